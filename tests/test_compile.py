"""``torch.compile`` over the simulated and the lowered graph: whole, and once for all lengths."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from quantsim import QuantSim
from tests.tiny import tiny_batch, tiny_sim

SHAPES = ((4, 10), (2, 7), (5, 33), (3, 64))


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def once_for_all_shapes(run: object, sim: QuantSim, backend: str) -> None:
    with torch.no_grad():
        for i, shape in enumerate(SHAPES):
            batch = tiny_batch(*shape, seed=i)
            expected = sim.model(**batch).logits
            with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
                found = run(**batch).logits  # type: ignore[operator]
            torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * expected.abs().max().item(), msg=backend)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("preset", ["aimet", "deploy"])
def test_simulated(preset: str, backend: str) -> None:
    sim = tiny_sim(config=preset)
    sim.freeze_ranges()
    once_for_all_shapes(torch.compile(sim.model, fullgraph=True, dynamic=True, backend=backend), tiny_sim(config=preset), backend)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("preset", ["aimet", "deploy"])
def test_lowered(preset: str, backend: str) -> None:
    sim = tiny_sim(config=preset)
    once_for_all_shapes(sim.lower().compile(backend).model, sim, backend)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_integers_are_the_same_bits(backend: str) -> None:
    sim = tiny_sim(config="ibert")
    eager, compiled = sim.integer_only().model, sim.integer_only().compile(backend).model
    with torch.no_grad():
        for i, shape in enumerate(SHAPES):
            batch = tiny_batch(*shape, seed=i)
            expected = eager(**batch).logits
            with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
                assert torch.equal(compiled(**batch).logits, expected)
