"""Patch embedding as a Linear layer on cut-out patches.

    Conv(image; kernel = stride = p) -> Reshape[B, C, N] -> Transpose[B, N, C]  ->  patches[B, N, 3 p p] W + c

A convolution kernel must round its output to int8; a Linear needs not, and is as fast. Precondition: the image size is
static and a multiple of the patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.linear import Linear
from vitq_compiler.graph import Graph, Node, Tensor, readers, value
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.quant import Edge
from vitq_compiler.views import trace


@dataclass(frozen=True)
class LinearizePatchEmbedding(Pass):
    """Conv(x; kernel = stride) -> patches(x) W + c"""

    name = "linearize-patch-embedding"
    requires = frozenset({Fact.ANNOTATED})
    drops = frozenset({Fact.CALIBRATED, Fact.QPARAMS})
    exact = True

    def run(self, c: Compilation) -> int:
        changes = 0
        for node in list(c.annotations.patch_embeddings):
            try:
                linear = _linearize(c.graph, node)
            except MatchFailure as failure:
                self.note(c, node.name, f"patch embedding stays in float: {failure.reason}")
                for index in (0, 1):
                    c.specs.pop(Edge(node.name, index), None)
                continue
            c.annotations.linears.insert(0, linear)
            c.annotations.patch_embeddings.remove(node)
            c.move_specs(node.name, [linear.name])
            changes += 1
        c.graph.clean().infer_shapes()
        return changes


def _linearize(graph: Graph, node: Node) -> Linear:
    weight = value(node.inputs[1])
    out_channels, in_channels, high, wide = weight.shape
    image = node.inputs[0]
    sizes = list(image.shape or [])[2:]
    if len(sizes) != 2 or not all(isinstance(s, int) and s > 0 for s in sizes) or sizes[0] % high or sizes[1] % wide:
        raise MatchFailure(f"the image size {sizes} is not a static multiple of the patch {[high, wide]}", node.name)
    rows, columns = sizes[0] // high, sizes[1] // wide
    tokens = _tokens(graph, node.outputs[0])
    cut = graph.constant(f"{node.name}/cut", np.array([-1, in_channels, rows, high, columns, wide], np.int64))
    grid = graph.insert(
        "Transpose", [graph.add("Reshape", [image, cut], name=f"{node.name}/cut")], name=f"{node.name}/grid", perm=[0, 2, 4, 1, 3, 5]
    )
    flat = graph.constant(f"{node.name}/flat", np.array([-1, rows * columns, in_channels * high * wide], np.int64))
    patches = graph.add("Reshape", [grid, flat], name=f"{node.name}/patches")
    matrix = graph.constant(f"{node.inputs[1].name}/matrix", weight.reshape(out_channels, -1).T)
    output = graph.insert("MatMul", [patches, matrix], name=f"{node.name}/linear", like=tokens)
    linear = Linear(output.inputs[0], None, role="patch_embed")
    if len(node.inputs) > 2:
        bias = graph.constant(f"{node.inputs[2].name}/vector", value(node.inputs[2]))
        output = graph.insert("Add", [output, bias], name=f"{node.name}/add", like=tokens)
        linear.add = output.inputs[0]
    graph.replace(tokens, output)
    return linear


def _tokens(graph: Graph, convolved: Tensor) -> Tensor:
    """The tensor [batch, tokens, channels] that the convolution's output is flattened and transposed to."""
    tensor = convolved
    for _ in range(3):
        following = readers(tensor)
        if len(following) != 1 or following[0].op not in ("Reshape", "Flatten", "Transpose") or graph.is_output(tensor):
            break
        tensor = following[0].outputs[0]
        view = trace(tensor)
        if view.index.ndim == 3 and len(view.source_shape) == 4:
            batch, channels = view.source_shape[:2]
            expected = np.arange(view.index.size).reshape(batch, channels, -1).swapaxes(1, 2)
            if view.source is convolved and np.array_equal(view.index, expected):
                return tensor
    raise MatchFailure("its output is not flattened to [batch, tokens, channels]")
