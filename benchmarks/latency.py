"""Latency of the integer graph, paired with the float graph and with what onnxruntime.quantization makes of it.

All graphs of a model are loaded into one process. After a warm-up, every round runs each of them once, starting with the
next one each time, so that whatever else the machine does hits all alike. The figure to read is the median over the rounds
of the ratio to the float run of the same round; the ratio of the fastest runs is beside it, and agrees on a quiet machine.
The float graph is the raw export, as ONNX Runtime optimizes it with everything on. Several recipes, ``--recipe w8a8 repq-vit:w4a4
best:w4a4:native w8a8:::newest`` (name, bits, storage, version of onnxruntime), are paired with the first of them too.

Weights are random (see benchmarks/models.py), which latency does not see: nothing here says anything about accuracy.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.models import OPSETS, TIMM, obtain
from benchmarks.tables import Cell, Table, say

SETTLE_SECONDS = 0.05  # threads of the graph before still spin when the next one starts
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Ratio:
    """One graph against another: its median in milliseconds, the median of paired ratios, and the ratio of minima."""

    name: str
    median_ms: float
    ratio: float
    minima: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--models", nargs="+", default=["vit_small", "deit_tiny"], metavar="NAME", help=f"{', '.join(TIMM)}, or ONNX files")
    parser.add_argument("--exporter", nargs="+", default=["dynamo"], choices=list(OPSETS), help="how torch exports them [dynamo]")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], metavar="N", help="batch sizes [1 8]")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the runtime; 0 for all cores [1]")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="timed runs of each graph [15]")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="calibration samples, built-in pictures [32]")
    parser.add_argument(
        "--recipe", nargs="+", default=["w8a8"], metavar="NAME[:BITS[:STORAGE[:VERSION]]]", help="of vitq, such as repq-vit:w4a4 [w8a8]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and built-in pictures [0]")
    parser.add_argument("--no-compare", action="store_true", help="leave out the graphs of onnxruntime.quantization")


def measure(options: argparse.Namespace) -> list[Table]:
    """One table for each model and exporter."""
    return [
        measure_model(name, exporter, options)
        for name in options.models
        for exporter in (options.exporter if not name.endswith(".onnx") else options.exporter[:1])
    ]


def measure_model(name: str, exporter: str, options: argparse.Namespace) -> Table:
    """Export, compile, make the others, and time them all."""
    from benchmarks.peers import calibration_feeds, quantize_all
    from vitq_compiler import runtime
    from vitq_compiler.compiler import compile
    from vitq_compiler.graph import Graph
    from vitq_compiler.model_io import read_model
    from vitq_compiler.probing import usual_shapes
    from vitq_compiler.sizes import Probe

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        say(f"{name}: export ...")
        model = obtain(name, exporter, folder, options.seed)
        graphs, made = {"float": model}, {}
        for text in options.recipe:
            say(f"{name}: compile with {text} ...")
            recipe, bits, storage, version = (*text.split(":"), "", "", "")[:4]
            label = "vitq" if len(options.recipe) == 1 else f"vitq {text}"
            graphs[label] = folder / f"{len(graphs)}.onnx"
            chosen: dict[str, Any] = {"recipe": recipe, "bits": bits or None, "storage": storage or None}
            chosen["target_options"] = {"version": version}
            made[label] = compile(model, graphs[label], **chosen, samples=options.samples, preprocess="imagenet", seed=options.seed)
        if not options.no_compare:
            feeds = calibration_feeds(model, None, "imagenet", options.samples, options.seed)
            graphs |= quantize_all(model, folder, lambda: feeds)
        sizes = {graph: path.stat().st_size / 1e6 for graph, path in graphs.items()}
        graph = Graph.from_proto(read_model(model))
        shapes = usual_shapes(graph, Path(model))
        sessions = {graph: runtime.session(path, threads=options.threads, as_deployed=True) for graph, path in graphs.items()}
        settle = 0.0 if options.threads == 1 else SETTLE_SECONDS
        rows: list[tuple[Cell, ...]] = []
        for batch in options.batches:
            say(f"{name}: batch {batch} ...")
            feed = Probe(batch, shapes).feed(graph.inputs)
            runs = {graph: partial(session.run, None, feed) for graph, session in sessions.items()}
            times = time_paired(runs, options.rounds, settle)
            first = {r.name: r.ratio for r in ratios(times, next(iter(made)))}
            rows += [(batch, r.name, r.median_ms, r.ratio, r.minima, sizes[r.name], first[r.name]) for r in ratios(times, "float")]
    origin = f"{exporter} export, opset {OPSETS[exporter]}" if not name.endswith(".onnx") else "file"
    threads = f"{options.threads or 'all'} thread{'s' * (options.threads != 1)}"
    columns = ("batch", "graph", "median ms", "median ratio", "ratio of minima", "file, MB", f"ratio to {next(iter(made))}")
    several = len(made) > 1
    return Table(
        f"Latency of {Path(name).stem} ({origin}), {threads}, {options.rounds} rounds",
        columns if several else columns[:-1],
        tuple(row if several else row[:-1] for row in rows),
        tuple(
            f"{label}: {report.integer} of {len(report.linears)} Linear layers (patch embedding included) run in integer kernels."
            for label, report in made.items()
        ),
        dict.fromkeys((*columns[3:5], columns[-1]), ".3f"),
    )


def rotated(names: Sequence[str], step: int) -> list[str]:
    """``names`` in turn, starting ``step`` places later."""
    start = step % len(names)
    return [*names[start:], *names[:start]]


def time_paired(runs: Mapping[str, Callable[[], object]], rounds: int, settle: float = 0.0) -> Times:
    """Seconds of each run in each round.

    Args:
        runs: what to time, by name.
        rounds: how often.
        settle: seconds to wait before each run.
    """
    times: Times = {name: [] for name in runs}
    for _ in range(2):
        for run in runs.values():
            run()
    for step in range(rounds):
        for name in rotated(list(runs), step):
            time.sleep(settle)
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return times


def ratios(times: Times, to: str) -> list[Ratio]:
    """Every graph against the graph ``to``."""
    import numpy as np

    base = np.array(times[to])
    return [
        Ratio(name, float(np.median(own) * 1e3), float(np.median(np.array(own) / base)), float(min(own) / base.min()))
        for name, own in times.items()
    ]
