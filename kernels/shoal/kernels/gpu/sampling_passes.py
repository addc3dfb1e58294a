"""The kernels behind `shoal.kernels.gpu.sampling`, four launches a step.

process  adds biases, forbids, penalises, divides by the temperature; finds each tile's largest
survey   counts, and sums the probabilities of, what lies above some distances from the largest
gather   lists, in the order of ids, what lies above the first distance that is far enough
finish   one program a row: the exact thresholds, and the draw, from the list alone

No vocabulary is sorted. A threshold of top-k, top-p or typical-p is the smallest value with less
than the wanted weight above it; `_threshold` finds it by bisection that steps on values that
occur, which is radix selection's idea (Alabi et al., "Fast k-selection algorithms for graphics
processing units", 2012) with sums in place of histograms. Where a list would be too long, `finish`
reads the whole row instead.

Probabilities are integers, 2^40 for the likeliest token: their sums do not depend on the order,
so neither does a draw on how the work is divided or on what else is in the batch.
"""

import triton
import triton.language as tl

EDGES = 16  # distances of the survey
LOWEST = tl.constexpr(-(1 << 63))  # below every `ranked` value
_FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
_NAN = tl.constexpr(0x7FFFFFFF)  # what `ordered` says of it
# From here to there `ranked` values are of finite logits.
_FINITE = tl.constexpr(-0x7F800000 << 32)
_INFINITE = tl.constexpr(0x7F800000 << 32)
_ONE = tl.constexpr(1099511627776.0)  # the weight of the likeliest token
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def ordered(x):
    """float32 -> int32 in the same order, both zeros alike, NaN above all."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, _NAN, bits ^ ((bits >> 31) & _NAN))


@triton.jit
def value_of(key):
    """int32 of `ordered` -> float32."""
    return (key ^ ((key >> 31) & _NAN)).to(tl.float32, bitcast=True)


@triton.jit
def ranked(x, ids):
    """int64 whose maximum is the largest x, and the smallest id of several such."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(x != x, _NAN, bits ^ ((bits >> 31) & _NAN))
    return (key.to(tl.int64) << 32) | (ids ^ _NAN).to(tl.int64)


@triton.jit
def ranked_value(rank):
    """The float32 of a `ranked` maximum."""
    key = (rank >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & _NAN)).to(tl.float32, bitcast=True)


@triton.jit
def largest(partials, row, tiles, TILES: tl.constexpr):
    """The largest of a row's [rows, tiles] `ranked` partial results."""
    at = tl.arange(0, TILES)
    return tl.max(tl.load(partials + row * tiles + at, mask=at < tiles, other=LOWEST), 0)


@triton.jit
def _weight(x, most):
    """The probability of a logit relative to the largest, as an integer."""
    return (tl.exp(x - most) * _ONE).to(tl.int64)


@triton.jit
def _edge(most, floor, index, EDGES: tl.constexpr):
    """Distances grow as those of likely tokens do: finely at first. The last edge is the floor."""
    distance = index.to(tl.float32) * (index.to(tl.float32) + 4.0) * 0.0625
    return tl.where(index == EDGES - 1, floor, tl.maximum(most - distance, floor))


@triton.jit
def _floor(most, min_p):
    """The smallest logit that min_p leaves; -inf is never left."""
    low = tl.where(min_p > 0.0, most + tl.log(tl.where(min_p > 0.0, min_p, 1.0)), -_FLOAT_MAX)
    return tl.minimum(tl.maximum(low, -_FLOAT_MAX), most)


@triton.jit
def _drawable(raw, best):
    """Whether a row's largest logits are finite, as they came and with the penalties."""
    return (raw >= _FINITE) & (raw < _INFINITE) & (best >= _FINITE) & (best < _INFINITE)


