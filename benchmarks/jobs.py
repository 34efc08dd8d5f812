"""What `benchmarks.compile_time` runs in processes of its own; arguments are words, results are printed."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
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
