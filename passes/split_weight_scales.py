"""One scale for the codes of a weight; what its channels differ by is multiplied behind the product.

    x DQ(W, s[n]) + c  ->  (x DQ(W, S)) * (s / S)[n] + c,   S = 2^k, the power nearest to the mean of log2 s

For a compiler that takes the type of a product from the graph, and multiplies by one number inside the integer kernel, by
one number per channel only behind it. In half precision TensorRT-RTX 1.7 then writes the accumulators of x DQ(W, s[n]) as halves
before it multiplies them by s, itself a number below the normal halves: whatever exceeds 65504 is lost, which sums of thousands
of codes do. Behind x DQ(W, S) comes out what is of the size of the result. Kernels stay as many: the multiplication by s
was there already. Codes do not change, and S is a power of two: in float32 both forms compute the same numbers.

A convolution, which that compiler writes in float32 where it has a scale for each channel, is treated alike; its bias goes behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.graph import Array, Graph, Node, Tensor, is_constant, producer, readers, value
from vitq_compiler.pipeline import Compilation, Fact, Pass

CHANNEL_AXES = {"MatMul": (1, -1), "Conv": (0,)}  # of the output, in the weight
NORMAL = (2.0**-14, 2.0**15)  # powers of two that are normal halves


@dataclass(frozen=True)
class SplitWeightScales(Pass):
    """x DQ(W, s[n]) -> (x DQ(W, S)) * (s / S)[n]"""

    name = "split-weight-scales"
    requires = frozenset({Fact.QUANTIZED})

    def run(self, c: Compilation) -> int:
        changes = 0
        for dequantize in c.graph.find("DequantizeLinear"):
            if is_constant(dequantize.inputs[0]) and value(dequantize.inputs[1]).ndim:
                products = readers(dequantize.outputs[0])
                if all(_is_product(node, dequantize) for node in products):
                    _split(c.graph, dequantize, products)
                    changes += 1
        return changes


def _is_product(node: Node, dequantize: Node) -> bool:
    """Whether ``node`` multiplies codes by codes, those of ``dequantize`` with a scale for each of its output channels."""
    if node.op not in CHANNEL_AXES or node.inputs[1] is not dequantize.outputs[0]:
        return False
    other = producer(node.inputs[0])
    return other is not None and other.op == "DequantizeLinear" and dequantize.attrs.get("axis", 1) in CHANNEL_AXES[node.op]


def common_scale(scale: Array) -> float:
    """The S of channels with ``scale``: a power of two that is a normal half."""
    return float(np.clip(2.0 ** np.rint(np.log2(scale.astype(np.float64)).mean()), *NORMAL))


def _split(graph: Graph, dequantize: Node, products: list[Node]) -> None:
    scale = value(dequantize.inputs[1]).astype(np.float64)
    common = common_scale(scale)
    codes, zero_point = dequantize.inputs[0].name, value(dequantize.inputs[2])
    dequantize.inputs[1] = graph.constant(f"{codes}/common_scale", np.asarray(common, np.float32))
    dequantize.inputs[2] = graph.constant(f"{codes}/common_zero_point", np.zeros((), zero_point.dtype))
    dequantize.attrs.pop("axis", None)
    for node in products:
        shape = [-1, *[1] * (len(dequantize.inputs[0].shape) - 2)] if node.op == "Conv" else [-1]
        ratio = (scale / common).astype(np.float32).reshape(shape)
        result = _append(graph, node.outputs[0], "Mul", graph.constant(f"{codes}/ratio", ratio))
        if node.op == "Conv" and len(node.inputs) > 2:
            bias = node.inputs.pop()
            _append(graph, result, "Add", graph.constant(f"{bias.name}/behind", value(bias).reshape(shape)))


def _append(graph: Graph, tensor: Tensor, op: str, constant: Tensor) -> Tensor:
    """Let all readers of ``tensor`` read op(tensor, constant)."""
    result = graph.insert(op, [tensor, constant], name=f"{tensor.name}/{op.lower()}", like=tensor)
    graph.replace(tensor, result)
    return result
