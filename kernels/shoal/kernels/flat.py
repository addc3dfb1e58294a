"""The tokens of one step, as every backend takes them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """One step's tokens, sequence after sequence, and where each sequence stands."""

    ids: Ints  # [tokens]
    positions: Ints  # [tokens] within its sequence
    owner: Ints  # [tokens] index of its sequence
    start: Ints  # [sequences] tokens that are cached already
    count: Ints  # [sequences] tokens of this step, at least 1
    tables: Ints  # [sequences, blocks] block tables

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, ids: Ints, start: Ints, count: Ints, tables: Ints) -> "FlatBatch":
        """`ids`: the tokens of all sequences, one after the other."""
        owner = np.repeat(np.arange(len(count)), count)
        positions = start[owner] + np.arange(len(owner)) - (np.cumsum(count) - count)[owner]
        return cls(ids, positions, owner, start, count, tables)
