"""Products of uint8 activations by constant int8 weights in a `Model`, whatever operators say so, as the kernels see them.

Quantized operands may stand behind DequantizeLinear (QDQ form) or be operands of an integer operator, standard or of onnxruntime's
own domain. Signed activation codes count as shifted by 128: the runtime moves them into uint8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from onnx import TensorProto

from vitq_compiler.lint.model import Array, Model, Node, Value
from vitq_compiler.lint.quantization import GEMMS, behind, is_dequantize, is_layout, is_quantize
from vitq_compiler.pairs import INT16, pair_sums

CODES = frozenset({TensorProto.UINT8, TensorProto.INT8})
SHIFT = 128  # from an int8 code to the uint8 code of the same value

# Operator -> places of its activation and weight codes. Where the second number is None the operator quantizes the activation itself.
OPERANDS: dict[str, tuple[int | None, int]] = {
    "MatMulInteger": (0, 1),
    "QLinearMatMul": (0, 3),
    "QLinearConv": (0, 3),
    "QGemm": (0, 3),
    "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (None, 1),
    "QAttention": (0, 1),
}
CONVOLUTIONS = frozenset({"Conv", "QLinearConv"})


@dataclass(frozen=True)
class Product:
    """One product.

    Attributes:
        node: its operator.
        activation: the codes of its activation; None where the operator makes them.
        weight: the codes of its weight as the kernel walks through them, int8 [inputs, outputs].
        highest: the largest activation code that can occur.
    """

    node: Node
    activation: Value | None
    weight: Array
    highest: int

    @cached_property
    def overflowing(self) -> tuple[Array, Array]:
        """(pair, output) of every pair of weights whose products can leave int16."""
        sums = pair_sums(self.weight)
        pair, output = np.nonzero((sums > INT16.max // self.highest) | (sums < -(-INT16.min // self.highest)))
        return pair, output

    @cached_property
    def wrapping(self) -> int:
        """How often two codes of -128 meet in a pair of ARM's kernel for CPUs without dot products: inputs k and k + 8 of each 16."""
        rows = np.pad(self.weight, ((0, -len(self.weight) % 16), (0, 0))).reshape(-1, 2, 8, self.weight.shape[1])
        return int(np.count_nonzero((rows == np.iinfo(np.int8).min).all(1)))

    @property
    def worst(self) -> int:
        """The sum of two products that lies furthest from zero."""
        return int(np.abs(pair_sums(self.weight)).max(initial=0)) * self.highest


def products(model: Model) -> Iterator[Product]:
    """Every product of activations by constant int8 weights."""
    for node in model.nodes:
        operands = _operands(model, node)
        if operands is None:
            continue
        activation, value = operands
        weight = static_codes(model, value)
        if weight is None or weight.dtype != np.int8 or weight.ndim < 2 or _is_depthwise(node, weight):
            continue
        yield Product(node, activation, _walked(node, weight), highest_code(model, activation))


def _operands(model: Model, node: Node) -> tuple[Value | None, Value] | None:
    """Activation codes (None: made by the operator) and weight codes."""
    if node.op in OPERANDS:
        place, weight = OPERANDS[node.op]
        second = node.input(weight)
        return (None if place is None else node.input(place), second) if second is not None else None
    if node.op not in GEMMS or node.domain != "":
        return None
    found = [behind(node.input(i), lambda n: n.op == "Identity") for i in (0, 1)]
    if not all(map(is_dequantize, found)):
        return None
    codes = [n.input(0) for n in found if n is not None]
    if codes[0] is None or codes[1] is None or model.is_static(codes[0]) or codes[0].dtype not in CODES:
        return None
    return codes[0], codes[1]


def _is_depthwise(node: Node, weight: Array) -> bool:
    """Whether it is a convolution of each channel by itself, whose kernels are exact."""
    return node.op in CONVOLUTIONS and weight.shape[1] == 1 and len(weight) == node.attributes.get("group", 1) > 1


def _walked(node: Node, weight: Array) -> Array:
    """[inputs, outputs] in the order of the kernel: a convolution goes through kernel positions first, then through channels."""
    if node.op in CONVOLUTIONS:
        return weight.reshape(*weight.shape[:2], -1).transpose(2, 1, 0).reshape(-1, len(weight))
    if weight.ndim > 2:
        weight = weight.swapaxes(0, -2).reshape(weight.shape[-2], -1)
    return weight.T if node.op == "Gemm" and node.attributes.get("transB", 0) else weight


def static_codes(model: Model, value: Value | None) -> Array | None:
    """Codes that depend on nothing known only at run time: stored, moved, widened, or quantized from stored numbers."""
    if value is None or not model.is_static(value):
        return None
    if (array := model.array(value)) is not None:
        return array
    node = value.producer
    if node is None:
        return None
    if is_quantize(node):
        return _quantized(model, node)
    array = static_codes(model, node.input(0))
    if array is None:
        return None
    if node.op == "Transpose":
        return array.transpose(node.attributes.get("perm"))
    if node.op == "Cast":
        return array.astype(np.int8) if value.dtype == TensorProto.INT8 else array
    shape = model.array(node.input(1)) if node.op == "Reshape" else None
    return array.reshape(shape) if shape is not None and (shape != 0).all() else None


def _quantized(model: Model, node: Node) -> Array | None:
    x, scale, zero_point = (model.array(node.input(i)) for i in range(3))
    if x is None or scale is None or node.output.dtype not in CODES:
        return None
    limits = np.iinfo(np.int8 if node.output.dtype == TensorProto.INT8 else np.uint8)
    axis = node.attributes.get("axis", 1) % max(x.ndim, 1)
    shape = [-1 if i == axis else 1 for i in range(x.ndim)] if scale.size > 1 else []
    offset = 0 if zero_point is None else zero_point.astype(np.int32).reshape(shape)
    codes: Array = np.clip(np.rint(x / scale.reshape(shape)) + offset, limits.min, limits.max).astype(limits.dtype)
    return codes


def highest_code(model: Model, codes: Value | None) -> int:
    """The largest uint8 code that an activation can have: 255, or where a Clip of its codes, or of what becomes codes, ends."""
    most = int(np.iinfo(np.uint8).max)
    node = behind(codes, is_layout)
    shift = SHIFT if codes is not None and codes.dtype == TensorProto.INT8 else 0
    if node is not None and node.op == "Clip" and (last := model.array(node.input(2))) is not None:
        return int(last) + shift
    clip = behind(node.input(0), is_layout) if node is not None and is_quantize(node) else None
    if node is None or clip is None or clip.op != "Clip":
        return most
    end, scale, zero_point = model.array(clip.input(2)), model.array(node.input(1)), model.array(node.input(2))
    if end is None or scale is None or scale.size != 1:
        return most
    return min(most, int(np.rint(end / scale).item() + (0 if zero_point is None else int(zero_point)) + shift))
