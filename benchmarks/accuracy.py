"""Accuracy of the integer graph on labelled test images, against the float graph.

top-1       part of the images with the right answer (svtr_ocr: digits read right)
agreement   part of the images with the same answer as the float graph
SQNR        signal to quantization noise in dB, over all images: of the logits (svtr_ocr: of its features)

Float and integer graphs see the same images, in batches: memory does not grow with their number. Calibration is on training
images, or on the pictures built into vitq; ``--compare`` gives the same to onnxruntime.quantization. Nothing is tuned here.
Several recipes stand in one table, with the seconds of each compile. With ``--seeds N`` each is compiled N times, from other
calibration images, and the means are given, beside the spread of top-1: its largest value less its smallest.
Models and data are described in benchmarks/tasks.py.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from benchmarks.tables import Cell, Table, say

if TYPE_CHECKING:
    from benchmarks.tasks import Answer, Array, Task
    from vitq_compiler.recipe import Recipe
    from vitq_compiler.report import CompileReport

K = TypeVar("K")
Key = tuple[str, int]

NAMES = ("shipped", "vit_s14_cifar10", "dinov2s_cifar10", "svtr_ocr")
BATCH = 16


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--model", nargs="+", default=["shipped"], choices=NAMES, help="[shipped]")
    parser.add_argument("--file", type=Path, metavar="ONNX", help="measure this file instead; it takes the same images as the model")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of images and models [VITQ_DATA, else .data/real]")
    parser.add_argument("--images", type=int, metavar="N", help="test images [shipped 10000, others 1000]")
    parser.add_argument("--calibration", choices=["train", "builtin"], default="train", help="training images or built-in ones [train]")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="calibration samples [32; recipes that train want 512]")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples [0]")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="compile this often, with seeds from --seed on [1]")
    parser.add_argument("--recipe", nargs="+", default=["w8a8"], help="of vitq [w8a8]")
    parser.add_argument("--bits", metavar="wNaM", help="of weights and activations [the recipe's]")
    parser.add_argument("--target", default="onnxruntime", choices=["onnxruntime", "tensorrt"], help="of vitq [onnxruntime]")
    parser.add_argument(
        "--float-type", choices=["fp32", "fp16"], help="of what target tensorrt does not quantize [fp16; fp32 runs faster here]"
    )
    parser.add_argument("--attention", choices=["float", "int8", "fp8"], help="operands of attention products [the recipe's]")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the runtime; 0 for all cores [0]")
    parser.add_argument("--compare", action="store_true", help="measure the graphs of onnxruntime.quantization too")


@dataclass
class Score:
    """Sums over images of one graph against the float one."""

    images: int = 0
    right: int = 0
    agreeing: int = 0
    signal: float = 0.0
    noise: float = 0.0

    def add(self, answers: list[Answer], reference: list[Answer], labels: Array, compared: Array, reference_compared: Array) -> None:
        """Count one batch."""
        import numpy as np

        self.images += len(labels)
        self.right += sum(answer == (int(label),) for answer, label in zip(answers, labels, strict=True))
        self.agreeing += sum(a == b for a, b in zip(answers, reference, strict=True))
        self.signal += float(np.sum(np.square(reference_compared, dtype=np.float64)))
        self.noise += float(np.sum(np.square(np.subtract(reference_compared, compared, dtype=np.float64))))

    @property
    def sqnr(self) -> float:
        """In dB; infinite without noise, undefined without signal."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else math.nan


def measure(options: argparse.Namespace) -> list[Table]:
    """One table for each model."""
    from benchmarks.tasks import TASKS

    return [measure_task(TASKS[name], options) for name in options.model]


@dataclass(frozen=True)
class Graphs:
    """What is measured; keys are the name of a row and the seed of its calibration, the float graph comes first."""

    paths: dict[Key, Path]
    reports: dict[Key, CompileReport]
    plain: dict[str, str]  # name of a row -> see `plainness`


def measure_task(task: Task, options: argparse.Namespace) -> Table:
    """Calibrate, compile, evaluate."""
    import numpy as np

    from benchmarks.tasks import data_folder, existing
    from vitq_compiler import runtime

    folder = options.data or data_folder()
    model = existing(options.file or task.model(folder))
    with np.load(existing(folder / task.images)) as stored:
        train = stored["x_train"] if options.calibration == "train" else None
        tests, labels = stored["x_test"], stored["y_test"]
    order = (task.order() if task.order else np.arange(len(tests)))[: options.images or task.count]
    with tempfile.TemporaryDirectory() as temporary:
        graphs = make_graphs(task, model, train, options, Path(temporary))
        sizes = {key: path.stat().st_size / 1e6 for key, path in graphs.paths.items()}
        sessions = {key: runtime.session(path, threads=options.threads, as_deployed=True) for key, path in graphs.paths.items()}
    rows = summarize(evaluate(task, sessions, tests, labels, order), graphs, sizes)
    several = options.seeds > 1
    columns = ("graph", "top-1", "spread", "agreement", f"SQNR of {task.compared}, dB", "plain Q/DQ", "file, MB", "compile, s")
    formats = {"top-1": ".4f", "spread": ".4f", "agreement": ".4f", "compile, s": ".1f"}
    report = next(iter(graphs.reports.values()))
    attention = f", attention {options.attention}" if options.attention else ""
    plans = [
        f"{r.recipe} at {r.bits}{f' ({r.definition})' if r.definition else ''}: {r.integer} of {len(r.linears)}"
        for (_, seed), r in graphs.reports.items()
        if seed == options.seed
    ]
    calibration = f"{report.data.calibration_samples} {'training images' if train is not None else 'built-in pictures'}"
    drawn = f"means of {options.seeds} seeds from {options.seed} on" if several else f"seed {options.seed}"
    return Table(
        f"Accuracy of {task.name}{f' ({options.file.name})' if options.file else ''}, {len(order)} test images",
        columns if several else tuple(c for c in columns if c != "spread"),
        tuple(row if several else (*row[:2], *row[3:]) for row in rows),
        (f"Calibration: {calibration}, {drawn}. Target {report.target}{attention}; layers in integer kernels: {'; '.join(plans)}.",),
        formats,
    )


