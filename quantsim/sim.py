"""QuantSim: the one object a user holds. Each method is a stage of the flow."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
import transformers  # its models are looked up when there is one: importing quantsim need not wait for them
from torch import Tensor, nn
from transformers.utils.generic import find_labels

from quantsim.config import ConfigError, QuantConfig
from quantsim.formats.aimet_config import is_aimet_config, read_aimet_config
from quantsim.formats.aimet_encodings import LoadedEncodings, load_aimet_encodings, write_aimet_encodings
from quantsim.formats.checkpoint import read_checkpoint, save_checkpoint
from quantsim.formats.description import METHOD
from quantsim.formats.model_card import model_card
from quantsim.formats.onnx import export_onnx
from quantsim.formats.onnx.edges import Bias
from quantsim.graph.forward import GraphForward, refuse_pickle, run_on_graph
from quantsim.graph.place import Placement, place
from quantsim.graph.trace import trace
from quantsim.kernels.cpu import missing_for_int8
from quantsim.lowered import IntegerModel, LoweredModel
from quantsim.post_training.bits import search_bits
from quantsim.post_training.layers import adjust_layers
from quantsim.post_training.smooth import smooth
from quantsim.quantizers.fake_quantizer import CalibrationError, FakeQuantizer, State, WeightQuantizer
from quantsim.quantizers.processes import on_every_process, world_size
from quantsim.quantizers.range_estimators import Statistics
from quantsim.report.coverage import coverage_table, summary
from quantsim.report.report import write_report
from quantsim.report.sensitivity import Metric
from quantsim.rewrites.clamp_mask import clamp_mask
from quantsim.rewrites.exact_products import exact_products
from quantsim.rewrites.insert_quantizers import ROOM, insert_quantizers, weights_of
from quantsim.rewrites.integer_only import ForceDequant, integer_only
from quantsim.rewrites.integer_only.training import IntegerOnlyTraining
from quantsim.rewrites.lower_int8 import lower_int8
from quantsim.rewrites.scale_channels import unscale_reads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLUGIN = "quantsim.hf"  # stands above, and is found through transformers' registry of quantization methods
Batch = Mapping[str, Tensor]
Data = Iterable[Batch] | Callable[..., Any]


class QuantSim:
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

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    >>> sim = QuantSim(BertForSequenceClassification(config).eval())
    >>> sim.compute_encodings([{"input_ids": torch.randint(0, 99, (4, 10))}])
    >>> sim.model(input_ids=torch.randint(0, 99, (2, 7))).logits.shape
    torch.Size([2, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        config: QuantConfig | str | Path | None = None,
        example_inputs: Batch | None = None,
        *,
        in_place: bool = False,
    ) -> None:
        if isinstance(model.__dict__.get("forward"), GraphForward):
            raise ValueError(f"{type(model).__name__} is a simulation already; give QuantSim the model that it was made from")
        self.config = resolve_config(config)
        self.model = model if in_place else copy.deepcopy(model)
        if example_inputs is not None:  # a training batch will do: labels are not traced
            labels = find_labels(type(model))  # type: ignore[no-untyped-call]
            example_inputs = {name: x for name, x in example_inputs.items() if name not in labels}
        self.graph = trace(self.model, example_inputs)
        if self.config.mask_clamp is not None:
            clamp_mask(self.graph, self.config.mask_clamp)
        if self.config.post_training.smooth is not None:
            unscale_reads(self.graph)
        self.placements: list[Placement] = place(self.graph, self.config)
        insert_quantizers(self.graph, self.placements)
        exact_products(self.graph, self.model.training)
        run_on_graph(self.model, self.graph)
        if isinstance(self.model, transformers.PreTrainedModel):
            import_module(PLUGIN)
            registry: Any = transformers.quantizers
            registry.AutoHfQuantizer.from_config({"quant_method": METHOD, "config": self.config.to_dict()}).attach(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """An independent copy without another trace; of its model alone, ``copy.deepcopy(sim.model)`` makes one too."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.config, new.model, new.graph = self.config, copy.deepcopy(self.model, memo), copy.deepcopy(self.graph, memo)
        nodes = {node.name: node for node in new.graph.graph.nodes}
        new.placements = [replace(p, node=nodes[p.node.name]) for p in self.placements]
        return new

    def __reduce__(self) -> NoReturn:
        refuse_pickle(self.model)

    # ---- quantizers ----

    @property
    def quantizers(self) -> dict[str, FakeQuantizer]:
        """Every quantizer by its placement's name, in the order of the graph."""
        found = (
            {q.name: q for q in self.model.get_submodule(ROOM).modules() if isinstance(q, FakeQuantizer)} if self._has_quantizers else {}
        )
        return {p.name: found[p.name] for p in self.placements if p.spec}

    @property
    def _has_quantizers(self) -> bool:
        return any(p.spec for p in self.placements)

    @contextmanager
    def quantizers_off(self) -> Iterator[None]:
        """Run in floating point inside the ``with`` block (a clamped mask stays clamped)."""
        states = {q: q.state for q in self.quantizers.values()}
        try:
            for quantizer in states:
                quantizer.state = State.OFF
            yield
        finally:
            for quantizer, state in states.items():
                quantizer.state = state

    def freeze_ranges(self) -> None:
        """Stop range learning: every calibrated quantizer keeps its present range."""
        for quantizer in self.quantizers.values():
            if quantizer.calibrated:
                quantizer.state = State.FIXED

    def range_parameters(self) -> list[nn.Parameter]:
        """The ranges that are being learned, for an optimizer group of their own."""
        return [p for q in self.quantizers.values() if q.state is State.LEARNING for p in (q.min, q.max)]

    # ---- calibrate ----

    @torch.no_grad()
    def compute_encodings(self, data: Data, *args: Any) -> None:
        """Calibrate: find a range for every quantizer. Weights need no data; activations see ``data`` with weights quantized.

        Where ``config.post_training`` asks for more, weights and biases are changed too: outliers are scaled down before, roundings
        learned and biases corrected after ranges are found, and then the activations' ranges are found again. ``data`` is kept in memory.

        Where ``torch.distributed`` runs more than one process, each calls this with batches of its own, none at all allowed
        on some, and all get the ranges that one process would find on all the batches: the first batch of every process in
        the order of ranks, then the second of each, and so on (the order matters to ``running_min_max`` alone).

        Args:
            data: an iterable of batches by keyword (a list, a ``DataLoader``), labels allowed and ignored; or a callable
                that is given the model (AIMET's form), and ``args`` after it.

        Raises:
            CalibrationError: no data, an empty batch, values that are not finite, or an attention mask that was never
                clamped, on any process; post-training in more than one. Ranges and weights are then what they were before.
        """
        quantizers = self.quantizers
        post = self.config.post_training
        if post:
            if world_size() > 1:
                raise CalibrationError(
                    f"config.post_training: {post}; expected one process, {world_size()} run. Calibrate in one, and load"
                )
            data, args = self._given(data, args), ()
        weights = {x: x.detach().clone() for x in self.model.state_dict(keep_vars=True).values()} if post else {}
        before = {q: (q.state, {name: x.clone() for name, x in q.range_tensors().items()}) for q in quantizers.values()}
        training = self.model.training
        try:
            self.model.eval()
            if post.smooth is not None:
                smooth(self.graph, data, post.smooth)  # type: ignore[arg-type]  # a list, for there is post-training
            self._find_ranges(data, args)
            if post.adaround or post.bias_correction:
                adjust_layers(self.graph, data, rounding_steps=post.adaround, biases=post.bias_correction)  # type: ignore[arg-type]
                self._find_ranges(data, args, weights=False)
        except BaseException:
            with torch.no_grad():
                for x, value in weights.items():
                    x.copy_(value)
            for quantizer, (state, tensors) in before.items():
                quantizer.restore(state, tensors)
            raise
        finally:
            self.model.train(training)

    def _find_ranges(self, data: Data, args: Sequence[Any], *, weights: bool = True) -> None:
        """A range for every activation, after one for every weight."""
        activations = [q for q in self.quantizers.values() if not isinstance(q, WeightQuantizer)]
        everyone = on_every_process(lambda: self._estimate(activations, data, args, weights), CalibrationError)
        for quantizer, statistics in zip(activations, zip(*everyone, strict=True), strict=True):
            quantizer.estimator.merge(statistics)
            quantizer.finish_estimating()

    def _estimate(self, activations: Sequence[FakeQuantizer], data: Data, args: Sequence[Any], weights: bool) -> list[Statistics]:
        """Finish the weights, send ``data`` through the model, and say what each of the activations' estimators keeps of it."""
        for weight_quantizer, weight in weights_of(self.graph) if weights else ():
            weight_quantizer.state = State.ESTIMATING
            weight_quantizer.observe(weight)
            weight_quantizer.finish_estimating()
        for quantizer in activations:
            quantizer.state = State.ESTIMATING
        if callable(data):
            data(self.model, *args)
        else:
            for inputs in self._inputs(data):
                self.model(**inputs)
        return [quantizer.estimator.statistics() for quantizer in activations]

    def _given(self, data: Data, args: Sequence[Any]) -> list[Batch]:
        """The inputs that ``data`` gives the graph, to be gone over more than once."""
        if not callable(data):
            return list(self._inputs(data))
        given: list[Batch] = []
        forward = self.model.__dict__["forward"]
        forward.graph = lambda **inputs: given.append(inputs) or self.graph(**inputs)  # type: ignore[func-returns-value]
        try:
            with self.quantizers_off():
                data(self.model, *args)
        finally:
            forward.graph = self.graph
        if not given:
            raise CalibrationError("the callable never called the model that it was given")
        return given

    def _inputs(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """What the graph takes of each batch."""
        device = next(self.model.parameters()).device
        inputs = [str(node.target) for node in self.graph.graph.find_nodes(op="placeholder")]
        count = 0
        for count, batch in enumerate(batches, 1):
            if not isinstance(batch, Mapping):
                raise CalibrationError(
                    f"batch {count - 1} is a {type(batch).__name__}; expected inputs by keyword, as a tokenizer gives them"
                )
            taken = {name: x.to(device) for name, x in batch.items() if name in inputs}
            if any(x.numel() == 0 for x in taken.values()):
                shapes = {name: list(x.shape) for name, x in taken.items()}
                raise CalibrationError(f"batch {count - 1} is empty: {shapes}")
            yield taken
        if not count and world_size() == 1:  # of several processes some may have none
            raise CalibrationError("no batches to calibrate with; a DataLoader or generator that was used up before gives none")

    def search_bits(
        self,
        batches: Iterable[Batch],
        *,
        edges: int | None = None,
        average: float | None = None,
        bits: int = 16,
        metric: Metric | None = None,
    ) -> QuantConfig:
        """This config with more bits for the activations that gain most by it; calibrate first, and afterwards a new simulation with it.

        Args:
            batches: inputs by keyword; a few rows are enough for the default metric.
            edges, average: the budget: so many edges, or so many bits on average over all activations.
            bits: what an edge gets.
            metric: of the outputs of each batch and the batches, greater is better; by default the SQNR of the outputs in dB.

        Raises:
            ConfigError: not one budget, one that means nothing, or no calibrated activation.

        >>> sim = QuantSim(model)  # doctest: +SKIP
        >>> sim.compute_encodings(batches)  # doctest: +SKIP
        >>> better = QuantSim(model, sim.search_bits(batches, edges=6))  # doctest: +SKIP
        >>> better.compute_encodings(batches)  # doctest: +SKIP
        """
        given = list(self._inputs(batches)) if metric is None else list(batches)  # a metric may want the labels
        rules = search_bits(self.graph, self.quantizers, given, edges=edges, average=average, bits=bits, metric=metric)
        return self.config.with_rules(*rules)

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

    def export_onnx(self, path: str | Path, bias: Bias = "float", opset: int | None = None, *, quantize: bool = True) -> dict[str, str]:
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

        Returns:
            Each quantizer's placement → the ONNX tensor with its integers, or without ``quantize`` the tensor that it would quantize
            (of a weight, the initializer).

        Raises:
            OnnxError: no quantizer is calibrated, an opset too low, weights that are not float32, or an operator that ``torch.onnx``
                cannot write.
            ImportError: ``onnx`` or ``onnxscript`` isn't installed; the extra ``quantsim[onnx]`` brings them.
        """
        weights = dict(weights_of(self.graph))
        return export_onnx(path, self.graph, self.config, weights, bias=bias, opset=opset, quantize=quantize)

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
    def from_pretrained(cls, folder: str | Path, model: nn.Module | None = None) -> QuantSim:
        """Read what :meth:`save_pretrained` wrote, or ``save_pretrained`` of its model; nothing that is read is executed.

        Args:
            folder: the checkpoint's folder.
            model: an instance of the model's class, for classes that ``transformers`` does not have; its weights are replaced.

        Raises:
            CheckpointError: a file that is missing, broken, changed, or not what this model needs.
        """
        checkpoint = read_checkpoint(folder)
        sim = cls(checkpoint.build(model), checkpoint.config, in_place=True)
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

    def __repr__(self) -> str:
        return f"QuantSim({type(self.model).__name__}, {self.config.name}: {summary(self.placements)})"

    def __str__(self) -> str:
        return coverage_table(self.graph, self.placements, self.quantizers)


def resolve_config(config: QuantConfig | str | Path | None) -> QuantConfig:
    """A config from itself, a preset's name, or the path of a JSON file in our form or in AIMET's."""
    if config is None:
        return QuantConfig.preset("aimet")
    if isinstance(config, QuantConfig):
        return config
    if str(config).endswith(".json") or Path(config).exists():
        return read_aimet_config(config) if is_aimet_config(config) else QuantConfig.from_json(config)
    if isinstance(config, Path):
        raise ConfigError(f"{config}: no such file")
    return QuantConfig.preset(config)
