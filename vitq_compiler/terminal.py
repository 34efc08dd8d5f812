"""What a compile looks like on a terminal or in a log: the summary, its tables, and progress.

All text goes through `rich.text.Text`, never through markup: node names and reasons hold brackets. A file or a pipe gets
plain text, 100 columns wide, so that a log does not depend on the window it was started from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from statistics import fmean
from typing import IO, TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from vitq_compiler.progress import silent
from vitq_compiler.text import printable

if TYPE_CHECKING:
    from vitq_compiler.diagnosis import Diagnosis, RewriteRow
    from vitq_compiler.inspection import Structure
    from vitq_compiler.progress import Progress
    from vitq_compiler.report import AttentionRow, CompileReport, GateRow, LatencyRow, LinearRow, TrainingRow

LOG_COLUMNS = 100
FIRST_NAMES = 5  # shown of a list unless all are asked for
FIRST_NOTES = 10
SHORT_CELL = 16
LOG_SECONDS = 5.0
LOG_FRACTION = 0.1
REFRESH_SECONDS = 0.1


def console_for(stream: IO[str]) -> Console:
    """A console that draws on a terminal and writes plain text elsewhere, whatever the environment says."""
    if stream.isatty():
        return Console(file=stream, markup=False, highlight=False, emoji=False)
    # Said outright, so that neither FORCE_COLOR nor COLUMNS puts control characters or other widths into a log.
    return Console(
        file=stream,
        width=LOG_COLUMNS,
        force_terminal=False,
        force_jupyter=False,
        legacy_windows=False,
        no_color=True,
        markup=False,
        highlight=False,
        emoji=False,
    )


def show(report: CompileReport, console: Console, verbosity: int = 1, time_passes: bool = False) -> None:
    """Print the summary of a compile.

    Args:
        report: what to tell.
        console: where; see `console_for`.
        verbosity: 0 only what is asked for (``time_passes``), 1 the summary, 2 every pass, Linear and note.
        time_passes: the table of passes with their seconds.
    """
    if verbosity:
        output = f"-> {report.output}" if report.output else "(no output written)"
        # Paths are not wrapped: a broken one cannot be copied.
        console.print(_text(f"{report.model} {output}", "bold"), soft_wrap=True)
        _show_summary(report, console, verbosity)
    if verbosity > 1:
        _show_details(report, console)
    if verbosity > 1 or time_passes:
        _show_passes(report, console)
    if verbosity:
        _say(console, [(f"warning: {warning}", "yellow") for warning in report.warnings])


def show_structure(structure: Structure, console: Console, verbosity: int = 1) -> None:
    """Print what `inspection.inspect` found: a row per block, the totals, and what was almost recognized."""
    console.print(_text(structure.model, "bold"), soft_wrap=True)
    rows = [
        (
            block.name,
            block.scope or "-",
            ", ".join(block.roles),
            " x ".join(map(str, block.shape)),
            _millions(block.parameters),
            _millions(block.macs),
            f"{block.quantized} of {block.layers}",
        )
        for block in structure.blocks
    ]
    _table(console, ("Block", "module", "roles", "output", "M params", "M MACs", "integer"), rows, words=(0, 1, 2))
    share = structure.quantized_macs / structure.macs if structure.macs else 0.0
    facts = [
        (f"{_millions(structure.parameters)} M parameters, {_millions(structure.macs)} M MACs a sample", ""),
        (f"recipe {structure.recipe} for {structure.target} makes {_percent(share, 1)} of the MACs integer", ""),
    ]
    reasons = dict.fromkeys(f"{row.role}: {row.reason}" for row in structure.layers if row.reason)
    _say(console, [*facts, *((f"not integer, {reason}", "") for reason in reasons)])
    notes = structure.notes if verbosity > 1 else structure.notes[:FIRST_NOTES]
    more = len(structure.notes) - len(notes)
    _say(
        console,
        [(f"{n.where}: {n.stage} says: {n.reason}", "yellow") for n in notes] + ([(f"and {more} more (-v shows all)", "")] if more else []),
    )


def show_diagnosis(diagnosis: Diagnosis, console: Console, verbosity: int = 1) -> None:
    """Print what `diagnosis.diagnose` found: activations, rewrites, sensitivity, and last what is recommended."""
    console.print(_text(diagnosis.model, "bold"), soft_wrap=True)
    measures = ("kurtosis", "max/rms", "spread", "offset", "tokens")
    _table(
        console,
        ("Block", "activation", *measures, "idle"),
        [
            (
                row.block or "-",
                row.role,
                *("-" if n is None else f"{n:.3g}" for n in (row.kurtosis, row.peak, row.spread, row.offset, row.tokens)),
                str(len(row.idle_heads)) if row.role == "probs" else "-",
            )
            for row in diagnosis.tensors
        ],
        words=(0, 1),
    )
    effects = [row for rewrite in diagnosis.rewrites for row in _effects(rewrite)]
    _table(console, ("Rewrite, worst block", "activation", *measures[:4]), effects, words=(0, 1))
    rows = [
        (row.name or "everything", row.part, str(row.edges), "exact" if row.sqnr_db is None else _decibels(row.sqnr_db))
        for row in diagnosis.sensitivity
    ]
    _table(console, ("Quantized alone", "part", "tensors", "SQNR"), rows, words=(0, 1))
    facts = [f"{diagnosis.data}; recipe {diagnosis.recipe} at {diagnosis.bits}"]
    for rewrite in diagnosis.rewrites:
        reasons = rewrite.reasons if verbosity > 1 else rewrite.reasons[:1]
        more = f" and {len(rewrite.reasons) - len(reasons)} more (-v shows all)" if len(rewrite.reasons) > len(reasons) else ""
        facts += [f"{rewrite.name} changes {rewrite.changes}, and says: {'; '.join(reasons)}{more}"] if reasons else []
    _say(console, [(text, "") for text in facts])
    _say(console, [(text, "green") for text in diagnosis.recommendations or ("nothing stands out: no rewrite is recommended",)])
    _say(console, [(f"warning: {warning}", "yellow") for warning in diagnosis.warnings])


def _effects(rewrite: RewriteRow) -> list[tuple[str, ...]]:
    """One row per role whose measures moved."""
    cells = {(e.role, e.measure): f"{e.before:.3g} -> {e.after:.3g}" for e in rewrite.effects}
    roles = dict.fromkeys(e.role for e in rewrite.effects)
    return [(rewrite.name, role, *(cells.get((role, m), "-") for m in ("kurtosis", "peak", "spread", "offset"))) for role in roles]


def gate_line(gate: GateRow) -> str:
    """One requirement and what was measured, such as ``min-sqnr missed: 28.10 dB measured, 30.00 dB required``."""
    shown = _decibels if "sqnr" in gate.name else _percent if "agreement" in gate.name else _number
    return f"{gate.name} {'met' if gate.passed else 'missed'}: {shown(gate.measured)} measured, {shown(gate.required)} required"


@contextmanager
def progress_on(console: Console, visible: bool = True) -> Iterator[Progress]:
    """Progress for one compile: bars that vanish afterwards on a terminal, else a line now and then."""
    if not visible:
        yield silent
        return
    if not console.is_terminal or console.is_dumb_terminal:
        yield _log_progress(console)
        return
    # No refreshing thread: it would take time from the latency measurement.
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True, auto_refresh=False) as bars:
        yield _bar_progress(bars)


def _bar_progress(bars: Bars) -> Progress:
    tasks: dict[str, TaskID] = {}
    drawn = -math.inf

    def progress(step: str, done: int, total: int) -> None:
        nonlocal drawn
        appears = step not in tasks
        if appears:
            tasks[step] = bars.add_task(step, total=total)
        bars.update(tasks[step], completed=done, total=total, visible=done < total)
        if appears or time.monotonic() - drawn >= REFRESH_SECONDS:
            drawn = time.monotonic()
            bars.refresh()

    return progress


def _log_progress(console: Console) -> Progress:
    last: dict[str, tuple[float, float]] = {}  # step -> when it last wrote a line, and the fraction done then

    def progress(step: str, done: int, total: int) -> None:
        now, fraction = time.monotonic(), done / total if total else 1.0
        wrote, before = last.setdefault(step, (now, 0.0))
        if fraction < before:  # the step runs again
            wrote, before = last[step] = (now, fraction)
        ends = done >= total and before < 1.0
        is_due = now - wrote >= LOG_SECONDS and fraction - before >= LOG_FRACTION
        text = f"{step}: {done} of {total}" if ends or is_due else ""
        if total <= 1:
            text = "" if done else step  # it has no middle: said once, when it begins
        if text:
            last[step] = (now, fraction)
            console.print(_text(text))

    return progress


def _cpus(report: CompileReport) -> str:
    """Which CPUs the figures hold for, and what the one has that they were measured on."""
    if not report.cpu:
        return ""
    right = "the same results on all" if report.cpu == "any" else "made for x86 with VNNI and ARM with dot product"
    return f"{right}; measured on {report.integer_unit}"


def _recipe(report: CompileReport) -> str:
    """Name, bits where the name is not just them, and definition."""
    bits = "" if report.bits == report.recipe else f" at {report.bits}"
    return f"{report.recipe}{bits}{f' ({report.definition})' if report.definition else ''}"


def _show_summary(report: CompileReport, console: Console, verbosity: int) -> None:
    checked, data, worst = report.validation, report.data, report.validation.worst_block
    linears, before, after = len(report.linears), checked.float_bytes, checked.integer_bytes
    where = checked.runtime if checked.latency else f"by their form, for {report.target}"
    kernels = f"{report.integer} of {linears} in integer kernels ({where})"
    skipped = [f"{name} ({reason})" for name, reason in data.skipped]
    rows = {
        "Model": report.chosen,
        "Linear layers": f"{linears} found, {report.quantized} quantized, {kernels}",
        "Worst block": f"{worst.name}, SQNR {_decibels(worst.sqnr_db)}" if worst else "",
        "Size": f"{_size(before)} -> {_size(after)}, {_ratio(after, before, 'smaller', 'larger')}",
        "Calibration": f"{data.source}; validated on {data.validation_samples} others" if data.validation_samples else data.source,
        "Skipped": _names(skipped, verbosity) if skipped else "",
        "Preprocessing": data.preprocess,
        "CPUs": _cpus(report),
        "Training": _training(report.training),
        "Runs on": f"{report.needs.releases}: opset {report.needs.opset}, IR version {report.needs.ir_version} ({report.needs.reason})",
        "Recipe": f"{_recipe(report)} for {report.target}, compiled in {report.seconds:.1f} s",
    }
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in rows.items():
        if text:
            facts.add_row(_text(name), _text(text))
    _put(console, facts)
    saturating = any(o.saturated_db is not None for o in checked.outputs)
    _table(
        console,
        ("Output", "SQNR", "cosine", "agreement", *(("SQNR without VNNI",) if saturating else ())),
        [
            (
                o.name,
                _decibels(o.sqnr_db),
                _number(o.cosine, 6),
                "-" if o.agreement is None else _percent(o.agreement),
                *((_decibels(o.saturated_db),) if o.saturated_db is not None else ()),
            )
            for o in checked.outputs
        ],
    )
    priced = f"SQNR on {report.attention[0].images}" if report.attention else ""
    _table(console, ("Attention", "in blocks", priced, ""), [_price(row) for row in report.attention], words=(0, 1, 3))
    _table(console, ("Threads", "batch", "float ms", "int8 ms", "ratio", ""), [_latency(row) for row in checked.latency], words=(5,))
    if report.command:
        console.print()
        console.print(_text(f"Next: {report.command}"), soft_wrap=True)  # to be copied
    _say(console, [(f"gate {gate_line(gate)}", "green" if gate.passed else "bold red") for gate in report.gates])
    _say(
        console,
        [
            (f"{state}, {len(names)} of {linears}: {_names(names, verbosity)} ({reason})", "")
            for state, reason, names in _left_out(report.linears)
        ],
    )


def _show_details(report: CompileReport, console: Console) -> None:
    _table(
        console,
        ("Linear layer", "role", "block", "size", "kernel", "int8"),
        [(r.name, r.role, r.block or "-", f"{r.in_features} x {r.out_features}", r.kernel or "-", _state(r)) for r in report.linears],
        words=(0, 1, 2, 4, 5),
    )
    _table(console, ("Block", "SQNR"), [(b.name, _decibels(b.sqnr_db)) for b in report.validation.blocks])
    _table(console, ("Left alone by", "where", "why"), [(n.stage, n.where, n.reason) for n in report.notes], words=(0, 1, 2))
    console.print()
    console.print(_text(f"pipeline: {report.pipeline}"), soft_wrap=True)  # to be copied


def _show_passes(report: CompileReport, console: Console) -> None:
    total = sum(row.seconds for row in report.passes)
    rows = [(row.spec, str(row.changes), f"{row.seconds:.3f}", _percent(row.seconds / total if total else 0.0, 0)) for row in report.passes]
    rows.append(("all passes", str(sum(row.changes for row in report.passes)), f"{total:.3f}", ""))
    _table(console, ("Pass", "changes", "seconds", "share"), rows)


def _training(rows: Sequence[TrainingRow]) -> str:
    """What training was worth, in one line; nothing where there was none."""
    if not rows:
        return ""
    if len(rows) == 1:
        return f"loss on samples held back {rows[0].before:.3f} -> {rows[0].after:.3f}, {_percent(rows[0].gain)} less"
    gains = [row.gain for row in rows]
    return f"loss on samples held back {_percent(fmean(gains))} less on average, in {sum(gain > 0 for gain in gains)} of {len(rows)} parts"


def _left_out(linears: Iterable[LinearRow]) -> list[tuple[str, str, list[str]]]:
    """Linear layers that are not computed on integers: their state, why, and their names; the most frequent reason first."""

    def why(row: LinearRow) -> tuple[str, str]:
        return "Quantized but computed in float" if row.quantized else "Not quantized", row.reason or "no reason given"

    left = sorted((row for row in linears if not (row.quantized and row.integer)), key=why)  # stable: names keep graph order
    groups = [(*reason, [row.name for row in rows]) for reason, rows in groupby(left, why)]
    return sorted(groups, key=lambda group: -len(group[2]))


def _state(row: LinearRow) -> str:
    return "yes" if row.quantized and row.integer else "weights only" if row.quantized else "no"


def _table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0,)) -> None:
    """A table after an empty line, or nothing where it has no rows; the columns in ``words`` go left, numbers right."""
    if not rows:
        return
    # Plain ASCII rules off a terminal: a log may be read in any encoding.
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII2, show_edge=False, pad_edge=False)
    for index, (name, *cells) in enumerate(zip(header, *rows, strict=True)):
        is_short = max(map(len, cells)) <= SHORT_CELL  # only long names and sentences give way in a narrow window
        table.add_column(_text(name), justify="left" if index in words else "right", overflow="fold", no_wrap=is_short)
    for row in rows:
        table.add_row(*map(_text, row))
    console.print()
    _put(console, table)


def _put(console: Console, table: Table) -> None:
    """Print a table, in a log without the blanks that fill its lines up."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        console.print(Text(line.rstrip()), soft_wrap=True)


