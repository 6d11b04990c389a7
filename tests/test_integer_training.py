"""IntegerTraining on whole models: nothing listed is left in float, runs are reproducible, memory is that of integers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    SqueezeBertConfig,
    SqueezeBertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from quantsim import ConfigError, FixedPointError, IntegerConfig, IntegerTraining, QuantSim
from quantsim.graph.example_inputs import example_inputs
from quantsim.kernels.integer_matmul import int8_kernel_is_exact
from quantsim.numerics.fused import fused_kernels
from quantsim.rewrites.integer_training import ROOM, IntegerOp
from tests.tiny import LABELS, VOCAB, tiny_batch, tiny_bert

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
IMAGE: dict[str, Any] = {"image_size": 16, "num_channels": 3, "initializer_range": 0.3}
GROUPS = {f"{name}_groups": 2 for name in ("q", "k", "v", "intermediate", "output")}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": tiny_bert,
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**TEXT)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=VOCAB, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=64, initializer_range=0.3)
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(**IMAGE, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ),
    # not looked at while this was built: grouped 1d convolutions in place of linears; depthwise convolutions and norms over channels
    "squeezebert": lambda: SqueezeBertForSequenceClassification(
        SqueezeBertConfig(**TEXT, **GROUPS, post_attention_groups=1, embedding_size=16)
    ),
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(**IMAGE, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], patch_size=2)
    ),
}
ALL_OPS = ("linear", "convolution", "layer_norm", "embedding", "matmul")
FLOAT_PRODUCTS = {
    *("linear addmm mm mv addmv convolution convolution_backward conv1d conv2d conv3d mkldnn_convolution".split()),
    *("layer_norm native_layer_norm native_layer_norm_backward embedding embedding_dense_backward".split()),
}


@cache
def _trained_in(name: str, bits: int) -> tuple[nn.Module, IntegerTraining]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    if bits == 8:
        return model, IntegerTraining(model, IntegerConfig(ops=ALL_OPS))
    training = copy.copy(_trained_in(name, 8)[1])  # the same graph with other bits
    training.model, training.config = copy.deepcopy(training.model), IntegerConfig(bits, bits, bits, ops=ALL_OPS)
    training.graph = training.model.forward.graph
    for op in training.model.modules():
        if isinstance(op, IntegerOp):
            op.config = training.config
    return model, training


def trained_in(name: str, bits: int = 8) -> tuple[nn.Module, IntegerTraining]:
    """A model and its integer form; traced once for all tests."""
    model, training = _trained_in(name, bits)
    model.zero_grad()
    return model.eval(), training


def labelled(model: nn.Module) -> dict[str, Tensor]:
    batch = example_inputs(model)
    return {**batch, "labels": torch.arange(len(next(iter(batch.values())))) % 2}


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Recorded(TorchDispatchMode):
    """Every ATen op that sees a floating-point tensor, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(x, Tensor) and x.is_floating_point() for x in args):
            self.seen[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


# ---- what is in integers ----


@pytest.mark.parametrize("name", MODELS)
def test_no_listed_op_is_left_in_float(name: str) -> None:
    """By the graph, and by what runs in a step: no product, convolution, norm or look-up sees a floating-point tensor."""
    model, training = trained_in(name)
    left = [n for n in training.graph.graph.nodes if n.op == "call_function" and "aten" in str(n.target)]
    assert not {str(n.target).split(".")[1] for n in left} & {*FLOAT_PRODUCTS, "matmul", "bmm"}
    integer = [d for d in training.decisions if d.form]
    assert len(integer) == len([n for n in training.graph.graph.nodes if n.op == "call_module" and str(n.target).startswith(ROOM)]) - 1
    with Recorded() as float_model:
        gradients(model, labelled(model))
    assert float_model.seen.keys() & FLOAT_PRODUCTS  # the test sees them where they are
    gradients(training.model, labelled(model))  # the first labels trace the loss, from the model's own forward
    if int8_kernel_is_exact():  # else integers are multiplied in float64
        with Recorded() as recorded:
            gradients(training.model.train(), labelled(model))
        assert set(recorded.seen) & FLOAT_PRODUCTS == set()


@pytest.mark.parametrize("name", MODELS)
def test_sixteen_bits_are_near_float(name: str) -> None:
    model, training = trained_in(name, bits=16)
    batch = labelled(model)
    expected, found = gradients(model, batch), gradients(training.model.eval(), batch)
    with torch.no_grad():
        torch.testing.assert_close(training.model(**batch).logits, model(**batch).logits, rtol=0, atol=5e-3)
    assert found.keys() == expected.keys()
    scale = max(float(g.norm()) for g in expected.values())
    assert max(float((found[key] - expected[key]).norm()) for key in expected) < 5e-3 * scale


def test_fewer_bits_are_further_away() -> None:
    batch, errors = tiny_batch(), []
    for bits in (4, 8, 12, 16):
        model, training = trained_in("bert", bits)
        with torch.no_grad():
            errors.append(float((training.model.eval()(**batch).logits - model(**batch).logits).norm()))
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 64 * errors[3]


def test_the_table_names_every_op_and_why() -> None:
    text = str(trained_in("bert")[1])
    assert text.startswith("26 ops in integers, 17 in float; weights 8 bits nearest")
    for line in ("bert.pooler.dense.output", "bert.encoder.layer.1.attention.self.softmax", "not a kind of op that is trained in integers"):
        assert line in text
    default = IntegerTraining(tiny_bert(num_hidden_layers=1), IntegerConfig(keep_float=("classifier.*",)))
    why = {d.name: d.reason for d in default.decisions if not d.form}
    assert why["bert.encoder.layer.0.attention.self.matmul"] == "ops has no 'matmul'"
    assert why["classifier.output"] == "keep_float has 'classifier.*'"


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"keep_float: 'classifer\.\*' matches no op; the nearest are .*classifier\.output"):
        IntegerTraining(tiny_bert(num_hidden_layers=1), IntegerConfig(keep_float=("classifer.*",)))
    with pytest.raises(ValueError, match="runs on a graph already"):
        IntegerTraining(QuantSim(tiny_bert(num_hidden_layers=1)).model)


