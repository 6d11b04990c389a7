"""Calibration: a range for every quantizer, what post-training does beside, and bits by search."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import find_labels

from quantsim.config import QuantConfig
from quantsim.post_training.bits import search_bits
from quantsim.post_training.layers import adjust_layers
from quantsim.post_training.smooth import smooth
from quantsim.quantizers.fake_quantizer import CalibrationError, FakeQuantizer, State, WeightQuantizer
from quantsim.quantizers.processes import on_every_process, world_size
from quantsim.quantizers.range_estimators import Statistics
from quantsim.report.sensitivity import Metric
from quantsim.rewrites.insert_quantizers import weights_of
from quantsim.sim.simulation import Batch, Data, Simulation


class Calibration(Simulation):
    """A simulation that finds its ranges."""

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
        training = [module for module in self.model.modules() if module.training]
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
            for module in training:  # each its own mode, not that of the whole model
                module.training = True

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
        forward = inspect.signature(type(self.model).forward).parameters
        takes = forward.keys() - inputs - set(find_labels(type(self.model)))  # type: ignore[no-untyped-call]
        count = 0
        for count, batch in enumerate(batches, 1):
            if not isinstance(batch, Mapping):
                raise CalibrationError(
                    f"batch {count - 1} is a {type(batch).__name__}; expected inputs by keyword, as a tokenizer gives them"
                )
            for name, x in batch.items():
                if name in inputs and x is not None and not isinstance(x, Tensor):
                    raise CalibrationError(
                        f"batch {count - 1}: {name} is a {type(x).__name__}; expected a tensor (of a tokenizer by return_tensors='pt')"
                    )
            if untraced := [name for name, x in batch.items() if name in takes and isinstance(x, Tensor)]:
                warnings.warn(
                    f"{untraced[0]}: left out of the calibration, for the model was traced with {', '.join(inputs)}; to have it, "
                    "QuantSim(…, example_inputs=batch)",
                    stacklevel=6,
                )
                takes -= set(untraced)
            taken = {name: x.to(device) for name, x in batch.items() if name in inputs and x is not None}
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
