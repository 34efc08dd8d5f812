"""The residual stream: all tensors that share one basis of channels, and the weights that write into it and read from it.

Found by structure: from the input of a normalization in all directions through operations that treat channels alike
(`blocks.channels`), up to the Linears, convolutions and constants that write it and the Linears and convolutions that read
it. A network of stages (Swin, Hiera) has one stream for each width: patch merging reads the one and writes the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vitq_compiler.blocks.channels import CARRIERS, REARRANGING, carry
from vitq_compiler.blocks.linear import Linear, absorb
from vitq_compiler.blocks.normalization import NORMS
from vitq_compiler.graph import Graph, Node, Tensor, is_constant, producer, readers, value
from vitq_compiler.pattern import MatchFailure


@dataclass(eq=False)
class Port:
    """A constant that has the channels of a stream along one of its axes, once or several times over.

    Attributes:
        tensor: a weight, a bias, or a constant in the stream itself, such as position embeddings.
        axis: its axis of channels.
        owner: the node it is a parameter of, or that it is an input of.
    """

    tensor: Tensor
    axis: int
    owner: Node


@dataclass(eq=False)
class Stream:
    """One stream.

    Attributes:
        width: number of channels.
        writers: what adds to it.
        readers: what multiplies it.
        linears: the Linear layers among the readers.
        norms: the LayerNormalizations and RMSNormalizations in it; their outputs are tensors of the stream too.
        refusal: why its basis cannot be changed, or an empty string.
    """

    width: int
    writers: list[Port] = field(default_factory=list)
    readers: list[Port] = field(default_factory=list)
    linears: list[Linear] = field(default_factory=list)
    norms: list[Node] = field(default_factory=list)
    refusal: str = ""


def find_streams(graph: Graph, linears: Sequence[Linear]) -> list[Stream]:
    """All streams that a normalization reads, in graph order."""
    streams, seen = [], set[int]()
    for node in graph.find(*NORMS):
        width = node.inputs[0].shape[-1] if node.inputs[0].shape else None
        if id(node) not in seen and isinstance(width, int) and width > 0:
            search = _Search(graph, linears, width, CARRIERS)
            streams.append(search.run(node.inputs[0], len(node.inputs[0].shape) - 1))
            seen |= {id(norm) for norm in search.stream.norms}
    return streams


def readers_of_norm(graph: Graph, node: Node, linears: Sequence[Linear]) -> list[Linear]:
    """The Linear layers that read the output of a normalization, each directly or through layout operations and means.

    Raises:
        MatchFailure: something else reads it, or they read something else too.
    """
    result = node.outputs[0]
    if not result.shape or node.attrs.get("axis", -1) not in (-1, len(result.shape) - 1):
        raise MatchFailure("it normalizes more than the last axis", node.name)
    stream = _Search(graph, linears, result.shape[-1], REARRANGING, source=node).run(result, len(result.shape) - 1)
    if stream.writers and not stream.refusal:
        stream.refusal = f"{stream.writers[0].owner.op} {stream.writers[0].owner.name} adds to its output"
    if len(stream.linears) < len(stream.readers) and not stream.refusal:
        stream.refusal = "a convolution reads it"
    if stream.refusal:
        raise MatchFailure(stream.refusal, node.name)
    return stream.linears


def only_normalizes(node: Node) -> bool:
    """Whether a normalization has scales of one and shifts of zero."""
    return bool((value(node.inputs[1]) == 1).all()) and not any(value(t).any() for t in node.inputs[2:])


def fold_affine(graph: Graph, node: Node, linears: Sequence[Linear]) -> None:
    """Move the scale and shift of a normalization into its readers: LN(u; g, b) W + c -> LN(u; 1, 0) (diag(g) W) + (c + b W).

    Raises:
        MatchFailure: as `readers_of_norm`; the graph is as it was.
    """
    gamma = value(node.inputs[1])
    beta = value(node.inputs[2]) if len(node.inputs) > 2 else np.zeros_like(gamma)
    for linear in readers_of_norm(graph, node, linears):
        copies = linear.in_features // len(gamma)
        absorb(graph, linear, -np.tile(beta, copies), np.tile(gamma, copies))
    node.inputs[1].values = np.ones_like(gamma)
    if len(node.inputs) > 2:
        node.inputs[2].values = np.zeros_like(beta)


class _Search:
    """One walk over the tensors of a stream; the first obstacle is kept, and the rest is walked all the same."""

    def __init__(self, graph: Graph, linears: Sequence[Linear], width: int, carriers: frozenset[str], source: Node | None = None) -> None:
        self.graph, self.carriers, self.source = graph, carriers, source
        self.by_output = {id(linear.output): linear for linear in linears}
        self.by_matmul = {id(linear.matmul): linear for linear in linears}
        self.stream = Stream(width)
        self.axes: dict[int, int] = {}
        self.carried: set[int] = set()

    def run(self, tensor: Tensor, axis: int) -> Stream:
        """Walk from ``tensor``, whose channels lie along ``axis``."""
        waiting = [(tensor, axis, tensor.outputs[0] if tensor.outputs else None)]
        while waiting:
            tensor, axis, reader = waiting.pop()
            if self.axes.setdefault(id(tensor), axis) != axis:
                self.refuse(f"{tensor.name} has its channels along two axes")
            elif id(tensor) in self.carried:
                continue
            self.carried.add(id(tensor))
            if is_constant(tensor):
                self.stream.writers.append(Port(tensor, axis, reader))
            else:
                waiting += self.look_up(tensor, axis) + self.look_down(tensor, axis)
        return self.stream

    def refuse(self, reason: str) -> None:
        self.stream.refusal = self.stream.refusal or reason

    def look_up(self, tensor: Tensor, axis: int) -> list[tuple[Tensor, int, Node]]:
        """What ``tensor`` is made of."""
        node, linear = producer(tensor), self.by_output.get(id(tensor))
        if node is not None and node is self.source:
            return []
        if linear is not None:
            self.write(linear.matmul, linear.weight, linear.bias, axis, len(tensor.shape) - 1, 1)
        elif node is not None and node.op == "Conv" and is_constant(node.inputs[1]):
            if node.attrs.get("group", 1) != 1:
                self.refuse(f"Conv {node.name} writes it channel by channel")
            self.write(node, node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None, axis, 1, 0)
        elif node is None:
            self.refuse(f"it holds the graph input {tensor.name}")
        else:
            return self.through(node, tensor, axis, "writes it")
        return []

    def write(self, node: Node, weight: Tensor, bias: Tensor | None, axis: int, expected: int, weight_axis: int) -> None:
        """A writer whose output channels lie along ``expected``."""
        if axis != expected:
            self.refuse(f"{node.op} {node.name} writes it along another axis")
        self.stream.writers.append(Port(weight, weight_axis, node))
        if bias is not None:
            self.stream.writers.append(Port(bias, 0, node))

    def look_down(self, tensor: Tensor, axis: int) -> list[tuple[Tensor, int, Node]]:
        """What reads ``tensor``."""
        if self.graph.is_output(tensor):
            self.refuse(f"{tensor.name} is a graph output")
        found = []
        for node in readers(tensor):
            linear = self.by_matmul.get(id(node))
            if node.op in ("Shape", "Size"):
                continue  # sees no numbers
            if linear is not None and node.inputs[0] is tensor and axis == len(tensor.shape) - 1:
                self.stream.linears.append(linear)
                self.stream.readers.append(Port(linear.weight, 0, node))
            elif node.op == "Conv" and node.inputs[0] is tensor and is_constant(node.inputs[1]) and axis == 1:
                if node.attrs.get("group", 1) != 1:
                    self.refuse(f"Conv {node.name} reads it channel by channel")
                self.stream.readers.append(Port(node.inputs[1], 1, node))
            else:
                found += self.through(node, tensor, axis, "reads it")
        return found

    def through(self, node: Node, tensor: Tensor, axis: int, does: str) -> list[tuple[Tensor, int, Node]]:
        """The other tensors that an operation on the way holds."""
        if node.op not in self.carriers:
            self.refuse(f"{node.op} {node.name} {does}")
            return []
        try:
            places = carry(node, tensor, axis, self.stream.width)
        except MatchFailure as failure:
            self.refuse(failure.reason)
            return []
        if node.op in NORMS and not any(node is norm for norm in self.stream.norms):
            self.stream.norms.append(node)
        return [(other, place, node) for other, place in places]
