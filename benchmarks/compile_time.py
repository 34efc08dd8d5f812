"""What a compile costs: seconds and memory of the whole process, against its budget and against onnxruntime's quantize_static.

Every step runs in a process of its own, as a user would start it, from interpreter start to exit. The unit is the float
forward of the calibration images (batch 8, all threads, session already made), measured right before every compile: a compile
of 32 images may take 2 forwards and 5 seconds. Rounds are float forward, compile, quantize_static, in turn; medians are shown.
``quantize_static`` includes the ``quant_pre_process`` its documentation asks for, and calibrates on the same images.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import OPSETS, ROOT, TIMM
from benchmarks.tables import Cell, Table, say, shown

FIXED_SECONDS, FORWARDS = 5.0, 2.0
HELP_RUNS = 5


@dataclass(frozen=True)
class Measured:
    """One finished process: wall seconds, peak resident megabytes, and what it printed."""

    seconds: float
    peak_mb: float
    printed: str


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--model", default="vit_small", metavar="NAME", help=f"{', '.join(TIMM)}, or an ONNX file [vit_small]")
    parser.add_argument("--exporter", default="dynamo", choices=list(OPSETS), help="how torch exports it [dynamo]")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="calibration samples, built-in pictures [32]")
    parser.add_argument("--recipe", default="w8a8", help="of vitq [w8a8]")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often to measure all [3]")
    parser.add_argument("--seed", type=int, default=0, help="of weights and built-in pictures [0]")
    parser.add_argument("--no-compare", action="store_true", help="leave out quantize_static")


def measure(options: argparse.Namespace) -> list[Table]:
    """The summary, the passes, and the start of the command line."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        say(f"{options.model}: export ...")
        model = job("obtain", options.model, options.exporter, folder, options.seed).printed.strip()
        forwards, compiles, others, reports = [], [], [], []
        for index in range(options.rounds):
            say(f"{options.model}: round {index + 1} of {options.rounds}")
            forwards.append(float(job("forward", model, options.samples, options.seed).printed))
            compiles.append(compile_once(model, folder, options))
            reports.append(json.loads((folder / "report.json").read_text(encoding="utf-8")))
            if not options.no_compare:
                others.append(job("quantize_static", model, folder, options.samples, options.seed))
    rows = [summary("vitq-compile", compiles, forwards)]
    if others:
        rows.append(summary("onnxruntime quantize_static", others, forwards))
    forward = f"Float forward of the same {options.samples} images: {shown(statistics.median(forwards))} s"
    help_seconds = min(run_measured([*program(), "--help"]).seconds for _ in range(HELP_RUNS))
    return [
        Table(
            f"Compile of {Path(options.model).stem}, {options.samples} samples, {options.rounds} rounds",
            ("process", "seconds", "budget, s", "within", "(seconds - 5) / forward", "peak MB"),
            tuple(rows),
            (
                f"{forward}; budget = {FORWARDS:g} forwards + {FIXED_SECONDS:g} s.",
                f"`vitq-compile --help`: {help_seconds:.3f} s (best of {HELP_RUNS}).",
            ),
        ),
        passes_table(reports),
    ]


def passes_table(reports: list[dict[str, Any]]) -> Table:
    """Median seconds of each pass over the reports of several compiles."""
    rows = [
        (own[0]["spec"], own[0]["changes"], float(statistics.median(row["seconds"] for row in own)))
        for own in zip(*(report["passes"] for report in reports), strict=True)
    ]
    inside = statistics.median(report["seconds"] for report in reports)
    note = f"All passes {sum(row[2] for row in rows):.2f} s of {inside:.2f} s in `compile`; the rest reads, validates and writes."
    return Table("Seconds of each pass", ("pass", "changes", "seconds"), tuple(rows), (note,))


def summary(name: str, runs: list[Measured], forwards: list[float]) -> tuple[Cell, ...]:
    """One row: medians over rounds, of ratios too."""
    seconds = statistics.median(run.seconds for run in runs)
    budget = FORWARDS * statistics.median(forwards) + FIXED_SECONDS
    ratio = statistics.median((run.seconds - FIXED_SECONDS) / forward for run, forward in zip(runs, forwards, strict=True))
    return name, seconds, budget, "yes" if seconds <= budget else "no", ratio, max(run.peak_mb for run in runs)


def program() -> list[str]:
    """How to start vitq-compile: the installed command, else the module."""
    installed = Path(sys.executable).with_name("vitq-compile")
    return [str(installed)] if installed.is_file() else [sys.executable, "-m", "vitq_compiler"]


def compile_once(model: str, folder: Path, options: argparse.Namespace) -> Measured:
    """One ``vitq-compile`` with built-in pictures; its report is left in ``folder``."""
    words: list[Any] = [*program(), model, "-o", folder / "vitq.onnx", "--report", folder / "report.json", "-q", "--preprocess", "imagenet"]
    words += ["--samples", options.samples, "--recipe", options.recipe, "--seed", options.seed]
    return run_measured([str(word) for word in words])


def job(name: str, *arguments: object) -> Measured:
    """One function of `benchmarks.jobs` in a process of its own."""
    code = f"import sys; from benchmarks.jobs import {name}; {name}(*sys.argv[1:])"
    return run_measured([sys.executable, "-c", code, *map(str, arguments)])


def run_measured(command: list[str]) -> Measured:
    """Run a process in the repository's root; an exit with its last words where it fails.

    Its peak memory is never less than this process had when it started it, so nothing large may be imported here.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        printed, errors = out.read().decode(), err.read().decode(errors="replace")
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {process.returncode}\n{errors[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Measured(seconds, usage.ru_maxrss * unit / 1e6, printed)
