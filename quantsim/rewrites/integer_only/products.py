"""Look-ups and products: 8-bit integers, summed in 32 bits."""

from __future__ import annotations

import torch
from torch import fx

from quantsim.graph.roles import WEIGHTS
from quantsim.kernels.int8_matmul import LARGEST_AFFINE_SUM, LARGEST_SUM, affine_matmul, int8_matmul
from quantsim.numerics.affine import quantize
from quantsim.numerics.dyadic import INT32_MAX
from quantsim.quantizers.exact_linear import is_int8_weight
from quantsim.quantizers.fake_quantizer import WeightQuantizer
from quantsim.quantizers.in_graph import quantizer_of
from quantsim.rewrites.integer_only.arguments import constant, eight_bits
from quantsim.rewrites.integer_only.builder import FACTOR_BITS, Builder, unsupported
from quantsim.rewrites.integer_only.values import Channels, Ints, Value

aten = torch.ops.aten


def embedding(b: Builder, node: fx.Node) -> Value:
    """Rows of integers: int8 where the quantizer has one scale of 8 bits or fewer, else int32 with 16 bits."""
    weight, ids = constant(b, node, 0), b.plain(node.args[1], node)  # type: ignore[arg-type]
    reader = next(iter(node.users), None)
    quantizer = quantizer_of(reader, b.source)
    if isinstance(quantizer, WeightQuantizer) and quantizer.spec.bits <= 8:
        params = quantizer.affine_params()
        dtype = torch.int8 if params.quant_min < 0 else torch.uint8
        zero_point, scale = int(params.zero_point), float(params.scale)
        bound = max(abs(params.quant_min - zero_point), abs(params.quant_max - zero_point))
        q = b.worked_out(quantizer, weight, lambda: quantize(weight, params).to(dtype))
        rows = b.keep(q, f"{quantizer.name}.rows")
        return Ints(b.emit(aten.embedding.default, rows, ids), scale, bound, zero_point, dtype)
    if isinstance(quantizer, WeightQuantizer):
        weight = quantizer(weight.clone())  # a quantizer of rows writes over what it is given
    scale = b.scale_for(float(weight.abs().max()), FACTOR_BITS)
    q = (weight.double() / scale).round().to(torch.int32)
    return Ints(b.emit(aten.embedding.default, b.keep(q), ids), scale, int(q.abs().max()))


def linear(b: Builder, node: fx.Node) -> Value:
    """``q_x @ q_w.T`` in int32; scales, zero point and bias follow at the next rescale."""
    x = eight_bits(b, node, 0)
    source = node.args[WEIGHTS["linear"].index]
    quantizer = quantizer_of(source, b.source)
    if not isinstance(quantizer, WeightQuantizer):
        raise unsupported(node, "its weight has no quantizer; integer products need one: symmetric, 8 bits or fewer")
    if not is_int8_weight(quantizer.spec):
        raise unsupported(node, f"{quantizer.name} is {quantizer.spec}; an integer product needs symmetric weights of 8 bits or fewer")
    params = quantizer.affine_params()
    q = quantize(constant(b, node, WEIGHTS["linear"].index), params).to(torch.int8)  # [out, in]
    sums, sizes = q.sum(1).double(), q.to(torch.int16).abs().sum(1).double()
    scale = (params.scale.double() * x.scale).expand(len(q))
    bias = constant(b, node, 2).double() if len(node.args) > 2 and node.args[2] is not None else torch.zeros(len(q), dtype=torch.float64)
    most = 255 if x.dtype == torch.uint8 else 128
    bound = sizes * most
    if float(bound.max()) > INT32_MAX:
        raise unsupported(node, f"a sum over {q.shape[1]} products may overflow 32 bits")
    stored = b.emit(aten.t.default, b.keep(q, f"{quantizer.name}.rows"))  # [out, in] -> [in, out]
    product = b.emit(int8_matmul, x.node, stored, b.kernel)
    return Channels(product, scale, bias - x.zero_point * scale * sums, bound)


def matmul(b: Builder, node: fx.Node) -> Value:
    """A product of two 8-bit edges, in int32."""
    left, right = eight_bits(b, node, 0), eight_bits(b, node, 1)
    length = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    plain = left.zero_point == right.zero_point == 0 and right.dtype == torch.int8
    if not isinstance(length, int):  # the number of keys
        length = LARGEST_SUM if plain else LARGEST_AFFINE_SUM
    bound = length * left.bound * right.bound
    if bound > INT32_MAX:
        raise unsupported(node, f"a sum over {length} products may overflow 32 bits")
    if plain:
        return Ints(b.emit(int8_matmul, left.node, right.node, b.kernel), left.scale * right.scale, bound)
    product = b.emit(affine_matmul, left.node, right.node, left.zero_point, right.zero_point, b.kernel)
    return Ints(product, left.scale * right.scale, bound)
