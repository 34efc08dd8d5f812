"""The rules of ONNX Runtime on the CPU: it runs every valid graph, and these in integer kernels."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from vitq_compiler.lint.model import Model, Node, Value
from vitq_compiler.lint.quantization import code_type, is_dequantize, quantizers, quantizes
from vitq_compiler.lint.rule import WARNING, Fault, Platform, Rule


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
        "the runtime leaves INT8 activations in float where several nodes read them, and its x86 kernels are UINT8 by INT8",
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
)
