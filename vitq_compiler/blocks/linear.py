"""Linear layers in canonical form: MatMul(x, weight[K, N]), then Add(., bias[N]) where there is a bias."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.graph import Graph, Node, Tensor, is_constant, readers, value

ROLES = ("qkv", "mix", "proj", "fc1", "gate", "fc2", "head", "output", "linear", "patch_embed")


@dataclass(eq=False)
class Linear:
    """One Linear layer.

    Attributes:
        matmul: the MatMul node; its input 0 is the activation, input 1 the weight [in_features, out_features].
        add: the Add node of the bias, or None; its input 1 is the bias [out_features].
        role: what it does in its block, one of `ROLES`.
        block: the block it belongs to, such as ``attention 3``; empty outside blocks.
        layers: names of the layers of the model as given that it computes, or a part of: one, until a pass puts several together.
        aside: whether it is a small float product beside a layer, which takes out what would stretch its range.
        name: the name of its MatMul node, kept after lowering has replaced the node.
        in_features, out_features: the shape of the weight.
    """

    matmul: Node
    add: Node | None
    role: str = "linear"
    block: str = ""
    layers: tuple[str, ...] = ()
    aside: bool = False
    name: str = field(init=False)
    in_features: int = field(init=False)
    out_features: int = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.matmul.name
        self.layers = self.layers or (self.name,)
        self.in_features, self.out_features = value(self.weight).shape

    @property
    def input(self) -> Tensor:
        return self.matmul.inputs[0]

    @property
    def weight(self) -> Tensor:
        return self.matmul.inputs[1]

    @property
    def bias(self) -> Tensor | None:
        return self.add.inputs[1] if self.add is not None else None

    @property
    def output(self) -> Tensor:
        return (self.add or self.matmul).outputs[0]


def find_linears(graph: Graph) -> list[Linear]:
    """All Linear layers, in graph order."""
    return [linear for node in graph.find("MatMul") if (linear := as_linear(graph, node)) is not None]


def as_linear(graph: Graph, matmul: Node) -> Linear | None:
    """The Linear layer that ``matmul`` is, or None where its second operand is no constant matrix."""
    weight = matmul.inputs[1]
    if not is_constant(weight) or value(weight).ndim != 2:
        return None
    product = matmul.outputs[0]
    following = readers(product)
    if len(following) == 1 and following[0].op == "Add" and not graph.is_output(product):
        bias = following[0].inputs[1]
        if is_constant(bias) and value(bias).shape == (value(weight).shape[1],):
            return Linear(matmul, following[0])
    return Linear(matmul, None)


def is_depthwise(node: Node) -> bool:
    """Whether ``node`` is a convolution that keeps every channel to itself."""
    return node.op == "Conv" and is_constant(node.inputs[1]) and value(node.inputs[1]).shape[1] == 1 and node.attrs.get("group", 1) > 1


def absorb(graph: Graph, linear: Linear, shift: NDArray[Any], scale: NDArray[Any]) -> None:
    """Follow a rewrite that replaced the input x by (x + shift) / scale, both [in_features]: the output stays.

    W -> diag(scale) W,  c -> c - shift W
    """
    weight = value(linear.weight)
    if np.any(shift):
        add_to_bias(graph, linear, -(shift.astype(np.float64) @ weight.astype(np.float64)))
    linear.weight.values = (weight * scale[:, None]).astype(np.float32)


def add_to_bias(graph: Graph, linear: Linear, offset: NDArray[Any]) -> None:
    """Add ``offset`` [out_features] to the bias, which is created where the Linear has none."""
    if linear.bias is not None:
        linear.bias.values = (value(linear.bias) + offset).astype(np.float32)
        return
    product = linear.matmul.outputs[0]
    bias = graph.constant(f"{linear.name}/bias", offset.astype(np.float32))
    total = graph.insert("Add", [product, bias], name=f"{linear.name}/add", like=product)
    linear.add = total.inputs[0]
    graph.replace(product, total)