def make_graphs(task: Task, model: Path, train: Array | None, options: argparse.Namespace, folder: Path) -> Graphs:
    """Compile every recipe with every seed into ``folder``, and make what it is compared with."""
    from benchmarks.peers import calibration_feeds, quantize_all
    from benchmarks.tasks import write_calibration
    from vitq_compiler.compiler import compile
    from vitq_compiler.graph import Graph
    from vitq_compiler.model_io import read_model
    from vitq_compiler.recipe import load_recipe

    same: dict[str, Any] = {"preprocess": task.preprocess, "samples": options.samples}
    chosen: dict[str, Any] = {name: getattr(options, name) for name in ("bits", "target", "attention", "threads")}
    chosen["target_options"] = {"float_type": options.float_type} if options.float_type else None
    found = Graphs({("float", options.seed): model}, {}, {"float": ""})
    (given, *_) = Graph.from_proto(read_model(model)).inputs
    for seed in range(options.seed, options.seed + options.seeds):
        source = folder / f"calibration_{seed}.npz" if train is not None else None
        if train is not None and source is not None:
            write_calibration(task, train, given.name, options.samples, seed, source)
        for recipe in options.recipe:
            say(f"{task.name}: compile with {recipe}, seed {seed} ...")
            key = "vitq" if len(options.recipe) == 1 else f"vitq {recipe}", seed
            found.paths[key] = folder / f"{len(found.paths)}.onnx"
            found.reports[key] = compile(model, found.paths[key], calibration=source, recipe=recipe, seed=seed, **chosen, **same)
            found.plain[key[0]] = plainness(load_recipe(recipe).with_attention(options.attention))
        if options.compare:
            peers = folder / f"peers_{seed}"
            peers.mkdir()
            made = quantize_all(model, peers, partial(calibration_feeds, model, source, seed=seed, **same))
            found.paths.update({(name, seed): path for name, path in made.items()})
    return found


def summarize(scores: dict[Key, Score], graphs: Graphs, sizes: dict[Key, float]) -> list[tuple[Cell, ...]]:
    """A row for each name: means over seeds, and how far apart the best and the worst top-1 are."""
    from statistics import fmean

    rows: list[tuple[Cell, ...]] = []
    for name in dict.fromkeys(name for name, _ in scores):
        keys = [key for key in scores if key[0] == name]
        right = [scores[key].right / scores[key].images for key in keys]
        agreeing = fmean(scores[key].agreeing / scores[key].images for key in keys)
        sqnr = fmean(scores[key].sqnr for key in keys) if name != "float" else None
        seconds = [graphs.reports[key].seconds for key in keys if key in graphs.reports]
        spread = max(right) - min(right) if len(keys) > 1 else None
        size = fmean(sizes[key] for key in keys)
        rows.append((name, fmean(right), spread, agreeing, sqnr, graphs.plain.get(name, ""), size, fmean(seconds) if seconds else None))
    return rows


def plainness(recipe: Recipe) -> str:
    """Whether QuantizeLinear and DequantizeLinear alone say what ``recipe`` does; if not, where they lie around a curve."""
    from vitq_compiler.blocks.linear import ROLES
    from vitq_compiler.quantizer import quantizer_for

    specs = {role: recipe.activation_spec(role) for role in ROLES} | recipe.attention_specs()
    curved = [place for place, spec in specs.items() if not quantizer_for(spec).plain]
    return f"but {', '.join(curved)}" if curved else "yes"


def evaluate(task: Task, sessions: dict[K, Any], images: Array, labels: Array, order: Array) -> dict[K, Score]:
    """Score every graph on the images of ``order``; the first graph is the reference."""
    scores = {name: Score() for name in sessions}
    names = [task.compared, task.answered]
    for start in range(0, len(order), BATCH):
        if start * 10 // len(order) != (start - BATCH) * 10 // len(order):  # ten times in all
            say(f"{task.name}: {start} of {len(order)} images")
        chosen = order[start : start + BATCH]
        batch = task.prepare(images[chosen])
        reference: tuple[Array, list[Answer]] | None = None
        for name, session in sessions.items():
            compared, answered = session.run(names, {session.get_inputs()[0].name: batch})
            answers = task.answer(answered)
            reference = reference or (compared, answers)
            scores[name].add(answers, reference[1], labels[chosen], compared, reference[0])
    return scores
