"""Patch embedding as a Linear layer on cut-out patches.

    Conv(image; kernel = stride = p) -> Reshape[B, C, N] -> Transpose[B, N, C]  ->  patches[B, N, 3 p p] W + c

A convolution kernel must round its output to int8; a Linear needs not, and is as fast. Patches of a video (tubelets) and of a
signal are cut in the same way. Precondition: the image size is static and a multiple of the patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

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
    (out_channels, in_channels, *patch), dims = weight.shape, weight.ndim - 2
    image = node.inputs[0]
    sizes = list(image.shape or [])[2:]
    if len(sizes) != dims or not all(isinstance(s, int) and s > 0 and s % p == 0 for s, p in zip(sizes, patch, strict=True)):
        raise MatchFailure(f"the image size {sizes} is not a static multiple of the patch {patch}", node.name)
    grid = [s // p for s, p in zip(sizes, patch, strict=True)]
    tokens = _tokens(graph, node.outputs[0])
    cells = [number for pair in zip(grid, patch, strict=True) for number in pair]
    cut = graph.constant(f"{node.name}/cut", np.array([-1, in_channels, *cells], np.int64))
    pieces = graph.add("Reshape", [image, cut], name=f"{node.name}/cut")
    order = [0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2)]
    ordered = graph.insert("Transpose", [pieces], name=f"{node.name}/grid", perm=order)
    flat = graph.constant(f"{node.name}/flat", np.array([-1, prod(grid), in_channels * prod(patch)], np.int64))
    patches = graph.add("Reshape", [ordered, flat], name=f"{node.name}/patches")
    matrix = graph.constant(f"{node.inputs[1].name}/matrix", weight.reshape(out_channels, -1).T)
    output = graph.insert("MatMul", [patches, matrix], name=f"{node.name}/linear", like=tokens)
    linear = Linear(output.inputs[0], None, role="patch_embed", layers=(node.name,))
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
        if view.index.ndim == 3 and len(view.source_shape) == len(convolved.shape):
            batch, channels = view.source_shape[:2]
            expected = np.arange(view.index.size).reshape(batch, channels, -1).swapaxes(1, 2)
            if view.source is convolved and np.array_equal(view.index, expected):
                return tensor
    raise MatchFailure("its output is not flattened to [batch, tokens, channels]")
