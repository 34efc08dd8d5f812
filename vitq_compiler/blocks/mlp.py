"""MLP: Linear (fc1), an activation, Linear (fc2); between them also layout operations and depthwise convolutions (PVT v2, SegFormer)."""

from __future__ import annotations

from dataclasses import dataclass

from vitq_compiler.blocks.linear import Linear, is_depthwise
from vitq_compiler.graph import Graph, Node, Tensor, is_constant, producer, scalar
from vitq_compiler.views import VIEWS

ACTIVATIONS = frozenset({"Gelu", "Relu", "Sigmoid", "HardSwish", "Silu", "Swish", "Elu", "LeakyRelu", "Mish"})


@dataclass(eq=False)
class Mlp:
    """One MLP.

    Attributes:
        fc1, fc2: its Linear layers.
        activation: the node that gives the activation's result.
        index: position among the MLPs of the graph.
    """

    fc1: Linear
    fc2: Linear
    activation: Node
    index: int = 0

    @property
    def plain(self) -> bool:
        """Whether the activation, in one node, is all that lies between fc1 and fc2."""
        return self.activation.inputs[0] is self.fc1.output and self.activation.outputs[0] is self.fc2.input


def find_mlps(graph: Graph, linears: list[Linear]) -> list[Mlp]:
    """All MLPs whose two Linear layers are joined by one activation, in graph order."""
    by_output = {id(linear.output): linear for linear in linears}
    found: list[Mlp] = []
    for fc2 in linears:
        activation = producer(_behind(fc2.input))
        before = _preactivation(activation) if activation is not None else None
        fc1 = by_output.get(id(_behind(before))) if before is not None else None
        if fc1 is not None:
            found.append(Mlp(fc1, fc2, activation, len(found)))
    return found


def _behind(tensor: Tensor) -> Tensor:
    """Where ``tensor`` comes from, through layout operations and depthwise convolutions."""
    node = producer(tensor)
    while node is not None and (node.op in VIEWS or is_depthwise(node)) and not is_constant(node.inputs[0]):
        tensor = node.inputs[0]
        node = producer(tensor)
    return tensor


def _preactivation(node: Node) -> Tensor | None:
    """What goes into an activation function: one node, or x * sigmoid(a * x)."""
    if node.op in ACTIVATIONS:
        return node.inputs[0]
    if node.op == "Mul":
        for x, gate in (node.inputs, node.inputs[::-1]):
            sigmoid = producer(gate)
            if sigmoid is not None and sigmoid.op == "Sigmoid":
                inner, scaled = sigmoid.inputs[0], producer(sigmoid.inputs[0])
                if scaled is not None and scaled.op == "Mul" and any(scalar(t) is not None for t in scaled.inputs):
                    inner = next(t for t in scaled.inputs if scalar(t) is None)
                if inner is x:
                    return x
    return None
