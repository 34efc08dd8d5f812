"""What a benchmark prints: Markdown tables under a line that says how, with what, where and when they were made."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

Cell = str | int | float | None
PACKAGES = ("vitq-compiler", "onnxruntime", "onnx", "numpy", "torch", "timm")


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: what it shows.
        columns: their headings.
        rows: as many cells each; numbers are rounded only when they are printed.
        notes: sentences below it.
        formats: format specifications of numbers, by column; see `shown` for the others.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    formats: dict[str, str] = field(default_factory=dict)

    def to_markdown(self) -> str:
        """Title, table and notes; text columns left, numbers right."""
        texts = [
            self.columns,
            *([shown(cell, self.formats.get(column, "")) for cell, column in zip(row, self.columns, strict=True)] for row in self.rows),
        ]
        widths = [max(3, *(len(row[i]) for row in texts)) for i in range(len(self.columns))]
        right = [all(not isinstance(row[i], str) for row in self.rows) for i in range(len(self.columns))]
        rule = ["-" * (width - 1) + ":" if end else "-" * width for width, end in zip(widths, right, strict=True)]
        lines = [
            "| " + " | ".join(t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, right, strict=True)) + " |"
            for row in (texts[0], rule, *texts[1:])
        ]
        return "\n".join([f"### {self.title}", "", *lines, *(f"\n{note}" for note in self.notes)])


def shown(cell: Cell, specification: str = "") -> str:
    """A cell as text; a number without a format specification has three decimals below 1, two below 10, else one."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "-"
    if not isinstance(cell, float):
        return str(cell).replace("|", "\\|")
    if math.isinf(cell):
        return "inf" if cell > 0 else "-inf"
    if specification:
        return format(cell, specification)
    return f"{cell:.1f}" if abs(cell) >= 10 else f"{cell:.2f}" if abs(cell) >= 1 else f"{cell:.3f}"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version and those of the installed ones among ``packages``."""
    found = {"Python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """The processor's name, as far as the system tells, and its integer instructions."""
    from vitq_compiler.cpu import integer_unit

    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{next(iter(names), '') or platform.processor() or platform.machine()} ({integer_unit()})"


@dataclass(frozen=True)
class Report:
    """The tables of one command, and where they come from."""

    command: str
    tables: Sequence[Table]
    versions: dict[str, str] = field(default_factory=lambda: versions(PACKAGES))
    cpu: str = field(default_factory=cpu_model)
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))

    def to_markdown(self) -> str:
        """All of it as text."""
        with_what = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        head = [f"`{self.command}`", f"{self.date}. {self.cpu}, {self.cores} logical cores. {with_what}."]
        return "\n\n".join([*head, *(table.to_markdown() for table in self.tables)])

    def to_json(self) -> str:
        """All of it as data; what is no number becomes null."""
        return json.dumps(_finite(asdict(self)), indent=2, ensure_ascii=False) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str) -> None:
    """Progress, to standard error."""
    print(text, file=sys.stderr, flush=True)
