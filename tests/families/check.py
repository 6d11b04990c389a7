"""What is asked of every family and head: traced, placed, calibrated, trained a step, saved and loaded, lowered."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, fx, nn
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from quantsim import QuantSim
from quantsim.graph.example_inputs import MASK, example_inputs
from quantsim.graph.roles import HIDES, MASK_ADD, PROBS, SIZES_ALONE, Roles, is_float
from quantsim.quantizers.fake_quantizer import FakeQuantizer, WeightQuantizer
from quantsim.rewrites.insert_quantizers import ROOM
from tests.families.configs import Family

HEADS = {  # the name in the table: transformers' mapping from model_type to classes
    "sequence classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "masked LM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "multiple choice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    "image classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "feature extraction": modeling_auto.MODEL_MAPPING_NAMES,
}
AUTO = {head: "AutoModelFor" + "".join(word[0].upper() + word[1:] for word in head.split()) for head in HEADS} | {
    "feature extraction": "AutoModel"
}
"""The class of transformers that reads a checkpoint of each head."""

LEAST_SCORE = -1000.0  # of random weights; a mask that was not clamped lies at -1e4 or below


@dataclass(frozen=True, eq=False)
class Case:
    """A model class of a family."""

    family: Family
    head: str
    architecture: str

    def __str__(self) -> str:
        return f"{self.family.name}, {self.architecture}"


@dataclass(frozen=True)
class Found:
    """What a simulation of a case holds.

    Attributes:
        activations, weights: numbers of quantizers, a quantizer that serves several places once.
        mask: how the attention mask is written, where there is one.
        excused: the reason of edges without a quantizer → how many have it.
        sqnr: of the outputs that are floating-point, the lowest, quantized against not quantized, in dB.
        in_evaluation: traced as it evaluates, for its training forward cannot be traced.
    """

    activations: int
    weights: int
    mask: str
    excused: Counter[str]
    sqnr: float
    in_evaluation: bool


def cases(family: Family) -> list[Case]:
    """Every class that transformers offers for the family's ``model_type`` among the heads; of a family that nobody named, two."""
    found = []
    for head, mapping in HEADS.items():
        classes = mapping.get(family.model_type, ())
        for name in (classes,) if isinstance(classes, str) else classes:
            found.append(Case(family, head, name))
    return found if family.named else found[:1] + found[1:][-1:]


def build(case: Case) -> nn.Module:
    """The model with random weights, those that are initialized to 0 or 1 among them."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.family.model_type, **{**case.family.base, **case.family.config})
    model: nn.Module = getattr(transformers, case.architecture)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1 or p.std() == 0:
                p.add_(0.1 * torch.randn_like(p))
    return model


def batches(model: nn.Module, length: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The example, padded; and a batch without padding, short enough that every token sees every other."""
    padded = example_inputs(model)
    ids = padded.get("input_ids")
    short = {name: x.flip(0) for name, x in padded.items()}
    if ids is not None:
        short = {name: x.narrow(ids.ndim - 1, 0, length) for name, x in short.items()}
    if MASK in short:
        short[MASK] = torch.ones_like(short[MASK])
    return padded, short


def labels_for(case: Case, batch: dict[str, Tensor], classes: int) -> dict[str, Tensor]:
    first = next(iter(batch.values()))
    rows, length = first.shape[0], first.shape[-1]
    if case.head in ("sequence classification", "multiple choice", "image classification"):
        labels = {"labels": torch.arange(rows) % 2}
    elif case.head == "question answering":
        labels = {"start_positions": torch.arange(rows) % length, "end_positions": torch.arange(rows) % length}
    elif case.head in ("token classification", "masked LM"):
        labels = {"labels": torch.randint(0, classes, (rows, length))}
    else:
        labels = {}
    return labels


# ---- the check ----


