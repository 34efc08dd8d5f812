"""Patch embedding as a Linear layer on cut-out patches.

    Conv(image; kernel = stride = p) -> Reshape[B, C, N] -> Transpose[B, N, C]  ->  patches[B, N, 3 p p] W + c

A convolution kernel must round its output to int8; a Linear needs not, and is as fast. Patches of a video (tubelets) and of a
signal are cut in the same way. Pixels beyond the last whole patch, which the convolution does not read either, are cut off first.
Where the image size is open, the number of patches is computed when the graph runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from vitq_compiler.blocks.linear import Linear
from vitq_compiler.graph import Graph, Node, Tensor, readers, value
from vitq_compiler.passes._observed import observe
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
                linear = _linearize(c, node)
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


def _linearize(c: Compilation, node: Node) -> Linear:
    graph = c.graph
    weight = value(node.inputs[1])
    (out_channels, in_channels, *patch), dims = weight.shape, weight.ndim - 2
    tokens = _tokens(graph, node.outputs[0])
    sides = _sides(c, node.inputs[0], patch)
    pieces, rows = _cut(graph, node, sides) if all(len(sizes) == 1 for sizes in sides) else _cut_open(graph, node, sides)
    order = [0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2)]
    ordered = graph.insert("Transpose", [pieces], name=f"{node.name}/grid", perm=order)
    flat = graph.constant(f"{node.name}/flat", np.array([*rows, in_channels * prod(patch)], np.int64))
    patches = graph.add("Reshape", [ordered, flat], name=f"{node.name}/patches")
    matrix = graph.constant(f"{node.inputs[1].name}/matrix", weight.reshape(out_channels, -1).T)
    output = graph.insert("MatMul", [patches, matrix], name=f"{node.name}/linear", like=tokens)
    linear = Linear(output.inputs[0], None, role="patch_embed", layers=(node.name,))
    if len(node.inputs) > 2:
        bias = graph.constant(f"{node.inputs[2].name}/vector", value(node.inputs[2]))
        output = graph.insert("Add", [output, bias], name=f"{node.name}/add", like=tokens)
        linear.add = output.inputs[0]
    graph.replace(tokens, output)
    for reader in [n for n in readers(node.outputs[0]) if n.op == "Shape"]:
        graph.replace(reader.outputs[0], _shape(graph, node, reader))
    return linear


def _sides(c: Compilation, image: Tensor, patch: Sequence[int]) -> list[list[int]]:
    """How many pixels there may be along each side: one number where that is not open."""
    sizes = list(image.shape or [])[2:]
    if len(sizes) == len(patch) and all(isinstance(size, int) and size > 0 for size in sizes):
        return [[size] for size in sizes]
    seen = observe(c.graph, c.probes, [], [image], c.threads)
    return [list(dict.fromkeys(series)) for series in zip(*seen.shapes[image.name], strict=True)][2:]


def _cut(graph: Graph, node: Node, sides: list[list[int]]) -> tuple[Tensor, list[int]]:
    """The image as [batch, channels, rows, height of a patch, columns, width of a patch], and the batch and tokens of a Reshape."""
    _, channels, *patch = value(node.inputs[1]).shape
    counts = [size // p for (size,), p in zip(sides, patch, strict=True)]
    image = node.inputs[0]
    if any(size % p for (size,), p in zip(sides, patch, strict=True)):
        ends = [count * p for count, p in zip(counts, patch, strict=True)]
        image = _cropped(graph, node, _numbers(graph, node, "ends", ends))
    cells = [number for pair in zip(counts, patch, strict=True) for number in pair]
    target = _numbers(graph, node, "cut", [-1, channels, *cells])
    return graph.add("Reshape", [image, target], name=f"{node.name}/cut"), [-1, prod(counts)]


def _cut_open(graph: Graph, node: Node, sides: list[list[int]]) -> tuple[Tensor, list[int]]:
    """As `_cut`, the number of patches along each side computed from the image."""
    _, channels, *patch = value(node.inputs[1]).shape
    image, counts = node.inputs[0], _counts(graph, node)
    if any(size % p for several, p in zip(sides, patch, strict=True) for size in several):
        image = _cropped(graph, node, graph.add("Mul", [counts, _numbers(graph, node, "patch", patch)], name=f"{node.name}/ends"))
    cells = [_numbers(graph, node, "samples", [0, channels])]
    for axis, p in enumerate(patch):
        count = graph.add("Gather", [counts, _numbers(graph, node, "side", [axis])], name=f"{node.name}/count", axis=0)
        cells += [count, _numbers(graph, node, "pixels", [p])]
    target = graph.add("Concat", cells, name=f"{node.name}/cells", axis=0)
    return graph.add("Reshape", [image, target], name=f"{node.name}/cut"), [0, -1]


def _counts(graph: Graph, node: Node) -> Tensor:
    """How many patches there are along each side, as a vector that is computed from the image."""
    sides = graph.add("Shape", [node.inputs[0]], name=f"{node.name}/sides", start=2)
    return graph.add("Div", [sides, _numbers(graph, node, "patch", value(node.inputs[1]).shape[2:])], name=f"{node.name}/counts")


def _shape(graph: Graph, node: Node, reader: Node) -> Tensor:
    """What a Shape of the convolution's output gives, without that."""
    weight = value(node.inputs[1])
    samples = graph.add("Shape", [node.inputs[0]], name=f"{node.name}/batch", start=0, end=1)
    parts = [samples, _numbers(graph, node, "features", [len(weight)]), _counts(graph, node)]
    whole = graph.add("Concat", parts, name=f"{node.name}/shape", axis=0)
    axes = range(weight.ndim)[reader.attrs.get("start", 0) : reader.attrs.get("end")]
    return graph.insert("Gather", [whole, _numbers(graph, node, "read", axes)], name=f"{reader.name}/shape", like=reader.outputs[0], axis=0)


def _numbers(graph: Graph, node: Node, name: str, values: Sequence[int]) -> Tensor:
    return graph.constant(f"{node.name}/{name}", np.array(values, np.int64))


def _cropped(graph: Graph, node: Node, ends: Tensor) -> Tensor:
    """The image without the pixels beyond the last whole patch."""
    dims = value(node.inputs[1]).ndim - 2
    window = [_numbers(graph, node, "starts", [0] * dims), ends, _numbers(graph, node, "axes", range(2, 2 + dims))]
    return graph.insert("Slice", [node.inputs[0], *window], name=f"{node.name}/whole")


def _tokens(graph: Graph, convolved: Tensor) -> Tensor:
    """The tensor [batch, tokens, channels] that the convolution's output is flattened and transposed to."""
    tensor = convolved
    for _ in range(3):
        following = [reader for reader in readers(tensor) if reader.op != "Shape" or tensor is not convolved]
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
