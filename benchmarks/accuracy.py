"""Accuracy of the integer graph on labelled test images, against the float graph.

top-1       part of the images with the right answer (svtr_ocr: digits read right)
agreement   part of the images with the same answer as the float graph
SQNR        signal to quantization noise in dB, over all images: of the logits (svtr_ocr: of its features)

Float and integer graphs see the same images, in batches: memory does not grow with their number. Calibration is on training
images, or on the pictures built into vitq; ``--compare`` gives the same to onnxruntime.quantization. Nothing is tuned here.
Several recipes stand in one table, with the seconds of each compile.
Models and data are described in benchmarks/tasks.py.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.tables import Cell, Table, say

if TYPE_CHECKING:
    from benchmarks.tasks import Answer, Array, Task

NAMES = ("shipped", "vit_s14_cifar10", "dinov2s_cifar10", "svtr_ocr")
BATCH = 16


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--model", nargs="+", default=["shipped"], choices=NAMES, help="[shipped]")
    parser.add_argument("--file", type=Path, metavar="ONNX", help="measure this file instead; it takes the same images as the model")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of images and models [VITQ_DATA, else .data/real]")
    parser.add_argument("--images", type=int, metavar="N", help="test images [shipped 10000, others 1000]")
    parser.add_argument("--calibration", choices=["train", "builtin"], default="train", help="training images or built-in ones [train]")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="calibration samples [32]")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples [0]")
    parser.add_argument("--recipe", nargs="+", default=["w8a8"], help="of vitq [w8a8]")
    parser.add_argument("--bits", metavar="wNaM", help="of weights and activations [the recipe's]")
    parser.add_argument("--target", default="onnxruntime", choices=["onnxruntime", "tensorrt"], help="of vitq [onnxruntime]")
    parser.add_argument(
        "--float-type", choices=["fp32", "fp16"], help="of what target tensorrt does not quantize [fp16; fp32 runs faster here]"
    )
    parser.add_argument("--attention", choices=["float", "int8"], help="operands of the attention products, of vitq [the recipe's choice]")
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


def measure_task(task: Task, options: argparse.Namespace) -> Table:
    """Calibrate, compile, evaluate."""
    import numpy as np

    from benchmarks.peers import calibration_feeds, quantize_all
    from benchmarks.tasks import data_folder, existing, write_calibration
    from vitq_compiler import runtime
    from vitq_compiler.compiler import compile

    folder = options.data or data_folder()
    model = existing(options.file or task.model(folder))
    with np.load(existing(folder / task.images)) as stored:
        train = stored["x_train"] if options.calibration == "train" else None
        tests, labels = stored["x_test"], stored["y_test"]
    order = (task.order() if task.order else np.arange(len(tests)))[: options.images or task.count]
    floating = runtime.session(model, threads=options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        source = None
        if train is not None:
            source = Path(temporary) / "calibration.npz"
            write_calibration(task, train, floating.get_inputs()[0].name, options.samples, options.seed, source)
            del train
        same: dict[str, Any] = {"preprocess": task.preprocess, "samples": options.samples, "seed": options.seed}
        narrow = {"float_type": options.float_type} if options.float_type else None
        chosen: dict[str, Any] = {
            "target_options": narrow,
            "bits": options.bits,
            "target": options.target,
            "attention": options.attention,
        }
        graphs, reports = {"float": model}, {}
        for recipe in options.recipe:
            say(f"{task.name}: compile with {recipe} ...")
            name = "vitq" if len(options.recipe) == 1 else f"vitq {recipe}"
            graphs[name] = Path(temporary) / f"{len(graphs)}.onnx"
            given = {"calibration": source, "threads": options.threads, "recipe": recipe, **chosen, **same}
            reports[name] = compile(model, graphs[name], **given)
        if options.compare:
            graphs |= quantize_all(model, Path(temporary), lambda: calibration_feeds(model, source, **same))
        sizes = {name: path.stat().st_size / 1e6 for name, path in graphs.items()}
        sessions = {name: floating if name == "float" else runtime.session(path, threads=options.threads) for name, path in graphs.items()}
    scores = evaluate(task, sessions, tests, labels, order)
    rows: list[tuple[Cell, ...]] = [
        (
            name,
            score.right / score.images,
            score.agreeing / score.images,
            score.sqnr if name != "float" else None,
            sizes[name],
            reports[name].seconds if name in reports else None,
        )
        for name, score in scores.items()
    ]
    report = reports[next(iter(reports))]
    attention = f", attention {options.attention}" if options.attention else ""
    plans = [
        f"{r.recipe} at {r.bits}{f' ({r.definition})' if r.definition else ''}: {r.integer} of {len(r.linears)}" for r in reports.values()
    ]
    calibration = f"{report.data.calibration_samples} {'training images' if source else 'built-in pictures'}, seed {options.seed}"
    return Table(
        f"Accuracy of {task.name}{f' ({options.file.name})' if options.file else ''}, {len(order)} test images",
        ("graph", "top-1", "agreement", f"SQNR of {task.compared}, dB", "file, MB", "compile, s"),
        tuple(rows),
        (f"Calibration: {calibration}. Target {report.target}{attention}; layers in integer kernels: {'; '.join(plans)}.",),
        {"top-1": ".4f", "agreement": ".4f", "compile, s": ".1f"},
    )


def evaluate(task: Task, sessions: dict[str, Any], images: Array, labels: Array, order: Array) -> dict[str, Score]:
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
