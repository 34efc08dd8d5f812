"""Which CPUs an integer graph is right on, and what that costs: accuracy and latency on both kinds of x86 CPUs.

vitq, any CPU      what vitq compiles: no two products of codes can leave 16 bits
vitq, VNNI only    the same with weights free to do so (--cpu vnni)
vitq, 7 bits       weights of 7 bits, which cannot do so either
onnxruntime ...    what onnxruntime.quantization makes of the model; with ``reduce_range`` its weights have 7 bits

``exact`` is what CPUs with VNNI and ARM CPUs compute, ``without VNNI`` what the kernels for AVX2 and for AVX-512 without VNNI compute,
worked out on this CPU (vitq_compiler/saturation.py; convolutions are left exact). Latency is that of this CPU, one thread, paired; the
kernels do not look at the codes, so it depends on the form of a graph alone. Test images are those of the command ``accuracy``.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy import NAMES, evaluate
from benchmarks.latency import ratios, time_paired
from benchmarks.tables import Cell, Table, say

if TYPE_CHECKING:
    from benchmarks.tasks import Task

VARIANTS: dict[str, dict[str, Any]] = {
    "vitq, any CPU": {},
    "vitq, VNNI only": {"target_options": {"cpu": "vnni"}},
    "vitq, 7 bits": {"bits": "w7a8"},
}
PEERS = ("dynamic", "static", "static reduce_range")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--model", nargs="+", default=["shipped"], choices=NAMES, help="[shipped]")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of images and models [VITQ_DATA, else .data/real]")
    parser.add_argument("--images", type=int, metavar="N", help="test images [shipped 10000, others 1000]")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="calibration samples [32]")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples [0]")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="of timing, at batch 1 [15]")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the runtime while accuracy is measured; 0 for all [0]")


def measure(options: argparse.Namespace) -> list[Table]:
    """One table for each model."""
    from benchmarks.tasks import TASKS

    return [measure_task(TASKS[name], options) for name in options.model]


def measure_task(task: Task, options: argparse.Namespace) -> Table:
    """Make every graph, score it on both kinds of CPU, time it."""
    import numpy as np
    import onnx

    from benchmarks.tasks import data_folder, existing, write_calibration
    from vitq_compiler import runtime
    from vitq_compiler.graph import Graph
    from vitq_compiler.model_io import read_model
    from vitq_compiler.saturation import saturated, saturates

    folder = options.data or data_folder()
    model = existing(task.model(folder))
    with np.load(existing(folder / task.images)) as stored:
        train, tests, labels = stored["x_train"], stored["x_test"], stored["y_test"]
    order = (task.order() if task.order else np.arange(len(tests)))[: options.images or task.count]
    (given, *_) = Graph.from_proto(read_model(model)).inputs
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "calibration.npz"
        write_calibration(task, train, given.name, options.samples, options.seed, source)
        paths = {"float": model, **make_graphs(task, model, source, options, Path(temporary))}
        scored: dict[tuple[str, bool], Any] = {}
        for name, path in paths.items():
            scored[name, False] = runtime.session(path, threads=options.threads)
            graph = Graph.from_proto(onnx.load(path))
            graph.infer_shapes()
            if saturates(graph):
                scored[name, True] = runtime.session(saturated(graph), threads=options.threads)
        scores = evaluate(task, scored, tests, labels, order)
        deployed = {name: runtime.session(path, threads=1, as_deployed=True) for name, path in paths.items()}
        feed = {given.name: task.prepare(tests[order[:1]])}
        runs = {name: partial(session.run, None, feed) for name, session in deployed.items()}
        latency = {row.name: row.ratio for row in ratios(time_paired(runs, options.rounds), "float")}
    rows: list[tuple[Cell, ...]] = []
    for name in paths:
        exact = scores[name, False]
        cut = scores.get((name, True), exact)
        sqnr = (None, None) if name == "float" else (exact.sqnr, cut.sqnr)
        accuracy = exact.right / exact.images, cut.right / cut.images
        rows.append((name, accuracy[0], sqnr[0], accuracy[1], sqnr[1], latency[name]))
    columns = ("graph", "top-1, exact", "SQNR, dB", "top-1, without VNNI", "SQNR, dB ", "latency")
    return Table(
        f"{task.name} on both kinds of CPU, {len(order)} test images",
        columns,
        tuple(rows),
        (f"Calibrated on {options.samples} training images, seed {options.seed}. Latency: batch 1, float is 1.",),
        {"top-1, exact": ".4f", "top-1, without VNNI": ".4f", "SQNR, dB": ".1f", "SQNR, dB ": ".1f", "latency": ".3f"},
    )


def make_graphs(task: Task, model: Path, source: Path, options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Compile every variant into ``folder``, and make what it is compared with."""
    from benchmarks.peers import calibration_feeds, prepare, quantize, quantize_as
    from vitq_compiler.compiler import compile

    same: dict[str, Any] = {"preprocess": task.preprocess, "samples": options.samples, "seed": options.seed}
    found = {}
    for name, chosen in VARIANTS.items():
        say(f"{task.name}: {name} ...")
        found[name] = folder / f"{len(found)}.onnx"
        compile(model, found[name], calibration=source, **chosen, **same)
    prepared = prepare(model, folder / "prepared.onnx")
    for kind in PEERS:
        say(f"{task.name}: onnxruntime {kind} ...")
        path, feeds = folder / f"{kind.replace(' ', '_')}.onnx", calibration_feeds(model, source, **same)
        if kind == "static reduce_range":
            found[f"onnxruntime {kind}"] = quantize_as("QUInt8", prepared, path, feeds, reduce_range=True)
        else:
            found[f"onnxruntime {kind}"] = quantize(kind, prepared, path, feeds)
    return found
