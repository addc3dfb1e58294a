"""The canaries of all services, as one process remembers them.

    observed, routers' counts ─> Trials.look() ─> TrialView, which the planner plans for

What is remembered may be lost at any time: the status holds what a restart needs (`trial`).
"""

from shoal.api.types import InferenceService
from shoal.operator.analysis import Opinion
from shoal.operator.observe import Observed, TrialView
from shoal.operator.plan import bounds_of, refusals_of
from shoal.operator.platform import Platform
from shoal.operator.trial import TrialState, attend
from shoal.operator.wanted import wanted_revision
from shoal.operator.webhooks import Webhooks

LOOK_SECONDS = 1.0  # between two looks at a service, so that a step ends when its time is over


class Trials:
    """The memory of all canaries, in one process."""

    def __init__(self, platform: Platform, webhooks: Webhooks) -> None:
        self._platform = platform
        self._webhooks = webhooks
        self._states: dict[str, TrialState] = {}
        self._weights: dict[str, int] = {}

    def look(
        self, key: str, service: InferenceService, observed: Observed, now: float
    ) -> TrialView | None:
        """What to plan for; None where no revision is on trial. `now` in Unix seconds.

        May be called at any time: requests are judged every `analysis.intervalSeconds`.
        """
        revision = self._on_trial(service, observed)
        if revision is None:
            self.forget(key)
            return None
        answers = {view.name: view.load for view in observed.routers if view.load is not None}
        bounds = bounds_of(service, observed)
        state = self._states.get(key)
        opinion = self._opinion(key, service, observed, revision)
        found = attend(service, observed, answers, revision, bounds, state, now, opinion)
        if found.state is not None:
            self._states[key] = found.state
        if found.course.weights is None:
            self._weights.pop(key, None)
            return None
        self._weights[key] = found.course.weights[revision]
        return TrialView(found.course, found.status, found.healthy, found.message)

    def weight(self, key: str) -> int | None:
        """Percent of requests at the service's canary; None where there is none."""
        return self._weights.get(key)

    def forget(self, key: str) -> None:
        """Nothing of the service is on trial."""
        self._states.pop(key, None)
        self._weights.pop(key, None)
        self._webhooks.forget(key)

    def clear(self) -> None:
        """Somebody else decides from here on."""
        self._states.clear()
        self._weights.clear()
        self._webhooks.clear()

    def _opinion(
        self, key: str, service: InferenceService, observed: Observed, revision: str
    ) -> Opinion | None:
        spec, shown = service.spec.rollout.canary, observed.status.canary
        if spec is None or spec.analysis is None or spec.analysis.webhook is None:
            return None
        if shown is None or shown.revision != revision or shown.aborted_time is not None:
            return None  # the first look of a step has nothing to ask about yet
        question = {
            "service": self._platform.service_key(service),
            "revision": revision,
            "stable": shown.stable,
            "step": shown.step,
            "weight": shown.weight,
        }
        return self._webhooks.opinion(key, spec.analysis, question)

    def _on_trial(self, service: InferenceService, observed: Observed) -> str | None:
        """The revision that is to be tried, or goes on being tried."""
        active, shown = observed.status.active_revision, observed.status.canary
        if service.spec.rollout.canary is None or active is None:
            return None
        if refusals_of(service, observed, self._platform):
            return None
        wanted = wanted_revision(service, observed.revisions, self._platform)
        if wanted.back or wanted.name == active:
            return None
        if service.spec.paused and (shown is None or shown.revision != wanted.name):
            # Nothing new begins; what is on trial stays where it is.
            known = shown is not None and shown.stable == active
            return shown.revision if shown is not None and known else None
        return wanted.name