def check(case: Case, *, reload: bool = True) -> Found:
    """Put a case through the flow.

    Args:
        reload: save and load too, which traces once more.

    Raises:
        AssertionError: a step did not give what it is to give; anything else is the library's own refusal.
    """
    model = build(case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sim = QuantSim(model)
    padded, short = batches(model, case.family.sees)
    off_is_bitwise(sim, model, short)
    every_edge_is_placed_or_excused(sim)
    every_parameter_has_one_quantizer(sim)
    sim.compute_encodings([padded, short])
    mask = mask_is_clamped(sim, MASK in padded)
    sqnr = quantized_is_near(sim, padded)
    trains_a_step(sim, case, padded)
    if reload:
        loads_what_was_saved(sim, case, padded)
    own = sim.quantizers.values()
    weights = sum(isinstance(q, WeightQuantizer) for q in own)
    excused = Counter(p.reason for p in sim.placements if p.spec is None)
    return Found(len(own) - weights, weights, mask, excused, sqnr, any("traced as it evaluates" in str(w.message) for w in caught))


def outputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in model(**batch).items() if isinstance(x, Tensor)}


@torch.no_grad()
def off_is_bitwise(sim: QuantSim, model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Before calibration every quantizer is off. The model is run with the attention that is traced; nothing is masked."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    expected, actual = outputs(model, batch), outputs(sim.model, batch)
    assert expected.keys() == actual.keys()
    for name, x in expected.items():
        assert torch.equal(actual[name], x), f"{name} differs by {(actual[name] - x).abs().max():.3g} with quantizers off"


def every_edge_is_placed_or_excused(sim: QuantSim) -> None:
    """Read from the simulated graph itself: what computes is behind an activation quantizer, or its placement says why it isn't."""
    roles = Roles(sim.graph)
    listed = {p.node: p for p in sim.placements if p.role != "weight"}
    names = Counter(p.name for p in sim.placements if p.role != "weight")
    assert not (twice := [name for name, count in names.items() if count > 1]), f"one name for several places: {twice}"
    for node in roles.nodes:
        if roles.op[node] in ("get_attr", "placeholder", "dropout", "module") or not is_float(node) or roles.keeps_grid(node):
            continue
        if node in listed and listed[node].spec is None:
            assert listed[node].reason, f"{listed[node].name}: no quantizer and no reason"
            continue
        if quantized(node, sim.graph) or roles.from_ids_alone(node):
            continue
        assert roles.sources[node] == {"parameter"}, f"{node}: {node.target} computes an edge that no placement names"


def quantized(node: fx.Node, graph: fx.GraphModule) -> bool:
    """Everything that reads the node's values reads them behind a quantizer."""
    return bool(node.users) and all(quantizer_of(user, graph) or user.target in SIZES_ALONE for user in node.users)


def quantizer_of(node: fx.Node, graph: fx.GraphModule) -> FakeQuantizer | None:
    module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, FakeQuantizer) else None


def every_parameter_has_one_quantizer(sim: QuantSim) -> None:
    """Each parameter that the graph reads and that is no bias, scalar or excused; tied names are one parameter."""
    own = {name: p for name, p in sim.model.named_parameters(remove_duplicate=False) if not name.startswith(ROOM)}
    excused = {p.name for p in sim.placements if p.role == "weight" and p.spec is None}
    found: dict[int, set[FakeQuantizer]] = {}
    read: dict[int, str] = {}
    for node in sim.graph.graph.find_nodes(op="get_attr"):
        parameter = own.get(str(node.target))
        if parameter is None or sum(size > 1 for size in parameter.shape) < 2 or node.target in excused:
            continue
        read[id(parameter)] = str(node.target)
        for user in node.users:
            quantizers = [quantizer_of(user, sim.graph), *(quantizer_of(after, sim.graph) for after in user.users)]
            own_quantizers = {q for q in quantizers if isinstance(q, WeightQuantizer)}
            assert own_quantizers, f"{node.target} is read by {user} without a quantizer"
            found.setdefault(id(parameter), set()).update(own_quantizers)
    for key, quantizers_of_one in found.items():
        assert len(quantizers_of_one) == 1, f"{read[key]}: {len(quantizers_of_one)} quantizers"


def mask_is_clamped(sim: QuantSim, masked: bool) -> str:
    """Every attention's mask sum has a quantizer whose range is one of scores; how the mask is written."""
    roles = Roles(sim.graph)
    sums = [p for p in sim.placements if p.attention == MASK_ADD]
    attentions = sum(p.attention == PROBS for p in sim.placements)
    if masked:
        assert len(sums) == attentions, f"{attentions} attentions, {len(sums)} of them with a mask"
        assert attentions or "softmax" not in roles.op.values(), "no attention was recognized"
    for p in sums:
        assert p.spec is None or (low := sim.quantizers[p.name].min.item()) > LEAST_SCORE, f"{p.name} calibrated down to {low:.3g}"
    kinds = set()
    for p in sums:
        index = roles.mask_operand(p.node)
        mask = p.node.args[index] if index is not None else None
        assert isinstance(mask, fx.Node)
        written = "added" if mask.target is torch.ops.aten.clamp.default else "filled"
        kinds.add(written if roles.sources[mask] else "of constants")
    return " and ".join(sorted(kinds)) or ("none" if attentions else "no softmax attention")


