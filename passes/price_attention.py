"""What each choice for the attention products costs, side by side: the user decides between speed and accuracy by numbers.

    the graph as it will be quantized, with the operands of q k^T and P v in float | int8 | fp8  ->  SQNR of its outputs

The choices are those of the target. Each is simulated in float32 on images that calibration did not see; ranges are those
that a compile with this choice would find, and what recipes fit to the quantized layers before is left as it is. Prices are
told, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path

from vitq_compiler.errors import RecipeError
from vitq_compiler.graph import LARGE_MODEL, Array, Graph, value
from vitq_compiler.metrics import sqnr
from vitq_compiler.passes._operand_specs import excluding_pattern, operand_specs
from vitq_compiler.passes.compute_qparams import activation_params
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.qdq import simulate
from vitq_compiler.quant import Edge, QuantParams, QuantSpec
from vitq_compiler.report import AttentionRow
from vitq_compiler.runtime import Feed, limited, run_all, sample_count, session


@dataclass(frozen=True)
class PriceAttention(Pass):
    """QuantParams -> SQNR with the attention products in float, int8 and 8-bit floats"""

    name = "price-attention"
    requires = frozenset({Fact.QPARAMS})
    edits = False
    images: int = 4

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}")

    def run(self, c: Compilation) -> int:
        if not c.annotations.attentions or not c.target.attention_choices:
            return 0
        if sum(value(linear.weight).nbytes for linear in c.annotations.linears) > LARGE_MODEL:
            self.note(c, "the graph", "the choices of --attention are not priced: the model is large")
            return 0
        feeds = self._feeds(c)
        images = sum(sample_count(c.graph.inputs, feed) for feed in feeds)
        reference = self._outputs(c.floating or c.graph, c, feeds)
        operands = {edge for attention in c.annotations.attentions for edge in attention.edges.values()}
        own = {edge: params for edge, params in c.params.items() if edge in operands}
        others = {edge: params for edge, params in c.params.items() if edge not in operands}
        for choice, specs in _choices(c).items():
            chosen = specs == c.recipe.attention_specs()
            row = AttentionRow(choice, chosen, 0, len(c.annotations.attentions), None, images)
            try:
                edges, row = _quantized(c, specs, row)
            except RecipeError as error:
                c.prices.append(replace(row, reason=str(error)))
                continue
            params = own if chosen else {edge: _params(c, edge, spec) for edge, spec in edges.items()}
            noisy = self._outputs(simulate(c, others | params), c, feeds)
            c.prices.append(replace(row, sqnr_db=min(map(sqnr, reference, noisy), default=nan)))
        return len(c.prices)

    def _feeds(self, c: Compilation) -> list[Feed]:
        """The first held-back images; calibration's where none are."""
        samples = c.data.validation() if c.data.validation_count else c.data.calibration()
        return list(limited(c.graph.inputs, samples, self.images))

    def _outputs(self, graph: Path | Graph, c: Compilation, feeds: Sequence[Feed]) -> list[Array]:
        """Those outputs on all batches that hold classes, or all in float where none does."""
        names = [name for name in c.graph.output_names if name in c.annotations.class_outputs] or c.graph.output_names
        return [array for array in run_all(session(graph, threads=c.threads), feeds, names) if array.dtype.kind == "f"]


def _choices(c: Compilation) -> dict[str, dict[str, QuantSpec]]:
    """Name of a choice -> the specs of operands; the recipe's own where it is none of the target's."""
    found = {choice: c.recipe.with_attention(choice).attention_specs() for choice in c.target.attention_choices}
    own = c.recipe.attention_specs()
    return found if own in found.values() else {"recipe": own, **found}


def _quantized(c: Compilation, specs: dict[str, QuantSpec], row: AttentionRow) -> tuple[dict[Edge, QuantSpec], AttentionRow]:
    """The edges that a choice quantizes, and its row with their blocks counted."""
    edges: dict[Edge, QuantSpec] = {}
    quantized, reasons = 0, []
    for attention in c.annotations.attentions if specs else ():
        if (pattern := excluding_pattern(c, attention.softmax)) is not None:
            reasons.append(f"excluded by {pattern!r}")
            continue
        try:
            edges |= operand_specs(c, attention, specs)
            quantized += 1
        except MatchFailure as failure:
            reasons.append(failure.reason)
    return edges, replace(row, quantized=quantized, reason=reasons[0] if reasons else "")


def _params(c: Compilation, edge: Edge, spec: QuantSpec) -> QuantParams:
    return activation_params(c, c.graph.node(edge.node).inputs[edge.index], spec)
