"""The fused kernels give the values of the eager form, and its gradients up to the rounding of sums."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantsim.config import QuantSpec
from quantsim.numerics import fused
from quantsim.numerics.affine import affine_params, fake_quantize
from quantsim.numerics.fused import fused_fake_quantize, fused_kernels, fused_kernels_active
from quantsim.quantizers.fake_quantizer import FakeQuantizer, WeightQuantizer

SPECS = [
    pytest.param(QuantSpec(bits=bits, symmetric=symmetric, axis=axis), id=f"{bits}-bit-{'sym' if symmetric else 'asym'}-axis-{axis}")
    for bits, symmetric, axis in [(8, False, None), (8, True, 0), (4, True, None), (16, False, -1), (2, False, 1)]
]


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    with warnings.catch_warnings(), fused_kernels() as works:
        warnings.simplefilter("ignore")
        if not works:
            pytest.skip("torch.compile needs a C++ compiler (g++), which is not installed here")


def gradients(function: Any, x: Tensor, low: Tensor, high: Tensor, g: Tensor, spec: QuantSpec) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, low, high)]
    out = function(leaves[0], affine_params(leaves[1], leaves[2], spec))
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6, 7, 8), (3, 5, 16)], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_equal_to_the_eager_form(spec: QuantSpec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, g = (1.5 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    channels = () if spec.axis is None else (shape[spec.axis],)
    low, high = -1.0 - torch.rand(channels), 2.2 + torch.rand(channels)
    expected, actual = (gradients(f, x, low, high, g, spec) for f in (fake_quantize, fused_fake_quantize))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    sharing = g.abs().sum() if spec.axis is None else g.abs().movedim(spec.axis, 0).flatten(1).sum(1)
    for a, b in zip(actual[2:], expected[2:], strict=True):
        assert ((a - b).abs() <= 1e-4 * sharing).all()


def test_ties_and_ends_of_the_grid_fall_as_in_the_eager_form() -> None:
    """Every half step of the grid and beyond: half rounds to even on either path."""
    spec = QuantSpec(bits=4)
    low, high = torch.tensor(-3.0), torch.tensor(12.0)  # scale 1, exact
    x = torch.arange(-12.0, 40.0, 0.5)
    expected, actual = (gradients(f, x, low, high, torch.ones_like(x), spec) for f in (fake_quantize, fused_fake_quantize))
    assert all(torch.equal(a, b) for a, b in zip(actual[:2], expected[:2], strict=True))


def test_a_transposed_tensor() -> None:
    spec = QuantSpec()
    x, g = torch.randn(4, 6).T, torch.randn(6, 4)
    expected, actual = (gradients(f, x, torch.tensor(-1.0), torch.tensor(1.0), g, spec) for f in (fake_quantize, fused_fake_quantize))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_kernel_serves_every_shape_and_view(dtype: torch.dtype) -> None:
    """Compiled anew for each kind of view, it would run into dynamo's limit and be eager from then on, without a word."""
    views = [
        torch.randn(4, 6),
        torch.randn(2, 3, 8).transpose(0, 1),
        torch.randn(3, 40)[:, 2:9],
        torch.randn(1, 5).expand(3, 5),
        torch.randn(2, 4, 6, 10),
        torch.randn(2, 9, 6).reshape(2, 9, 2, 3).permute(0, 2, 1, 3),
    ]
    ends = torch.tensor(-1.0), torch.tensor(1.0)
    gradients(fused_fake_quantize, torch.randn(5, 5).to(dtype), *ends, torch.randn(5, 5).to(dtype), QuantSpec())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for view in views:
            gradients(fused_fake_quantize, view.to(dtype), *ends, torch.ones(()).to(dtype).expand(view.shape), QuantSpec())
        x = torch.randn(2, 8, 4).to(dtype).requires_grad_()
        heads = x.view(2, 8, 2, 2).transpose(1, 2)  # as attention makes them, with its history
        fused_fake_quantize(heads, affine_params(*ends, QuantSpec())).float().sum().backward()


def learning(kind: type[FakeQuantizer] = FakeQuantizer) -> FakeQuantizer:
    quantizer = kind(QuantSpec())
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    return quantizer


def test_a_quantizer_is_fused_inside_the_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    monkeypatch.setattr("quantsim.quantizers.fake_quantizer.fused_fake_quantize", lambda x, params: calls.append(x) or x)
    x = nn.Parameter(torch.randn(5))
    with pytest.raises(ZeroDivisionError), fused_kernels():
        assert fused_kernels_active()
        learning()(x)
        with torch.no_grad():
            learning()(x)  # nothing is kept for backward: the eager form overwrites in place
        raise ZeroDivisionError
    learning()(x)
    assert len(calls) == 1
    assert not fused_kernels_active()


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(kernel: Any) -> Any:
        raise RuntimeError("no g++ anywhere\nmore lines")

    fused._can_compile.cache_clear()
    monkeypatch.setattr(fused, "compiled_kernel", no_compiler)
    message = r"fails here \(no g\+\+ anywhere\)\. A C\+\+ compiler"
    with pytest.warns(UserWarning, match=message), fused_kernels() as works:  # noqa: PT031
        assert not works
        assert learning()(nn.Parameter(torch.randn(5))).requires_grad
    fused._can_compile.cache_clear()


@pytest.mark.parametrize("kind", [FakeQuantizer, WeightQuantizer])
def test_lsq_divides_the_gradient_of_a_range_by_the_root_of_elements_times_levels(kind: type[FakeQuantizer]) -> None:
    x, plain, lsq = torch.randn(4, 250), learning(kind), learning(kind)
    lsq.lsq_gradients = True
    outputs = [q(x) for q in (plain, lsq)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    elements = 1000 if kind is WeightQuantizer else 250  # of a weight all, of an activation a row's
    for end in ("min", "max"):
        torch.testing.assert_close(getattr(lsq, end).grad, getattr(plain, end).grad / (elements * 255) ** 0.5)