@torch.no_grad()
def quantized_is_near(sim: QuantSim, batch: dict[str, Tensor]) -> float:
    """The least signal-to-noise ratio of an output, in dB; quantizing changes every output and destroys none."""
    found = outputs(sim.model, batch)
    with sim.quantizers_off():
        exact = outputs(sim.model, batch)
    ratios = []
    for name, x in exact.items():
        if x.is_floating_point() and x.numel() > 1:
            seen = x > HIDES  # a head may hide the logits of some tokens
            noise, x = (found[name] - x)[seen], x[seen]
            assert noise.isfinite().all(), f"{name} is not finite when quantized"
            assert noise.any(), f"{name}: quantizing changed nothing"
            ratios.append(float(10 * torch.log10(x.square().sum() / noise.square().sum())))
    assert min(ratios) > 6, f"quantized outputs keep {min(ratios):.1f} dB"
    return min(ratios)


def trains_a_step(sim: QuantSim, case: Case, batch: dict[str, Tensor]) -> None:
    """Gradients reach every weight that the graph reads and every range; a step moves them and the loss."""
    sim.model.train()
    labels = labels_for(case, batch, sim.model.config.vocab_size if case.head == "masked LM" else 2) if sim.model.forward.labels else {}
    ranges = sim.range_parameters()
    weights = [p for name, p in sim.model.named_parameters() if not name.startswith(ROOM)]
    output = sim.model(**batch, **labels)
    with_loss = bool(labels) and "loss" in output
    loss = output.loss if with_loss else sum(x.square().mean() for x in output.values() if isinstance(x, Tensor) and x.is_floating_point())
    assert with_loss or not labels, "labels give no loss"
    loss.backward()
    reached = [p for p in weights if p.grad is not None]
    untouched = [name for name, q in sim.quantizers.items() if q.min.grad is None or not q.min.grad.isfinite().all()]
    frozen = {name for name, p in sim.model.named_parameters() if not p.requires_grad}
    assert set(untouched) <= frozen, f"no finite gradient of the ranges of {untouched}"
    assert all(p.grad.isfinite().all() for p in reached), "a weight's gradient is not finite"
    assert {id(p) for p in reached} >= {id(p) for p in sim.graph.parameters() if p.requires_grad and p not in set(ranges)} - unread(sim)
    before = [p.detach().clone() for p in (*reached, *ranges)]
    torch.optim.Adam([*reached, *ranges], lr=1e-3).step()
    moved = sum(not torch.equal(a, b) for a, b in zip(before, (*reached, *ranges), strict=True))
    assert moved > len(before) / 2, f"a step moved {moved} of {len(before)} parameters"
    sim.model.eval()


def unread(sim: QuantSim) -> set[int]:
    """Parameters that lie in the graph's modules and that no node reads."""
    read = {str(node.target) for node in sim.graph.graph.find_nodes(op="get_attr")}
    return {id(p) for name, p in sim.graph.named_parameters(remove_duplicate=False) if name not in read}


@torch.no_grad()
def loads_what_was_saved(sim: QuantSim, case: Case, batch: dict[str, Tensor]) -> None:
    """Both readers, ours and transformers' Auto class of the head, give a model of the class with the same outputs, bit for bit."""
    expected = outputs(sim.model, batch)
    auto = getattr(transformers, AUTO[case.head])
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sim.save_pretrained(folder)
        read = {"QuantSim": QuantSim.from_pretrained(folder).model, AUTO[case.head]: auto.from_pretrained(folder)}
    for reader, model in read.items():
        assert type(model).__name__ == case.architecture, f"{reader} read a {type(model).__name__}"
        actual = outputs(model, batch)
        assert actual.keys() == expected.keys()
        for name, x in expected.items():
            assert torch.equal(actual[name], x), f"{name} differs after {reader} read what was saved"
