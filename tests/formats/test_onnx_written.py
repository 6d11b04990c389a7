"""Integer functions in ONNX Runtime against the same functions in torch: at the ends of their budgets, and over whole grids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx", reason="onnx isn't installed: pip install 'quantsim[onnx]'")
pytest.importorskip("onnxruntime", reason="onnxruntime isn't installed: pip install 'quantsim[onnx]'")
pytest.importorskip("onnxscript", reason="onnxscript isn't installed: pip install 'quantsim[onnx]'")

from quantsim.formats.onnx.capture import quiet
from quantsim.formats.onnx.integer import CALLED, call, translations
from quantsim.formats.onnx.runtime import open_session
from quantsim.numerics.dyadic import channel_rescale, dyadic
from quantsim.numerics.polynomial import EXP_SCALE, EXP_ZERO, norm_constants

INT32 = torch.tensor([-(2**31) + 1, -(2**30), -(2**20) - 1, -3, -2, -1, 0, 1, 2, 3, 2**20 + 1, 2**30, 2**31 - 1], dtype=torch.int32)
NEAR_0 = torch.arange(-(2**15), 2**15, 7, dtype=torch.int32)
RANDOM = torch.randint(-(2**21), 2**21 + 1, (6, 48), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
ROWS = torch.cat([RANDOM, torch.full((1, 48), 2**21, dtype=torch.int32), torch.zeros(1, 48, dtype=torch.int32)])
ENDS = torch.tensor([[-(2**21)], [2**21]], dtype=torch.int32).expand(2, 24).reshape(1, 48).contiguous()
BYTES = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8)


def channels() -> tuple[Tensor, Tensor, int]:
    ratio = torch.tensor([1e-3, -0.5, 0.0, 7.0], dtype=torch.float64)
    numbers = channel_rescale(
        ratio, torch.tensor([3.0, -2.0, 100.0, 0.0], dtype=torch.float64), torch.full((4,), 2.0**31, dtype=torch.float64)
    )
    return numbers.multiplier, numbers.offset, numbers.shift


def of_softmax(scale: float) -> tuple[Any, ...]:
    least = -int(EXP_ZERO / scale) - 1
    numbers = dyadic(scale / EXP_SCALE, -least)
    return least, numbers.multiplier, numbers.shift, numbers.wide


CASES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "gelu at the ends": ("i_gelu", (INT32,)),
    "gelu near 0": ("i_gelu", (NEAR_0,)),
    "tanh at the ends": ("i_tanh", (INT32,)),
    "tanh near 0": ("i_tanh", (NEAR_0,)),
    "rescale of 8 bits": ("rescale", (BYTES, *dyadic(0.37, 128, -128, 127).numbers)),
    "rescale in 64 bits": ("rescale", (INT32, *dyadic(0.37, 2**31 - 1, -(2**30), 2**30).numbers)),
    "rescale upwards": ("rescale", (NEAR_0, *dyadic(3000.0, 2**15).numbers)),
    "rescale of channels": ("rescale_channels", (INT32[:12].reshape(3, 4), *channels(), -(2**30), 2**30, torch.int32)),
    "rescale of channels to bytes": ("rescale_channels", (INT32[:12].reshape(3, 4), *channels(), -128, 127, torch.int8)),
    "norm": ("i_normalize", (torch.cat([ROWS, ENDS]), *norm_constants(48, 1e-3, 1e-12))),
    "norm of odd width": ("i_normalize", (ROWS[:, :47].contiguous(), *norm_constants(47, 1e-3, 1e-5))),
    "softmax": ("i_softmax", (ROWS, *of_softmax(1e-4), -1)),
    "softmax of coarse scores": ("i_softmax", ((ROWS >> 16), *of_softmax(0.1), -1)),
    "table": ("look_up", (BYTES, torch.arange(256, dtype=torch.int32).flip(0).to(torch.uint8), -128)),
}


class Calls(nn.Module):
    def __init__(self, function: str, rest: tuple[Any, ...]) -> None:
        super().__init__()
        self.function, self.rest = function, rest
        for i, x in enumerate(rest):
            if isinstance(x, Tensor):
                self.register_buffer(f"t{i}", x)

    def forward(self, x: Tensor) -> Tensor:
        return call(self.function, x, *(getattr(self, f"t{i}") if isinstance(y, Tensor) else y for i, y in enumerate(self.rest)))


@pytest.mark.parametrize("case", CASES)
def test_same_integers(case: str) -> None:
    function, (x, *rest) = CASES[case]
    with quiet():
        program = torch.onnx.export(
            Calls(function, tuple(rest)).eval(),
            (x,),
            input_names=["x"],
            opset_version=20,
            dynamo=True,
            verbose=False,
            optimize=False,
            custom_translation_table=translations(),
        )
    assert program is not None
    session = open_session(program.model_proto.SerializeToString(), config={})
    (found,) = session.run(None, {"x": x.numpy()})
    expected = CALLED[function](x, *rest)
    assert torch.from_numpy(found).dtype == expected.dtype
    assert torch.equal(torch.from_numpy(found), expected)


def test_every_function_is_here() -> None:
    assert {function for function, _ in CASES.values()} == set(CALLED)
