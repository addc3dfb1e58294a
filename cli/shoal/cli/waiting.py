"""Waiting for a service with an end: every failure says what the service last reported."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from shoal.api.status import ConditionType
from shoal.cli.errors import CliError
from shoal.cli.view import condition_of

if TYPE_CHECKING:
    from shoal.operator.local.store import Store

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


def wait_condition(store: "Store", name: str, condition: str, status: str, timeout: float) -> None:
    """Returns once the condition has the status. Raises CliError at `timeout`."""
    _require(store, name)
    if not store.wait_condition(name, condition, timeout, status=status):
        raise CliError(
            f"{name}: condition {condition}={status} not met after {timeout:g} s; "
            f"{_last_words(store, name, condition)}"
        )


def wait_scaled(store: "Store", name: str, replicas: int, timeout: float) -> None:
    """Returns once exactly `replicas` replicas exist and take requests."""
    _require(store, name)

    def reached() -> bool:
        service, status = store.get(name), store.status(name) or {}
        return (
            service is not None
            and status.get("observedGeneration") == service.metadata.generation
            and status.get("replicas") == replicas
            and status.get("routableReplicas") == replicas
        )

    if not store.wait(reached, timeout):
        status = store.status(name) or {}
        raise CliError(
            f"{name}: {status.get('routableReplicas', 0)} of {replicas} replicas take requests "
            f"after {timeout:g} s; {_last_words(store, name, ConditionType.READY.value)}"
        )


def wait_gone(store: "Store", name: str, timeout: float) -> None:
    """Returns once neither the service nor anything of it is left."""
    if not store.wait(lambda: store.get(name) is None, timeout) or not store.wait_gone(
        name, timeout
    ):
        raise CliError(f"{name}: still there after {timeout:g} s")


def _require(store: "Store", name: str) -> None:
    """Raises CliError where waiting cannot end: no such service, or nothing that serves it."""
    from shoal.operator.local.store import UnknownService

    if store.get(name) is None:
        raise CliError(str(UnknownService(name, [s.metadata.name for s in store.services()])))
    if store.supervisor() is None:
        raise CliError(f"{name}: nothing serves from {store.root}; start it with: shoal up")


def _last_words(store: "Store", name: str, condition: str) -> str:
    found = condition_of(store.status(name) or {}, condition)
    if found is None:
        return f"`shoal describe {name}` shows more"
    return f"{found.get('reason', '')}: {found.get('message', '')} (`shoal describe {name}`)"
