"""What each step of weight repair is worth: a recipe's pipeline, cut short after one step after the other.

top-1, agreement, SQNR   on labelled test images, as in `python -m benchmarks accuracy`
SQNR seen                the same on the calibration images: where it is much higher, the step has learned these by heart
seconds, MB              of the compile, in a process of its own: wall clock, and its largest resident memory

Every row is compiled by itself from the same calibration images (training images); nothing is tuned on test images. Rows are
written ``+ pass``, each with all that stand above it.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.accuracy import NAMES, evaluate
from benchmarks.tables import Cell, Table, say

KILO = 1024 if sys.platform != "darwin" else 1024**2  # of ru_maxrss, to MB
FITTING = ("compensate-weights", "round-weights", "correct-bias", "reconstruct-blocks")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--model", nargs="+", default=["shipped"], choices=NAMES, help="[shipped]")
    parser.add_argument("--recipe", default="fast-w4a4", help="whose steps are measured [fast-w4a4]")
    parser.add_argument("--bits", nargs="+", help="such as w4a4 w3a3 [the recipe's]")
    parser.add_argument("--also", default="", metavar="PASSES", help="passes to add at the end of the recipe's")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of images and models [VITQ_DATA, else .data/real]")
    parser.add_argument("--images", type=int, default=1000, metavar="N", help="test images [1000]")
    parser.add_argument("--samples", type=int, default=256, metavar="N", help="calibration samples [256]")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="of calibration [16]")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples [0]")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the runtime and of torch [1]")
    parser.add_argument("--work-dir", type=Path, metavar="DIR", help="of the compiles: activations, and training to go on from")
    parser.add_argument("--last", type=int, metavar="N", help="measure only the N longest pipelines [all]")


def steps(passes: str) -> list[str]:
    """Pipelines that end before the first fitting pass, and after each of them."""
    names = passes.split(",")
    first = next((i for i, name in enumerate(names) if name.partition("{")[0] in FITTING), len(names))
    return [",".join(names[:stop]) for stop in range(first, len(names) + 1)]


def measure(options: argparse.Namespace) -> list[Table]:
    """A table for each model and number of bits."""
    return [_table(name, bits, options) for name in options.model for bits in options.bits or [None]]


def _table(name: str, bits: str | None, options: argparse.Namespace) -> Table:
    import numpy as np

    from benchmarks.tasks import TASKS, data_folder, existing, write_calibration
    from vitq_compiler import runtime
    from vitq_compiler.recipe import load_recipe

    task, recipe = TASKS[name], load_recipe(options.recipe)
    folder = options.data or data_folder()
    model = existing(task.model(folder))
    with np.load(existing(folder / task.images)) as stored:
        train, tests, labels = stored["x_train"], stored["x_test"], stored["y_test"]
        known = stored["y_train"]
    order = (task.order() if task.order else np.arange(len(tests)))[: options.images]
    seen = np.random.default_rng(options.seed).permutation(len(train))[: options.samples]
    floating = runtime.session(model, threads=options.threads)
    rows: list[tuple[Cell, ...]] = []
    with tempfile.TemporaryDirectory() as temporary:
        source, output = Path(temporary) / "calibration.npz", Path(temporary) / "vitq.onnx"
        write_calibration(task, train, floating.get_inputs()[0].name, options.samples, options.seed, source)
        pipelines = steps(",".join(filter(None, (recipe.with_bits(bits).pipeline, options.also))))
        for number, passes in enumerate(pipelines):
            if options.last and number + options.last < len(pipelines):
                continue
            label = "+ " + passes.rpartition(",")[2] if number else "without repair"
            say(f"{name}: {label} ...")
            given = {"recipe": options.recipe, "bits": bits, "calibration": source, "preprocess": task.preprocess}
            given |= {key: getattr(options, key) for key in ("samples", "batch_size", "seed", "threads", "work_dir")}
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                seconds, megabytes = alone.submit(compile_alone, model, output, passes, given).result()
            sessions = {"float": floating, "vitq": runtime.session(output, threads=options.threads)}
            unseen = evaluate(task, sessions, tests, labels, order)
            learned = evaluate(task, sessions, train, known, seen)["vitq"]
            score = unseen["vitq"]
            parts = score.right / score.images, score.agreeing / score.images
            rows.append((label, *parts, score.sqnr, learned.agreeing / learned.images, learned.sqnr, seconds, megabytes))
            reference = unseen["float"]
    rows.insert(0, ("float", reference.right / reference.images, *[None] * 6))
    columns = ("graph", "top-1", "agreement", "SQNR, dB", "agreement seen", "SQNR seen, dB", "seconds", "MB")
    note = f"Calibration: {options.samples} training images, seed {options.seed}; {options.threads} thread(s). {len(order)} test images."
    title = f"Weight repair of {name}, recipe {options.recipe} at {bits or recipe.bits}"
    formats = {"top-1": ".4f", "agreement": ".4f", "agreement seen": ".4f", "seconds": ".0f", "MB": ".0f"}
    return Table(title, columns, tuple(rows), (note,), formats)


def compile_alone(model: Path, output: Path, passes: str, given: dict[str, Any]) -> tuple[float, float]:
    """Compile with the recipe's pipeline replaced by ``passes``; seconds and megabytes."""
    from vitq_compiler.catalog import FRONT, load_target
    from vitq_compiler.compiler import compile

    target = load_target("onnxruntime")
    began = time.perf_counter()
    compile(model, output, passes=",".join((FRONT, target.rewrites, passes, target.lowering)), **given)
    return time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KILO