class Unbatched(nn.Module):
    """A convolution along the batch, of one image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.conv(x.t())
        return output.t()


class Transposed(nn.Module):
    """A convolution that has no integer form here."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(4, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


def test_a_listed_op_without_an_integer_form_is_an_error_unless_left_in_float() -> None:
    batch = {"x": torch.randn(2, 4, 6)}
    with pytest.raises(ConfigError, match=r"no integer form for up\.output \(conv_transpose1d\); leave them in float with keep_float"):
        IntegerTraining(Transposed(), example_inputs=batch)
    assert not any(d.form for d in IntegerTraining(Transposed(), IntegerConfig(keep_float=("up.*",)), batch).decisions)
    with pytest.raises(ConfigError, match=r"no integer form for conv\.output \(conv1d\)"):
        IntegerTraining(Unbatched(), example_inputs={"x": torch.randn(3, 4)})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weight_bits": 3}, "weight_bits: 3; expected an integer from 4 to 16"),
        ({"activation_bits": 17}, "activation_bits: 17"),
        ({"gradient_bits": 8.0}, "gradient_bits: 8.0"),
        ({"gradient_rounding": "up"}, "gradient_rounding: 'up'; expected stochastic or nearest"),
        ({"ops": ("linaer",)}, r"ops: 'linaer'; .*nearest: linear"),
        ({"ops": "linear"}, "ops: 'linear'; expected a tuple"),
    ],
    ids=str,
)
def test_a_config_that_means_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IntegerConfig(**changes)


# ---- training ----


def test_parameters_are_shared_and_the_given_model_stays_in_float() -> None:
    model, training = trained_in("bert")
    assert isinstance(training.model, BertForSequenceClassification)
    assert [(n, id(p)) for n, p in training.model.named_parameters()] == [(n, id(p)) for n, p in model.named_parameters()]
    assert training.model.state_dict().keys() == model.state_dict().keys()
    assert not hasattr(model, ROOM)


@pytest.mark.parametrize("bits", [8, 16])
def test_the_loss_falls_as_in_float(bits: int) -> None:
    """Sixty steps of AdamW on one batch: the integers learn it too."""
    losses = {}
    for kind in ("float", "integers"):
        model, training = _trained_in("bert", bits)
        trained = copy.deepcopy(model if kind == "float" else training.model).train()
        for module in trained.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)
        torch.manual_seed(0)
        for _ in range(60):
            optimizer.zero_grad()
            loss = trained(**tiny_batch(), labels=LABELS).loss
            loss.backward()
            optimizer.step()
        losses[kind] = loss.item()
    assert losses["float"] < 0.05
    assert losses["integers"] < 0.1


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_a_seed_reproduces_a_step_on_any_number_of_threads() -> None:
    model, training = trained_in("bert")
    training.model.train()
    found = []
    for seed, count in ((3, 1), (3, 2), (3, 1), (4, 1)):
        torch.manual_seed(seed)
        with threads(count):
            found.append(gradients(training.model, {**tiny_batch(), "labels": LABELS}))
    names = [n for n, p in model.named_parameters() if p.ndim > 1]
    assert all(torch.equal(found[0][n], other[n]) for other in found[1:3] for n in found[0])
    assert not all(torch.equal(found[0][n], found[3][n]) for n in names)


