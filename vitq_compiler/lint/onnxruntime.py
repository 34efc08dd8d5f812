"""The rules of ONNX Runtime on the CPU: it runs every valid graph, and these in integer kernels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from vitq_compiler.lint.model import Model, Node, Value
from vitq_compiler.lint.products import OPERANDS, products
from vitq_compiler.lint.quantization import GEMMS, behind, code_type, is_dequantize, is_layout, quantizers, quantizes
from vitq_compiler.lint.rule import SILENT, WARNING, Fault, Platform, Rule
from vitq_compiler.pairs import INT16


def _zero_points(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in quantizers(model):
        if node.input(2) is None:
            yield Fault(node, "no zero point")


def _signed_activations(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in quantizes(model):
        if node.output.dtype == TensorProto.INT8 and not model.is_static(node.input(0)):
            yield Fault(node, "quantizes an activation to INT8")


def _is_dequantized(value: Value | None, dtype: int) -> bool:
    node = value.producer if value is not None else None
    return is_dequantize(node) and node is not None and code_type(node) == dtype


def _integer_gemms(model: Model) -> Iterator[Node]:
    return (node for node in model.find("Gemm") if _is_dequantized(node.input(1), TensorProto.INT8))


def _float_biases(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in _integer_gemms(model):
        bias = node.input(2)
        if bias is not None and not _is_dequantized(bias, TensorProto.INT32):
            yield Fault(node, "a float bias on an integer weight")


def _float_activations(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in _integer_gemms(model):
        activation = node.input(0)
        if activation is None or not is_dequantize(activation.producer):
            yield Fault(node, "an integer weight, but a float activation")


def _saturating_pairs(model: Model, platform: Platform) -> Iterator[Fault]:
    if platform.cpu != "any":
        return
    for product in products(model):
        pair, output = product.overflowing
        if pair.size:
            pairs = -(-product.weight.shape[0] // 2) * product.weight.shape[1]
            channels = len(set(output.tolist()))
            yield Fault(
                product.node,
                f"{pair.size} of {pairs} pairs of weights, in {channels} of {product.weight.shape[1]} outputs, can sum to more than "
                f"{INT16.max}; the worst to {product.worst}",
            )
    for node in _mixed_products(model):
        yield Fault(node, "multiplies UINT8 by INT8 codes that are both known only at run time")


def _wrapping_pairs(model: Model, platform: Platform) -> Iterator[Fault]:
    for product in products(model) if platform.cpu == "any" else ():
        if product.wrapping:
            yield Fault(product.node, f"two codes of -128 meet {product.wrapping} times")


def _mixed_products(model: Model) -> Iterator[Node]:
    """Integer operators on a UINT8 and an INT8 tensor that are both computed, unless the first are probabilities: these sum to one."""
    for node in model.nodes:
        if node.op not in OPERANDS or (place := OPERANDS[node.op][0]) is None:
            continue
        first, second = node.input(place), node.input(OPERANDS[node.op][1])
        computed = not model.is_static(first) and not model.is_static(second)
        if computed and first is not None and second is not None and second.dtype == TensorProto.INT8 and not _is_probability(model, first):
            yield node


def _is_probability(model: Model, codes: Value) -> bool:
    """Whether codes are those of a softmax from zero point 0 at a scale of 1/255 or more: a pair of them sums to 256 at most."""
    node = behind(codes, is_layout)
    source = node.input(0).producer if node is not None and node.op == "QuantizeLinear" and node.input(0) is not None else None  # type: ignore[union-attr]
    if node is None or source is None or source.op != "Softmax":
        return False
    scale, zero_point = model.array(node.input(1)), model.array(node.input(2))
    return scale is not None and bool((scale >= np.float32(1 / 255) * (1 - 1e-6)).all()) and (zero_point is None or not zero_point.any())


def _unsigned_weights(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in model.nodes:
        place = OPERANDS[node.op][1] if node.op in OPERANDS else 1 if node.op in GEMMS and node.domain == "" else None
        value = node.input(place) if place is not None else None
        if value is not None and node.op in GEMMS:
            dequantize = behind(value, is_layout)
            value = dequantize.input(0) if dequantize is not None and is_dequantize(dequantize) else None
        if value is not None and value.dtype == TensorProto.UINT8 and model.is_static(value):
            yield Fault(node, "a UINT8 weight")


RULES = (
    Rule(
        "R01",
        WARNING,
        "quantizers have a zero point",
        "the runtime fuses nothing with a quantizer that has none",
        "write it, also where it is zero",
        _zero_points,
        "onnxruntime QDQ selectors",
    ),
    Rule(
        "R02",
        WARNING,
        "activations are UINT8",
        "the runtime leaves INT8 activations in float where several nodes read them, and on x86 it has only portable code for INT8 by "
        "INT8: such graphs take 0.65 to 5.6 times as long as float, by form",
        "quantize activations to UINT8",
        _signed_activations,
        "onnxruntime QDQ selectors",
    ),
    Rule(
        "R03",
        WARNING,
        "an integer Gemm has an INT32 bias",
        "a float bias keeps it out of the integer kernel",
        "store the bias as INT32 codes at scale activation times weight",
        _float_biases,
        "onnxruntime QDQ selectors",
    ),
    Rule(
        "R04",
        WARNING,
        "an integer Gemm has a quantized activation",
        "with a float activation the weight is dequantized, and the product is done in float",
        "quantize the activation to UINT8",
        _float_activations,
        "onnxruntime QDQ selectors",
    ),
    Rule(
        "R05",
        SILENT,
        "no two products saturate",
        "x86 CPUs without VNNI add the products of two neighbouring weights in 16 bits, which cut the sum off: the results differ from "
        "those of other CPUs",
        "compile with vitq-compile (--cpu any), quantize weights to 7 bits (reduce_range), or run it only on CPUs with VNNI (--cpu vnni)",
        _saturating_pairs,
        "onnxruntime MLAS, vpmaddubsw",
    ),
    Rule(
        "R06",
        WARNING,
        "weights are INT8",
        "UINT8 weights are exact everywhere, but no x86 kernel with VNNI takes them: they take twice the time there, and a sixth more "
        "elsewhere",
        "store INT8 codes",
        _unsigned_weights,
        "onnxruntime MLAS",
    ),
    Rule(
        "R07",
        SILENT,
        "no two codes of -128 meet",
        "ARM CPUs without dot products add two products in 16 bits: (-128)(-128) twice is 32768, and wraps",
        "quantize weights symmetrically, to codes from -127",
        _wrapping_pairs,
        "onnxruntime MLAS, qgemm_kernel_neon",
    ),
)
