"""How long an engine's step takes, as a linear model that `bench.step_model` fits to a real engine.

    seconds = base + per_sequence * decoding sequences
                   + per_prefill_token * prompt tokens in the step
                   + per_context_token * tokens in the KV cache of the decoding sequences

and `overhead` from a request's arrival to the engine and from its first token to the client.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

from shoal.cli.errors import UsageError


@dataclass(frozen=True, slots=True)
class StepModel:
    """All in seconds."""

    base: float
    per_sequence: float
    per_prefill_token: float
    per_context_token: float = 0.0
    overhead: float = 0.0

    def seconds(self, decoding: int, prefill_tokens: int, context: float) -> float:
        return (
            self.base
            + self.per_sequence * decoding
            + self.per_prefill_token * prefill_tokens
            + self.per_context_token * context
        )

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second in a long prefill."""
        return 1.0 / max(self.per_prefill_token, 1e-9)


DEFAULT: Final = "smollm2-cpu"
# bench/results/step_model.json, which bench.step_model wrote on two shared cores.
PRESETS: Final = {
    "smollm2-cpu": StepModel(
        base=0.04604,
        per_sequence=0.001965,
        per_prefill_token=0.001151,
        per_context_token=5.999e-07,
        overhead=0.002,
    ),
}


def parse_step_model(text: str) -> StepModel:
    """A preset's name or a JSON file with the fields of StepModel. UsageError for anything else."""
    if text in PRESETS:
        return PRESETS[text]
    try:
        document = json.loads(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(sorted(PRESETS))
        raise UsageError(
            f"--step-model {text}: no preset ({names}) and no file: {error.strerror}"
        ) from error
    except ValueError as error:
        raise UsageError(f"--step-model {text}: not JSON: {error}") from error
    known = {field.name for field in fields(StepModel)}
    values = document if isinstance(document, dict) else {}
    numbers = {key: value for key, value in values.items() if key in known}
    if not {"base", "per_sequence", "per_prefill_token"} <= numbers.keys() or not all(
        isinstance(value, int | float) and value >= 0 for value in numbers.values()
    ):
        raise UsageError(
            f"--step-model {text}: needs base, per_sequence and per_prefill_token in seconds, "
            f"each 0 or more; for example {json.dumps(asdict(PRESETS[DEFAULT]))}"
        )
    return StepModel(**{key: float(value) for key, value in numbers.items()})
