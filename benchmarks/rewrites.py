"""What each exact rewrite of the float graph is worth, by bits: top-1 and signal-to-noise ratio on labelled images.

Every Linear layer, the head and both attention products are quantized (patch embedding: 8-bit image; probabilities: unsigned,
8 bits, unless --probs says otherwise), activations per tensor, weights per output channel and rounded to nearest; nothing is
repaired afterwards. What differs between rows is what the float graph was rewritten to, and whether activations are symmetric.
--held-out measures on training images that did not calibrate: for decisions; test images are for the final table.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.tables import Cell, Table, say

if TYPE_CHECKING:
    from benchmarks.tasks import Array, Task
    from vitq_compiler.graph import Graph
    from vitq_compiler.pipeline import Compilation
    from vitq_compiler.recipe import Recipe

NAMES = ("shipped", "vit_s14_cifar10", "dinov2s_cifar10", "svtr_ocr")
ROTATED = "rotate-residual"
CENTRED = "center-keys,center-values"
FOLD = "reparameterize-layernorm"
# Name of a row -> passes before calibration, passes after it. "fold" is that of channel ranges into LayerNormalization.
REWRITES = {
    "none": ("", ""),
    "rotate-residual": (ROTATED, ""),
    "rotate-heads": ("rotate-heads", ""),
    "centring": (CENTRED, ""),
    "equalize-heads": ("equalize-heads", ""),
    "equalize-values": ("", "equalize-values"),
    "fold 0.5": ("", FOLD),
    "fold 0.5, scales alone": ("", f"{FOLD}{{center=false}}"),
    "fold 0.5, limit 4": ("", f"{FOLD}{{limit=4}}"),
    "fold 1": ("", f"{FOLD}{{strength=1}}"),
    "fold 1, median": ("", f"{FOLD}{{strength=1 common=median}}"),
    "fold 0.5, equalize-values": ("", f"{FOLD},equalize-values"),
    "centring, fold 0.5": (CENTRED, FOLD),
    "centring, fold 0.5, equalize-values": (CENTRED, f"{FOLD},equalize-values"),
    "rotate-residual, fold 0.5 where uneven, equalize-values": (ROTATED, f"{FOLD}{{spread=2}},equalize-values"),
    "rotations": (f"{ROTATED},rotate-heads", ""),
    "rotations, centring": (f"{ROTATED},rotate-heads,{CENTRED}", ""),
    "rotate-residual, fold 0.5": (ROTATED, FOLD),
    "rotate-residual, centring, fold 0.5": (f"{ROTATED},{CENTRED}", FOLD),
    "rotations, fold 0.5": (f"{ROTATED},rotate-heads", FOLD),
    "rotations, centring, fold 0.5": (f"{ROTATED},rotate-heads,{CENTRED}", FOLD),
    "rotations, centring, fold 1": (f"{ROTATED},rotate-heads,{CENTRED}", f"{FOLD}{{strength=1}}"),
}
AT_ONCE = 8  # graphs that are in memory together


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--model", nargs="+", default=["shipped"], choices=NAMES, help="[shipped]")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w6a6", "w4a4"], metavar="wNaM", help="[w8a8 w6a6 w4a4]")
    parser.add_argument("--rewrites", nargs="+", default=list(REWRITES), choices=list(REWRITES), metavar="NAME", help="rows [all]")
    parser.add_argument("--symmetric", nargs="+", default=["no", "yes"], choices=["no", "yes"], help="of activations [no yes]")
    parser.add_argument("--recipe", help="quantize what this recipe does, at its bits, not what is said above")
    parser.add_argument("--builtin", action="store_true", help="calibrate on built-in pictures, not on training images")
    parser.add_argument("--probs", type=int, default=8, metavar="N", help="bits of probabilities [8]")
    parser.add_argument("--ranges", default="compute-qparams", metavar="TEXT", help="passes that set ranges [compute-qparams]")
    parser.add_argument("--images", type=int, metavar="N", help="images [as many as the accuracy command]")
    parser.add_argument("--held-out", action="store_true", help="training images that calibration did not see, not test images")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="calibration samples [32]")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of calibration images [0]")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of images and models [VITQ_DATA, else .data/real]")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the runtime; 0 for all cores [0]")


def measure(options: argparse.Namespace) -> list[Table]:
    """One table for each model and bits."""
    from benchmarks.tasks import TASKS

    return [table for name in options.model for table in measure_task(TASKS[name], options)]


def measure_task(task: Task, options: argparse.Namespace) -> list[Table]:
    """For each choice of bits: quantize the model once for every row, and run all of them on the same images."""
    import numpy as np

    from benchmarks.tasks import HELD_BACK, data_folder, existing, write_calibration
    from vitq_compiler.graph import Graph
    from vitq_compiler.model_io import read_model

    folder = options.data or data_folder()
    model = existing(task.model(folder))
    with np.load(existing(folder / task.images)) as stored:
        train, train_labels, tests, labels = (stored[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    if options.held_out:
        calibrating = options.samples + HELD_BACK
        order = np.random.default_rng(options.seed).permutation(len(train))[calibrating:][: options.images or task.count]
        images = Images(train, train_labels, order)
    else:
        images = Images(tests, labels, (task.order() if task.order else np.arange(len(tests)))[: options.images or task.count])
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "calibration.npz"
        write_calibration(task, train, Graph.from_proto(read_model(model)).inputs[0].name, options.samples, options.seed, source)
        front = understood(model, source, task, options)
        return [score_all(task, model, front, bits, images, options) for bits in options.bits]


@dataclass(frozen=True)
class Images:
    """Stored images with their labels, and which of them are looked at."""

    stored: Array
    labels: Array
    order: Array


def score_all(task: Task, model: Path, front: Compilation, bits: str, images: Images, options: argparse.Namespace) -> Table:
    """One table."""
    from benchmarks.accuracy import evaluate
    from vitq_compiler import runtime

    scores: dict[Any, Any] = {}
    rows = [(name, symmetric) for name in options.rewrites for symmetric in options.symmetric]
    for start in range(0, len(rows), AT_ONCE):
        sessions: dict[Any, Any] = {"float": runtime.session(model, threads=options.threads)}
        for name, symmetric in rows[start : start + AT_ONCE]:
            say(f"{task.name} {bits}: {name}, {'symmetric' if symmetric == 'yes' else 'asymmetric'}")
            graph = quantized(front, bits, symmetric == "yes", *REWRITES[name], options)
            sessions[name, symmetric] = runtime.session(graph, threads=options.threads)
        scores |= evaluate(task, sessions, images.stored, images.labels, images.order)
    count = len(images.order)
    cells: list[tuple[Cell, ...]] = [("float", *[scores["float"].right / count, None] * len(options.symmetric))]
    for name in options.rewrites:
        both = [scores[name, symmetric] for symmetric in options.symmetric]
        cells.append((name, *(cell for s in both for cell in (s.right / s.images, s.sqnr))))
    headings = {"no": ("top-1", "SQNR, dB"), "yes": ("top-1 symmetric", "SQNR symmetric, dB")}
    kind = "held-out training" if options.held_out else "test"
    source = "built-in pictures calibrate" if options.builtin else "calibration images"
    what = f"Recipe {options.recipe}" if options.recipe else f"Probabilities: {options.probs} bits"
    return Table(
        f"{task.name}, {bits.upper()}, {count} {kind} images",
        ("rewrites", *(heading for symmetric in options.symmetric for heading in headings[symmetric])),
        tuple(cells),
        (f"{options.samples} {source}, seed {options.seed}. {what}. After the rewrites: `{options.ranges}`.",),
        {"top-1": ".4f", "top-1 symmetric": ".4f", "SQNR, dB": ".1f", "SQNR symmetric, dB": ".1f"},
    )


def understood(model: Path, calibration: Path, task: Task, options: argparse.Namespace) -> Compilation:
    """The float graph after the passes that every row begins with."""
    from vitq_compiler.catalog import load_target
    from vitq_compiler.data import open_data
    from vitq_compiler.opening import open_model, run_front
    from vitq_compiler.pipeline import Compilation
    from vitq_compiler.preprocess import resolve

    target = load_target("onnxruntime")
    graph = open_model(model, target).graph
    data = open_data(
        None if options.builtin else calibration, graph.inputs, resolve(task.preprocess, model), samples=options.samples, seed=options.seed
    )
    c = Compilation(graph, study(False, options), target, data, threads=options.threads)
    run_front(c, model)
    return c


def quantized(front: Compilation, bits: str, symmetric: bool, before: str, after: str, options: argparse.Namespace) -> Graph:
    """The float graph with quantizers, as the runtime can run it."""
    from vitq_compiler.catalog import find_pass
    from vitq_compiler.pipeline import Compilation, Pipeline
    from vitq_compiler.qdq import simulate

    recipe = study(symmetric, options).with_bits(bits)
    c = Compilation(front.graph.snapshot(), recipe, front.target, front.data, threads=options.threads)
    steps = ("canonicalize,annotate", front.target.rewrites, before, "calibrate", after, options.ranges)
    Pipeline.parse(",".join(filter(None, steps)), find_pass).run(c)
    return simulate(c)


def study(symmetric: bool, options: argparse.Namespace) -> Recipe:
    """What is quantized, and how."""
    from vitq_compiler.recipe import load_recipe, parse_recipe

    if options.recipe:
        return load_recipe(options.recipe)
    operand: dict[str, Any] = {"symmetric": symmetric}
    return parse_recipe(
        "study",
        {
            "description": "exact rewrites and rounding to nearest",
            "weight": {"bits": 8, "signed": True, "symmetric": True, "granularity": "per_channel"},
            "activation": {"bits": 8, "symmetric": symmetric},
            "attention": {"q": operand, "k": operand, "v": operand, "probs": {"bits": options.probs, "symmetric": False}},
            "definition": "strict",
            "passes": "",
        },
    )
