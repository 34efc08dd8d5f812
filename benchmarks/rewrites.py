"""What each exact rewrite of the float graph is worth, by bits: top-1 and signal-to-noise ratio on labelled images.

Every Linear layer, the head and both attention products are quantized (patch embedding: 8-bit image; probabilities: unsigned,
8 bits, unless --probs says otherwise), activations per tensor, weights per output channel and rounded to nearest; nothing is
repaired afterwards. What differs between rows is what the float graph was rewritten to, and whether activations are symmetric.
--held-out measures on training images that did not calibrate: for decisions; test images are for the final table.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.tables import Cell, Table, say

if TYPE_CHECKING:
    from benchmarks.tasks import Task
    from vitq_compiler.graph import Graph

NAMES = ("shipped", "vit_s14_cifar10", "dinov2s_cifar10")
ROTATED = "fold-layernorm-affine,rotate-residual"
CENTRED = "center-keys,center-values"
# Name of a row -> passes before calibration, passes after it.
REWRITES = {
    "none": ("", ""),
    "rotate-residual": (ROTATED, ""),
    "rotate-heads": ("rotate-heads", ""),
    "center-keys, center-values": (CENTRED, ""),
    "equalize-heads": ("equalize-heads", ""),
    "equalize-values": ("", "equalize-values"),
    "reparameterize-layernorm 0.5": ("", "reparameterize-layernorm"),
    "reparameterize-layernorm 1": ("", "reparameterize-layernorm{strength=1}"),
    "rotations": (f"{ROTATED},rotate-heads", ""),
    "rotations, centring": (f"{ROTATED},rotate-heads,{CENTRED}", ""),
    "rotations, centring, fold 0.5": (f"{ROTATED},rotate-heads,{CENTRED}", "reparameterize-layernorm"),
    "rotations, centring, fold 1": (f"{ROTATED},rotate-heads,{CENTRED}", "reparameterize-layernorm{strength=1}"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--model", nargs="+", default=["shipped"], choices=NAMES, help="[shipped]")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w6a6", "w4a4"], metavar="wNaM", help="[w8a8 w6a6 w4a4]")
    parser.add_argument("--rewrites", nargs="+", default=list(REWRITES), choices=list(REWRITES), metavar="NAME", help="rows [all]")
    parser.add_argument("--symmetric", nargs="+", default=["no", "yes"], choices=["no", "yes"], help="of activations [no yes]")
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

    return [measure_task(TASKS[name], bits, options) for name in options.model for bits in options.bits]


def measure_task(task: Task, bits: str, options: argparse.Namespace) -> Table:
    """Quantize the model once for every row, then run all of them on the same images."""
    import numpy as np

    from benchmarks.accuracy import evaluate
    from benchmarks.tasks import HELD_BACK, data_folder, existing, write_calibration
    from vitq_compiler import runtime

    folder = options.data or data_folder()
    model = existing(task.model(folder))
    with np.load(existing(folder / task.images)) as stored:
        train, train_labels, tests, labels = (stored[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    if options.held_out:
        calibrating = options.samples + HELD_BACK
        order = np.random.default_rng(options.seed).permutation(len(train))[calibrating:][: options.images or task.count]
        tests, labels = train, train_labels
    else:
        order = (task.order() if task.order else np.arange(len(tests)))[: options.images or task.count]
    sessions = {"float": runtime.session(model, threads=options.threads)}
    rows = [(name, symmetric) for name in options.rewrites for symmetric in options.symmetric]
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "calibration.npz"
        write_calibration(task, train, sessions["float"].get_inputs()[0].name, options.samples, options.seed, source)
        for name, symmetric in rows:
            say(f"{task.name} {bits}: {name}, {'symmetric' if symmetric == 'yes' else 'asymmetric'}")
            graph = quantized(model, source, task, bits, symmetric == "yes", *REWRITES[name], options)
            sessions[f"{name}|{symmetric}"] = runtime.session(graph, threads=options.threads)
    scores = evaluate(task, sessions, tests, labels, order)
    cells: list[tuple[Cell, ...]] = [("float", scores["float"].right / len(order), None, scores["float"].right / len(order), None)]
    for name in options.rewrites:
        pair = [scores.get(f"{name}|{symmetric}") for symmetric in ("no", "yes")]
        cells.append((name, *(cell for s in pair for cell in ((s.right / s.images, s.sqnr) if s else (None, None)))))
    images = "held-out training" if options.held_out else "test"
    return Table(
        f"{task.name}, {bits.upper()}, {len(order)} {images} images",
        ("rewrites", "top-1", "SQNR, dB", "top-1 symmetric", "SQNR symmetric, dB"),
        tuple(cells),
        (f"{options.samples} calibration images, seed {options.seed}. Probabilities: {options.probs} bits. Ranges: `{options.ranges}`.",),
        {"top-1": ".4f", "top-1 symmetric": ".4f", "SQNR, dB": ".1f", "SQNR symmetric, dB": ".1f"},
    )


def quantized(
    model: Path, calibration: Path, task: Task, bits: str, symmetric: bool, before: str, after: str, options: argparse.Namespace
) -> Graph:
    """The float graph with quantizers, as the runtime can run it."""
    from vitq_compiler.catalog import FRONT, find_pass, load_target
    from vitq_compiler.data import open_data
    from vitq_compiler.graph import Graph
    from vitq_compiler.model_io import convert_opset, read_model
    from vitq_compiler.pipeline import Compilation, Pipeline
    from vitq_compiler.preprocess import resolve
    from vitq_compiler.qdq import simulate
    from vitq_compiler.recipe import parse_recipe

    operand: dict[str, Any] = {"symmetric": symmetric}
    recipe = parse_recipe(
        "study",
        {
            "description": "exact rewrites and rounding to nearest",
            "weight": {"bits": 8, "signed": True, "symmetric": True, "granularity": "per_channel"},
            "activation": {"bits": 8, "symmetric": symmetric},
            "attention": {"q": operand, "k": operand, "v": operand, "probs": {"bits": options.probs, "symmetric": False}},
            "passes": "",
        },
    )
    target = load_target("onnxruntime")
    graph = Graph.from_proto(convert_opset(read_model(model), target.opset, model))
    graph.ir_version = target.ir_version
    data = open_data(calibration, graph.inputs, resolve(task.preprocess, model), samples=options.samples, seed=options.seed)
    c = Compilation(graph, recipe.with_bits(bits).defined("strict"), target, data, threads=options.threads)
    text = ",".join(part for part in (FRONT, target.rewrites, before, "calibrate", after, options.ranges) if part)
    Pipeline.parse(text, find_pass).run(c)
    return simulate(c)
