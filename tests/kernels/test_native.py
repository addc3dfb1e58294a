"""Step programs of the native library, operation by operation, against torch."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.kernels.flat import FlatBatch, Ints
from shoal.kernels.native import (
    Buffer,
    Geometry,
    Into,
    PackedWeight,
    Program,
    Team,
    interleave_gate,
    unavailable,
)
from shoal.kernels.quant import GROUP, quantize_int8
from shoal.kernels.rope import apply_rope_, rope_table

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

HIDDEN, INNER, VOCAB, POSITIONS = 96, 80, 75, 1024
NOBODY = np.zeros(0, np.int64)


def geometry(**changes: int | None) -> Geometry:
    sizes = {"heads": 6, "kv_heads": 2, "head_dim": 32, "rotary_dim": 32, "block_size": 16}
    return Geometry(hidden=HIDDEN, scale=0.2, **{**sizes, **changes})  # type: ignore[arg-type]  # tests


def turns(rotary: int) -> Tensor:
    return rope_table(1 / 10_000 ** (torch.arange(0, rotary, 2) / rotary), POSITIONS)


def buffers(rows: int, shape: Geometry) -> list[Tensor]:
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    bf16 = torch.bfloat16
    return [
        torch.zeros(rows, HIDDEN),
        torch.zeros(rows, HIDDEN, dtype=bf16),
        torch.zeros(rows, heads, dtype=bf16),
        torch.zeros(rows, shape.heads * shape.head_dim, dtype=bf16),
        torch.zeros(rows, INNER, dtype=bf16),
        torch.zeros(rows, VOCAB),
    ]


def matrix(rows: int, columns: int) -> Tensor:
    return (torch.randn(rows, columns) / columns**0.5).bfloat16()


def near(found: Tensor, wanted: Tensor) -> None:
    """Equal but for the last bit of bfloat16 here and there."""
    torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=1e-2)


@pytest.fixture(params=[1, 3])
def team(request: pytest.FixtureRequest) -> Team:
    return Team(request.param)


@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 100])
def test_everything_but_attention(team: Team, rows: int) -> None:
    """Embedding, norm and every kind of linear, at sizes that are no multiple of a tile."""
    torch.manual_seed(rows)
    shape = geometry()
    embedding, weight = torch.randn(50, HIDDEN).bfloat16(), torch.rand(HIDDEN) + 0.5
    wide, bias = matrix(320, HIDDEN), torch.randn(320)
    gate, up, down, head = (
        matrix(INNER, HIDDEN),
        matrix(INNER, HIDDEN),
        matrix(HIDDEN, INNER),
        matrix(VOCAB, HIDDEN),
    )
    program = Program(shape, turns(32))
    program.embed(embedding)
    program.norm(weight, 1e-5)
    program.linear(PackedWeight(wide, bias), Buffer.NORMED, Buffer.HEADS, Into.BFLOAT16)
    gated = PackedWeight(interleave_gate(gate, up))
    program.linear(gated, Buffer.NORMED, Buffer.INNER, Into.GATED)
    program.linear(PackedWeight(down), Buffer.INNER, Buffer.RESIDUAL, Into.ADD)
    program.norm(weight, 1e-5)
    program.linear(PackedWeight(head), Buffer.NORMED, Buffer.LOGITS, Into.FLOAT32)
    ids = np.arange(rows) * 7 % 50
    found = buffers(rows, shape)
    one = np.array([rows])
    program.run(team, FlatBatch.of(ids, one * 0, one, np.zeros((1, 1), np.int64)), NOBODY, found)

    residual = embedding[ids].float()
    normed = F.rms_norm(residual, (HIDDEN,), weight, 1e-5).bfloat16().float()
    near(found[Buffer.HEADS], F.linear(normed, wide.float(), bias.bfloat16().float()))
    inner = F.silu(normed @ gate.float().T) * (normed @ up.float().T)
    near(found[Buffer.INNER], inner)
    residual += inner.bfloat16().float() @ down.float().T
    near(found[Buffer.RESIDUAL], residual)
    normed = F.rms_norm(residual, (HIDDEN,), weight, 1e-5).bfloat16().float()
    near(found[Buffer.LOGITS], normed @ head.float().T)


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 100])
def test_int8_weights(team: Team, rows: int) -> None:
    """Exact products of the codes, also where one input of a group is far larger than the rest:
    inputs are rounded to 16 bits, no coarser than bfloat16 has them."""
    torch.manual_seed(rows)
    inputs = 192
    weight, bias = quantize_int8(torch.randn(VOCAB, inputs)), torch.randn(VOCAB)
    program = Program(geometry(), turns(32))
    program.linear(PackedWeight(weight, bias), Buffer.NORMED, Buffer.LOGITS, Into.FLOAT32)
    found = buffers(rows, geometry())
    x = torch.randn(rows, inputs)
    x[:, 70] *= 200
    found[Buffer.NORMED] = x.bfloat16()
    batch = FlatBatch(np.zeros(rows, np.int64), *[NOBODY] * 4, np.zeros((0, 1), np.int64))
    program.run(team, batch, NOBODY, found)
    whole = weight.codes.double() * weight.scales.double().repeat_interleave(GROUP, 1)
    wanted = x.bfloat16().double() @ whole.T + bias.bfloat16().double()
    torch.testing.assert_close(found[Buffer.LOGITS].double(), wanted, rtol=1e-3, atol=0.2)


def test_int8_codes_are_the_nearest() -> None:
    """No element is off by more than half a step of its group, and a group of zeros stays zero."""
    weight = torch.randn(5, 2 * GROUP)
    weight[2, GROUP:] = 0.0
    found = quantize_int8(weight)
    steps = found.scales.repeat_interleave(GROUP, 1)
    assert ((found.codes * steps - weight).abs() <= 0.5001 * steps).all()
    assert not found.codes[2, GROUP:].any()
    with pytest.raises(ValueError, match="100 inputs"):
        quantize_int8(torch.zeros(3, 100))


CASES = [
    ([0], [1]),
    ([300], [1]),
    ([0], [50]),
    ([600, 7, 0, 255, 257], [1, 1, 33, 20, 2]),
]


@pytest.mark.parametrize(("start", "count"), CASES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 40},
        {"block_size": 64, "rotary_dim": 16},
        {"heads": 2, "head_dim": 64, "rotary_dim": 64},
        {"heads": 16, "kv_heads": 1, "head_dim": 48, "rotary_dim": 16},
    ],
)
def test_attention(
    team: Team, start: list[int], count: list[int], changes: dict[str, int | None]
) -> None:
    """Decoding rows, chunks and cached prefixes side by side; blocks nobody owns hold rubbish."""
    torch.manual_seed(0)
    shape = geometry(**changes)
    before, now = np.array(start), np.array(count)
    whole = before + now
    tables, blocks = allocate(whole, shape.block_size)
    cache = shape.cache(blocks)
    cache.fill_(1e30)  # finite, as in a cache whose blocks had other owners
    cache[0] = 0.0
    heads = shape.heads + 2 * shape.kv_heads
    tokens = [torch.randn(length, heads * shape.head_dim).bfloat16() for length in whole]
    program = Program(shape, turns(shape.rotary_dim))
    program.rope_store(cache)
    program.attend(cache)

    def step(first: Ints, end: Ints) -> Tensor:
        """Tokens first..end of every sequence; one that has none is left out."""
        some = np.flatnonzero(end > first)
        flat = [tokens[s][first[s] : end[s]] for s in some]
        rows = int((end - first)[some].sum())
        found = buffers(rows, shape)
        if rows:
            found[Buffer.HEADS] = torch.cat(flat)
            batch = FlatBatch.of(
                np.zeros(rows, np.int64), first[some], (end - first)[some], tables[some]
            )
            program.run(team, batch, NOBODY, found)
        return found[Buffer.ATTENDED]

    third = before // 3
    step(third * 0, third)
    step(third, before)
    found = step(before, whole)
    wanted = [attention(x, shape)[first:] for x, first in zip(tokens, before, strict=True)]
    near(found, torch.cat(wanted))


def test_a_row_does_not_depend_on_its_company(team: Team) -> None:
    """Bit for bit the same alone and among others."""
    torch.manual_seed(1)
    shape = geometry()
    weight = PackedWeight(matrix(320, HIDDEN))
    program = Program(shape, turns(32))
    program.linear(weight, Buffer.NORMED, Buffer.HEADS, Into.BFLOAT16)
    inputs = torch.randn(29, HIDDEN).bfloat16()

    def run(rows: Tensor) -> Tensor:
        found = buffers(len(rows), shape)
        found[Buffer.NORMED] = rows.contiguous()
        batch = FlatBatch(np.zeros(len(rows), np.int64), *[NOBODY] * 4, np.zeros((0, 1), np.int64))
        program.run(team, batch, NOBODY, found)
        return found[Buffer.HEADS]

    together = run(inputs)
    for row in range(len(inputs)):
        assert torch.equal(run(inputs[row : row + 1])[0], together[row])


def test_taking_rows(team: Team) -> None:
    """What follows a take computes the wanted rows alone, in their order."""
    shape = geometry()
    program = Program(shape, turns(32))
    program.take()
    program.norm(torch.ones(HIDDEN), 0.0)
    found = buffers(5, shape)
    found[Buffer.RESIDUAL] = torch.arange(5.0)[:, None].expand(5, HIDDEN).contiguous()
    wanted = np.array([4, 1, 3])
    batch = FlatBatch(np.zeros(5, np.int64), *[NOBODY] * 4, np.zeros((0, 1), np.int64))
    program.run(team, batch, wanted, found)
    assert found[Buffer.RESIDUAL][:3, 0].tolist() == [4.0, 1.0, 3.0]
    assert (found[Buffer.NORMED][:3] == 1).all()
    assert not found[Buffer.NORMED][3:].any()


def test_a_step_of_more_rows_than_the_buffers_have_is_refused(team: Team) -> None:
    """Memory beyond a buffer is never written: the step fails, and says how many rows there are."""
    program = Program(geometry(), turns(32))
    program.norm(torch.rand(HIDDEN), 1e-5)
    none = np.zeros(0, np.int64)
    alone = FlatBatch(np.zeros(9, np.int64), none, none, none, none, np.zeros((0, 1), np.int64))
    with pytest.raises(ValueError, match="a step of 9 rows, but its buffers have room for 8"):
        program.run(team, alone, NOBODY, buffers(8, geometry()))


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"head_dim": 24}, "head size 24"), ({"block_size": 8}, "block size 8")],
)
def test_sizes_that_do_not_fit_are_named(changes: dict[str, int], named: str) -> None:
    """Such a model goes to torch, and the log says why."""
    shape = geometry(**changes)
    assert named in str(shape.unfit())
    with pytest.raises(ValueError, match=named):
        Program(shape, turns(32))


def allocate(lengths: Ints, block_size: int) -> tuple[Ints, int]:
    """Scattered block tables [sequences, blocks], and how many blocks there are."""
    needed = -(-lengths // block_size)
    order = np.random.default_rng(0).permutation(int(needed.sum())) + 1
    tables = np.zeros((len(lengths), int(needed.max())), np.int64)
    taken = 0
    for row, count in zip(tables, needed, strict=True):
        row[:count] = order[taken : taken + count]
        taken += count
    return tables, int(needed.sum()) + 1


def attention(tokens: Tensor, shape: Geometry) -> Tensor:
    """A whole sequence [tokens, heads + 2 kv_heads of head_dim] -> [tokens, heads * head_dim]."""
    x = tokens.view(len(tokens), -1, shape.head_dim).clone()
    group = shape.heads // shape.kv_heads
    apply_rope_(x[:, : shape.heads + shape.kv_heads], turns(shape.rotary_dim)[: len(x)])
    queries, keys, values = x.float().split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * shape.scale
    query, key = torch.arange(len(x))[:, None], torch.arange(len(x))
    hidden = key > query
    if shape.window is not None:
        hidden |= key <= query - shape.window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).reshape(len(x), -1)
