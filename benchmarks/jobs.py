"""What `benchmarks.compile_time` and `benchmarks.zoo` run in processes of their own; arguments are words, results are printed."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

PASSES = 3


def obtain(name: str, exporter: str, folder: str, seed: str) -> None:
    """Print the path of a model, exported if need be."""
    from benchmarks import models

    with contextlib.redirect_stdout(sys.stderr):  # exporters talk
        path = models.obtain(name, exporter, Path(folder), int(seed))
    print(path.resolve())


def forward(model: str, samples: str, seed: str) -> None:
    """Print the seconds of a float forward of the calibration images: median of three, after one batch of warm-up."""
    from benchmarks.peers import calibration_feeds
    from vitq_compiler import runtime

    feeds = calibration_feeds(Path(model), None, "imagenet", int(samples), int(seed))
    session = runtime.session(Path(model))
    session.run(None, feeds[0])
    seconds = []
    for _ in range(PASSES):
        began = time.perf_counter()
        for feed in feeds:
            session.run(None, feed)
        seconds.append(time.perf_counter() - began)
    print(statistics.median(seconds))


def quantize_static(model: str, folder: str, samples: str, seed: str) -> None:
    """onnxruntime's static quantization with its preparation."""
    from benchmarks import peers

    feeds = peers.calibration_feeds(Path(model), None, "imagenet", int(samples), int(seed))
    prepared = peers.prepare(Path(model), Path(folder) / "prepared.onnx")
    peers.quantize("static", prepared, Path(folder) / "static.onnx", feeds)


def zoo_export(name: str, exporter: str, path: str, small: str, seed: str) -> None:
    """Write one architecture of the zoo."""
    from benchmarks.architectures import ARCHITECTURES, export_architecture

    with contextlib.redirect_stdout(sys.stderr):
        export_architecture(ARCHITECTURES[name], exporter, Path(path), bool(int(small)), int(seed))


def zoo_compile(model: str, recipe: str, samples: str, seed: str) -> None:
    """Compile a model and print what became of it, as one line of JSON."""
    from benchmarks.products import KINDS, dense_products, kernels_of
    from vitq_compiler.compiler import compile
    from vitq_compiler.errors import DataError, ModelError, TargetError
    from vitq_compiler.graph import Graph
    from vitq_compiler.model_io import read_model
    from vitq_compiler.probing import usual_shapes
    from vitq_compiler.sizes import Probe
    from vitq_compiler.targets.onnxruntime import Onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "int8.onnx"
        try:
            report = compile(Path(model), output, recipe=recipe, samples=int(samples), preprocess="imagenet", seed=int(seed), threads=1)
        except (ModelError, DataError, TargetError) as error:
            print(json.dumps({"status": "refused", "reason": str(error)}))
            return
        graph = Graph.from_proto(read_model(Path(model)))
        feed = Probe(1, usual_shapes(graph, Path(model))).feed(graph.inputs)
        products = dense_products(output, feed, kernels_of(output), Onnxruntime.integer_kernels)
    macs = {kind: sum(p.macs for p in products if p.kind == kind) for kind in KINDS}
    integer = {kind: sum(p.macs for p in products if p.kind == kind and p.integer) for kind in KINDS}
    sqnr = [row.sqnr_db for row in report.validation.outputs if math.isfinite(row.sqnr_db)]
    left = [row for row in report.linears if not row.integer]
    result = {
        "linears": len(report.linears),
        "quantized": sum(row.quantized for row in report.linears),
        "integer": report.integer,
        "roles": dict(Counter(row.role for row in report.linears)),
        "refused": dict(Counter(row.reason for row in left)),
        "notes": dict(Counter(note.reason for note in report.notes)),
        "macs": macs,
        "macs_integer": integer,
        "float_products": [p.name for p in products if not p.integer],
        "sqnr": min(sqnr, default=None),
        "ratio": report.validation.latency[0].ratio,
        "seconds": report.seconds,
        "warnings": report.warnings,
    }
    print(json.dumps(result))
