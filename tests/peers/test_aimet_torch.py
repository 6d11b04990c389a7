"""Our encodings files in aimet-torch, and its in ours: the same scales, zero points, ranges and quantized weights, bit for bit.

aimet-torch has an environment of its own; from the project's folder::

    python3 -m venv ../aimet
    ../aimet/bin/pip install torch==2.13.0 aimet-torch==2.42.0
    ../aimet/bin/pip install -e ".[test]"
    HF_HUB_OFFLINE=1 ../aimet/bin/python -m pytest -p no:logging -W ignore -m peer tests/peers/test_aimet_torch.py

One thing cannot hold exactly. AIMET finds the scale of a symmetric grid as ``(max - min) / 255`` in float32, which takes steps of
256 / 255 ulp and so skips one float32 scale in 256 (of 4 bits: 1 in 16); ours, ``max(max / 127, min / -128)``, skips none. A
symmetric scale that AIMET cannot express arrives as its neighbour; :func:`expressible` says which those are.

And of values that are quantized, about one in a million differs by a step: torch's kernels, which AIMET uses, multiply by ``1 / scale``
where ours divide by ``scale``, which tells apart what lies within an ulp of half a step (``Pair.differ_at_ties_alone``).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantsim import FakeQuantizer, QuantSim, State
from quantsim.numerics.affine import grid_range
from tests.tiny import tiny_batch, tiny_bert, tiny_sim

pytestmark = pytest.mark.peer
if importlib.util.find_spec("aimet_torch") is None:
    pytest.skip("aimet-torch is not installed; it has an environment of its own (see the docstring)", allow_module_level=True)


@pytest.fixture
def aimet() -> Any:
    """A simulation by AIMET of the model behind :func:`tiny_sim`, calibrated on other batches than ours."""
    from aimet_torch import QuantizationSimModel

    model = tiny_bert()
    model.config.return_dict = False
    batches = [tuple(tiny_batch(seed=seed).values()) for seed in (5, 6)]
    sim = QuantizationSimModel(model, batches[0], quant_scheme="tf")
    sim.compute_encodings(lambda model, _: [model(*batch) for batch in batches], None)
    return sim


@dataclass
class Pair:
    """The two quantizers of one tensor."""

    name: str
    ours: FakeQuantizer
    theirs: Any
    weight: Tensor | None

    def to_the_bit(self) -> Tensor:
        """Where scale, zero point and both ends of the range are equal. ``[C]``"""
        params = self.ours.affine_params()
        theirs = (self.theirs.get_scale(), -self.theirs.get_offset(), self.theirs.get_min(), self.theirs.get_max())
        ours = (params.scale, params.zero_point, *grid_range(params))
        return torch.stack([a.flatten() == plain(b).flatten() for a, b in zip(ours, theirs, strict=True)]).all(0)

    def quantized(self) -> tuple[Tensor, Tensor, Tensor]:
        """A weight, or values in and out of an activation's range; and as both quantize it."""
        x = self.weight
        if x is None:
            low, high = grid_range(self.ours.affine_params())
            x = torch.linspace(2 * low.item() - 1, 2 * high.item() + 1, 5000)
        return x, self.ours(x.clone()), plain(self.theirs(x.clone()))

    def differ_at_ties_alone(self) -> bool:
        """Weights are equal to the bit; values of an activation but for those at half a step, which may be a step apart."""
        x, ours, theirs = self.quantized()
        if self.weight is not None:
            return torch.equal(ours, theirs)
        apart = ours != theirs
        scale = self.ours.affine_params().scale
        steps = (x / scale)[apart]
        from_tie = ((steps - steps.floor()) - 0.5).abs()
        one_step = ((ours - theirs)[apart].abs() / scale - 1).abs() < 1e-4
        return bool((from_tie <= 2**-22 * steps.abs()).all() and one_step.all() and apart.sum() <= 2)


def plain(x: Tensor) -> Tensor:
    return x.detach().as_subclass(torch.Tensor)


def pairs(ours: QuantSim, aimet: Any) -> Iterator[Pair]:
    modules = dict(aimet.model.named_modules())
    sums = {f"{path.rpartition('.')[0]}.add": path for path in modules if path.endswith("output.LayerNorm")}
    sums["bert.embeddings.add_1"] = "bert.embeddings.LayerNorm"
    for name, quantizer in ours.quantizers.items():
        path, _, kind = name.rpartition(".")
        if kind == "weight":
            yield Pair(name, quantizer, modules[path].param_quantizers["weight"], plain(modules[path].weight))
        elif kind == "output":
            yield Pair(name, quantizer, modules[path].output_quantizers[0], None)
        elif name in sums:
            yield Pair(name, quantizer, modules[sums[name]].input_quantizers[0], None)


def quantizers_of(aimet: Any) -> set[Any]:
    lists = [
        q
        for m in aimet.model.modules()
        if hasattr(m, "param_quantizers")
        for q in (*m.input_quantizers, *m.output_quantizers, *m.param_quantizers.values())
    ]
    return {q for q in lists if q is not None}


