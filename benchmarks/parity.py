"""All exact rewrites of the float graph, one after the other, over files of models: what applies, what is refused, and how exact it is.

Outputs are compared after every rewrite with those of the model before any, on random input; the largest difference is in
parts of the largest output, where a compile stops at 1e-4. ``python -m benchmarks zoo --exports DIR`` makes files to try.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.tables import Cell, Table, say

if TYPE_CHECKING:
    from vitq_compiler.graph import Array

PASSES = ("fold-attention-scale", "fold-layernorm-affine", "rotate-residual", "rotate-heads", "center-keys", "center-values")
PASSES += ("equalize-heads", "reparameterize-layernorm", "equalize-values", "equalize-hidden")
STEPS = ",".join(PASSES).replace("reparameterize", "calibrate,reparameterize")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("files", nargs="+", type=Path, metavar="ONNX", help="models")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the runtime; 0 for all cores [0]")


def measure(options: argparse.Namespace) -> list[Table]:
    """A row for each model, and how often each rewrite gave which reason."""
    rows: list[tuple[Cell, ...]] = []
    reasons: Counter[tuple[str, str]] = Counter()
    for path in options.files:
        say(f"{path.stem} ...")
        row, refused = measure_one(path, options.threads)
        rows.append(row)
        reasons.update(refused)
    applied = ("model", *PASSES, "largest difference")
    told = tuple((name, reason, count) for (name, reason), count in sorted(reasons.items()))
    return [
        Table("Exact rewrites: changes", applied, tuple(rows), (), {"largest difference": ".1e"}),
        Table("Models that a rewrite leaves alone or in part, by reason", ("rewrite", "reason", "models"), told),
    ]


def measure_one(path: Path, threads: int) -> tuple[tuple[Cell, ...], set[tuple[str, str]]]:
    """The row of one model; and rewrite and reason, without the names of nodes, of what was left alone."""
    from vitq_compiler.catalog import FRONT, find_pass, load_target
    from vitq_compiler.data import open_data
    from vitq_compiler.errors import VitqError
    from vitq_compiler.opening import open_model, run_front
    from vitq_compiler.pipeline import Compilation, Pipeline
    from vitq_compiler.preprocess import resolve
    from vitq_compiler.recipe import load_recipe
    from vitq_compiler.token_ids import id_limits

    target = load_target("onnxruntime")
    try:
        graph = open_model(path, target).graph
        data = open_data(None, graph.inputs, resolve(None, path), samples=2, batch_size=2, ids=id_limits(graph))
        c = Compilation(graph, load_recipe("w8a8"), target, data, threads=threads)
        feed = next(data.calibration())
        run_front(c, path)
        largest = 0.0
        changes: dict[str, int] = {}
        reference = run(c.graph, feed, threads)
        for step in Pipeline.parse(f"{FRONT},{STEPS}", find_pass).passes[-len(STEPS.split(",")) :]:
            changes[step.name] = step.run(c)
            if step.exact:
                largest = max(largest, difference(reference, run(c.graph, feed, threads)))
    except VitqError as error:
        return (f"{path.stem}: {error}", *[None] * (len(PASSES) + 1)), set()
    reasons = {(note.stage, without_names(note.reason)) for note in c.notes if note.stage in PASSES}
    return (path.stem, *(changes[name] for name in PASSES), largest), reasons


def run(graph: object, feed: dict[str, Array], threads: int) -> list[Array]:
    """All outputs."""
    from vitq_compiler import runtime

    return runtime.run(runtime.session(graph, threads=threads, brief=True), feed)  # type: ignore[arg-type]


def difference(before: list[Array], after: list[Array]) -> float:
    """The largest difference of any output, in parts of the largest value of that output."""
    from vitq_compiler.metrics import max_relative_error

    return max((max_relative_error(a, b) for a, b in zip(before, after, strict=True) if a.dtype.kind == "f"), default=0.0)


def without_names(reason: str) -> str:
    """``reason`` without the names of nodes and tensors, which hold a digit, slash or dot."""
    words = [word for word in reason.split() if not any(sign in word for sign in "0123456789/._")]
    return " ".join(words)
