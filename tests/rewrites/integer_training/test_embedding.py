"""Embedding: rows on the table's grid, gradients exact sums of integers."""

from __future__ import annotations

import pytest
import torch

from quantsim.numerics.fixed_point import FixedPointError
from quantsim.rewrites.integer_training.embedding import embedding
from tests.rewrites.integer_training.mapped import BITS, leaf, mapper, step, value


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_rows_and_gradients(bits: tuple[int, int, int]) -> None:
    m, table = mapper(bits), leaf(50, 8)
    ids = torch.randint(0, 40, (6, 9))
    y = embedding(m, table, ids)
    g = torch.randn_like(y)
    y.backward(g)
    table_step = step(m, table, "weight")
    assert ((y - table[ids]).abs() < table_step).all()
    assert torch.equal((y / table_step).frac(), torch.zeros_like(y))
    expected = torch.zeros(50, 8, dtype=torch.float64).index_add_(0, ids.flatten(), value(m, g, "gradient").reshape(-1, 8))
    assert torch.equal(table.grad, expected.float())


def test_each_row_of_the_table_may_have_a_grid() -> None:
    m, table = mapper(exponents="row"), leaf(5, 8)
    with torch.no_grad():
        table[2] *= 1e6
    ids = torch.tensor([[0, 2, 4], [2, 2, 1]])
    y = embedding(m, table, ids)
    rows = m.map(table.detach()[ids.flatten()], "weight", axis=0)
    assert torch.equal(y.reshape(6, 8), rows.value())
    assert ((y - table[ids]).abs().amax(2) < rows.step.reshape(2, 3)).all()
    g = torch.randn_like(y)
    y.backward(g)
    expected = torch.zeros(5, 8, dtype=torch.float64).index_add_(0, ids.flatten(), value(m, g, "gradient").reshape(-1, 8))
    assert torch.equal(table.grad, expected.float())


def test_the_grid_is_the_tables_and_not_that_of_the_rows() -> None:
    table = leaf(3, 4, scale=1e-3)
    with torch.no_grad():
        table[2] = 1.0
    assert embedding(mapper(key=None), table, torch.tensor([2])).max() > 0.99
    assert not embedding(mapper(key=None), table, torch.tensor([0, 1])).any()  # below half a step of the whole table


def test_padding_has_no_gradient() -> None:
    table = leaf(5, 4)
    embedding(mapper(), table, torch.tensor([0, 1, 0, 3]), 0).sum().backward()
    assert not table.grad[0].any()
    assert table.grad[1].any()


def test_no_ids() -> None:
    table = leaf(5, 4)
    embedding(mapper(), table, torch.zeros(0, 3, dtype=torch.long)).sum().backward()
    assert not table.grad.any()


def test_a_row_that_nobody_looks_up_counts_too() -> None:
    table = torch.zeros(4, 2)
    table[3, 1] = torch.nan
    with pytest.raises(FixedPointError, match=r"layer\.dense, weight: 1 of 8"):
        embedding(mapper(), table, torch.tensor([0]))


@pytest.mark.parametrize("exponents", ["row", "tensor"])
@pytest.mark.parametrize("place", [-1, 5])
def test_ids_that_are_no_rows_are_refused(place: int, exponents: str) -> None:
    with pytest.raises(IndexError, match="out of range"):
        embedding(mapper(exponents=exponents), leaf(5, 4), torch.tensor([0, place]))
