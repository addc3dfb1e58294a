"""Shared builders. Test folders are no packages, so what they share is handed over as fixtures."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    full_name = f"shoal_tests_worker_{name}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            full_name, Path(__file__).with_name(f"{name}.py")
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full_name] = module
        spec.loader.exec_module(module)
    return sys.modules[full_name]


@pytest.fixture(scope="session")
def kv() -> ModuleType:
    """The module `kv_model`: an executor that checks what every row reads."""
    return _load("kv_model")


@pytest.fixture(scope="session")
def models() -> ModuleType:
    """The module `model_zoo`: tiny random models, the real one, and transformers as oracle."""
    return _load("model_zoo")


@pytest.fixture(scope="session")
def groups() -> ModuleType:
    """The module `rank_groups`: executors whose ranks are threads of this process."""
    return _load("rank_groups")


@pytest.fixture(scope="session")
def families() -> ModuleType:
    """The module `test_families`: a tiny random model of every architecture."""
    return _load("test_families")
