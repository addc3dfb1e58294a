"""What counts as already so: defaults and spellings of the API server are no reason to write."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.operator.kube.subset import is_subset

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(["x", "y"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abn"), inner),
    max_leaves=12,
)


@given(JSON)
def test_everything_is_a_subset_of_itself(value: Any) -> None:
    """An object that is as wanted is never written."""
    assert is_subset(value, value)


@given(st.dictionaries(st.sampled_from("ab"), JSON), st.dictionaries(st.sampled_from("cd"), JSON))
def test_what_others_added_does_not_matter(wanted: dict[str, Any], more: dict[str, Any]) -> None:
    """Defaults, status and fields of other managers are theirs."""
    assert is_subset(wanted, {**more, **wanted})


@pytest.mark.parametrize(
    ("desired", "live"),
    [
        ({"limits": {"cpu": "1000m"}}, {"limits": {"cpu": "1"}}),
        ({"requests": {"memory": "1024Mi"}}, {"requests": {"memory": "1Gi"}}),
        ({"labels": {}}, {}),
        ({"ports": []}, {}),
        (
            {"ports": [{"name": "grpc", "port": 1}]},
            {"ports": [{"name": "grpc", "port": 1, "x": 2}]},
        ),
        (
            {"ports": [{"name": "b"}, {"name": "a"}]},
            {"ports": [{"name": "a"}, {"name": "b"}]},
        ),
    ],
)
def test_the_same_in_another_spelling(desired: Any, live: Any) -> None:
    """Quantities are compared by value, empty is as absent, named things by their names."""
    assert is_subset(desired, live)


@pytest.mark.parametrize(
    ("desired", "live"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {}),
        ({"a": {"b": 1}}, {"a": {}}),
        ({"a": True}, {"a": 1}),
        ({"a": ["x"]}, {"a": ["x", "y"]}),
        ({"a": ["x", "y"]}, {"a": ["y", "x"]}),
        ({"limits": {"cpu": "1"}}, {"limits": {"cpu": "2"}}),
        ({"name": "1000m"}, {"name": "1"}),
        ({"ports": [{"name": "a", "port": 1}]}, {"ports": [{"name": "a", "port": 2}]}),
        ({"ports": [{"name": "a"}]}, {"ports": [{"name": "b"}]}),
    ],
)
def test_what_differs(desired: Any, live: Any) -> None:
    """A value that is another, or is not there, has to be written."""
    assert not is_subset(desired, live)


def test_items_of_one_type_are_compared_in_order() -> None:
    """A key that does not tell them apart is none: each metric of an autoscaler is External."""
    both = [{"type": "External", "target": 1}, {"type": "External", "target": 2}]
    assert is_subset({"metrics": both}, {"metrics": both})
    assert not is_subset({"metrics": both}, {"metrics": both[::-1]})
    assert not is_subset({"metrics": both[:1] * 2}, {"metrics": both})
    assert not is_subset({"metrics": both}, {"metrics": [*both, both[0]]})
