"""Pictures of what `diagnosis` saw: the range of every channel, before and after the rewrite that narrows them most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.errors import OutputError
from vitq_compiler.model_io import write_bytes

Vector = NDArray[Any]
WIDTH, HEIGHT, DPI = 10.0, 1.8, 110  # of a row, inches


@dataclass(frozen=True)
class Ranges:
    """Least and largest value of each channel of one activation, [channels] each."""

    low: Vector
    high: Vector

    @property
    def waste(self) -> float:
        """The range of the tensor over the mean range of a channel: 1 where one scale suits them all."""
        mean = float(np.mean(self.high - self.low, dtype=np.float64))
        return float(self.high.max() - self.low.min()) / mean if mean > 0 else 1.0


@dataclass(frozen=True)
class Picture:
    """One activation in two graphs: what it is called, and the rewrite between the two."""

    title: str
    rewrite: str
    before: Ranges
    after: Ranges


def draw(pictures: Sequence[Picture], path: Path) -> None:
    """Draw a row for each picture, of which there is at least one, into a file that has passed `check_plots`.

    Raises:
        OutputError: the disk refuses.
    """
    figure = _figure_class()(figsize=(WIDTH, HEIGHT * len(pictures)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(pictures), 2, squeeze=False)
    for row, picture in zip(axes, pictures, strict=True):
        for axis, ranges, text in zip(row, (picture.before, picture.after), ("before", f"after {picture.rewrite}"), strict=True):
            axis.bar(np.arange(len(ranges.low)), ranges.high - ranges.low, bottom=ranges.low, width=1.0)
            axis.set_title(f"{picture.title}, {text}: tensor / mean channel {ranges.waste:.1f}", fontsize=7)
            axis.tick_params(labelsize=6)
            axis.margins(x=0)
        row[0].set_ylabel("range", fontsize=7)
    axes[-1][0].set_xlabel("channel", fontsize=7)
    drawn = BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."))
    write_bytes(drawn.getvalue(), path)


def check_plots(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before any work is done.

    Raises:
        OutputError: matplotlib is not installed, or has no such format.
    """
    known = _figure_class()().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise OutputError(f"picture {path}: matplotlib writes {', '.join(sorted(known))}; end the name in one of these")


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure  # without pyplot there is no window and no global state
    except ImportError:
        raise OutputError("pictures need matplotlib: pip install 'vitq-compiler[plots]'") from None
    return Figure
