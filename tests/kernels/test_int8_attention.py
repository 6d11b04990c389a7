"""Attention on integers against torch's ops: grids, masks, shapes, layouts; what happens without a compiler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantsim.kernels import int8_attention
from quantsim.kernels.edges import Grid
from quantsim.kernels.int8_attention import AttentionGrids, Int8Attention, missing_for_attention

MISSING = missing_for_attention()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

PLAIN = AttentionGrids(
    query=Grid(0.05, 120, 0, 255), key=Grid(0.05, 130, 0, 255), value=Grid(0.03, 110, 0, 255), scores=None, factor=0.125, divides=False,
    scaled=None, masked=None, probabilities=Grid(1 / 255, 0, 0, 255), context=Grid(0.02, 127, 0, 255),
)  # fmt: skip
QUANTIZED = replace(PLAIN, scores=Grid(0.4, 128, 0, 255), scaled=Grid(0.05, 128, 0, 255), masked=Grid(0.06, 150, 0, 255))
SIGNED = replace(
    QUANTIZED, query=Grid(0.05, 0, -128, 127), key=Grid(0.05, 0, -127, 127), value=Grid(0.03, 0, -8, 7), context=Grid(0.02, 0, -128, 127),
    factor=8.0, divides=True,
)  # fmt: skip
SHIFTED = replace(QUANTIZED, probabilities=Grid(1 / 200, 20, 0, 255), value=Grid(0.03, 0, 0, 255), query=Grid(0.05, 255, 0, 255))
ALL = {"plain": PLAIN, "quantized": QUANTIZED, "signed": SIGNED, "shifted": SHIFTED}


def integers(grid: Grid, batch: int, heads: int, rows: int, depth: int) -> Tensor:
    """As a layer gives them: heads lie beside each other in a row."""
    x = torch.randint(grid.quant_min, grid.quant_max + 1, (batch, rows, heads, depth))
    return x.to(grid.dtype).transpose(1, 2)


def inputs(grids: AttentionGrids, batch: int, heads: int, queries: int, keys: int, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(queries + keys)
    rows = ((grids.query, queries), (grids.key, keys), (grids.value, keys))
    q, k, v = (integers(grid, batch, heads, n, depth) for grid, n in rows)
    return q, k, v


def close(grids: AttentionGrids, found: Tensor, expected: Tensor) -> None:
    """The same type and layout of values; where exp is the kernel's own, one step apart at most, and that in a thousandth of them."""
    assert found.dtype == expected.dtype == grids.context.dtype
    off = (found.int() - expected.int()).abs()
    assert off.max() <= (grids.masked is None)
    assert (off > 0).float().mean() <= 1e-3


@pytest.mark.parametrize(
    "shape", [(2, 3, 37, 37, 64), (1, 2, 5, 5, 16), (1, 1, 1, 300, 32), (3, 2, 8, 16, 48), (1, 1, 17, 33, 256)], ids=str
)
@pytest.mark.parametrize("name", ALL)
def test_as_torch_computes_it(name, shape):
    attention = Int8Attention(ALL[name])
    q, k, v = inputs(ALL[name], *shape)
    close(ALL[name], attention(q, k, v), attention.in_float32(q, k, v))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("form", ["keys", "expanded", "each query", "one number", "strided"])
def test_masks_of_every_form(name, form):
    attention, (batch, heads, n) = Int8Attention(ALL[name]), (2, 3, 21)
    q, k, v = inputs(ALL[name], batch, heads, n, n, 32)
    hidden = torch.where(torch.rand(batch, 1, 1, n) < 0.3, -6.0, 0.0)
    mask = {
        "keys": hidden,
        "expanded": hidden.expand(batch, 1, n, n),
        "each query": torch.randn(batch, heads, n, n),
        "one number": torch.tensor(-1.5),
        "strided": torch.randn(batch, 1, n, n).transpose(2, 3),
    }[form]
    close(ALL[name], attention(q, k, v, mask), attention.in_float32(q, k, v, mask))


@pytest.mark.parametrize("lowest", [-3.4e38, -1e4, -104.0, -87.0])
def test_hidden_keys_have_no_weight(lowest):
    q, k, v = inputs(PLAIN, 1, 2, 9, 20, 16)
    mask = torch.zeros(1, 1, 1, 20)
    mask[..., 12:] = lowest
    attention = Int8Attention(PLAIN)
    assert torch.equal(attention(q, k, v, mask), attention(q, k[:, :, :12], v[:, :, :12]))


def test_a_row_whose_keys_are_all_hidden_alike_is_as_if_none_were():
    q, k, v = inputs(PLAIN, 1, 2, 9, 20, 16)
    attention = Int8Attention(PLAIN)
    found = attention(q, k, v, torch.full((1, 1, 9, 20), -3.4e38))
    close(PLAIN, found, attention.in_float32(q, k, v, torch.full((1, 1, 9, 20), -3.4e38)))


def test_up_to_the_softmax_it_is_torch_to_the_bit():
    """On these grids each probability is 0 or 1, so a score on another side of a tie would show."""
    grids = replace(QUANTIZED, scores=Grid(0.4, 128, 0, 255), scaled=Grid(30.0, 128, 0, 255), masked=None)
    attention = Int8Attention(grids)
    q, k, v = inputs(grids, 4, 4, 64, 64, 64)
    assert torch.equal(attention(q, k, v), attention.in_float32(q, k, v))


def test_extremes():
    """The largest sums of both products."""
    grids = replace(
        PLAIN, query=Grid(0.01, 0, 0, 255), key=Grid(0.01, 255, 0, 255), value=Grid(0.01, 255, 0, 255), context=Grid(0.02, 255, 0, 255)
    )
    q = torch.full((1, 1, 3, 256), 255, dtype=torch.uint8)
    k = v = torch.zeros(1, 1, 512, 256, dtype=torch.uint8)
    attention = Int8Attention(grids)
    assert torch.equal(attention(q, k, v), attention.in_float32(q, k, v))


def test_broadcast_batches_and_heads_and_an_empty_one():
    attention = Int8Attention(PLAIN)
    q, k, v = inputs(PLAIN, 2, 4, 6, 6, 16)
    one_head = attention(q, k[:1, :1], v[:1, :1])
    close(PLAIN, one_head, attention.in_float32(q, k[:1, :1].expand(2, 4, -1, -1), v[:1, :1].expand(2, 4, -1, -1)))
    assert attention(q[:0], k[:0], v[:0]).shape == (0, 4, 6, 16)


def test_sums_that_may_overflow_are_refused():
    q, k, v = inputs(PLAIN, 1, 1, 1, 1, 16)
    with pytest.raises(ValueError, match=r"33026 keys may overflow 32 bits; at most 33025"):
        Int8Attention(PLAIN)(q, k.expand(1, 1, 33026, 16), v.expand(1, 1, 33026, 16))


def test_any_number_of_threads_gives_the_same():
    attention = Int8Attention(QUANTIZED)
    q, k, v = inputs(QUANTIZED, 3, 5, 40, 40, 32)
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(attention(q, k, v))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_registered_as_torch_wants_operators():
    q, k, v = inputs(QUANTIZED, 1, 2, 5, 5, 16)
    args = (q, k, v, None, Int8Attention(QUANTIZED).numbers, False)
    torch.library.opcheck(int8_attention._attention, args, test_utils=("test_schema", "test_faketensor"))
