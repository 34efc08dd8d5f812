"""What a compile would find and do, without calibrating: the blocks of a model and what the recipe makes of each layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from vitq_compiler.catalog import load_target
from vitq_compiler.graph import Node, Tensor, is_constant, value
from vitq_compiler.model_source import ModelSource, find_model
from vitq_compiler.opening import open_model, run_front
from vitq_compiler.pipeline import Compilation
from vitq_compiler.quant import Edge
from vitq_compiler.recipe import load_recipe
from vitq_compiler.report import NoteRow
from vitq_compiler.runtime import probe
from vitq_compiler.sizes import Probe


@dataclass(frozen=True)
class LayerRow:
    """One Linear layer, patch embedding, or the two products of an attention block.

    Attributes:
        name: its node; that of the softmax for attention products.
        scope: the module it came from, where the exporter recorded it.
        role: as in the report of a compile; ``products`` for attention products.
        block: its block, such as ``attention 3``; empty outside blocks.
        shape: of its output in a run of one sample (or of the batch that the model fixes).
        parameters: numbers in its weight and bias.
        macs: multiplications of one sample.
        quantized: whether the recipe makes it integer.
        reason: why not.
    """

    name: str
    scope: str
    role: str
    block: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    quantized: bool
    reason: str


@dataclass(frozen=True)
class BlockSummary:
    """The layers of one block together; a layer outside blocks stands for itself."""

    name: str
    scope: str
    roles: tuple[str, ...]
    shape: tuple[int, ...]
    parameters: int
    macs: int
    layers: int
    quantized: int
    reason: str


@dataclass(frozen=True)
class Structure:
    """The structure of a model.

    Attributes:
        parameters: all numbers in weights, those outside the layers too.
        notes: what is no layer or block although it is almost one, and why.
    """

    model: str
    recipe: str
    target: str
    parameters: int
    layers: tuple[LayerRow, ...]
    notes: tuple[NoteRow, ...]

    @property
    def macs(self) -> int:
        """Multiplications of one sample in all layers and attention products."""
        return sum(row.macs for row in self.layers)

    @property
    def quantized_macs(self) -> int:
        """Those of them that become integer."""
        return sum(row.macs for row in self.layers if row.quantized)

    @property
    def blocks(self) -> tuple[BlockSummary, ...]:
        """The blocks in the order of the graph."""
        return tuple(_summary(list(rows)) for _, rows in groupby(self.layers, lambda row: row.block or row.name))

    def to_json(self) -> str:
        """Layers, blocks, notes and totals as text."""
        totals = {"macs": self.macs, "quantized_macs": self.quantized_macs, "parameters": self.parameters}
        table: dict[str, Any] = {**asdict(self), "blocks": [asdict(block) for block in self.blocks], "totals": totals}
        return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


def _summary(rows: list[LayerRow]) -> BlockSummary:
    first = rows[0]
    reasons = dict.fromkeys(f"{row.role}: {row.reason}" for row in rows if row.reason)
    return BlockSummary(
        name=first.block or first.name,
        scope=first.scope,
        roles=tuple(dict.fromkeys(row.role for row in rows)),
        shape=rows[-1].shape,
        parameters=sum(row.parameters for row in rows),
        macs=sum(row.macs for row in rows),
        layers=len(rows),
        quantized=sum(row.quantized for row in rows),
        reason="; ".join(reasons),
    )


def inspect(
    model: ModelSource | Path | str,
    *,
    recipe: str = "w8a8",
    bits: str | None = None,
    definition: str | None = None,
    target: str = "onnxruntime",
    exclude: Sequence[str] = (),
    threads: int = 0,
) -> Structure:
    """Find the blocks of a model, by the passes that a compile begins with; options as of `compiler.compile`.

    The model is run once on random numbers, to see the shapes.

    Raises:
        VitqError: the model cannot be compiled; the message says why.
    """
    source = find_model(model)
    model = source.file
    plan = load_recipe(recipe).with_bits(bits).defined(definition).excluding(tuple(exclude))
    chosen = load_target(target)
    graph = open_model(model, chosen).graph
    parameters = sum(value(t).size for t in graph.constants() if value(t).dtype.kind == "f")
    c = Compilation(graph, plan, chosen, data=None, threads=threads)  # type: ignore[arg-type]  # nothing here looks at data
    run_front(c, model)
    layers = tuple(_layers(c))
    named = {row.name for row in layers}
    notes = tuple(NoteRow(n.stage, n.where, n.reason) for n in c.notes if n.where not in named)
    return Structure(source.name, plan.name, chosen.name, parameters, layers, notes)


def _layers(c: Compilation) -> list[LayerRow]:
    """All layers in graph order, the products of each attention block before its projection."""
    found = c.annotations
    ends: dict[str, Tensor] = {linear.name: linear.output for linear in found.linears}
    ends.update({node.name: node.outputs[0] for node in found.patch_embeddings})
    inner = [t for a in found.attentions for t in (a.scores.outputs[0], a.context.outputs[0])]
    shapes = _observed(c, [*ends.values(), *inner])
    batch = next((spec.fixed_batch for spec in c.graph.inputs if spec.fixed_batch), 1)
    reasons = {note.where: note.reason for note in c.notes}
    order = {node.name: place for place, node in enumerate(c.graph.clean().nodes)}

    def row(node: Node, role: str, block: str, end: Tensor, parameters: int, macs: int, reason: str, quantized: bool) -> LayerRow:
        return LayerRow(
            node.name, c.graph.scope(node), role, block, shapes[end.name], parameters, int(macs) // int(batch), quantized, reason
        )

    rows = []
    for linear in found.linears:
        size = value(linear.weight).size + (value(linear.bias).size if linear.bias is not None else 0)
        macs = prod(shapes[linear.output.name]) * linear.in_features
        quantized = Edge(linear.name, 1) in c.specs
        reason = "" if quantized else reasons.get(linear.name, "")
        rows.append(row(linear.matmul, linear.role, linear.block, linear.output, size, macs, reason, quantized))
    for node in found.patch_embeddings:
        weights = [value(t) for t in node.inputs[1:] if is_constant(t)]
        macs = prod(shapes[node.outputs[0].name]) * prod(weights[0].shape[1:])
        quantized, reason = Edge(node.name, 1) in c.specs, reasons.get(node.name, "")
        rows.append(row(node, "patch_embed", "", node.outputs[0], sum(w.size for w in weights), macs, reason, quantized))
    for attention in found.attentions:
        scores, context = (shapes[n.outputs[0].name] for n in (attention.scores, attention.context))
        macs = prod(scores) * context[-1] * 2  # q k^T and probs v, with heads of one size
        quantized = any(edge in c.specs for edge in attention.edges.values())
        reason = "" if quantized else reasons.get(attention.softmax.name, f"recipe {c.recipe.name} keeps attention products in float")
        block = f"attention {attention.index}"
        rows.append(row(attention.softmax, "products", block, attention.context.outputs[0], 0, macs, reason, quantized))
    return sorted(rows, key=lambda r: order[r.name])


def _observed(c: Compilation, tensors: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors in one run on a single random sample."""
    copy = c.graph.snapshot()
    names = list(dict.fromkeys(t.name for t in tensors))
    shapes = {name: copy.insert("Shape", [copy.tensor(name)], name=f"{name}/observed").name for name in names}
    seen = probe(copy, shapes.values(), [Probe(1, c.probes[0].shapes).feed(c.graph.inputs)], threads=c.threads)[0]
    return {name: tuple(int(d) for d in np.atleast_1d(seen[shape])) for name, shape in shapes.items()}
