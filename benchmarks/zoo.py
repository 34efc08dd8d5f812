"""Every architecture through the compiler: what is found, quantized, refused, and what it costs and gains.

Each model is built with random weights (benchmarks/architectures.py), exported by torch, compiled, and judged by ONNX Runtime,
in processes of its own: one that crashes or takes all memory ends its row, not the run.

Linears     found, and of these quantized, as the compiler's report counts them
MACs        multiplications of every MatMul, Gemm and Einsum with a constant operand in the compiled graph, for one sample, and
            the part of them that ONNX Runtime computes in integer kernels; convolutions stand apart: of 1x1 (a Linear on
            channels), and others. Counted on the graph, whether or not the compiler took a product for a Linear.
SQNR        of the worst output, on built-in pictures (token ids: random ones); weights are random
ratio       latency of the integer graph by that of the float graph, batch 1, one thread, paired

``--results FILE`` keeps a line of JSON for each row: a row that is there is not measured again (``--again`` does), and
several runs and machines can be put together by naming several files, the later row winning. Flat families and hierarchical
ones stand in two lists in benchmarks/architectures.py; a new row there is all that a new architecture needs.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.architectures import ARCHITECTURES, Architecture
from benchmarks.models import OPSETS, ROOT
from benchmarks.products import KINDS
from benchmarks.tables import Cell, Table, say

Row = dict[str, Any]
LONGEST = 120  # characters of a reason
HINTS = {"timm": "pip install timm", "transformers": "pip install transformers"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--models", nargs="+", default=["*"], metavar="NAME", help="names or patterns such as 'vit_*'; see --list [all]")
    parser.add_argument("--family", choices=["flat", "hierarchical"], help="only these [both]")
    parser.add_argument("--exporter", nargs="+", default=list(OPSETS), choices=list(OPSETS), help="how torch exports them [both]")
    parser.add_argument("--small", action="store_true", help="two blocks and small pictures")
    parser.add_argument("--list", action="store_true", help="list the architectures and end")
    parser.add_argument(
        "--results", nargs="+", type=Path, metavar="FILE", help="rows of earlier runs; new ones are added to the first file"
    )
    parser.add_argument("--again", action="store_true", help="measure what the results have, too")
    parser.add_argument("--show", action="store_true", help="measure nothing, print the results")
    parser.add_argument("--exports", type=Path, metavar="DIR", help="keep the exported models here, and take those that are there")
    parser.add_argument("--timeout", type=int, default=1800, metavar="S", help="seconds for each export and each compile [1800]")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="calibration samples [8]")
    parser.add_argument("--recipe", default="w8a8", help="of vitq [w8a8]")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples [0]")


def measure(options: argparse.Namespace) -> list[Table]:
    """The rows of all chosen models, then the sums."""
    chosen = choose(options.models, options.family)
    if options.list:
        return [listing(chosen)]
    files: list[Path] = options.results or []
    rows = read_rows(files)
    for source in sorted({a.source for a in chosen if importlib.util.find_spec(a.source) is None} if not options.show else ()):
        missing = [a for a in chosen if a.source == source]
        say(f"{source} is not installed ({HINTS[source]}): {len(missing)} architectures are left out")
        chosen = [a for a in chosen if a.source != source]
    keys = [(a.name, exporter, options.small) for a in chosen for exporter in options.exporter]
    for number, key in enumerate(keys if not options.show else ()):
        if key in rows and not options.again:
            continue
        say(f"{number + 1} of {len(keys)}: {key[0]}, {key[1]} ...")
        row = measure_one(*key, options)
        say(f"    {row['status']}{': ' if row['reason'] else ''}{row['reason']}")
        rows[key] = row
        if files:
            with files[0].open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
    shown = [rows[key] for key in keys if key in rows]
    if not shown:
        raise SystemExit("no model is left to show; see --list, and what was said above")
    return tables(shown)


def choose(patterns: list[str], family: str | None) -> list[Architecture]:
    """The architectures that a pattern names, in the order of the list.

    Raises:
        SystemExit: one names none.
    """
    for pattern in patterns:
        if not fnmatch.filter(ARCHITECTURES, pattern):
            raise SystemExit(f"model {pattern!r} is none of the zoo; see --list")
    return [
        a for a in ARCHITECTURES.values() if any(fnmatch.fnmatch(a.name, p) for p in patterns) and (family is None or a.family == family)
    ]


def read_rows(files: list[Path]) -> dict[tuple[str, str, bool], Row]:
    """All rows of the files by model, exporter and size; later ones win."""
    lines = [line for file in files if file.is_file() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [json.loads(line) for line in lines]
    return {(row["model"], row["exporter"], row["small"]): row for row in rows}


def measure_one(name: str, exporter: str, small: bool, options: argparse.Namespace) -> Row:
    """Export and compile one model; what goes wrong becomes the row's reason."""
    row: Row = {"model": name, "exporter": exporter, "small": small, "status": "compiled", "reason": ""}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.exports or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        path = (folder / f"{name}_{exporter}{'_small' if small else ''}.onnx").resolve()
        if not path.is_file():
            _, failure = job("zoo_export", name, exporter, path, int(small), options.seed, timeout=options.timeout)
            if failure:
                path.unlink(missing_ok=True)
                return {**row, "status": "not exported", "reason": failure}
        printed, failure = job("zoo_compile", path, options.recipe, options.samples, options.seed, timeout=options.timeout)
    return {**row, "status": "failed", "reason": failure} if failure else {**row, **json.loads(printed.splitlines()[-1])}


