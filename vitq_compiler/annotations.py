"""What the compiler understood of a graph: its blocks, and the role of every Linear layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from vitq_compiler.blocks.attention import Attention, find_attention
from vitq_compiler.blocks.linear import Linear, find_linears
from vitq_compiler.blocks.mlp import Mlp, find_mlps
from vitq_compiler.blocks.patch_embed import find_patch_embeddings
from vitq_compiler.graph import Graph, Node, Tensor, ancestors, readers
from vitq_compiler.pattern import MatchFailure


@dataclass
class Annotations:
    """The structure of a graph.

    Attributes:
        linears: every Linear layer, in graph order, with its role and block.
        attentions: attention blocks.
        mlps: MLP blocks.
        patch_embeddings: Conv nodes that turn the image into tokens.
        failures: structures that were almost an attention block, and why not.
    """

    linears: list[Linear] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    mlps: list[Mlp] = field(default_factory=list)
    patch_embeddings: list[Node] = field(default_factory=list)
    failures: list[MatchFailure] = field(default_factory=list)

    @property
    def by_matmul(self) -> dict[int, Linear]:
        """Linear layers by the id of their MatMul node."""
        return {id(linear.matmul): linear for linear in self.linears}

    def block_outputs(self) -> dict[str, Tensor]:
        """The tensor each block adds to the residual stream, by block name."""
        return {linear.block: linear.output for linear in self.linears if linear.role in ("proj", "fc2")}


def understand(graph: Graph) -> Annotations:
    """Find the blocks of ``graph`` by structure and give every Linear its role."""
    linears = find_linears(graph)
    attentions, failures = find_attention(graph, linears)
    found = Annotations(linears, attentions, find_mlps(graph, linears), find_patch_embeddings(graph), failures)
    for attention in attentions:
        block = f"attention {attention.index}"
        for linear in attention.linears:
            linear.role, linear.block = "qkv", block
        attention.proj.role, attention.proj.block = "proj", block
    for mlp in found.mlps:
        mlp.fc1.role, mlp.fc1.block = "fc1", f"mlp {mlp.index}"
        mlp.fc2.role, mlp.fc2.block = "fc2", f"mlp {mlp.index}"
    matmuls = {id(linear.matmul) for linear in linears}
    for linear in linears:
        if linear.role == "linear" and not _feeds(linear.output, matmuls):
            linear.role = "head"
    return found


def _feeds(tensor: Tensor, matmuls: set[int]) -> bool:
    """Whether any Linear lies downstream of ``tensor``."""
    seen: set[int] = set()
    stack = readers(tensor)
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        if id(node) in matmuls:
            return True
        seen.add(id(node))
        stack.extend(r for t in node.outputs for r in readers(t))
    return False


def depends_on(tensor: Tensor, node: Node) -> bool:
    """Whether ``tensor`` is computed from ``node``."""
    return any(n is node for n in ancestors(tensor))
