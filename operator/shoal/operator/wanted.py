"""Which revision a service is to serve: that of its spec, or an earlier one that it names. Pure.

`spec.rollout.rollbackTo` holds as long as it stands there, and where it says `insteadOf` only while
the spec describes that very revision. It is a wish like any other: nothing is remembered, and
taking it out leads forward again.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from shoal.api.types import InferenceService
from shoal.operator.platform import Platform
from shoal.operator.revision import Revision, revision_of


@dataclass(frozen=True, slots=True)
class Wanted:
    """The revision to bring about."""

    name: str
    own: str  # of the spec
    unknown: str | None = None  # an earlier revision that is asked for and not kept

    @property
    def back(self) -> bool:
        """Whether it is an earlier one than the spec's."""
        return self.name != self.own


def wanted_revision(
    service: InferenceService, revisions: Iterable[Revision], platform: Platform
) -> Wanted:
    """`revisions` are those whose specs are kept: only they can be served again."""
    own = revision_of(service.spec, platform.pods)
    back = service.spec.rollout.rollback_to
    if back is None or back.revision == own:
        return Wanted(own, own)
    if back.instead_of is not None and back.instead_of != own:
        return Wanted(own, own)
    if any(revision.name == back.revision for revision in revisions):
        return Wanted(back.revision, own)
    return Wanted(own, own, unknown=back.revision)


def unknown_sentence(wanted: Wanted, revisions: Iterable[Revision]) -> str:
    """Why the earlier revision cannot be served, and which could."""
    kept = ", ".join(sorted(revision.name for revision in revisions)) or "none"
    return (
        f"spec.rollout.rollbackTo.revision={wanted.unknown} is not kept any more; kept are: {kept}"
    )
