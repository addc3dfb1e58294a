"""How the work of one attention call is cut into programs: pure arithmetic on host-known bounds.

Two launches cover any batch. Sequences with few queries (decoding, verified drafts) read many
keys for few rows, so their keys are split over programs until the device is full and a merge
joins the parts (Dao et al., "Flash-Decoding for long-context inference", 2023). Sequences with
many queries fill tiles of rows that tensor cores like (Dao, "FlashAttention-2", 2023). In both
the query heads of one key head share a tile, so keys and values are read once for all of them
(Ainslie et al., "GQA", 2023).
"""

from dataclasses import dataclass

# Below this a split costs more in merging than it gains in parallelism.
_LEAST_KEYS = 256
MOST_SPLITS = 128
# Programs a multiprocessor should get: two run at a time, and two such rounds even out lengths.
_PROGRAMS_PER_UNIT = 4
# Rows up to which keys are split rather than queries tiled.
_FEW_ROWS = 64


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program attends: `queries * heads` rows, padded to `rows`, `keys` at a time."""

    queries: int  # consecutive queries of one sequence
    heads: int  # query heads of one key head
    rows: int  # a power of two, at least 16
    keys: int  # a power of two, at least 16
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        assert self.queries * self.heads <= self.rows, f"rows do not hold what {self} promises"


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of one call. At least one of `few` and `many` is there.

    With both, sequences of at most `few.queries` queries belong to `few`.
    """

    few: Tile | None
    many: Tile | None
    splits: int  # of the keys of a sequence with few queries, at most
    least_keys: int = _LEAST_KEYS  # of a split, but the last

    def workspace(self, sequences: int, heads: int, value_dim: int) -> int:
        """float32 elements that hold the parts to merge: a row and its log-sum-exp each."""
        if self.few is None or self.splits == 1:
            return 0
        return sequences * self.few.queries * heads * self.splits * (value_dim + 1)


@dataclass(frozen=True, slots=True)
class Load:
    """What is known of a call on the host, where lengths are not."""

    heads: int
    kv_heads: int
    sequences: int
    max_queries: int  # of one sequence
    max_length: int  # of one sequence
    window: int | None = None

    @property
    def group(self) -> int:
        """Query heads of one key head."""
        return self.heads // self.kv_heads


def plan_attention(
    load: Load, head_dim: int, *, bits: int, cache_bits: int, units: int, capability: int = 90
) -> Plan:
    """The launches for paged attention.

    bits, cache_bits: of an element of the queries and of the cache; units: multiprocessors;
    capability: of the device, 90 for 9.0.
    """
    few_heads = min(load.group, _FEW_ROWS)
    few_queries = _few_queries(load, few_heads)
    few = None
    if load.max_queries <= few_queries or load.sequences > 1:
        rows = _rows(few_queries * few_heads)
        few = _few(few_queries, few_heads, rows, head_dim, bits, cache_bits)
    many = None
    if load.max_queries > few_queries:
        many = _many(load.group, head_dim, bits, cache_bits, capability)
    return Plan(few, many, 1 if few is None else count_splits(load, few, units))


def plan_latent(load: Load, *, bits: int, units: int) -> Plan:
    """The launches for attention over latents, whose rows are several times as wide.

    More than 32 rows of output spill registers on 9.0, whatever the warps.
    """
    most = 16 if bits == 32 else 32
    few_heads = min(load.group, most)
    few_queries = min(_power_of_two(load.max_queries), most // few_heads)
    keys, warps = (16, 4) if bits == 32 else (32, 8 if few_heads * few_queries > 16 else 4)
    few = Tile(few_queries, few_heads, _rows(few_queries * few_heads), keys, warps, 3)
    many = None if load.max_queries <= few_queries else few
    if many is not None and load.sequences == 1:
        return Plan(None, many, 1)
    return Plan(few, many, count_splits(load, few, units))


def count_splits(load: Load, few: Tile, units: int) -> int:
    """So many that the device is full, and not so many that one has little to do."""
    span = load.max_length
    if load.window is not None:
        span = min(span, load.window + few.queries + few.keys)
    programs = load.sequences * load.kv_heads * -(-load.group // few.heads)
    wanted = -(-_PROGRAMS_PER_UNIT * units // max(1, programs))
    return max(1, min(wanted, -(-span // _LEAST_KEYS), MOST_SPLITS))


def _few_queries(load: Load, heads: int) -> int:
    """All of a sequence's queries where they fit, else what rides along in the smallest tile.

    Powers of two, since each number is a compilation of its own.
    """
    queries = _power_of_two(load.max_queries)
    return queries if queries * heads <= _FEW_ROWS else max(1, 16 // heads)


def _few(queries: int, heads: int, rows: int, head_dim: int, bits: int, cache_bits: int) -> Tile:
    """Three tiles of keys in flight, so that two or three programs share a multiprocessor."""
    if bits == 32:
        return Tile(queries, heads, rows, 32, 4, 2)
    # Widening 8 bits, and long rows of output, take registers of more threads.
    warps = 8 if cache_bits == 8 or rows * head_dim > 64 * 128 else 4
    return Tile(queries, heads, rows, 64 if head_dim <= 128 else 32, warps, 3)


def _many(group: int, head_dim: int, bits: int, cache_bits: int, capability: int) -> Tile:
    """As many rows as the accumulator's registers allow: 64 a thread of 8 warps.

    Keys that must be widened pass through registers too, and before 9.0 all factors of a product
    do: then a tile has fewer of them, or fewer rows.
    """
    if bits == 32:
        heads = min(group, 32)
        return Tile(32 // heads, heads, 32, 32 if head_dim <= 128 else 16, 4, 1)
    wide, plain = head_dim > 128, cache_bits > 8
    rows = 64 if wide or (capability < 90 and not plain) else 128
    heads = min(group, rows)
    keys = 64 if capability >= 90 and plain and not wide else 32
    stages = 3 if capability >= 90 or wide else 2
    return Tile(rows // heads, heads, rows, keys, 8, stages)


def _rows(needed: int) -> int:
    return max(16, _power_of_two(needed))


def _power_of_two(least: int) -> int:
    return 1 << (max(1, least) - 1).bit_length()
