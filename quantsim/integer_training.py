"""IntegerTraining: a model whose forward and backward are computed in integers."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn
from transformers.utils.generic import find_labels

from quantsim.graph.forward import GraphForward, run_on_graph
from quantsim.graph.trace import trace
from quantsim.rewrites.integer_training import Decision, IntegerConfig, decide, decision_table, integer_training


class IntegerTraining:
    """Fine-tuning in integers of 4 to 16 bits (Tayaranian et al., arXiv 2209.09815).

    Linear layers, convolutions, LayerNorms and embeddings, and by option the products of attention, map weights, activations and
    gradients to integers that share exponents (those of a token, of a weight's output, or of a tensor), multiply them exactly, and
    map the result back; the weights that an optimizer updates stay in FP32.

    Args:
        model: a ``transformers`` encoder, with or without a head. It keeps its own forward, in float.
        config: bits, rounding and which ops; 8 bits by default.
        example_inputs: a batch by keyword to trace with; made from the model's config by default.

    Attributes:
        model: an instance of the same class that takes and gives what the model does, ``labels`` and ``loss`` included. Its parameters
            and buffers **are** those of the model that was given: to train one is to train the other.
        graph: what its forward runs.
        decisions: every op that computes: its integer form, or why it has none. ``print(training)`` shows them.

    Random numbers of a forward and its backward follow from one number that torch's default generator gives, from the op and from the
    place in the tensor: ``torch.manual_seed`` reproduces them, whatever the number of threads. In eval mode everything is rounded to
    the nearest, and evaluation is deterministic; where a tensor has one exponent, a row's result hangs on the rows beside it.

    A forward or backward that meets NaN or infinity in an operand raises :class:`FixedPointError`, which names op and operand.

    Raises:
        ConfigError: an op of a listed kind without an integer form, or a pattern that matches nothing.
        TraceError: the model cannot be traced exactly.

    >>> import torch
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    >>> training = IntegerTraining(BertForSequenceClassification(config), IntegerConfig(gradient_bits=16))
    >>> optimizer = torch.optim.AdamW(training.model.parameters(), lr=1e-3)
    >>> training.model(input_ids=torch.randint(0, 99, (2, 7)), labels=torch.tensor([0, 1])).loss.backward()
    >>> optimizer.step()
    """

    def __init__(self, model: nn.Module, config: IntegerConfig | None = None, example_inputs: Mapping[str, Tensor] | None = None) -> None:
        if isinstance(model.__dict__.get("forward"), GraphForward):
            raise ValueError(f"{type(model).__name__} runs on a graph already; give IntegerTraining the model that it was made from")
        self.config = config or IntegerConfig()
        if example_inputs is not None:  # a training batch will do: labels are not traced
            labels = find_labels(type(model))  # type: ignore[no-untyped-call]
            example_inputs = {name: x for name, x in example_inputs.items() if name not in labels}
        shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared)
        self.graph = trace(self.model, example_inputs)
        self.decisions: list[Decision] = decide(self.graph, self.config)
        integer_training(self.graph, self.decisions, self.config)
        run_on_graph(self.model, self.graph)

    def __repr__(self) -> str:
        count = sum(d.form is not None for d in self.decisions)
        return f"IntegerTraining({type(self.model).__name__}: {count} ops in integers, {self.config})"

    def __str__(self) -> str:
        return decision_table(self.decisions, self.config)
