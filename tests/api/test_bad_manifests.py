"""Every manifest of the table is refused with its sentence."""

import pytest

from shoal.api.types import InvalidManifest, parse_document
from tests.api.bad_manifests import REFUSED, UNMET, Refused, Unmet


@pytest.mark.parametrize("bad", REFUSED, ids=lambda bad: bad.why)
def test_a_bad_manifest_is_refused(bad: Refused) -> None:
    """The first problem names the culprit's path, and the sentence says what to do."""
    with pytest.raises(InvalidManifest) as refused:
        parse_document(bad.document)
    problem = refused.value.problems[0]
    assert problem.path == bad.path
    assert problem.message.startswith(bad.says)


@pytest.mark.parametrize("bad", UNMET, ids=lambda bad: bad.why)
def test_what_is_well_formed_is_taken(bad: Unmet) -> None:
    """It is the operator's to say why it does not act on it."""
    parse_document(bad.document)


def test_there_are_many() -> None:
    """A hundred ways to be wrong, none twice."""
    names = [bad.why for bad in (*REFUSED, *UNMET)]
    assert len(names) == len(set(names)) >= 150
