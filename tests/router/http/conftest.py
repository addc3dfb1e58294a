"""Fixtures of the HTTP tests. Test folders are no packages: `support` is handed over."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bench.scripted_engine import byte_tokenizer  # the folder above puts bench on the path
from shoal.router.text import TextModel


@pytest.fixture(scope="session")
def support() -> ModuleType:
    """The module `support`: a scripted core and clients."""
    name = "shoal_tests_router_http_support"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("support.py"))
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", name="byte_tokenizer")
def byte_tokenizer_json() -> bytes:
    """A tokenizer.json whose ids are bytes."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def text_model(support: ModuleType) -> TextModel:
    """The text of a model over byte tokens, 512 of them at most."""
    return TextModel.load(support.model(byte_tokenizer()))


@pytest.fixture
def core(support: ModuleType, text_model: TextModel) -> object:
    """A core that answers "Hello world"."""
    return support.FakeCore(text_model)