def expressible(scale: Tensor, steps: int) -> Tensor:
    """Some float32 width divided by ``steps`` is this scale: one of the three around ``steps * scale``, or none."""
    width = (scale.double() * steps).float()
    around = [width, torch.nextafter(width, torch.zeros_like(width)), torch.nextafter(width, torch.full_like(width, torch.inf))]
    return torch.stack([x / steps == scale for x in around]).any(0)


@torch.no_grad()
def test_our_file_in_aimet(aimet: Any, tmp_path: Path) -> None:
    """``strict=True``: no name that AIMET does not have; ``partial=False``: every quantizer without an entry would be removed."""
    ours = tiny_sim()
    left_out = ours.export_aimet_encodings(tmp_path / "e.json")
    before = quantizers_of(aimet)
    aimet.load_encodings(str(tmp_path / "e.json"), strict=True, partial=False)
    assert quantizers_of(aimet) == before
    found = list(pairs(ours, aimet))
    assert {pair.theirs for pair in found} == before
    assert {pair.name for pair in found} == set(ours.quantizers) - set(left_out)
    skipped = 0
    for pair in found:
        params = pair.ours.affine_params()
        exact = pair.to_the_bit()
        if not pair.ours.spec.symmetric:
            assert exact.all(), pair.name
        else:
            assert torch.equal(exact, expressible(params.scale.flatten(), 255)), pair.name
            neighbours = (plain(pair.theirs.get_scale()).flatten() - params.scale.flatten()).abs() <= 2**-23 * params.scale.flatten()
            assert neighbours.all(), pair.name
        skipped += int((~exact).sum())
        if exact.all():
            assert pair.differ_at_ties_alone(), pair.name
        elif len(exact) > 1:
            _, a, b = pair.quantized()
            assert torch.equal(a[exact], b[exact]), pair.name
    assert skipped <= 4, "of some 250 symmetric scales one is expected to be skipped"


@torch.no_grad()
def test_aimets_file_in_ours(aimet: Any, tmp_path: Path) -> None:
    """Without exception: every scale that AIMET has is one that we can have."""
    aimet.save_encodings_to_json(str(tmp_path), "e")
    ours = tiny_sim(calibrated=False)
    read = ours.load_aimet_encodings(tmp_path / "e.json", strict=True)
    assert (read.missing, read.unknown, read.inexact) == ((), (), ())
    found = list(pairs(ours, aimet))
    assert {pair.name for pair in found} == set(read.loaded)
    for pair in found:
        assert pair.ours.state is State.LEARNING
        assert pair.to_the_bit().all(), pair.name
        assert pair.differ_at_ties_alone(), pair.name


@torch.no_grad()
def test_what_aimet_exports_is_read(aimet: Any, tmp_path: Path) -> None:
    """Both files of ``sim.export``: by module, and by the tensors of the ONNX file that AIMET names itself (1.0.0)."""
    aimet.export(str(tmp_path), "e", tuple(tiny_batch().values()))
    ours = tiny_sim(calibrated=False)
    ours.load_aimet_encodings(tmp_path / "e_torch.encodings", strict=True)
    assert all(pair.to_the_bit().all() for pair in pairs(ours, aimet))
    other = tiny_sim(calibrated=False)
    read = other.load_aimet_encodings(tmp_path / "e.encodings", strict=False)
    weights = [pair for pair in pairs(other, aimet) if pair.weight is not None]
    assert set(read.loaded) == {pair.name for pair in weights}
    assert all(pair.to_the_bit().all() for pair in weights)
    assert read.unknown


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
@torch.no_grad()
def test_an_onnx_side_entry_is_the_one_that_aimet_writes(version: str, aimet: Any, tmp_path: Path) -> None:
    """Field by field; ``min`` and ``max`` of 0.6.1 within the ulps that make them give the scale back."""
    aimet.save_encodings_to_json(str(tmp_path), "e")
    ours = tiny_sim(calibrated=False)
    ours.load_aimet_encodings(tmp_path / "e.json")
    ours.export_aimet_encodings(tmp_path / "ours.json", version)
    written = entries(json.loads((tmp_path / "ours.json").read_text()))
    for pair in pairs(ours, aimet):
        encoding = pair.theirs.get_encodings()
        if pair.weight is not None:
            encoding = encoding._hint_input_shape(pair.weight.shape)
        assert comparable(written[pair.name]) == comparable(encoding.to_qnn_encoding_dict(version)), pair.name


def entries(values: dict[str, Any]) -> dict[str, Any]:
    sections = [values[key] for key in ("activation_encodings", "param_encodings", "encodings") if key in values]
    return {
        name: entry
        for section in sections
        for name, entry in (section.items() if isinstance(section, dict) else ((e["name"], e) for e in section))
    }


def comparable(entry: Any) -> Any:
    if isinstance(entry, list):
        return [comparable(x) for x in entry]
    ends = {key: pytest.approx(value, rel=4 * 2**-23, abs=0) for key, value in entry.items() if key in ("min", "max")}
    axis = {"axis": 0} if "axis" in entry else {}  # AIMET counts it from the end until the ONNX file is written
    return {key: value for key, value in entry.items() if key != "name"} | ends | axis
