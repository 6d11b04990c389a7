"""QuantSim: the one object a user holds. Each method is a stage of the flow."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from quantsim.formats.aimet_encodings import LoadedEncodings, load_aimet_encodings, write_aimet_encodings
from quantsim.formats.checkpoint import read_checkpoint, save_checkpoint
from quantsim.formats.model_card import model_card
from quantsim.formats.onnx import export_onnx
from quantsim.formats.onnx.edges import Bias
from quantsim.kernels.cpu import missing_for_int8
from quantsim.lowered import IntegerModel, LoweredModel
from quantsim.report.report import write_report
from quantsim.report.sensitivity import Metric
from quantsim.rewrites.insert_quantizers import weights_of
from quantsim.rewrites.integer_only import ForceDequant, integer_only
from quantsim.rewrites.integer_only.training import IntegerOnlyTraining
from quantsim.rewrites.lower_int8 import lower_int8
from quantsim.sim.calibration import Calibration
from quantsim.sim.simulation import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class QuantSim(Calibration):
    """A simulation of a quantized model.

    Args:
        model: a ``transformers`` encoder, with or without a head. It is copied and stays as it is, unless ``in_place``.
        config: a :class:`QuantConfig`, the name of a preset, or the path of a JSON file (ours or AIMET's).
        example_inputs: a batch by keyword to trace with; made from the model's config by default.
        in_place: quantize this very model.

    Attributes:
        model: the quantized model: an instance of the same class that takes and gives what it did, ``labels`` and
            ``loss`` included.
        graph: what its forward runs.
        placements: every edge that computes, with its quantizer or the reason why it has none.

    Raises:
        ConfigError: the config means nothing, or one of its rules matches nothing in this model.
        TraceError: the model cannot be traced exactly.

    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    >>> sim = QuantSim(BertForSequenceClassification(config).eval())
    >>> sim.compute_encodings([{"input_ids": torch.randint(0, 99, (4, 10))}])
    >>> sim.model(input_ids=torch.randint(0, 99, (2, 7))).logits.shape
    torch.Size([2, 2])
    """

    # ---- see ----

    def report(
        self,
        batches: Iterable[Batch],
        path: str | Path = "report.html",
        *,
        before: QuantSim | str | Path | None = None,
        metric: Metric | None = None,
        sensitivity: bool = True,
        rows: int | None = 64,
        sensitivity_rows: int | None = None,
        title: str | None = None,
        progress: bool = True,
    ) -> Path:
        """Write one HTML page about the simulation: what is quantized and how well, edge by edge. It needs no network.

        It shows every edge's range, histogram, clipping and SQNR, the channels with outliers, and what each quantizer costs alone.
        What was measured is kept beside the page as JSON (``report.json``) while it is measured: after an interruption the same call
        goes on from there, and the page shows what there is. The simulation stays as it is.

        Args:
            batches: inputs by keyword, labels allowed.
            path: the page.
            before: what to show beside it: another simulation (of the model before training, say), measured on the same batches, or
                the JSON of an earlier report.
            metric: what sensitivity is measured by: a function of the outputs of each batch (by name) and the batches, greater is
                better; by default the SQNR of the outputs against the floating-point model. A plain function: results of a closure,
                whose values nobody can tell apart, are measured anew each time.
            sensitivity: measure each quantizer alone on and alone off, which is most of the work.
            rows: how many rows are seen; ``None``: all.
            sensitivity_rows: of these, how many for sensitivity; by default 16, with a metric all.
            title: of the page; the model's class by default.
            progress: draw bars, and say beforehand how long sensitivity will take.

        Returns:
            ``path``.

        Raises:
            ReportError: batches that are not what the model takes, a ``before`` that cannot be read, a name that is no page's.
            ImportError: ``plotly`` isn't installed; the extra ``quantsim[report]`` brings it.
            KeyboardInterrupt: it was interrupted; the page of what there is has been written.
        """
        return write_report(
            self,
            batches,
            path,
            before=before,
            metric=metric,
            sensitivity=sensitivity,
            rows=rows,
            sensitivity_rows=sensitivity_rows,
            title=title,
            progress=progress,
        )

    # ---- lower ----

    def lower(self, *, exact: bool = False) -> LoweredModel:
        """The simulation on int8 kernels: what it computes, on the integers that it simulates. The simulation stays as it is.

        Linears between 8-bit edges become exact products of integers (oneDNN, ``uint8 × int8`` accumulated in 32 bits), embeddings
        keep int8 rows, functions of an 8-bit edge become tables. Values agree before requantization; in it, one that lies within
        a float's rounding of a tie may land a step off.

        On a machine whose integer kernels are missing or not exact, products are computed in float32, with a warning that says why.

        Args:
            exact: give up requantization inside the kernels, so that outputs are the simulation's to the bit (uncompiled: a compiler
                rounds sums in another order).

        Raises:
            LoweringError: a quantizer that is not calibrated.
        """
        fallback = missing_for_int8(next(self.model.parameters()).device)
        if fallback:
            warnings.warn(f"lower(): products are computed in float32, no faster than the simulation: {fallback}", stacklevel=2)
        graph = lower_int8(self.graph, self.placements, packs=not fallback, exact=exact)
        return LoweredModel(self.model, graph, self.config, self.quantizers, fallback)

    def integer_only(self, force_dequant: ForceDequant = "none") -> IntegerModel:
        """The simulation on integers alone (I-BERT, for any encoder): every tensor between the embedding look-ups and the outputs.

        Products are exact in int32; rescales are multiplications and shifts; GELU, tanh, softmax and LayerNorm are integer polynomials
        and an integer square root (``quantsim.numerics.polynomial``); outputs are dequantized at the very end. Preset ``"ibert"``
        places the quantizers that it needs: symmetric, 8 bits, on what linears and attention products read. The simulation stays as it is.

        Args:
            force_dequant: ``"gelu"``, ``"softmax"``, ``"layernorm"`` or ``"nonlinear"`` (all) computes these in floating point between
                integers, to find what costs accuracy.

        Raises:
            IntegerError: a quantizer that is not calibrated, an edge without a scale of 8 bits, a floating-point input, or an op without an
                integer form; the message names it.
        """
        fallback = missing_for_int8(next(self.model.parameters()).device)
        names = {p.node.name: p.name for p in self.placements if p.role != "weight"}
        graph = integer_only(self.graph, force_dequant, kernel=not fallback, names=names)
        return IntegerModel(self.model, graph, self.config, self.quantizers, fallback)

    @contextmanager
    def integer_only_training(self, force_dequant: ForceDequant = "none") -> Iterator[None]:
        """Inside the ``with`` block, ``sim.model`` gives what :meth:`integer_only` would, bit for bit, with straight-through gradients.

        For integer-only fine-tuning (I-BERT's third stage). Weights and learning ranges are read anew at each forward; dropout does
        nothing.
        """
        forward = self.model.__dict__["forward"]
        kernel = not missing_for_int8(next(self.model.parameters()).device)
        forward.graph = IntegerOnlyTraining(self.graph, force_dequant, kernel=kernel)
        try:
            yield
        finally:
            forward.graph = self.graph

    # ---- export ----

    def export_onnx(
        self, path: str | Path, bias: Bias = "float", opset: int | None = None, *, quantize: bool = True, exact: bool = True
    ) -> dict[str, str]:
        """Write an ONNX file that computes what the simulation computes in evaluation, for integer runtimes.

        Every calibrated quantizer becomes ``QuantizeLinear`` and ``DequantizeLinear``::

            q = saturate(round(x / scale) + zero_point),   x_hat = (q - zero_point) * scale

        with a ``Clip`` before it where the grid ends within its type (5 bits in 8). Weights are stored as integers of 4, 8 or 16 bits
        behind a ``DequantizeLinear``, embeddings are looked up as integers. A quantizer that is off leaves its tensor in floating
        point. Inputs and outputs are the model's by name (all inputs, the optional ones too), batch and sequence of any size. The
        config and the versions are in the file's metadata (``quantsim.formats.onnx.read_metadata``), and
        ``quantsim.formats.onnx.compare_onnx`` compares the file with the simulation edge by edge.

        Args:
            path: the file. It appears when it is whole and checked; above 2 GB its tensors are in ``<path>.data``.
            bias: ``"float"``, as the simulation adds them, or ``"int32"``: at ``scale_x * scale_w``, as integer kernels add them,
                where input and weight of a linear or convolution have a grid. That differs from the simulation by half a step of it.
            opset: 18 or more; by default 20, and 21 where a type of 4 or 16 bits needs it.
            quantize: false writes the floating-point model alone (a clamped mask stays clamped), to go with encodings.
            exact: write softmax, norms, sums and functions of 8-bit edges as in ``quantsim.formats.onnx.exact``, so that ONNX Runtime gives
                the simulation's values to the bit where each edge between ops that sum has at most 8 bits (preset ``aimet``):
                weights are UINT8 at zero point 128, for ``uint8 × int8`` products saturate where there is no VNNI. False leaves single
                operators and INT8 weights, for compilers that look for those: rows near a decision may then fall on its other side.

        Returns:
            Each quantizer's placement → the ONNX tensor with its integers, or without ``quantize`` the tensor that it would quantize
            (of a weight, the initializer).

        Raises:
            OnnxError: no quantizer is calibrated, an opset too low, weights that are not float32, or an operator that ``torch.onnx``
                cannot write.
            ImportError: ``onnx`` or ``onnxscript`` isn't installed; the extra ``quantsim[onnx]`` brings them.
        """
        weights = dict(weights_of(self.graph))
        return export_onnx(path, self.graph, self.config, weights, bias=bias, opset=opset, quantize=quantize, exact=exact)

    # ---- save and load ----

    def save_pretrained(
        self, folder: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Write weights and ranges (``model.safetensors``) and ``config.json``, all at once or nothing, in the layout of the Hub.

        :meth:`from_pretrained` reads them, and the Auto classes of ``transformers`` where quantsim is imported. Weights that are
        computed (``torch.nn.utils.parametrize``) are written as their values.

        Args:
            tokenizer: is written beside, so that a ``pipeline`` finds it.
            metrics: what was measured; with them a model card, ``README.md``, is written, with their table where there are some.
        """
        card = None if metrics is None else model_card(type(self.model).__name__, self.config, self.quantizers, metrics)
        save_checkpoint(folder, self.model, self.config, self.quantizers, tokenizer=tokenizer, card=card)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, model: nn.Module | None = None, *, example_inputs: Mapping[str, Tensor] | None = None
    ) -> QuantSim:
        """Read what :meth:`save_pretrained` wrote, or ``save_pretrained`` of its model; nothing that is read is executed.

        Args:
            folder: the checkpoint's folder.
            model: an instance of the model's class, for classes that ``transformers`` does not have; its weights are replaced.
            example_inputs: a batch by keyword to trace with, where the saved simulation was given one; a checkpoint holds none.

        Raises:
            CheckpointError: a file that is missing, broken, changed, or not what this model needs.
        """
        checkpoint = read_checkpoint(folder)
        sim = cls(checkpoint.build(model), checkpoint.config, example_inputs, in_place=True)
        checkpoint.load_added(sim.model, sim.quantizers)
        return sim

    # ---- encodings of other programs ----

    def export_aimet_encodings(
        self, path: str | Path, version: str = "torch", *, tensor_names: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Write the ranges as an AIMET encodings file, whole or not at all.

        ``min`` and ``max`` in it are the ends of the grid, ``(quant_min - zero_point) * scale`` and ``(quant_max - zero_point) *
        scale``, moved by an ulp or two where AIMET's ``(max - min) / (quant_max - quant_min)`` would else miss the scale's last bit.

        Args:
            path: the file to write.
            version: ``"torch"``, the file that ``aimet_torch``'s ``load_encodings`` takes, by module and parameter; or by tensor
                of an ONNX file, ``"0.6.1"``, ``"1.0.0"`` or ``"2.0.0"``.
            tensor_names: with an ONNX version, the tensor's name for a placement's name, where they differ.

        Returns:
            Every quantizer that the file does not hold, by name, and why: the torch-side file has no place for the output of an
            op between modules (``matmul``, ``softmax``), unless it is a sum, product, quotient or concatenation that a module
            takes as its input.

        Raises:
            EncodingsError: no quantizer is calibrated, an unknown version, or tensor names that fit no quantizer or fit two.
        """
        return write_aimet_encodings(path, version, self.model, self.placements, self.quantizers, tensor_names)

    def load_aimet_encodings(
        self, path: str | Path, strict: bool = True, *, tensor_names: Mapping[str, str] | None = None
    ) -> LoadedEncodings:
        """Give quantizers the ranges of an AIMET encodings file in any of the four versions: all that it names, or none.

        Scale and zero point are the file's to the bit; a range is then fixed, or learning where its spec says so.

        Args:
            path: a file as :meth:`export_aimet_encodings` or AIMET writes it.
            strict: refuse a file with names that no quantizer here has, or without one of those that it could hold.
            tensor_names: as for :meth:`export_aimet_encodings`.

        Returns:
            What took a range, what was missing in the file, what has no place in such a file, and what of it is unknown here.

        Raises:
            EncodingsError: a file that is not one, values that mean nothing, bits, symmetry or channels that are not the
                quantizer's; no quantizer has changed then.
        """
        return load_aimet_encodings(path, self.model, self.placements, self.quantizers, strict, tensor_names)
