"""What each exact rewrite of the float graph is worth, by bits: top-1 and signal-to-noise ratio on labelled images.

Every Linear layer, the head and both attention products are quantized (patch embedding: 8-bit image; probabilities: unsigned,
8 bits, unless --probs says otherwise), activations per tensor, weights per output channel and rounded to nearest; nothing is
repaired afterwards. What differs between rows is what the float graph was rewritten to, and whether activations are symmetric.
--held-out measures on training images that did not calibrate: for decisions; test images are for the final table.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.tables import Cell, Table, say

if TYPE_CHECKING:
    from benchmarks.accuracy import Score
    from benchmarks.tasks import Task
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
SEARCHED = "compute-qparams,search-ranges{rows=192 images=2}"
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
    parser.add_argument("--ranges", metavar="TEXT", help=f"passes that set ranges [compute-qparams; below 8 bits {SEARCHED}]")
    parser.add_argument("--images", type=int, metavar="N", help="images [as many as the accuracy command]")
    parser.add_argument("--held-out", action="store_true", help="training images that calibration did not see, not test images")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="calibration samples [32]")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of calibration images [0]")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of images and models [VITQ_DATA, else .data/real]")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the runtime; 0 for all cores [0]")
    parser.add_argument("--results", type=Path, metavar="FILE", help="keep what is measured here, and measure only what is missing there")


def measure(options: argparse.Namespace) -> list[Table]:
    """One table for each model."""
    from benchmarks.tasks import TASKS

    return [measure_task(TASKS[name], options) for name in options.model]


def measure_task(task: Task, options: argparse.Namespace) -> Table:
    """Quantize the model for every row, bits and symmetry, and run all of them on the same images."""
    import numpy as np

    from benchmarks.accuracy import evaluate
    from benchmarks.tasks import HELD_BACK, data_folder, existing, write_calibration
    from vitq_compiler import runtime
    from vitq_compiler.graph import Graph
    from vitq_compiler.model_io import read_model

    folder = options.data or data_folder()
    model = existing(task.model(folder))
    with np.load(existing(folder / task.images)) as stored:
        train, train_labels, tests, labels = (stored[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    if options.held_out:
        images, labels = train, train_labels
        order = np.random.default_rng(options.seed).permutation(len(train))[options.samples + HELD_BACK :]
    else:
        images, order = tests, task.order() if task.order else np.arange(len(tests))
    order = order[: options.images or task.count]
    results = Results(options.results, settings(task, len(order), options))
    cases = [
        Case(name, bits, symmetric, ranges(bits, options))
        for bits in options.bits
        for name in options.rewrites
        for symmetric in options.symmetric
    ]
    left = [case for case in cases if case not in results.scores]
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "calibration.npz"
        write_calibration(task, train, Graph.from_proto(read_model(model)).inputs[0].name, options.samples, options.seed, source)
        front = understood(model, source, task, options) if left else None
        for start in range(0, len(left), AT_ONCE):
            sessions: dict[Case, Any] = {FLOAT: runtime.session(model, threads=options.threads)}
            for case in left[start : start + AT_ONCE]:
                say(f"{task.name} {case.bits}: {case.rewrites}, {'symmetric' if case.symmetric == 'yes' else 'asymmetric'}")
                assert front is not None
                sessions[case] = runtime.session(quantized(front, case, options), threads=options.threads)
            results.add(evaluate(task, sessions, images, labels, order))
    return table(task, results.scores, options)


@dataclass(frozen=True)
class Case:
    """One graph to measure: a row, ``wNaM``, whether activations are symmetric, and the passes that set ranges."""

    rewrites: str
    bits: str
    symmetric: str
    ranges: str


FLOAT = Case("float", "", "", "")


class Results:
    """The scores of cases, of which a file keeps what runs with the same settings have measured."""

    def __init__(self, path: Path | None, common: dict[str, Any]) -> None:
        from benchmarks.accuracy import Score

        self.path, self.common = path, common
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else []
        rows = [json.loads(line) for line in lines]
        self.scores = {Case(**row["case"]): Score(**row["score"]) for row in rows if row["settings"] == common}

    def add(self, scores: dict[Case, Score]) -> None:
        """Take new scores, and write them down."""
        self.scores |= scores
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as stream:
                for case, score in scores.items():
                    stream.write(json.dumps({"settings": self.common, "case": asdict(case), "score": asdict(score)}) + "\n")


def settings(task: Task, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Whatever else a score depends on."""
    chosen = {name: getattr(options, name) for name in ("held_out", "builtin", "samples", "seed", "probs", "recipe")}
    return {"model": task.name, "images": count, **chosen}


def ranges(bits: str, options: argparse.Namespace) -> str:
    """The passes that set ranges."""
    return str(options.ranges or ("compute-qparams" if bits.endswith("a8") else SEARCHED))


def table(task: Task, scores: dict[Case, Score], options: argparse.Namespace) -> Table:
    """A row for each rewrite; top-1 and SQNR side by side for all bits."""
    count = scores[FLOAT].images
    right = scores[FLOAT].right / count
    kinds = [(bits, symmetric) for bits in options.bits for symmetric in options.symmetric]
    cells: list[tuple[Cell, ...]] = [("float", *[right, None] * len(kinds))]
    for name in options.rewrites:
        row = [scores[Case(name, bits, symmetric, ranges(bits, options))] for bits, symmetric in kinds]
        cells.append((name, *(cell for score in row for cell in (score.right / count, score.sqnr))))
    headings = [f"{bits.upper()}{' sym.' if symmetric == 'yes' else ''} {what}" for bits, symmetric in kinds for what in ("top-1", "dB")]
    kind = "held-out training" if options.held_out else "test"
    source = "built-in pictures calibrate" if options.builtin else "calibration images"
    what = f"Recipe {options.recipe}" if options.recipe else f"Probabilities: {options.probs} bits"
    after = "; ".join(f"`{passes}`" for passes in dict.fromkeys(ranges(bits, options) for bits in options.bits))
    return Table(
        f"{task.name}, {count} {kind} images",
        ("rewrites", *headings),
        tuple(cells),
        (
            f"{options.samples} {source}, seed {options.seed}. {what}. After the rewrites: {after}.",
            f"One standard error of top-1: {math.sqrt(right * (1 - right) / count):.4f} at that of the float graph.",
        ),
        {heading: ".4f" if heading.endswith("top-1") else ".1f" for heading in headings},
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


def quantized(front: Compilation, case: Case, options: argparse.Namespace) -> Graph:
    """The float graph with quantizers, as the runtime can run it."""
    from vitq_compiler.catalog import find_pass
    from vitq_compiler.pipeline import Compilation, Pipeline
    from vitq_compiler.qdq import simulate

    before, after = REWRITES[case.rewrites]
    recipe = study(case.symmetric == "yes", options).with_bits(case.bits)
    c = Compilation(front.graph.snapshot(), recipe, front.target, front.data, threads=options.threads)
    steps = ("canonicalize,annotate", front.target.rewrites, before, "calibrate", after, case.ranges)
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
