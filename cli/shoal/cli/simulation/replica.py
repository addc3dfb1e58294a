"""One replica on a virtual clock: the engine's scheduling, with a step's time from the model.

As in the engine, running sequences decode first and prompts share what is left of the token budget
in order of arrival; a sequence is admitted while there is a slot and room in the KV cache (here
for all its tokens at once, so nothing is ever preempted). Steps in which nothing begins or ends
are the same, so a run of them is one event: an arrival cuts the run at the end of its present step.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil

from shoal.cli.simulation.step_model import StepModel
from shoal.router.pick import Candidate


class Request:
    """A request on its way. Times in seconds of the virtual clock; 0: not yet."""

    __slots__ = (
        "arrived",
        "first",
        "generated",
        "output_tokens",
        "prompt_tokens",
        "remaining",
    )

    def __init__(self, arrived: float, prompt_tokens: int, output_tokens: int) -> None:
        self.arrived = arrived
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens  # still to come when a replica takes it
        self.generated = output_tokens  # in all
        self.remaining = prompt_tokens  # of the prompt, to be computed
        self.first = 0.0


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """What all replicas of a service have in common."""

    model: StepModel
    slots: int
    budget: int  # tokens a step
    kv_tokens: int  # that the KV cache holds
    revision: str = "simulated"


class Replica:
    """Owned by the simulation, which calls `fire` at `wakes` (None: nothing to do)."""

    __slots__ = (
        "_began",
        "_candidate",
        "_context",
        "_decoding",
        "_duration",
        "_kv_used",
        "_order",
        "_prefilling",
        "_prefilling_tokens",
        "_settings",
        "_step",
        "_steps",
        "_waiting",
        "completing",
        "created",
        "drained_at",
        "in_flight",
        "name",
        "place",
        "ready",
        "ready_at",
        "wakes",
    )

    def __init__(self, name: str, settings: ReplicaSettings, created: float, ready: float) -> None:
        self.name = name
        self.created = created
        self.ready_at = ready
        self.ready = False
        self.drained_at: float | None = None  # when its drain began
        self.in_flight = 0
        self.place = -1  # in the simulation's list of replicas with room; -1: not there
        self.wakes: float | None = None
        self._settings = settings
        self._waiting: deque[Request] = deque()
        self._prefilling: deque[Request] = deque()
        self._prefilling_tokens = 0
        self._decoding: list[tuple[int, int, Request]] = []  # last step, order, request
        self._order = 0
        self._step = 0  # steps done
        self._began = 0.0  # the present step, or run of steps
        self._steps = 0  # in the present run
        self._duration = 0.0  # of one step of it
        self.completing: list[Request] = []  # prompts that the present step completes
        self._context = 0  # tokens of decoding sequences
        self._kv_used = 0  # tokens promised
        self._candidate: Candidate | None = None

    @property
    def kv(self) -> float:
        """Share of the KV cache in use."""
        return self._kv_used / self._settings.kv_tokens

    def candidate(self) -> Candidate:
        """What the router's `pick` sees."""
        if self._candidate is None:
            settings = self._settings
            tokens = self._prefilling_tokens + sum(r.prompt_tokens for r in self._waiting)
            self._candidate = Candidate(
                self.name,
                settings.revision,
                self.in_flight,
                settings.slots,
                len(self._waiting),
                tokens,
                settings.model.prefill_rate,
                self._duration,
            )
        return self._candidate

    def take(self, request: Request, now: float) -> None:
        """A request arrives from the router."""
        self.in_flight += 1
        self._candidate = None
        self._waiting.append(request)
        if self.wakes is None:
            self._begin(now)
        elif self._steps > 1:
            done = max(1, ceil((now - self._began) / self._duration))
            if done < self._steps:
                self._steps = done
                self.wakes = self._began + done * self._duration

    def fire(self, now: float) -> Sequence[Request]:
        """The present step or run of steps is over; the requests that end with it."""
        self._step += self._steps
        self._context += len(self._decoding) * self._steps
        ended = []
        decoding, step = self._decoding, self._step
        while decoding and decoding[0][0] <= step:
            ended.append(heappop(decoding)[2])
        for request in ended:
            self._context -= request.prompt_tokens + request.output_tokens
        for request in self.completing:
            request.first = request.first or now
            if request.output_tokens == 1:
                ended.append(request)
                continue
            self._order += 1
            heappush(decoding, (step + request.output_tokens - 1, self._order, request))
            self._context += request.prompt_tokens + 1
        for request in ended:
            self._kv_used -= request.prompt_tokens + request.output_tokens
        self.in_flight -= len(ended)
        self._candidate = None
        self._begin(now)
        return ended

    def stop(self) -> list[Request]:
        """Ends at once; the requests that it had, to be continued from their last token."""
        for last, _, request in self._decoding:
            generated = request.output_tokens - max(1, last - self._step)
            request.prompt_tokens += generated
            request.output_tokens -= generated
        held = [
            *(entry[2] for entry in self._decoding),
            *self.completing,
            *self._prefilling,
            *self._waiting,
        ]
        for request in held:
            request.remaining = request.prompt_tokens
        self.in_flight = 0
        self.wakes = None
        return held

    def _begin(self, now: float) -> None:
        """The next step, or run of equal steps."""
        settings = self._settings
        if self._waiting:
            self._admit()
        decoding = len(self._decoding)
        self._began = now
        self.completing = []
        if self._prefilling:
            room = max(1, settings.budget - decoding)
            tokens = self._prefill(room)
            self._steps = 1
            self._duration = settings.model.seconds(decoding, tokens, self._context)
            self.wakes = now + self._duration
        elif decoding:
            steps = self._decoding[0][0] - self._step
            # The context grows by one token a sequence and step: take its middle.
            context = self._context + decoding * steps / 2
            self._steps = steps
            self._duration = settings.model.seconds(decoding, 0, context)
            self.wakes = now + steps * self._duration
        else:
            self.wakes = None

    def _admit(self) -> None:
        settings = self._settings
        running = len(self._decoding) + len(self._prefilling)
        while self._waiting and running < settings.slots:
            request = self._waiting[0]
            tokens = request.prompt_tokens + request.output_tokens
            if self._kv_used and self._kv_used + tokens > settings.kv_tokens:
                return
            self._waiting.popleft()
            self._prefilling.append(request)
            self._prefilling_tokens += request.remaining
            self._kv_used += tokens
            running += 1

    def _prefill(self, room: int) -> int:
        """Prompt tokens of the next step; fills `completing`."""
        tokens = 0
        while self._prefilling and tokens < room:
            request = self._prefilling[0]
            share = min(request.remaining, room - tokens)
            tokens += share
            request.remaining -= share
            if not request.remaining:
                self.completing.append(self._prefilling.popleft())
        self._prefilling_tokens -= tokens
        return tokens