@triton.jit
def process_kernel(
    logits_ptr,  # [rows, vocab]
    work_ptr,  # [rows, vocab] float32, written for rows that are not greedy
    raw_ptr,  # [rows, tiles] int64, the largest logit as it came
    best_ptr,  # [rows, tiles] int64, the largest behind the penalties
    slots_ptr,  # [rows]
    positions_ptr,  # [rows]
    greedy_ptr,  # from here on by slot
    temperature_ptr,
    bias_starts,  # none without biases
    bias_counts,
    bias_ids,
    bias_amounts,
    forbidden_starts,  # none where nothing is forbidden
    forbidden_counts,
    forbidden_ids,
    forbidden_until,
    repetition_ptr,  # none without penalties
    frequency_ptr,
    presence_ptr,
    history_ptr,  # [slots, positions]
    prompt_lengths_ptr,
    vocab,
    logits_stride,
    history_stride,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,  # tokens of the tile that are processed at once
    CHUNK: tl.constexpr,  # tokens of the history that are counted at once
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    partial = row * tl.num_programs(1) + tile
    length = tl.load(positions_ptr + row)
    raw = tl.full([], LOWEST, tl.int64)
    best = tl.full([], LOWEST, tl.int64)
    for part in range(BLOCK // PART):
        start = tile * BLOCK + part * PART
        ids = start + tl.arange(0, PART)
        inside = ids < vocab
        x = tl.load(logits_ptr + row * logits_stride + ids, mask=inside, other=float("-inf"))
        x = x.to(tl.float32)
        raw = tl.maximum(raw, tl.max(ranked(x, ids), 0))
        if bias_starts is not None:
            first = tl.load(bias_starts + slot)
            for entry in range(first, first + tl.load(bias_counts + slot)):
                token = tl.load(bias_ids + entry)
                if (token >= start) & (token < start + PART):
                    x = tl.where(ids == token, x + tl.load(bias_amounts + entry), x)
        if forbidden_starts is not None:
            count = tl.load(forbidden_counts + slot)
            count = tl.where(length < tl.load(forbidden_until + slot), count, 0)
            first = tl.load(forbidden_starts + slot)
            for entry in range(first, first + count):
                x = tl.where(ids == tl.load(forbidden_ids + entry), float("-inf"), x)
        if repetition_ptr is not None:
            repetition = tl.load(repetition_ptr + slot)
            frequency = tl.load(frequency_ptr + slot)
            presence = tl.load(presence_ptr + slot)
            if (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0):
                prompt_length = tl.load(prompt_lengths_ptr + slot)
                prompt = tl.zeros([PART], tl.int32)
                output = tl.zeros([PART], tl.int32)
                known = history_ptr + slot * history_stride
                for begin in range(0, length, CHUNK):
                    at = begin + tl.arange(0, CHUNK)
                    token = tl.load(known + at, mask=at < length, other=-1).to(tl.int32) - start
                    here = (token >= 0) & (token < PART) & (at < length)
                    token = tl.where(here, token, 0)
                    prompt += tl.histogram(token, PART, mask=here & (at < prompt_length))
                    output += tl.histogram(token, PART, mask=here & (at >= prompt_length))
                shrunk = tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition)
                x = tl.where((prompt > 0) | (output > 0), shrunk, x)
                x -= output.to(tl.float32) * frequency
                x -= tl.where(output > 0, presence, 0.0)
        if bias_starts is None and forbidden_starts is None and repetition_ptr is None:
            best = raw
        else:
            best = tl.maximum(best, tl.max(ranked(x, ids), 0))
        if tl.load(greedy_ptr + slot) == 0:
            scaled = tl.div_rn(x, tl.load(temperature_ptr + slot))
            tl.store(work_ptr + row * vocab + ids, scaled, mask=inside)
    tl.store(raw_ptr + partial, raw)
    tl.store(best_ptr + partial, best)


@triton.jit
def survey_kernel(
    work_ptr,  # [rows, vocab]
    raw_ptr,  # [rows, tiles]
    best_ptr,
    counts_ptr,  # [rows, tiles, EDGES] int32: tokens of the tile at or above each edge
    masses_ptr,  # [rows, tiles, EDGES] int64: the sums of their weights
    slots_ptr,
    greedy_ptr,
    temperature_ptr,
    min_p_ptr,
    vocab,
    BLOCK: tl.constexpr,
    EDGES: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    tiles = tl.num_programs(1)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    if tl.load(greedy_ptr + slot) != 0:
        return
    best = largest(best_ptr, row, tiles, TILES)
    if not _drawable(largest(raw_ptr, row, tiles, TILES), best):
        return
    most = tl.div_rn(ranked_value(best), tl.load(temperature_ptr + slot))
    floor = _floor(most, tl.load(min_p_ptr + slot))
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(work_ptr + row * vocab + ids, mask=ids < vocab, other=float("-inf"))
    weights = _weight(x, most)
    top = tl.max(x, 0)
    edges = tl.arange(0, EDGES)
    counts = tl.zeros([EDGES], tl.int32)
    masses = tl.zeros([EDGES], tl.int64)
    for index in range(EDGES):
        edge = tl.maximum(most - index * (index + 4) * 0.0625, floor)
        edge = tl.where(index == EDGES - 1, floor, edge)
        if edge <= top:
            above = x >= edge
            counts = tl.where(edges == index, tl.sum(above.to(tl.int32), 0), counts)
            masses = tl.where(edges == index, tl.sum(tl.where(above, weights, 0), 0), masses)
    partial = (row * tiles + tile) * EDGES + edges
    tl.store(counts_ptr + partial, counts)
    tl.store(masses_ptr + partial, masses)


@triton.jit
def _surveyed(partials, row, tiles, below, EDGES: tl.constexpr, TILES: tl.constexpr):
    """The sums [EDGES] of a row's [rows, tiles, EDGES] partial results before the tile `below`."""
    at = tl.arange(0, TILES)[:, None]
    places = (row * tiles + at) * EDGES + tl.arange(0, EDGES)[None, :]
    return tl.sum(tl.load(partials + places, mask=at < below, other=0), 0)


@triton.jit
def _enough(counts, masses, top_k, top_p, EDGES: tl.constexpr):
    """The first edge that everything top-k keeps, or else everything top-p keeps, is above."""
    edges = tl.arange(0, EDGES)
    wanted = top_p.to(tl.float64) * tl.max(masses, 0).to(tl.float64)
    reached = tl.where(top_k > 0, counts >= top_k, masses.to(tl.float64) >= wanted)
    first = tl.min(tl.where(reached, edges, EDGES - 1), 0)
    return tl.where((top_k > 0) | (top_p < 1.0), first, EDGES - 1)


@triton.jit
def gather_kernel(
    work_ptr,  # [rows, vocab]
    raw_ptr,  # [rows, tiles]
    best_ptr,
    counts_ptr,  # [rows, tiles, EDGES]
    masses_ptr,
    listed_ptr,  # [rows, LISTED] float32
    listed_ids_ptr,  # [rows, LISTED] int32
    slots_ptr,
    greedy_ptr,
    temperature_ptr,
    min_p_ptr,
    top_k_ptr,
    top_p_ptr,
    typical_p_ptr,
    vocab,
    BLOCK: tl.constexpr,
    EDGES: tl.constexpr,
    TILES: tl.constexpr,
    LISTED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    tiles = tl.num_programs(1)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    filtered = (top_k > 0) | (top_p < 1.0) | (tl.load(typical_p_ptr + slot) < 1.0)
    if (tl.load(greedy_ptr + slot) != 0) | (not filtered):
        return
    best = largest(best_ptr, row, tiles, TILES)
    if not _drawable(largest(raw_ptr, row, tiles, TILES), best):
        return
    counts = _surveyed(counts_ptr, row, tiles, tiles, EDGES, TILES)
    masses = _surveyed(masses_ptr, row, tiles, tiles, EDGES, TILES)
    index = _enough(counts, masses, top_k, top_p, EDGES)
    edges = tl.arange(0, EDGES)
    if tl.sum(tl.where(edges == index, counts, 0), 0) > LISTED:
        return
    earlier = _surveyed(counts_ptr, row, tiles, tile, EDGES, TILES)
    before = tl.sum(tl.where(edges == index, earlier, 0), 0)
    most = tl.div_rn(ranked_value(best), tl.load(temperature_ptr + slot))
    edge = _edge(most, _floor(most, tl.load(min_p_ptr + slot)), index, EDGES)
    ids = tile * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(work_ptr + row * vocab + ids, mask=ids < vocab, other=float("-inf"))
    above = x >= edge
    places = row * LISTED + before + tl.cumsum(above.to(tl.int32), 0) - 1
    tl.store(listed_ptr + places, x, mask=above)
    tl.store(listed_ids_ptr + places, ids, mask=above)


@triton.jit
def _threshold(
    source,  # [size] logits
    size,
    floor,  # only logits from here on count
    low,  # the threshold is not below this value
    most,
    mean,
    wanted,  # float64, more than none and at most all of the weight
    BY_COUNT: tl.constexpr,
    TYPICAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The smallest value of a logit with less than `wanted` weight on larger values. TYPICAL: of
    minus the distance of its surprise from the mean one.

    The threshold's key is in (below, upto]. Halves the bracket by values and by keys in turn: the
    first is fast where values are spread evenly, the second ends after 32 steps whatever they are.
    """
    below = ordered(low).to(tl.int64) - 1
    upto = ordered(most).to(tl.int64)
    if TYPICAL:
        upto = tl.zeros([], tl.int64)
    by_value = below < upto
    while upto - below > 1:
        middle = (below + upto) >> 1
        if by_value:
            between = 0.5 * value_of(below.to(tl.int32)) + 0.5 * value_of(upto.to(tl.int32))
            key = ordered(between).to(tl.int64)
            middle = tl.where((key > below) & (key < upto), key, middle)
        by_value = not by_value
        mass = tl.zeros([BLOCK], tl.int64)
        under = tl.full([BLOCK], LOWEST, tl.int64)
        over = tl.full([BLOCK], -(LOWEST + 1), tl.int64)
        for begin in range(0, size, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            x = tl.load(source + at, mask=at < size, other=float("-inf"))
            counted = x >= floor
            value = x
            if TYPICAL:
                value = -tl.minimum(tl.abs((x - most) - mean), _FLOAT_MAX)
            bits = (value + 0.0).to(tl.int32, bitcast=True)
            key = (bits ^ ((bits >> 31) & _NAN)).to(tl.int64)
            weight = tl.full([BLOCK], 1, tl.int64)
            if not BY_COUNT:
                weight = (tl.exp(x - most) * _ONE).to(tl.int64)
            mass += tl.where(counted & (key > middle), weight, 0)
            under = tl.maximum(under, tl.where(counted & (key <= middle), key, LOWEST))
            over = tl.minimum(over, tl.where(counted & (key > middle), key, -(LOWEST + 1)))
        if tl.sum(mass, 0).to(tl.float64) < wanted:
            upto = tl.maximum(tl.max(under, 0), below + 1)
        else:
            below = tl.minimum(tl.min(over, 0), upto) - 1
    return value_of(upto.to(tl.int32))


@triton.jit
def _left(source, at, size, floor, most, mean, reach):
    """Weights of what the filters left: logits from `floor` on whose distance from the most
    likely one is within `reach` of `mean`."""
    x = tl.load(source + at, mask=at < size, other=float("-inf"))
    kept = (x >= floor) & (tl.abs((x - most) - mean) <= reach)
    return tl.where(kept, _weight(x, most), 0)


@triton.jit
def _total(source, size, floor, most, mean, reach, BLOCK: tl.constexpr):
    mass = tl.zeros([BLOCK], tl.int64)
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        mass += _left(source, at, size, floor, most, mean, reach)
    return tl.sum(mass, 0)


@triton.jit
def _mean(source, size, floor, most, total, BLOCK: tl.constexpr):
    """The mean of `x - most` under the probabilities: the entropy without its constant part."""
    summed = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(source + at, mask=at < size, other=float("-inf"))
        distance = tl.where(x >= floor, x, most) - most
        summed += tl.exp(distance) * distance
    return tl.sum(summed, 0) / (total.to(tl.float32) / _ONE)


@triton.jit
def _finalise(word):
    word = (word ^ (word >> 30)) * _MIX_1
    word = (word ^ (word >> 27)) * _MIX_2
    return word ^ (word >> 31)


@triton.jit
def uniform(seed, position):
    """A float64 in [0, 1), that of `shoal.kernels.sampling.uniforms`; both arguments int64."""
    word = _finalise(seed.to(tl.uint64, bitcast=True) + _GAMMA)
    step = (position.to(tl.uint64, bitcast=True) + 1) * _GAMMA
    return (_finalise(word + step) >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def finish_kernel(
    ids_ptr,  # [rows] int64
    status_ptr,  # [rows] int32
    work_ptr,  # [rows, vocab]
    raw_ptr,  # [rows, tiles]
    best_ptr,
    counts_ptr,  # [rows, tiles, EDGES]
    masses_ptr,
    listed_ptr,  # [rows, LISTED]
    listed_ids_ptr,
    slots_ptr,
    positions_ptr,
    greedy_ptr,
    temperature_ptr,
    min_p_ptr,
    top_k_ptr,
    top_p_ptr,
    typical_p_ptr,
    seeds_ptr,
    vocab,
    tiles,
    TILE: tl.constexpr,  # tokens of a tile
    EDGES: tl.constexpr,
    TILES: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
    ALL_GREEDY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        tl.store(ids_ptr + row, 0)
        tl.store(status_ptr + row, 0)
        return
    raw = largest(raw_ptr, row, tiles, TILES)
    best = largest(best_ptr, row, tiles, TILES)
    if not _drawable(raw, best):
        finite = (raw >= _FINITE) & (raw < _INFINITE) & (best < _INFINITE)
        tl.store(ids_ptr + row, 0)
        tl.store(status_ptr + row, tl.where(finite, 2, 1))
        return
    tl.store(status_ptr + row, 0)
    if (tl.load(greedy_ptr + slot) != 0) | ALL_GREEDY:
        tl.store(ids_ptr + row, (best & _NAN) ^ _NAN)
        return
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    typical_p = tl.load(typical_p_ptr + slot)
    most = tl.div_rn(ranked_value(best), tl.load(temperature_ptr + slot))
    floor = _floor(most, tl.load(min_p_ptr + slot))
    counts = _surveyed(counts_ptr, row, tiles, tiles, EDGES, TILES)
    masses = _surveyed(masses_ptr, row, tiles, tiles, EDGES, TILES)
    total = tl.max(masses, 0)
    index = _enough(counts, masses, top_k, top_p, EDGES)
    listed = tl.sum(tl.where(tl.arange(0, EDGES) == index, counts, 0), 0)
    filtered = (top_k > 0) | (top_p < 1.0) | (typical_p < 1.0)
    from_list = filtered & (listed <= LISTED)
    source = work_ptr + row * vocab
    size = vocab
    if from_list:
        source = listed_ptr + row * LISTED
        size = listed
    low = _edge(most, floor, index, EDGES)
    if (top_k > 0) & (top_k < tl.max(counts, 0)):
        wanted = top_k.to(tl.float64)
        floor = _threshold(source, size, floor, low, most, 0.0, wanted, True, False, BLOCK)
        low = floor
        total = _total(source, size, floor, most, 0.0, float("inf"), BLOCK)
    elif top_k > 0:
        low = floor
    if top_p < 1.0:
        wanted = top_p.to(tl.float64) * total.to(tl.float64)
        floor = _threshold(source, size, floor, low, most, 0.0, wanted, False, False, BLOCK)
        total = _total(source, size, floor, most, 0.0, float("inf"), BLOCK)
    mean = tl.zeros([], tl.float32)
    reach = tl.full([], float("inf"), tl.float32)
    if typical_p < 1.0:
        mean = _mean(source, size, floor, most, total, BLOCK)
        wanted = typical_p.to(tl.float64) * total.to(tl.float64)
        low = tl.full([], -_FLOAT_MAX, tl.float32)
        reach = -_threshold(source, size, floor, low, most, mean, wanted, False, True, BLOCK)
        total = _total(source, size, floor, most, mean, reach, BLOCK)
    number = uniform(tl.load(seeds_ptr + slot), tl.load(positions_ptr + row))
    target = tl.minimum((number * total.to(tl.float64)).to(tl.int64), total - 1)
    begin = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.int64)
    if not filtered:
        # The survey's last edge is the floor: it knows each tile's weight.
        at = tl.arange(0, TILES)
        last = (row * tiles + at) * EDGES + EDGES - 1
        ends = tl.cumsum(tl.load(masses_ptr + last, mask=at < tiles, other=0), 0)
        begin = tl.sum((ends <= target).to(tl.int32), 0) * TILE
        before = tl.max(tl.where(ends <= target, ends, 0), 0)
    found = size
    while (found == size) & (begin < size):
        at = begin + tl.arange(0, BLOCK)
        weights = _left(source, at, size, floor, most, mean, reach)
        ends = before + tl.cumsum(weights, 0)
        found = tl.min(tl.where(ends > target, at, size), 0)
        before += tl.sum(weights, 0)
        begin += BLOCK
    if from_list:
        found = tl.load(listed_ids_ptr + row * LISTED + found)
    tl.store(ids_ptr + row, found)