def job(name: str, *arguments: object, timeout: int) -> tuple[str, str]:
    """One function of `benchmarks.jobs` in a process of its own: what it printed, and why it failed (or nothing)."""
    code = f"import sys; from benchmarks.jobs import {name}; {name}(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return "", f"{name.removeprefix('zoo_')} took more than {timeout} s"
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
    return done.stdout, f"exit {done.returncode}: {last.strip()[:300]}" if done.returncode else ""


def listing(architectures: list[Architecture]) -> Table:
    """What there is."""
    rows = tuple((a.name, a.family, a.source, a.kind, a.image) for a in architectures)
    return Table("Architectures", ("model", "family", "source", "kind", "pixels"), rows)


def tables(rows: list[Row]) -> list[Table]:
    """One row for each model that compiled, with the sums; what stayed in float, by reason; and what did not compile."""
    compiled = [row for row in rows if row["status"] == "compiled"]
    cells: list[tuple[Cell, ...]] = []
    for row in compiled:
        total, integer = row["macs"], row["macs_integer"]
        shares: list[Cell] = [100 * integer[k] / total[k] if total[k] else None for k in KINDS]
        cells.append((row["model"], row["exporter"], row["linears"], row["integer"], *shares, row["sqnr"], row["ratio"]))
    small = " (small)" if any(row["small"] for row in rows) else ""
    columns = ("model", "exporter", "Linears", "integer", "% of MACs", "% of 1x1", "% of conv", "SQNR, dB", "ratio")
    formats = {"% of MACs": ".1f", "% of 1x1": ".1f", "% of conv": ".1f", "SQNR, dB": ".1f", "ratio": ".2f"}
    sums = {k: (sum(r["macs_integer"][k] for r in compiled), sum(r["macs"][k] for r in compiled)) for k in KINDS}
    text = "; ".join(f"{k}: {100 * a / b:.1f} % of {b / 1e9:.1f} G" for k, (a, b) in sums.items() if b)
    states = Counter(row["status"] for row in rows)
    notes = (f"{', '.join(f'{count} {state}' for state, count in states.items())}. MACs in integer kernels over all: {text}.",)
    found = [Table(f"Zoo{small}", columns, tuple(cells), notes, formats)]
    layers: Counter[str] = Counter()
    models: Counter[str] = Counter()
    for row in compiled:
        layers.update(row["refused"])
        models.update(row["refused"].keys())
    if layers:
        found.append(Table("Left in float", ("reason", "Linears", "graphs"), tuple((r, n, models[r]) for r, n in layers.most_common())))
    others = tuple((row["model"], row["exporter"], f"{row['status']}: {shortened(row['reason'])}") for row in rows if row not in compiled)
    if others:
        found.append(Table("Not compiled", ("model", "exporter", "why"), others))
    return found


def shortened(reason: str) -> str:
    """The beginning of a reason, without the exit status and the name of the file."""
    text = re.sub(r"^exit \d+: |^model \S+: ", "", reason)
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0] + " ..."