def _say(console: Console, lines: Sequence[tuple[str, str]]) -> None:
    """Lines of text and style after an empty line; one line each in a log, where they are searched and not read in a row."""
    if lines:
        console.print()
    for text, style in lines:
        console.print(_text(text, style), soft_wrap=not console.is_terminal)


def _latency(row: LatencyRow) -> tuple[str, ...]:
    ratio = _ratio(row.ratio, 1.0, "faster", "slower")
    return (str(row.threads or "all"), str(row.batch), _number(row.float_ms, 3), _number(row.integer_ms, 3), _number(row.ratio, 3), ratio)


def _price(row: AttentionRow) -> tuple[str, ...]:
    blocks = "all" if row.quantized == row.blocks else f"{row.quantized} of {row.blocks}"
    told = [*(["chosen"] if row.chosen else []), *([row.reason] if row.reason else [])]
    return (row.choice, "-" if row.choice == "float" else blocks, "-" if row.sqnr_db is None else _decibels(row.sqnr_db), "; ".join(told))


def _ratio(new: float, old: float, better: str, worse: str) -> str:
    """``new`` against ``old``, both better when small, such as ``3.10x smaller``."""
    if not (math.isfinite(new) and math.isfinite(old) and new > 0 and old > 0):
        return "no ratio"
    return f"{old / new:.2f}x {better}" if new <= old else f"{new / old:.2f}x {worse}"


def _names(names: Sequence[str], verbosity: int) -> str:
    shown = names if verbosity > 1 else names[:FIRST_NAMES]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more (-v shows all)" if more else "")


def _number(value: float, digits: int = 2) -> str:
    return "undefined" if math.isnan(value) else f"{value:.{digits}f}"


def _decibels(value: float) -> str:
    return f"{_number(value)} dB" if math.isfinite(value) else "undefined" if math.isnan(value) else "exact" if value > 0 else "-inf dB"


def _percent(value: float, digits: int = 2) -> str:
    return "undefined" if math.isnan(value) else f"{value * 100:.{digits}f} %"


def _millions(count: int) -> str:
    return f"{count / 1e6:.3f}" if count < 1e6 else f"{count / 1e6:.1f}"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def _text(text: str, style: str = "") -> Text:
    """Text without markup."""
    return Text(printable(text), style=style)
