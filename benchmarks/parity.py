"""All exact rewrites of the float graph, one after the other, over files of models: what applies, what is refused, and how exact it is.

Outputs are compared after every rewrite with those of the model before any, on random input; the largest difference is in
parts of the largest output, where a compile stops at 1e-4. ``python -m benchmarks zoo --exports DIR`` makes files to try.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.tables import Cell, Table, say

if TYPE_CHECKING:
    from vitq_compiler.graph import Array

PASSES = ("fold-attention-scale", "fold-layernorm-affine", "rotate-residual", "rotate-heads", "center-keys", "center-values")
PASSES += ("equalize-heads", "reparameterize-layernorm", "equalize-values", "equalize-hidden")
STEPS = ",".join(PASSES).replace("reparameterize", "calibrate,reparameterize")
DIFFERENCE = {"largest difference": ".1e"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("files", nargs="+", type=Path, metavar="ONNX", help="models, or folders of them")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the runtime; 0 for all cores [0]")


@dataclass
class Tried:
    """One model after all rewrites.

    Attributes:
        name: of its file.
        changes: of each rewrite that was tried.
        differences: the largest after each rewrite that changed something.
        reasons: rewrite and reason, without the names of nodes, of what was left alone.
        error: why it was not tried, or nothing.
    """

    name: str
    changes: dict[str, int] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    reasons: set[tuple[str, str]] = field(default_factory=set)
    error: str = ""


def measure(options: argparse.Namespace) -> list[Table]:
    """By rewrite, by reason, by model."""
    files = [file for path in options.files for file in (sorted(path.glob("*.onnx")) if path.is_dir() else [path])]
    if not files:
        raise SystemExit(f"no .onnx file in {', '.join(map(str, options.files))}")
    tried = []
    for path in files:
        say(f"{path.stem} ...")
        tried.append(measure_one(path, options.threads))
        say(f"    {tried[-1].error or sum(tried[-1].changes.values())}")
    good = [model for model in tried if not model.error]
    return [
        Table("Exact rewrites by rewrite", ("rewrite", "models", "changes", "largest difference", "of"), by_rewrite(good), (), DIFFERENCE),
        Table("What a rewrite leaves alone, whole models or places in them", ("reason", "models", "rewrites"), by_reason(good)),
        Table("Exact rewrites by model", ("model", "changes", "largest difference", "no change"), by_model(tried), (), DIFFERENCE),
    ]


def by_rewrite(models: list[Tried]) -> tuple[tuple[Cell, ...], ...]:
    """How many models each rewrite changes, in how many places, and how far the outputs are from the model's after it."""
    rows: list[tuple[Cell, ...]] = []
    for name in PASSES:
        changed = [model for model in models if model.changes[name]]
        worst = max(changed, key=lambda model: model.differences[name], default=None)
        difference, where = (worst.differences[name], worst.name) if worst is not None else (None, "")
        rows.append((name, len(changed), sum(model.changes[name] for model in changed), difference, where))
    return tuple(rows)


def by_reason(models: list[Tried]) -> tuple[tuple[Cell, ...], ...]:
    """Each reason once, the most frequent first, with the rewrites that give it."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for model in models:
        for rewrite, reason in model.reasons:
            names, rewrites = found.setdefault(reason, (set(), set()))
            names.add(model.name)
            rewrites.add(rewrite)
    rows = sorted((-len(names), reason, rewrites) for reason, (names, rewrites) in found.items())
    return tuple((reason, -count, ", ".join(name for name in PASSES if name in rewrites)) for count, reason, rewrites in rows)


def by_model(models: list[Tried]) -> tuple[tuple[Cell, ...], ...]:
    """The largest difference after any rewrite, and the rewrites that change nothing."""
    return tuple(
        (model.name, None, None, model.error)
        if model.error
        else (
            model.name,
            sum(model.changes.values()),
            max(model.differences.values(), default=0.0),
            ", ".join(name for name in PASSES if not model.changes[name]),
        )
        for model in models
    )


def measure_one(path: Path, threads: int) -> Tried:
    """Rewrite one model by all passes in turn, and compare after each."""
    from vitq_compiler.catalog import FRONT, find_pass, load_target
    from vitq_compiler.data import open_data
    from vitq_compiler.errors import VitqError
    from vitq_compiler.opening import open_model, run_front
    from vitq_compiler.pipeline import Compilation, Pipeline
    from vitq_compiler.preprocess import resolve
    from vitq_compiler.recipe import load_recipe
    from vitq_compiler.token_ids import id_limits

    target, tried = load_target("onnxruntime"), Tried(path.stem)
    try:
        graph = open_model(path, target).graph
        data = open_data(None, graph.inputs, resolve(None, path), samples=2, batch_size=2, ids=id_limits(graph))
        c = Compilation(graph, load_recipe("w8a8"), target, data, threads=threads)
        feed = next(data.calibration())
        run_front(c, path)
        reference = run(c.graph, feed, threads)
        for step in Pipeline.parse(f"{FRONT},{STEPS}", find_pass).passes[-len(STEPS.split(",")) :]:
            changes = step.run(c)
            if step.name in PASSES:
                tried.changes[step.name] = changes
                if changes:
                    tried.differences[step.name] = difference(reference, run(c.graph, feed, threads))
    except VitqError as error:
        tried.error = str(error)
    tried.reasons = {(note.stage, in_general(note.reason)) for note in c.notes if note.stage in PASSES} if not tried.error else set()
    return tried


def run(graph: object, feed: dict[str, Array], threads: int) -> list[Array]:
    """All outputs."""
    from vitq_compiler import runtime

    return runtime.run(runtime.session(graph, threads=threads, brief=True), feed)  # type: ignore[arg-type]


def difference(before: list[Array], after: list[Array]) -> float:
    """The largest difference of any output, in parts of the largest value of that output."""
    from vitq_compiler.metrics import max_relative_error

    return max((max_relative_error(a, b) for a, b in zip(before, after, strict=True) if a.dtype.kind == "f"), default=0.0)


def in_general(reason: str) -> str:
    """``reason`` without what is not done and what is found in particular, and without names, which hold a digit, slash or dot."""
    reason = (reason.partition(": ")[2] or reason).partition("; ")[0]
    return " ".join(word for word in reason.split() if not any(sign in word for sign in "0123456789/._"))
