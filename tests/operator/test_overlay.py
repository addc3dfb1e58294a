"""Strategic merge as kubectl does it, on the lists that pods have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.operator.overlay import OverlayError, merged, overlay_problems

BASE = {
    "metadata": {"labels": {"a": "1"}},
    "spec": {
        "containers": [
            {
                "name": "worker",
                "image": "w:1",
                "args": ["--x"],
                "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                "ports": [{"containerPort": 9000, "name": "grpc"}],
                "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
            }
        ],
        "volumes": [{"name": "cache", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}],
        "tolerations": [{"key": "a"}],
        "terminationGracePeriodSeconds": 75,
    },
}


def overlaid(spec):
    return merged(BASE, {"spec": spec})["spec"]


def worker(spec):
    return next(c for c in overlaid(spec)["containers"] if c["name"] == "worker")


def test_containers_merge_by_name():
    """A known one is changed in place, an unknown one is added."""
    containers = overlaid(
        {"containers": [{"name": "worker", "image": "w:2"}, {"name": "side", "image": "s:1"}]}
    )["containers"]
    assert [(c["name"], c["image"]) for c in containers] == [("worker", "w:2"), ("side", "s:1")]
    assert containers[0]["args"] == ["--x"]


def test_environment_and_mounts_merge_by_their_keys():
    """env by name, volumeMounts by mountPath, ports by containerPort."""
    changed = worker(
        {
            "containers": [
                {
                    "name": "worker",
                    "env": [{"name": "A", "value": "9"}, {"name": "C", "value": "3"}],
                    "volumeMounts": [{"mountPath": "/tmp", "name": "big"}],
                    "ports": [{"containerPort": 9000, "hostPort": 1}],
                }
            ]
        }
    )
    assert [(e["name"], e["value"]) for e in changed["env"]] == [("A", "9"), ("B", "2"), ("C", "3")]
    assert changed["volumeMounts"] == [{"name": "big", "mountPath": "/tmp"}]
    assert changed["ports"] == [{"containerPort": 9000, "name": "grpc", "hostPort": 1}]


def test_lists_without_a_key_are_replaced():
    """args and tolerations, as in Kubernetes' own types."""
    assert worker({"containers": [{"name": "worker", "args": ["--y"]}]})["args"] == ["--y"]
    assert overlaid({"tolerations": []})["tolerations"] == []


def test_null_and_directives_remove():
    """null takes a key away, $patch: delete an element, $patch: replace what is not given."""
    assert "terminationGracePeriodSeconds" not in overlaid({"terminationGracePeriodSeconds": None})
    env = [{"name": "A", "$patch": "delete"}, {"name": "none", "$patch": "delete"}]
    assert [e["name"] for e in worker({"containers": [{"name": "worker", "env": env}]})["env"]] == [
        "B"
    ]
    only = worker({"containers": [{"name": "worker", "$patch": "replace", "image": "w:3"}]})
    assert only == {"name": "worker", "image": "w:3"}
    volumes = overlaid({"volumes": [{"$patch": "replace"}, {"name": "x", "emptyDir": {}}]})
    assert [v["name"] for v in volumes["volumes"]] == ["x"]


def test_a_volume_has_one_source():
    """One that is given again takes the place of the other."""
    volumes = overlaid({"volumes": [{"name": "cache", "nfs": {"server": "s", "path": "/"}}]})
    assert volumes["volumes"][0] == {"name": "cache", "nfs": {"server": "s", "path": "/"}}


@pytest.mark.parametrize(
    "overlay, words",
    [
        ({"containers": [{"image": "x"}]}, "spec.containers[0]: needs name"),
        ({"containers": ["x"]}, "spec.containers[0]: must be an object"),
        ({"containers": {"name": "x"}}, "spec.containers: must be a list"),
        ({"terminationGracePeriodSeconds": {}}, "must be a plain value"),
        ({"$patch": "delete"}, "spec: $patch: delete is not for objects"),
        ({"$setElementOrder/containers": []}, "directive $setElementOrder/containers is not known"),
    ],
)
def test_what_does_not_fit_is_named(overlay, words):
    """Path and rule, so that the author finds the place."""
    with pytest.raises(OverlayError) as error:
        overlaid(overlay)
    assert words in str(error.value)


def test_what_shoal_sets_is_protected():
    """Names, owners, marks, and what makes a pod a member of its group."""
    overlay = {
        "metadata": {"name": "x", "labels": {"mine": "y"}, "annotations": {"mine": "y"}},
        "spec": {"hostname": "x", "nodeSelector": {"a": "b"}},
    }
    paths = [problem.split(" ")[0] for problem in overlay_problems(overlay)]
    assert paths == ["metadata.name", "spec.hostname"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda below: st.lists(below, max_size=2) | st.dictionaries(st.text(max_size=3), below),
    max_leaves=8,
)
keys = st.sampled_from(["spec", "containers", "env", "name", "volumes", "$patch", "image"])


@given(st.dictionaries(keys, json_values | st.dictionaries(keys, json_values)))
def test_any_overlay_merges_or_is_refused(overlay):
    """Whatever users write: no other error, and the base is not changed."""
    before = repr(BASE)
    try:
        result = merged(BASE, overlay)
    except OverlayError:
        pass
    else:
        again = merged(BASE, overlay)
        assert again == result
    assert repr(BASE) == before
