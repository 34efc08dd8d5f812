"""What became of every node of the input model: which pass replaced it by what, and what that is in the result.

Passes are watched from outside, as a hook: a node that is gone after a pass was replaced by whatever now feeds the first
node behind it that is still there. No pass has to say anything, and no name is taken apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vitq_compiler.annotations import Annotations
from vitq_compiler.blocks.patch_embed import patchify_fault
from vitq_compiler.graph import Graph, Node, is_constant, producer, value
from vitq_compiler.pipeline import Compilation, Pass, PassResult
from vitq_compiler.quant import Edge
from vitq_compiler.report import NodeRow

Reader = tuple[str, int]  # node and input; the empty name stands for the graph and its outputs


@dataclass(frozen=True)
class Step:
    """A pass replaced a node by the node ``by``; empty where its result became a constant, an input or nothing at all."""

    by: str
    told: str


@dataclass
class Provenance:
    """Watches the passes; `rows` says what became of every node there was at the beginning."""

    origin: dict[str, tuple[str, str]] = field(default_factory=dict)  # node -> op type and scope
    steps: dict[str, Step] = field(default_factory=dict)
    _before: dict[str, list[Reader]] = field(default_factory=dict)

    def before(self, p: Pass, c: Compilation) -> None:
        """Remember who reads whom."""
        if not self.origin:
            self.origin = {n.name: (n.op, c.graph.scope(n)) for n in c.graph.nodes if n.op != "Constant"}
        if p.edits:
            self._before = _readers(c.graph)

    def after(self, p: Pass, c: Compilation, result: PassResult) -> None:
        """See who is gone, and what stands in its place."""
        if not p.edits:
            return
        nodes = {n.name: n for n in c.graph.nodes}
        for name in self._before.keys() - nodes.keys():
            self.steps[name] = self._step(p.name, name, nodes, c.graph)

    def _step(self, by: str, name: str, nodes: dict[str, Node], graph: Graph) -> Step:
        stack, seen = [name], {name}
        while stack:
            for reader, index in self._before[stack.pop(0)]:
                if reader not in nodes and reader:
                    stack += [reader] if reader not in seen else []
                    seen.add(reader)
                    continue
                tensors = nodes[reader].inputs if reader else graph.outputs
                if index >= len(tensors):
                    continue
                node = producer(tensors[index])
                if node is None:
                    what = "a constant" if is_constant(tensors[index]) else f"the input {tensors[index].name}"
                    return Step("", f"{by} replaced it by {what}")
                if node.name in self._before:
                    return Step(node.name, f"{by} took it out: {node.op} {node.name} gives the same")
                return Step(node.name, f"{by} made it part of {node.op} {node.name}")
        return Step("", f"{by} took it out: nothing reads it any more")

    def rows(self, c: Compilation) -> tuple[NodeRow, ...]:
        """One row for every node of the input model."""
        blocks = _blocks(c.annotations)
        layers = {n.name: linear for linear in c.annotations.linears for n in (linear.matmul, linear.add) if n is not None}
        nodes = {n.name: n for n in c.graph.nodes}
        rows = []
        for name, (op, scope) in self.origin.items():
            chain, history = [name], []
            while (step := self.steps.get(chain[-1])) is not None:
                history.append(step.told)
                if not step.by or step.by in chain:
                    break
                chain.append(step.by)
            block = next((blocks[n] for n in chain if n in blocks), "")
            layer, last = next((layers[n] for n in chain if n in layers), None), nodes.get(chain[-1])
            if layer is not None:
                block = block or layer.block or layer.role
                done = "weight and activation are quantized" if Edge(layer.name, 1) in c.codes else "weight stays in float"
                state = f"it is part of the {layer.role} layer {layer.name}, whose {done}"
            else:
                state = _state(c, last, block) if last is not None else ""
            history += [f"{n.stage} says: {n.reason}" for n in c.notes if n.where in chain[1:] and n.reason not in state]
            rows.append(NodeRow(name, op, scope, block, tuple(history), state))
        return tuple(rows)


def _readers(graph: Graph) -> dict[str, list[Reader]]:
    inputs: dict[int, list[Reader]] = {}
    for node in graph.nodes:
        for index, tensor in enumerate(node.inputs):
            inputs.setdefault(id(tensor), []).append((node.name, index))
    for index, tensor in enumerate(graph.outputs):
        inputs.setdefault(id(tensor), []).append(("", index))
    return {n.name: [reader for t in n.outputs for reader in inputs.get(id(t), [])] for n in graph.nodes}


def _blocks(annotations: Annotations | None) -> dict[str, str]:
    """The nodes that are not Linear layers but belong to a block -> its name."""
    found: dict[str, str] = {}
    for attention in annotations.attentions if annotations is not None else ():
        members = [attention.scores, attention.softmax, attention.context, *([attention.fused] if attention.fused is not None else [])]
        found.update({node.name: f"attention {attention.index}" for node in members})
    for mlp in annotations.mlps if annotations is not None else ():
        found[mlp.activation.name] = f"mlp {mlp.index}"
    for linear in annotations.linears if annotations is not None else ():
        found[linear.name] = linear.block or linear.role
    return found


def _state(c: Compilation, node: Node, block: str) -> str:
    """How the result computes ``node``, and why."""
    sources = [producer(t) for t in node.inputs]
    if any(s is not None and s.op == "DequantizeLinear" for s in sources):
        return f"{node.op} {node.name} reads quantized values"
    return f"{node.op} {node.name} computes in float: {_why(c, node, block)}"


def _why(c: Compilation, node: Node, block: str) -> str:
    noted = next((n.reason for n in c.notes if n.where == node.name and n.stage == "annotate"), "")  # exclusions, near misses
    constants = [t for t in node.inputs[:2] if is_constant(t)]
    if noted:
        return noted
    if node.op in ("MatMul", "Attention") and not constants:
        where = f"the recipe {c.recipe.name} keeps attention products in float" if block else "it belongs to no attention block"
        return f"it multiplies activations, and {where}"
    if node.op == "MatMul" and is_constant(node.inputs[0]):
        return "its constant is the left operand, which is no Linear layer"
    if node.op == "MatMul" and value(node.inputs[1]).ndim != 2:
        return f"its weight has {value(node.inputs[1]).ndim} axes, that of a Linear layer has 2"
    if node.op == "Conv":
        return patchify_fault(c.graph, node) or f"the recipe {c.recipe.name} keeps it there"
    return f"recipe {c.recipe.name} quantizes inputs and weights of Linear layers, and has nothing for {node.op}"
