"""Memory of compiling a model over 2 GB: peak resident size of the whole process, against model size plus 4 GB.

The model is a ViT of random weights, made without torch; see `benchmarks.large_model`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.compile_time import run_measured
from benchmarks.large_model import write_vit
from benchmarks.tables import Table, say

BUDGET_MB = 4000.0  # beyond the size of the model


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--width", type=int, default=1792, help="of tokens [1792, with depth 26 a billion parameters]")
    parser.add_argument("--depth", type=int, default=26, help="blocks [26]")
    parser.add_argument("--heads", type=int, default=28, help="of attention [28]")
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="calibration samples [2]")


def measure(options: argparse.Namespace) -> list[Table]:
    """One compile."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "vit.onnx"
        say(f"width {options.width}, depth {options.depth}: writing ...")
        parameters = write_vit(model, options.width, options.depth, options.heads)
        size = sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
        say("compiling ...")
        command = [sys.executable, "-m", "vitq_compiler", str(model), "-q", "--samples", str(options.samples), "--threads", "1"]
        done = run_measured(command)
    row = (parameters / 1e6, size, done.seconds, done.peak_mb, size + BUDGET_MB, "yes" if done.peak_mb <= size + BUDGET_MB else "no")
    columns = ("M parameters", "model MB", "seconds", "peak MB", "budget MB", "kept")
    return [Table("Memory of a compile", columns, (row,), ("One thread, validation and latency included.",))]
