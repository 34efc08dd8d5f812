"""Convolutions of one pixel as Linear layers on pixels as tokens.

    Conv(x[B, C, H, W]; kernel 1)  ->  Transpose[B, H, W, C] -> MatMul(., W) + c -> Transpose[B, C', H, W]

What EfficientFormer, LeViT, CoAtNet or a decoder writes as such a convolution is the same Linear that others write as one, and
gets role, block and integer kernel like those. The transposes of neighbours cancel: an activation between them is moved over.

Left alone by judgment, as whole models were too close to tell: few channels, C C' / (C + C') below ``least``, where the
transposes may cost what the kernel saves; and neighbours of a convolution over several pixels, as in MobileNet's blocks, which
the runtime keeps in a layout of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from vitq_compiler.graph import Graph, Node, Tensor, is_constant, producer, readers, value
from vitq_compiler.pipeline import Compilation, Fact, Pass

POINTWISE = frozenset({"Gelu", "Relu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Erf"})


@dataclass(frozen=True)
class LinearizePointwise(Pass):
    """Conv(x; kernel 1) -> x W + c"""

    name = "linearize-pointwise"
    requires = frozenset({Fact.CANONICAL})
    exact = True
    least: float = 64.0

    def run(self, c: Compilation) -> int:
        c.graph.infer_shapes()
        changes = 0
        for node in c.graph.find("Conv"):
            if not _is_pointwise(node):
                continue
            outputs, inputs = value(node.inputs[1]).shape[:2]
            if spatial := _spatial_neighbour(node):
                self.note(c, node.name, f"a 1x1 convolution beside {spatial}, which keeps it in the runtime's own layout")
                continue
            if inputs * outputs / (inputs + outputs) < self.least:
                self.note(c, node.name, f"a 1x1 convolution of {inputs} to {outputs} channels is no faster as an integer Linear")
                continue
            _linearize(c.graph, node)
            changes += 1
        while _cancel(c.graph):
            pass
        c.graph.clean()
        return changes


def _is_pointwise(node: Node) -> bool:
    sizes = node.inputs[0].shape or ()
    return (
        is_constant(node.inputs[1])
        and (len(node.inputs) < 3 or is_constant(node.inputs[2]))
        and len(sizes) in (3, 4)
        and set(value(node.inputs[1]).shape[2:]) == {1}
        and node.attrs.get("group", 1) == 1
        and set(node.attrs.get("strides", [1])) == {1}
        and not any(node.attrs.get("pads", []))
        and all(isinstance(d, int) and d > 0 for d in list(sizes)[2:])
        and any(d > 1 for d in list(sizes)[2:])
    )


def _spatial_neighbour(node: Node) -> str:
    """The name of the convolution over several pixels that gives its input, or alone reads its output; through activations."""
    before = producer(node.inputs[0])
    while before is not None and before.op in POINTWISE:
        before = producer(before.inputs[0])
    after = readers(node.outputs[0])
    while len(after) == 1 and after[0].op in POINTWISE:
        after = readers(after[0].outputs[0])
    near = [n for n in (before, after[0] if len(after) == 1 else None) if n is not None and n.op == "Conv"]
    return next((n.name for n in near if set(n.inputs[1].shape[2:]) != {1}), "")


def _linearize(graph: Graph, node: Node) -> None:
    image, weight = node.inputs[0], value(node.inputs[1])
    rank = weight.ndim
    tokens = graph.insert("Transpose", [image], name=f"{node.name}/tokens", like=image, perm=[0, *range(2, rank), 1])
    tokens.shape = [image.shape[0], *image.shape[2:], image.shape[1]]
    matrix = graph.constant(f"{node.inputs[1].name}/matrix", weight.reshape(weight.shape[:2]).T)
    output = graph.insert("MatMul", [tokens, matrix], name=f"{node.name}/linear", like=image)
    output.shape = [*tokens.shape[:-1], weight.shape[0]]
    if len(node.inputs) > 2:
        bias = graph.constant(f"{node.inputs[2].name}/vector", value(node.inputs[2]))
        output = graph.insert("Add", [output, bias], name=f"{node.name}/add", like=output)
    back = graph.insert("Transpose", [output], name=f"{node.name}/image", like=node.outputs[0], perm=[0, rank - 1, *range(1, rank - 1)])
    graph.replace(node.outputs[0], back)
    graph.remove(node)


def _cancel(graph: Graph) -> int:
    """Move one round of Transposes behind the activations that read them, and drop pairs that undo each other."""
    changes = 0
    for node in graph.clean().find("Transpose"):
        following = readers(node.outputs[0]) if node.outputs else []
        if len(following) != 1 or graph.is_output(node.outputs[0]):
            continue
        (reader,) = following
        if reader.op in POINTWISE and any(r.op == "Transpose" for r in readers(reader.outputs[0])):
            _move_behind(graph, node, reader)
            changes += 1
        elif reader.op == "Transpose" and _undoes(node, reader):
            changes += bool(graph.replace(reader.outputs[0], node.inputs[0])) if producer(node.inputs[0]) is not None else 0
    return changes


def _undoes(first: Node, second: Node) -> bool:
    perms = [node.attrs.get("perm") for node in (first, second)]
    return None not in perms and [perms[0][i] for i in perms[1]] == list(range(len(perms[0])))


def _move_behind(graph: Graph, transpose: Node, activation: Node) -> None:
    """f(T(x)) -> T(f(x))"""
    source, result = transpose.inputs[0], activation.outputs[0]
    activation.inputs[0] = source
    moved: Tensor = graph.insert("Transpose", [result], name=f"{transpose.name}/moved", like=result, perm=transpose.attrs["perm"])
    graph.replace(result, moved)
    result.shape = source.shape
