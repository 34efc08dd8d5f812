"""Statistics of activations, reduced inside ONNX Runtime so that no activation ever leaves it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.errors import ModelError
from vitq_compiler.graph import Graph
from vitq_compiler.progress import Progress, silent
from vitq_compiler.runtime import Feed, run, session

Vector = NDArray[np.float32]
REDUCTIONS = ("ReduceMin", "ReduceMax", "ReduceMean")  # in the order of the fields of ChannelStatistics


@dataclass(frozen=True)
class ChannelStatistics:
    """Smallest, largest and mean value per channel, each of shape [channels], over ``batches`` batches."""

    low: Vector
    high: Vector
    mean: Vector
    batches: int = 1

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """The statistics of both samples together (batches of equal size)."""
        batches = self.batches + other.batches
        mean = (self.mean * self.batches + other.mean * other.batches) / batches
        return ChannelStatistics(np.minimum(self.low, other.low), np.maximum(self.high, other.high), mean.astype(np.float32), batches)

    def split(self, copies: int) -> list[ChannelStatistics]:
        """Of a tensor that holds the same channels ``copies`` times side by side: the statistics of each."""
        parts = zip(*(np.split(x, copies) for x in (self.low, self.high, self.mean)), strict=True)
        return [ChannelStatistics(low, high, mean, self.batches) for low, high, mean in parts]


@dataclass
class CalibrationTable:
    """Statistics of every calibrated tensor, by tensor name, and the number of samples seen."""

    statistics: dict[str, ChannelStatistics] = field(default_factory=dict)
    samples: int = 0

    def update(self, name: str, seen: ChannelStatistics) -> None:
        """Add one batch of a tensor."""
        known = self.statistics.get(name)
        self.statistics[name] = seen if known is None else known.merge(seen)

    def widen(self, margin: float) -> None:
        """Move both ends of every range outwards, for samples that excite the model less than real ones will.

        An end moves by ``margin - 1`` of its distance from zero, but at most of the range's width: the range of a channel that lies
        far from zero must still be about what was seen.
        """
        for name, seen in self.statistics.items():
            below, above = (np.float32(margin - 1) * np.minimum(abs(end), seen.high - seen.low) for end in (seen.low, seen.high))
            self.statistics[name] = replace(seen, low=seen.low - below, high=seen.high + above)

    def rescale(self, name: str, scale: Vector, shift: Vector) -> None:
        """Follow a rewrite that replaced the tensor x by (x + shift) / scale, channel by channel; scale is positive."""
        known = self.statistics[name]
        low, high, mean = ((x + shift) / scale for x in (known.low, known.high, known.mean))
        self.statistics[name] = ChannelStatistics(low, high, mean, known.batches)


def collect(
    graph: Graph, channel_axes: Mapping[str, tuple[int, ...]], batches: Iterable[Feed], total: int, *, threads: int, progress: Progress
) -> CalibrationTable:
    """Run ``batches`` and keep the statistics of each tensor per channel.

    Args:
        graph: the float graph; not changed.
        channel_axes: tensor name -> the axis of its channels, or several that are counted through.
        batches: inputs by name.
        total: number of samples to come, for the progress display.
        threads: as in `runtime.session`.
        progress: told after every batch.

    Raises:
        ModelError: a tensor is not finite.
    """
    copy = graph.snapshot()
    reductions: dict[str, list[str]] = {}
    outputs = []
    for name, channels in channel_axes.items():
        tensor = copy.tensor(name)
        rank = len(tensor.shape)
        kept = sorted(axis % rank for axis in channels)
        axes = copy.constant(f"{name}/axes", np.array([i for i in range(rank) if i not in kept], np.int64))
        reduced = [copy.insert(op, [tensor, axes], name=f"{name}/{op}", keepdims=0) for op in REDUCTIONS]
        for statistic in reduced:
            statistic.dtype, statistic.shape = np.dtype(np.float32), [tensor.shape[i] for i in kept]
        reductions[name] = [t.name for t in reduced]
        outputs += reduced
    copy.set_outputs(outputs)
    runtime = session(copy, threads=threads)
    table = CalibrationTable()
    for feed in batches:
        results = dict(zip([t.name for t in outputs], run(runtime, feed), strict=True))
        for name, names in reductions.items():
            seen = ChannelStatistics(*(results[n].reshape(-1) for n in names))
            if not all(
                np.isfinite(x).all() for x in (seen.low, seen.high, seen.mean)
            ):  # the runtime's minimum passes over NaN, its mean does not
                raise ModelError(f"tensor {name} is not finite on the calibration data; check the model and the preprocessing")
            table.update(name, seen)
        table.samples += _batch_size(feed)
        progress("calibrating", table.samples, total)
    return table


def _batch_size(feed: Feed) -> int:
    sizes: Sequence[int] = [len(a) for a in feed.values() if a.ndim]
    return sizes[0] if sizes else 1


def glance(graph: Graph, names: Iterable[str], batches: Iterable[Feed], *, threads: int) -> dict[str, ChannelStatistics]:
    """Statistics of tensors with channels last on the first batch alone: enough to choose a rewrite that is exact whatever it is."""
    axes = dict.fromkeys(names, (-1,))
    return collect(graph, axes, islice(batches, 1), 0, threads=threads, progress=silent).statistics if axes else {}
