"""Waiting for a service with an end: every failure says what the service last reported."""

from dataclasses import dataclass
from typing import Any

import click

from shoal.api.status import ConditionType
from shoal.cli.backend import Backend, Document, not_found
from shoal.cli.errors import CliError
from shoal.cli.view import condition_of

_NAMES = {kind.value.lower(): kind.value for kind in ConditionType}


@dataclass(frozen=True, slots=True)
class Goal:
    """What to wait for: a condition with a status, or, without one, the service's end."""

    condition: str | None
    status: str = "True"


class GoalType(click.ParamType[Goal]):
    """`condition=Ready`, `condition=Ready=False` or `delete`, as in `kubectl wait --for`."""

    name = "goal"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Goal:
        if isinstance(value, Goal):
            return value
        if value == "delete":
            return Goal(None)
        kind, _, rest = value.partition("=")
        name, _, status = rest.partition("=")
        if kind != "condition" or name.lower() not in _NAMES:
            self.fail(
                f"{value!r}: write condition=TYPE or delete; types: {', '.join(_NAMES.values())}",
                param,
                ctx,
            )
        return Goal(_NAMES[name.lower()], status.capitalize() or "True")


def wait_condition(
    backend: Backend, name: str, condition: str, status: str, timeout: float
) -> None:
    """Returns once the condition has the status, as seen of the present generation. Raises
    CliError at `timeout`."""
    _require(backend, name)

    def reached() -> bool:
        document = _find(backend, name)
        if document is None or not _observed(document):
            return False
        found = condition_of(document["status"], condition) or {}
        return bool(found.get("status") == status)

    if not backend.wait(reached, timeout):
        raise CliError(
            f"{name}: condition {condition}={status} not met after {timeout:g} s; "
            f"{_last_words(backend, name, condition)}"
        )


def wait_scaled(backend: Backend, name: str, replicas: int, timeout: float) -> None:
    """Returns once exactly `replicas` replicas exist and take requests."""
    _require(backend, name)

    def reached() -> bool:
        document = _find(backend, name)
        if document is None or not _observed(document):
            return False
        status = document["status"]
        counts = (status.get("replicas", 0), status.get("routableReplicas", 0))
        return counts == (replicas, replicas)

    if not backend.wait(reached, timeout):
        document = _find(backend, name) or {}
        routable = (document.get("status") or {}).get("routableReplicas", 0)
        raise CliError(
            f"{name}: {routable} of {replicas} replicas take requests "
            f"after {timeout:g} s; {_last_words(backend, name, ConditionType.READY.value)}"
        )


def wait_gone(backend: Backend, name: str, timeout: float) -> None:
    """Returns once neither the service nor anything of it is left."""
    if not backend.wait(lambda: backend.gone(name), timeout):
        raise CliError(f"{name}: still there after {timeout:g} s")


def _find(backend: Backend, name: str) -> Document | None:
    return next(iter(backend.services(name)), None)


def _observed(document: Document) -> bool:
    """Whether the status speaks of the spec as it is now."""
    status = document.get("status") or {}
    return bool(status.get("observedGeneration") == document["metadata"].get("generation"))


def _require(backend: Backend, name: str) -> None:
    """Raises CliError where waiting cannot end: no such service, or nothing that serves it."""
    if _find(backend, name) is None:
        raise CliError(not_found(backend, name))
    if why := backend.asleep():
        raise CliError(f"{name}: {why}")


def _last_words(backend: Backend, name: str, condition: str) -> str:
    document = _find(backend, name) or {}
    found = condition_of(document.get("status") or {}, condition)
    if found is None:
        return f"`shoal describe {name}` shows more"
    return f"{found.get('reason', '')}: {found.get('message', '')} (`shoal describe {name}`)"