@pytest.mark.slow  # its smaller twin is tests/numerics/test_fixed_point.py::test_fused_kernels_give_the_same_bits
@pytest.mark.parametrize("bits", [8, 16])
def test_fused_kernels_give_the_same_gradients_and_are_compiled_once(bits: int) -> None:
    _, training = trained_in("bert", bits)
    batch, found = {**tiny_batch(), "labels": LABELS}, []
    gradients(training.model.train(), batch)  # traces the loss
    for fused in (False, True):
        torch.manual_seed(0)
        with fused_kernels(fused) as works, torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            if fused and not works:
                pytest.skip("no C++ compiler")
            found.append(gradients(training.model, batch))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_evaluation_is_deterministic_and_draws_nothing() -> None:
    _, training = trained_in("bert")
    training.model.eval()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = training.model(**tiny_batch()).logits
    assert torch.equal(first, training.model(**tiny_batch()).logits)
    assert torch.equal(before, torch.get_rng_state())


def test_autocast_leaves_integers_as_they_are() -> None:
    _, training = trained_in("bert")  # all products are integer ones, so there is nothing left to cast
    training.model.eval()
    expected = training.model(**tiny_batch()).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(training.model(**tiny_batch()).logits, expected)


def test_a_gradient_that_is_not_finite_names_the_op() -> None:
    model, training = trained_in("bert")
    with pytest.raises(FixedPointError, match=r"classifier\.output, gradient: 8 of 8 values are NaN or infinite"):
        (training.model.train()(**tiny_batch()).logits.sum() * float("inf")).backward()
    with torch.no_grad():
        kept = model.bert.pooler.dense.weight.clone()
        model.bert.pooler.dense.weight[0, 0] = float("nan")
    try:
        with pytest.raises(FixedPointError, match=r"bert\.pooler\.dense\.output, weight: 1 of 256"):
            training.model(**tiny_batch())
    finally:
        with torch.no_grad():
            model.bert.pooler.dense.weight.copy_(kept)


def test_an_empty_batch_is_taken_where_the_float_model_takes_it() -> None:
    batch = {name: x[:0] for name, x in tiny_batch().items()}
    for bert in trained_in("bert")[0], trained_in("bert")[1].model:
        with pytest.raises(RuntimeError, match="reshape tensor of 0 elements"):  # BERT itself splits its heads with a -1
            bert(**batch)
    model, empty = Linears(), torch.zeros(0, 50, 64, requires_grad=True)
    for trained in (model, IntegerTraining(model, None, {"x": torch.randn(2, 50, 64)}).model.train()):
        y = trained(x=empty)
        assert y.shape == (0, 50, 64)
        y.sum().backward()
    assert not any(p.grad.any() for p in model.parameters())


def test_a_layer_of_zeros_and_a_channel_of_zeros() -> None:
    trained = copy.deepcopy(_trained_in("bert", 8)[1].model)
    with torch.no_grad():
        trained.bert.encoder.layer[0].output.dense.weight.zero_()
        trained.bert.encoder.layer[1].output.dense.weight[3].zero_()
    found = gradients(trained.train(), {**tiny_batch(), "labels": LABELS})
    assert all(g.isfinite().all() for g in found.values())
    assert found["bert.encoder.layer.0.output.dense.weight"].any()


def test_what_is_saved_is_the_models_own_checkpoint(tmp_path: Path) -> None:
    model, training = trained_in("bert")
    training.model.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())


# ---- memory ----


def kept_bytes(model: nn.Module, batch: dict[str, Tensor]) -> Counter[torch.dtype]:
    """Bytes that a forward keeps for its backward, by type, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, tuple[torch.dtype, int]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (x.dtype, storage.nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(**batch)
    counts: Counter[torch.dtype] = Counter()
    for dtype, size in found.values():
        counts[dtype] += size
    del output
    return counts


class Linears(nn.Module):
    """Linears and norms alone, each fed by a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(m for _ in range(3) for m in (nn.Linear(64, 64), nn.LayerNorm(64)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_is_kept_for_backward_is_the_integers() -> None:
    """At 8 bits a quarter of what float keeps (and the mapped weights), at 16 bits half of it."""
    model, batch = Linears(), {"x": torch.randn(64, 50, 64, requires_grad=True)}
    in_float = kept_bytes(model, batch)[torch.float32]
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    for bits, dtype in ((8, torch.int8), (16, torch.int16)):
        training = IntegerTraining(model, IntegerConfig(bits, bits, bits), batch)
        kept = kept_bytes(training.model, batch)
        activations = 6 * batch["x"].numel() * bits // 8
        assert activations <= kept[dtype] <= activations + (weights + 3 * 64) * bits // 8
        assert kept.total() <= 1.05 * (activations + weights * bits // 8) + 3 * 50 * 64 * 12  # S and r of a norm's rows
        assert activations / in_float == pytest.approx(bits / 32, rel=0.05)
