"""Where the error of a recipe comes from: one role, or one block, quantized alone.

Ranges are the plain ones of calibration and weights are rounded to nearest, nothing is rewritten or repaired: what is seen is
the error that the passes of a recipe are there to lower. Measured at the outputs, on samples that calibration did not see.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np

from vitq_compiler.catalog import find_pass
from vitq_compiler.graph import is_constant
from vitq_compiler.metrics import sqnr
from vitq_compiler.pipeline import Compilation, Pipeline
from vitq_compiler.progress import Progress, silent
from vitq_compiler.qdq import simulate
from vitq_compiler.quant import Edge
from vitq_compiler.runtime import run_all, session

PASSES = "canonicalize,annotate,calibrate,compute-qparams"


@dataclass(frozen=True)
class SensitivityRow:
    """What was quantized alone, and the error that this makes.

    Attributes:
        kind: ``all``, ``role`` or ``block``.
        name: the role or block.
        part: ``weights``, ``activations``, or ``both``.
        edges: number of tensors quantized.
        sqnr_db: least of any float output; None where the outputs did not change.
    """

    kind: str
    name: str
    part: str
    edges: int
    sqnr_db: float | None


def sensitivity(c: Compilation, progress: Progress = silent) -> tuple[SensitivityRow, ...]:
    """Quantize everything, then each role (weights and activations apart) and each block alone; worst first.

    Args:
        c: a float graph after the passes of `catalog.FRONT`, with recipe and data; it is annotated and calibrated here.
        progress: told after every run.
    """
    Pipeline.parse(PASSES, find_pass).run(c)
    feeds = list(c.data.validation() if c.data.validation_count else c.data.calibration())
    reference = run_all(session(c.graph, threads=c.threads), feeds)
    groups = groups_of(c)
    rows = []
    for index, (key, edges) in enumerate(groups.items()):
        progress("quantizing one at a time", index, len(groups))
        other = run_all(session(simulate(c, {edge: c.params[edge] for edge in edges}), threads=c.threads), feeds)
        pairs = zip(reference, other, strict=True)
        least = min((sqnr(a, b) for a, b in pairs if a.dtype.kind == "f"), default=inf)
        rows.append(SensitivityRow(*key, len(edges), least if np.isfinite(least) else None))
    progress("quantizing one at a time", len(groups), len(groups))
    return tuple(sorted(rows, key=lambda row: inf if row.sqnr_db is None else row.sqnr_db))


def groups_of(c: Compilation) -> dict[tuple[str, str, str], list[Edge]]:
    """(kind, name, part) -> the quantized edges of it. What lies outside blocks is only in a role."""
    places = {linear.name: (linear.role, linear.block) for linear in c.annotations.linears}
    places.update({node.name: ("patch_embed", "") for node in c.annotations.patch_embeddings})
    operands = {
        edge: (operand, f"attention {attention.index}")
        for attention in c.annotations.attentions
        for operand, edge in attention.edges.items()
    }
    groups: dict[tuple[str, str, str], list[Edge]] = {("all", "", "both"): list(c.params)}
    for edge in c.params:
        role, block = operands[edge] if edge in operands else places[edge.node]
        part = "weights" if is_constant(c.graph.node(edge.node).inputs[edge.index]) else "activations"
        groups.setdefault(("role", role, part), []).append(edge)
        if block:
            groups.setdefault(("block", block, "both"), []).append(edge)
    return groups
