"""BatchNormalization into the convolution or Linear before it.

    BN(conv(x, W, c); g, b, m, v)  ->  conv(x, s W, s c + t)        s = g / sqrt(v + eps),  t = b - s m
    BN(views(x W + c))             ->  views(x W diag(s) + s c + t)

Preconditions: nothing else reads what lies between, and the channels that are normalized are the output channels, through
any views (LeViT flattens all tokens before it normalizes them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.blocks.linear import Linear, add_to_bias, find_linears
from vitq_compiler.graph import Graph, Node, Tensor, is_constant, producer, value
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.views import trace


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """BN(x W + c) -> x (W diag(s)) + s c + t"""

    name = "fold-batch-norm"
    requires = frozenset({Fact.CANONICAL})
    exact = True

    def run(self, c: Compilation) -> int:
        changes = 0
        linears = {id(linear.output): linear for linear in find_linears(c.graph)}
        for node in c.graph.find("BatchNormalization"):
            try:
                _fold(c.graph, node, linears)
                changes += 1
            except MatchFailure as failure:
                self.note(c, node.name, f"BatchNormalization stays: {failure.reason}")
        c.graph.clean()
        return changes


def _fold(graph: Graph, node: Node, linears: dict[int, Linear]) -> None:
    if not all(is_constant(t) for t in node.inputs[1:]) or node.attrs.get("training_mode", 0) or len(node.outputs) > 1:
        raise MatchFailure("its statistics are not constants")
    gamma, beta, mean, variance = (value(t).astype(np.float64) for t in node.inputs[1:])
    scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
    shift = beta - scale * mean
    before = producer(node.inputs[0])
    if before is not None and before.op == "Conv" and is_constant(before.inputs[1]):
        _check_alone(graph, node.inputs[0], before.outputs[0])
        _scale_conv(graph, before, scale, shift)
    else:
        _scale_linear(graph, node.inputs[0], linears, scale, shift)
    graph.replace(node.outputs[0], node.inputs[0])
    graph.remove(node)


def _check_alone(graph: Graph, tensor: Tensor, source: Tensor) -> None:
    """Refuse where anything between ``source`` and the reader of ``tensor`` has another reader."""
    while True:
        if len(tensor.outputs) != 1 or graph.is_output(tensor):
            raise MatchFailure(f"{tensor.name} has other readers")
        if tensor is source:
            return
        tensor = tensor.inputs[0].inputs[0]


def _scale_conv(graph: Graph, conv: Node, scale: NDArray[Any], shift: NDArray[Any]) -> None:
    weight = value(conv.inputs[1])
    bias = value(conv.inputs[2]) if len(conv.inputs) > 2 else np.zeros(len(scale))
    conv.inputs[1].values = (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
    fused = (scale * bias + shift).astype(np.float32)
    if len(conv.inputs) > 2:
        conv.inputs[2].values = fused
    else:
        conv.inputs.append(graph.constant(f"{conv.name}/bias", fused))


def _scale_linear(graph: Graph, tensor: Tensor, linears: dict[int, Linear], scale: NDArray[Any], shift: NDArray[Any]) -> None:
    view = trace(tensor)
    linear = linears.get(id(view.source))
    if linear is None:
        raise MatchFailure("no convolution and no Linear lies before it")
    channels = np.arange(len(scale)).reshape(-1, *[1] * (view.index.ndim - 2))
    if view.scale != 1 or len(scale) != linear.out_features or (view.index % linear.out_features != channels).any():
        raise MatchFailure("its channels are not the features of the Linear before it", linear.name)
    _check_alone(graph, tensor, linear.output)
    linear.weight.values = (value(linear.weight) * scale).astype(np.float32)
    if linear.bias is not None:
        linear.bias.values = (value(linear.bias) * scale).astype(np.float32)
    add_to_bias(graph, linear, shift)
