"""Quantizers, matrix products and attention in a `Model`: what the rules of every target are about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onnx import TensorProto

from vitq_compiler.lint.model import Model, Node, Value
from vitq_compiler.tensors import FLOAT4E2M1, kind_name

GEMMS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
LAYOUT = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
SCALING = frozenset({"Mul", "Div"})
FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
FP8 = TensorProto.FLOAT8E4M3FN
INT4 = TensorProto.INT4
FP4 = FLOAT4E2M1
NEARBY = 12  # nodes between a softmax and the matrix product before it


def type_name(dtype: int) -> str:
    """INT8, FLOAT16, and so on."""
    return kind_name(dtype) if dtype else "an unknown type"


def is_quantize(node: Node | None) -> bool:
    """Whether it is QuantizeLinear."""
    return node is not None and node.op == "QuantizeLinear"


def is_dequantize(node: Node | None) -> bool:
    """Whether it is DequantizeLinear."""
    return node is not None and node.op == "DequantizeLinear"


def quantizes(model: Model) -> list[Node]:
    """Every QuantizeLinear, also those of onnxruntime's own domain."""
    return [node for node in model.nodes if is_quantize(node) and node.inputs]


def dequantizes(model: Model) -> list[Node]:
    """Every DequantizeLinear, likewise."""
    return [node for node in model.nodes if is_dequantize(node) and node.inputs]


def quantizers(model: Model) -> list[Node]:
    """Both, in order."""
    return [node for node in model.nodes if (is_quantize(node) or is_dequantize(node)) and node.inputs]


def code_type(node: Node) -> int:
    """The type of the codes that a quantizer writes or reads."""
    if is_dequantize(node):
        data = node.input(0)
        return data.dtype if data is not None else 0
    return node.output.dtype


def scale_count(model: Model, node: Node) -> int | None:
    """How many scales a quantizer has; None where the graph does not tell."""
    scale = node.input(1)
    if scale is None:
        return None
    if (array := model.array(scale)) is not None:
        return int(array.size)
    if scale.shape is None or any(d is None for d in scale.shape):
        return None
    count = 1
    for size in scale.shape:
        count *= size or 0
    return count


def is_blocked(node: Node) -> bool:
    """Whether several scales are spread over blocks of an axis."""
    return bool(node.attributes.get("block_size", 0))


def same_scale(model: Model, one: Node, other: Node) -> bool | None:
    """Whether two quantizers have equal scales; None where the graph does not tell."""
    if one.input(1) is other.input(1):
        return True
    first, second = model.array(one.input(1)), model.array(other.input(1))
    if first is None or second is None:
        return None
    return first.shape == second.shape and bool((first == second).all())


def behind(value: Value | None, passes: Callable[[Node], bool]) -> Node | None:
    """The node that computes a value, seen through those that ``passes`` lets pass by their first input."""
    node = value.producer if value is not None else None
    for _ in range(NEARBY):
        if node is None or not passes(node):
            return node
        first = node.input(0)
        node = first.producer if first is not None else None
    return node


def is_layout(node: Node) -> bool:
    """Whether it only moves elements."""
    return node.op in LAYOUT and node.domain == ""


def dequantizer(value: Value | None) -> Node | None:
    """The DequantizeLinear that a value comes from, seen through what only moves, joins or casts elements."""
    node = behind(value, lambda n: is_layout(n) or n.op == "Cast")
    if node is not None and node.op == "Concat":
        joined = [dequantizer(part) for part in node.inputs]
        return joined[0] if joined and None not in joined else None
    return node if is_dequantize(node) else None


def ahead(node: Node, passes: Callable[[Node], bool]) -> Iterator[tuple[Node, int]]:
    """Every (reader, input index) of a node's first output, seen through those that ``passes`` lets pass."""
    waiting, seen = [node], {node}
    while waiting:
        for reader, index in waiting.pop(0).output.readers:
            if not (passes(reader) and index == 0):
                yield reader, index
            elif reader not in seen:
                seen.add(reader)
                waiting.append(reader)


def gemms(model: Model) -> list[Node]:
    """Every matrix product and convolution."""
    return [node for node in model.find(*GEMMS) if len(node.inputs) > 1]


def is_product(model: Model, node: Node) -> bool:
    """Whether it multiplies two tensors that are known only at run time, as attention does."""
    return node.op == "MatMul" and node.domain == "" and not any(map(model.is_static, node.inputs))


@dataclass(frozen=True)
class Attention:
    """softmax(q k^T) v, decomposed.

    Attributes:
        scores: the product q k^T.
        before: nodes from there to the softmax, in that order.
        softmax: the softmax.
        after: nodes from there to the second product.
        context: the product with v.
    """

    scores: Node
    before: tuple[Node, ...]
    softmax: Node
    after: tuple[Node, ...]
    context: Node

    def operands(self) -> tuple[Value | None, Value | None, Value | None]:
        """q, k transposed, and v."""
        return self.scores.input(0), self.scores.input(1), self.context.input(1)

    @property
    def head_size(self) -> int | None:
        """Channels of a head, where static."""
        q, k, _ = self.operands()
        sizes = [q.size(-1) if q else None, k.size(-2) if k else None]
        return next((size for size in sizes if size), None)

    @property
    def lengths(self) -> tuple[int | None, int | None]:
        """Number of queries and of keys, where static."""
        q, k, v = self.operands()
        keys = [k.size(-1) if k else None, v.size(-2) if v else None]
        return (q.size(-2) if q else None), next((size for size in keys if size), None)

    def quantizers(self) -> dict[str, Node | None]:
        """The DequantizeLinear behind q, k, v and the softmax."""

        def passes(node: Node) -> bool:
            return is_layout(node) or node.op == "Cast" or node.op in SCALING

        found = dict(zip("qkv", (behind(value, passes) for value in self.operands()), strict=True))
        quantized: dict[str, Node | None] = {name: node if is_dequantize(node) else None for name, node in found.items()}
        return {**quantized, "softmax": next(filter(is_dequantize, self.after), None)}


def attentions(model: Model) -> list[Attention]:
    """Every softmax between two products of activations, whatever else is between them."""
    found = []
    for softmax in model.find("Softmax"):
        before = _path_back(model, softmax.input(0), NEARBY)
        after = _path_ahead(model, softmax.output, NEARBY)
        if before is not None and after is not None:
            found.append(Attention(before[0], tuple(before[1:]), softmax, tuple(after[:-1]), after[-1]))
    return found


def _path_back(model: Model, value: Value | None, steps: int) -> list[Node] | None:
    """A product and the nodes from it to ``value``."""
    node = value.producer if value is not None else None
    if node is None or steps == 0:
        return None
    if is_product(model, node):
        return [node]
    for operand in node.inputs:
        if operand is not None and not model.is_static(operand):
            path = _path_back(model, operand, steps - 1)
            if path is not None:
                return [*path, node]
    return None


def _path_ahead(model: Model, value: Value, steps: int) -> list[Node] | None:
    """The nodes from ``value`` to a product that has it as its first operand, and that product."""
    if steps == 0:
        return None
    for node, index in value.readers:
        if is_product(model, node) and index == 0:
            return [node]
    for node, _ in value.readers:
        if node.outputs and node.op not in GEMMS and node.op != "Softmax":
            path = _path_ahead(model, node.output, steps - 1)
            if path is not None:
                return [node, *path]
    return None
