"""MLP: Linear (fc1), an activation, Linear (fc2)."""

from __future__ import annotations

from dataclasses import dataclass

from vitq_compiler.blocks.linear import Linear
from vitq_compiler.graph import Graph, Node, producer, scalar

ACTIVATIONS = frozenset({"Gelu", "Relu", "Sigmoid", "HardSwish", "Silu", "Swish", "Elu", "LeakyRelu", "Mish"})


@dataclass(eq=False)
class Mlp:
    """One MLP; ``activation`` is the node whose output fc2 reads."""

    fc1: Linear
    fc2: Linear
    activation: Node
    index: int = 0


def find_mlps(graph: Graph, linears: list[Linear]) -> list[Mlp]:
    """All MLPs whose two Linear layers are joined by one activation, in graph order."""
    by_output = {id(linear.output): linear for linear in linears}
    found: list[Mlp] = []
    for fc2 in linears:
        activation = producer(fc2.input)
        if activation is None:
            continue
        fc1 = by_output.get(id(_preactivation(activation)))
        if fc1 is not None:
            found.append(Mlp(fc1, fc2, activation, len(found)))
    return found


def _preactivation(node: Node) -> object:
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
