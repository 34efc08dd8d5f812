"""What the compiler understood of a graph: its blocks, and the role of every Linear layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from vitq_compiler.blocks.attention import Attention, Values, find_attention
from vitq_compiler.blocks.computed_attention import ComputedAttention, match_computed_attention
from vitq_compiler.blocks.head import class_outputs, find_heads
from vitq_compiler.blocks.linear import Linear, find_linears
from vitq_compiler.blocks.mlp import Mlp, find_mlps
from vitq_compiler.blocks.patch_embed import find_patch_embeddings
from vitq_compiler.graph import Graph, Node, Tensor, readers
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.quant import Edge
from vitq_compiler.views import VIEWS


@dataclass(frozen=True)
class Layer:
    """A Linear layer or patch embedding of the model as given, before passes take it apart or put several together.

    Attributes:
        name: its node.
        scope: the module it came from, where the exporter recorded it.
        role, block: as of `Linear`.
        in_features, out_features: its size.
    """

    name: str
    scope: str
    role: str
    block: str
    in_features: int
    out_features: int


@dataclass
class Annotations:
    """The structure of a graph.

    Attributes:
        layers: every Linear layer and patch embedding as given, in graph order; passes leave this alone.
        linears: every Linear layer, in graph order, with its role and block.
        attentions: attention blocks whose operands are views of Linear layers.
        computed_attentions: the other attention blocks.
        mlps: MLP blocks.
        patch_embeddings: Conv nodes that turn the image into tokens.
        failures: structures that were almost an attention block, and why not.
        block_edges: block name -> the first edge that reads the result of the block.
        class_outputs: graph outputs that hold one decision of each sample, see `blocks.head`.
    """

    layers: tuple[Layer, ...] = ()
    linears: list[Linear] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    computed_attentions: list[ComputedAttention] = field(default_factory=list)
    mlps: list[Mlp] = field(default_factory=list)
    patch_embeddings: list[Node] = field(default_factory=list)
    failures: list[MatchFailure] = field(default_factory=list)
    block_edges: dict[str, Edge] = field(default_factory=dict)
    class_outputs: frozenset[str] = frozenset()

    @property
    def values(self) -> list[Values]:
        """What is behind the softmax of every attention block, as far as it is plain: queries and keys may be turned or normalized."""
        return [*self.attentions, *(a.values for a in self.computed_attentions if isinstance(a.values, Values))]

    @property
    def by_matmul(self) -> dict[int, Linear]:
        """Linear layers by the id of their MatMul node."""
        return {id(linear.matmul): linear for linear in self.linears}


def understand(graph: Graph) -> Annotations:
    """Find the blocks of ``graph`` by structure and give every Linear its role."""
    linears = find_linears(graph)
    attentions, computed, failures = _find_attention(graph, linears)
    found = Annotations((), linears, attentions, computed, find_mlps(graph, linears), find_patch_embeddings(graph), failures)
    blocks: list[Attention | ComputedAttention] = [*attentions, *computed]
    for attention in blocks:
        block = f"attention {attention.index}"
        for linear in attention.linears:
            linear.role, linear.block = "qkv", block
        attention.proj.role, attention.proj.block = "proj", block
    for computed_attention in computed:
        for linear in computed_attention.mixers:
            linear.role, linear.block = "mix", f"attention {computed_attention.index}"
    for mlp in found.mlps:
        for half, role in ((mlp.gate, "gate"), (mlp.fc1, "fc1")):
            if half is not None and half.role in ("linear", "gate"):  # a parallel block shares it with attention
                half.role, half.block = role, f"mlp {mlp.index}"
        mlp.fc2.role, mlp.fc2.block = "fc2", f"mlp {mlp.index}"
    weighted = {id(linear.matmul) for linear in linears} | {id(node) for node in graph.find("Conv")}
    last = [linear for linear in linears if linear.role == "linear" and not _feeds(linear.output, weighted)]
    heads = find_heads(graph, last)
    for linear in last:
        linear.role = "head" if linear in heads else "output"
    found.block_edges = {
        linear.block: edge for linear in linears if linear.role in ("proj", "fc2") and (edge := _reading_edge(linear.output))
    }
    found.class_outputs = class_outputs(graph, heads)
    found.layers = _layers(graph, found)
    return found


def _layers(graph: Graph, found: Annotations) -> tuple[Layer, ...]:
    layers = [Layer(x.name, graph.scope(x.matmul), x.role, x.block, x.in_features, x.out_features) for x in found.linears]
    for node in found.patch_embeddings:
        outputs, *inputs = node.inputs[1].shape
        layers.append(Layer(node.name, graph.scope(node), "patch_embed", "", prod(inputs), outputs))
    place = {node.name: number for number, node in enumerate(graph.nodes)}
    return tuple(sorted(layers, key=lambda layer: place[layer.name]))


def _find_attention(graph: Graph, linears: list[Linear]) -> tuple[list[Attention], list[ComputedAttention], list[MatchFailure]]:
    """Attention blocks of both kinds, numbered together in graph order, and what is none of them."""
    attentions, near_misses = find_attention(graph, linears)
    computed: list[ComputedAttention] = []
    failures: list[MatchFailure] = []
    for failure in near_misses:
        try:
            computed.append(match_computed_attention(graph.node(failure.where), linears, failure.reason))
        except MatchFailure as none:
            if any(reader.op == "MatMul" for reader in readers(graph.node(failure.where).outputs[0])):  # else a classifier's
                failures.append(none)
    blocks: list[Attention | ComputedAttention] = [*attentions, *computed]
    place = {id(node): number for number, node in enumerate(graph.nodes)}
    for index, attention in enumerate(sorted(blocks, key=lambda block: place[id(block.softmax)])):
        attention.index = index
        if isinstance(attention, ComputedAttention) and isinstance(attention.values, Values):
            attention.values.index = index
    return attentions, computed, failures


def _reading_edge(tensor: Tensor) -> Edge | None:
    """The first edge that reads ``tensor``, behind layout operations, which lowering may cancel."""
    for reader in readers(tensor):
        behind = _reading_edge(reader.outputs[0]) if reader.op in VIEWS else None
        return behind or Edge(reader.name, next(i for i, t in enumerate(reader.inputs) if t is tensor))
    return None


def _feeds(tensor: Tensor, weighted: set[int]) -> bool:
    """Whether any of the nodes ``weighted`` lies downstream of ``tensor``."""
    seen: set[int] = set()
    stack = readers(tensor)
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        if id(node) in weighted:
            return True
        seen.add(id(node))
        stack.extend(r for t in node.outputs for r in readers(t))
    return False
