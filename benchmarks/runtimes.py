"""The compiled graph in other releases of ONNX Runtime, each in a virtual environment of its own.

A model is compiled twice: in the portable form, attention in standard operators, and for the newest release, attention in one. Each
release loads the float graph and both, and runs them in turn on one thread. The figures are its own: SQNR against the float graph,
and the median of the ratios to the float run of the same round. Releases are fetched by pip.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import TIMM, obtain
from benchmarks.tables import Cell, Table, say

VERSIONS = ("1.17.3", "1.18.1", "1.20.1", "1.22.1", "1.23.2", "1.24.1", "newest")
FIRST_WITH_NUMPY_2 = (1, 19)
FORMS = {"decomposed": "", "Attention": "newest"}  # form of attention -> the version to compile for
IN_RUNTIME = Path(__file__).with_name("in_runtime.py")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--models", nargs="+", default=["vit_small"], metavar="NAME", help=f"{', '.join(TIMM)}, or ONNX files [vit_small]")
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), metavar="X.Y.Z", help=f"[{' '.join(VERSIONS)}]")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], metavar="N", help="batch sizes [1 8]")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="timed runs of each graph [15]")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="calibration samples, built-in pictures [32]")
    parser.add_argument("--seed", type=int, default=0, help="of weights and built-in pictures [0]")


def measure(options: argparse.Namespace) -> list[Table]:
    """One table for each model."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pythons = {}
        for version in options.versions:
            say(f"onnxruntime {version}: install ...")
            pythons[version] = environment(folder / version, version)
        return [measure_model(name, pythons, folder, options) for name in options.models]


def measure_model(name: str, pythons: Mapping[str, Path], folder: Path, options: argparse.Namespace) -> Table:
    """Compile one model in both forms and run it everywhere."""
    import numpy as np

    from vitq_compiler import runtime
    from vitq_compiler.compiler import compile
    from vitq_compiler.graph import Graph
    from vitq_compiler.model_io import read_model

    say(f"{name}: export and compile ...")
    model = obtain(name, "dynamo", folder, options.seed)
    graphs, needs = {"float": str(model)}, []
    for form, version in FORMS.items():
        graphs[form] = str(folder / f"{Path(name).stem}_{form}.onnx")
        chosen = {"samples": options.samples, "preprocess": "imagenet", "seed": options.seed, "target_options": {"version": version}}
        report = compile(model, Path(graphs[form]), **chosen)
        needs.append(f"{form}: opset {report.needs.opset}, IR version {report.needs.ir_version}; the report says {report.needs.releases}.")
    inputs = Graph.from_proto(read_model(model)).inputs
    rows: list[tuple[Cell, ...]] = []
    for version, python in pythons.items():
        for batch in options.batches:
            say(f"{name}: onnxruntime {version}, batch {batch} ...")
            feed = folder / "feed.npz"
            np.savez(feed, **runtime.probe_feed(inputs, batch))
            answer = run_in(python, graphs, feed, options.rounds)
            for form in FORMS:
                found = answer["graphs"][form]
                figures = [found.get(key) for key in ("sqnr_db", "median_ms", "ratio")]
                rows.append((answer["version"], batch, form, "no" if found["error"] else "yes", *figures))
    return Table(
        f"Releases of ONNX Runtime, {Path(name).stem}, 1 thread, {options.rounds} rounds",
        ("onnxruntime", "batch", "attention", "loads", "SQNR, dB", "median ms", "median ratio"),
        tuple(rows),
        tuple(needs),
        {"SQNR, dB": ".1f", "median ratio": ".3f"},
    )


def environment(folder: Path, version: str) -> Path:
    """The Python of a new virtual environment with one release of ONNX Runtime.

    Args:
        folder: where to make it.
        version: of onnxruntime, such as 1.18.1, or ``newest``.

    Raises:
        SystemExit: pip cannot install it; the message is the last line of pip's.
    """
    numbers = tuple(map(int, version.split("."))) if version != "newest" else FIRST_WITH_NUMPY_2
    wanted = [f"onnxruntime=={version}" if version != "newest" else "onnxruntime", *(["numpy<2"] if numbers < FIRST_WITH_NUMPY_2 else [])]
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    _run([sys.executable, "-m", "venv", str(folder)])
    _run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary", ":all:", *wanted])
    return python


def run_in(python: Path, graphs: Mapping[str, str], feed: Path | None = None, rounds: int = 0) -> dict[str, Any]:
    """What `benchmarks.in_runtime` says in another environment.

    Args:
        python: of that environment.
        graphs: name -> path.
        feed: the inputs, else some are made up.
        rounds: timed runs; 0 only loads each graph and runs it once.
    """
    request = {"graphs": graphs, "feed": str(feed) if feed else None, "rounds": rounds}
    answer: dict[str, Any] = json.loads(_run([str(python), str(IN_RUNTIME)], json.dumps(request)))
    return answer


def _run(command: Sequence[str], text: str = "") -> str:
    others = {key: item for key, item in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, input=text, env=others, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit((done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1])
    return done.stdout
