"""MLP: Linear (fc1), an activation, Linear (fc2); or gated (SwiGLU): fc2 reads activation(gate) * fc1.

gate and fc1 may be two Linear layers or the halves of one. Between fc1 and fc2 there may also be layout operations, depthwise
convolutions (PVT v2, SegFormer) and a normalization (EVA-02, BEiT-3).
"""

from __future__ import annotations

from dataclasses import dataclass

from vitq_compiler.blocks.linear import Linear, is_depthwise
from vitq_compiler.blocks.normalization import NORMS
from vitq_compiler.graph import Graph, Node, Tensor, is_constant, producer, scalar
from vitq_compiler.views import VIEWS

ACTIVATIONS = frozenset({"Gelu", "Relu", "Sigmoid", "HardSwish", "Silu", "Swish", "Elu", "LeakyRelu", "Mish"})


@dataclass(eq=False)
class Mlp:
    """One MLP.

    Attributes:
        fc1: the Linear before the activation; in a gated MLP the one that is multiplied in.
        fc2: the Linear that ends it.
        activation: the node that gives the activation's result; in a gated MLP the product.
        gate: in a gated MLP the Linear before the activation, which is fc1 where both are one; else None.
        index: position among the MLPs of the graph.
    """

    fc1: Linear
    fc2: Linear
    activation: Node
    index: int = 0
    gate: Linear | None = None

    @property
    def plain(self) -> bool:
        """Whether the activation, in one node, is all that lies between fc1 and fc2."""
        return self.gate is None and self.activation.inputs[0] is self.fc1.output and self.activation.outputs[0] is self.fc2.input


def find_mlps(graph: Graph, linears: list[Linear]) -> list[Mlp]:
    """All MLPs whose Linear layers are joined by one activation, in graph order."""
    by_output = {id(linear.output): linear for linear in linears}
    found: list[Mlp] = []
    for fc2 in linears:
        activation = producer(_behind(fc2.input))
        if activation is not None and activation.op in NORMS:
            activation = producer(_behind(activation.inputs[0]))
        if activation is None:
            continue
        before = _preactivation(activation)
        fc1, gate = (by_output.get(id(_behind(before))), None) if before is not None else _gated(activation, by_output)
        if fc1 is not None:
            found.append(Mlp(fc1, fc2, activation, len(found), gate))
    return found


def _gated(node: Node, by_output: dict[int, Linear]) -> tuple[Linear | None, Linear | None]:
    """fc1 and gate of activation(gate) * fc1."""
    for active, other in (node.inputs, node.inputs[::-1]) if node.op == "Mul" else ():
        activation = producer(active)
        before = _preactivation(activation) if activation is not None else None
        gate = by_output.get(id(_behind(before))) if before is not None else None
        fc1 = by_output.get(id(_behind(other)))
        if fc1 is not None and gate is not None:
            return fc1, gate
    return None, None


def _behind(tensor: Tensor) -> Tensor:
    """Where ``tensor`` comes from, through layout operations, depthwise convolutions and the bias of a part."""
    while (node := producer(tensor)) is not None and not is_constant(node.inputs[0]):
        if not (node.op in VIEWS or is_depthwise(node) or (node.op == "Add" and _adds_to_part(node))):
            break
        tensor = node.inputs[0]
    return tensor


def _adds_to_part(node: Node) -> bool:
    """Whether an Add has a constant, and is not the bias of a whole Linear."""
    product = producer(node.inputs[0])
    return is_constant(node.inputs[1]) and (product is None or product.op != "MatMul")


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
