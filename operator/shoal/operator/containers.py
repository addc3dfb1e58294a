"""Why a container keeps its pod from being ready: a reason and a sentence.

Reasons are Kubernetes' own where it has one. Sentences name the container, what happened, and what
to change: a field of the InferenceService where one helps.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from shoal.operator.podspec import FETCH_CONTAINER, WORKER_CONTAINER

_MANY_RESTARTS: Final = 2
_LONGEST_WORDS: Final = 500  # characters of somebody else's words in a message
_PERCENT_STEP: Final = 5

_BEING_CREATED: Final = "is being created"
_NO_IMAGE: Final = (
    "image {image} cannot be had: {said}; check its name, and imagePullSecrets in the pod defaults"
)
_OVERLAY: Final = "{said}; make what it names, or change spec.podOverlay"
# What a container that waits says of itself -> what that means. Others say it in their own words.
WAITING: Final[Mapping[str, str]] = {
    "PodInitializing": _BEING_CREATED,
    "ContainerCreating": _BEING_CREATED,
    "ErrImagePull": _NO_IMAGE,
    "ImagePullBackOff": _NO_IMAGE,
    "InvalidImageName": _NO_IMAGE,
    "ErrImageNeverPull": _NO_IMAGE,
    "ImageInspectError": _NO_IMAGE,
    "RegistryUnavailable": _NO_IMAGE,
    "CreateContainerConfigError": _OVERLAY,
    "CreateContainerError": _OVERLAY,
    "RunContainerError": _OVERLAY,
    "PostStartHookError": _OVERLAY,
}
CREATING: Final = frozenset(it for it, text in WAITING.items() if text == _BEING_CREATED)


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a pod is not ready."""

    reason: str  # one CamelCase word
    message: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How a container's process ended."""

    code: int | None
    signal: int | None
    reason: str
    words: str  # its last


@dataclass(frozen=True, slots=True)
class Container:
    """A container of a live pod: what was asked for, and how it is."""

    name: str
    image: str
    memory: str | None  # its limit
    initial: bool  # the others wait for its end; a sidecar is none of these
    waiting: str | None  # the reason
    said: str  # by who starts it
    ended: Ended | None
    before: Ended | None  # the last time
    restarts: int
    started: bool
    ready: bool

    def trouble(self, progress: str) -> Trouble | None:
        """Why the pod is not ready; None: this container is not the cause. `progress`: the last
        line that the container which downloads has logged."""
        if self.ended is not None:
            well = self.initial and self.ended.code == 0
            return None if well else self._ended(self.ended, self.restarts)
        if self.waiting is not None:
            return self._waits(self.waiting)
        if self.initial:
            return self._initializes(progress)
        if self.ready:
            return None
        if self.started:
            return self._say("Unhealthy", "runs but its readiness probe fails")
        if self.before is not None:
            return self._ended(self.before, self.restarts)
        loads = self.name == WORKER_CONTAINER
        return self._say("Starting", "loads the model" if loads else "is not ready yet")

    def _waits(self, reason: str) -> Trouble | None:
        if reason == "CrashLoopBackOff" and self.before is not None:
            return self._ended(self.before, _MANY_RESTARTS)
        if reason in CREATING:
            return None if self.initial else self._say(reason, _BEING_CREATED)
        text = WAITING.get(reason, "{said}").format(image=self.image, said=self.said or reason)
        return Trouble(word(reason), f"container {self.name}: {text}")

    def _initializes(self, progress: str) -> Trouble:
        share = percent(progress)
        if self.before is not None and self.restarts >= _MANY_RESTARTS and share is None:
            return self._ended(self.before, self.restarts)
        if self.name != FETCH_CONTAINER:
            return self._say("Initializing", "runs")
        so_far = f", {share} % so far" if share is not None else ""
        return self._say("FetchingModel", f"downloads the model{so_far}")

    def _ended(self, how: Ended, restarts: int) -> Trouble:
        """One that ends again and again has that reason also while it starts anew, and the same
        words: they would come and go otherwise."""
        if how.reason == "OOMKilled":
            cause = f"its memory limit of {self.memory}" if self.memory else "its node's memory"
            return self._say(
                "OOMKilled",
                f"was killed for using more than {cause}: raise spec.resources.memory, or lower "
                "spec.engine.maxModelLen or maxNumSeqs; it is started again",
            )
        ended = f"by signal {how.signal}" if how.signal else f"with exit code {how.code}"
        text = f"ended {ended}{f': {how.words}' if how.words else ''}; it is started again"
        if self.name == FETCH_CONTAINER:
            return self._say("FetchFailed", text)
        return self._say("CrashLoopBackOff" if restarts >= _MANY_RESTARTS else "Restarted", text)

    def _say(self, reason: str, text: str) -> Trouble:
        return Trouble(reason, f"container {self.name} {text}")


def containers(pod: Mapping[str, Any]) -> Iterator[Container]:
    """Every container that has a status, in the order in which they run."""
    spec, status = pod.get("spec", {}), pod.get("status", {})
    for key, statuses in (
        ("initContainers", "initContainerStatuses"),
        ("containers", "containerStatuses"),
    ):
        asked = {one["name"]: one for one in spec.get(key) or ()}
        for found in status.get(statuses) or ():
            wanted = asked.get(found["name"], {})
            sidecar = wanted.get("restartPolicy") == "Always"
            yield _container(wanted, found, initial=key == "initContainers" and not sidecar)


def _container(wanted: Mapping[str, Any], found: Mapping[str, Any], *, initial: bool) -> Container:
    state, waiting = found.get("state", {}), found.get("state", {}).get("waiting")
    return Container(
        name=found["name"],
        image=wanted.get("image", ""),
        memory=wanted.get("resources", {}).get("limits", {}).get("memory"),
        initial=initial,
        waiting=None if waiting is None else waiting.get("reason") or "Waiting",
        said=words(waiting.get("message")) if waiting is not None else "",
        ended=_end(state.get("terminated")),
        before=_end(found.get("lastState", {}).get("terminated")),
        restarts=found.get("restartCount", 0),
        started=bool(found.get("started")),
        ready=bool(found.get("ready")),
    )


def _end(terminated: Mapping[str, Any] | None) -> Ended | None:
    if terminated is None:
        return None
    return Ended(
        code=terminated.get("exitCode"),
        signal=terminated.get("signal"),
        reason=terminated.get("reason", ""),
        words=words(terminated.get("message")),
    )


def percent(progress: str) -> int | None:
    """In steps, so that a download does not mean a write of the status every second."""
    found = re.search(r"(\d{1,3})(?:\.\d+)?\s?%", progress)
    return min(100, int(found[1])) // _PERCENT_STEP * _PERCENT_STEP if found else None


def word(reason: str) -> str:
    """A reason that a condition may have: one word."""
    return re.sub(r"[^A-Za-z0-9_]", "", reason) or "Unknown"


def words(text: str | None) -> str:
    """Somebody else's words on one line, not too long, without a full stop."""
    flat = " ".join((text or "").split()).rstrip(".")
    return flat if len(flat) <= _LONGEST_WORDS else f"…{flat[-_LONGEST_WORDS:]}"
