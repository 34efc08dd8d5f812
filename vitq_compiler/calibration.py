"""Statistics of activations, reduced inside ONNX Runtime so that no activation ever leaves it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from vitq_compiler.errors import ModelError
from vitq_compiler.graph import Graph, Tensor
from vitq_compiler.progress import Progress, silent
from vitq_compiler.runtime import Feed, limited, run, sample_count, session

Vector = NDArray[np.floating[Any]]
FEW = 8  # samples of a glance


@dataclass(frozen=True)
class ChannelStatistics:
    """Smallest, largest and mean value per channel, each of shape [channels], over ``samples`` samples.

    float32; the mean is float64 while samples are added to it, so that it does not depend on how they are divided into batches.
    """

    low: Vector
    high: Vector
    mean: Vector
    samples: int = 1

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """The statistics of both sets of samples together."""
        samples = self.samples + other.samples
        mean = (self.mean * self.samples + other.mean * other.samples) / samples
        return ChannelStatistics(np.minimum(self.low, other.low), np.maximum(self.high, other.high), mean, samples)

    def split(self, copies: int) -> list[ChannelStatistics]:
        """Of a tensor that holds the same channels ``copies`` times side by side: the statistics of each."""
        parts = zip(*(np.split(x, copies) for x in (self.low, self.high, self.mean)), strict=True)
        return [ChannelStatistics(low, high, mean, self.samples) for low, high, mean in parts]


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
        self.statistics[name] = ChannelStatistics(low, high, mean, known.samples)


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
        reduced = _reduce(copy, tensor, [i for i in range(rank) if i not in {axis % rank for axis in channels}])
        reductions[name] = [t.name for t in reduced]
        outputs += reduced
    copy.set_outputs(outputs)
    runtime = session(copy, threads=threads)
    table = CalibrationTable()
    for feed in batches:
        results = dict(zip([t.name for t in outputs], run(runtime, feed), strict=True))
        samples = sample_count(graph.inputs, feed)
        for name, names in reductions.items():
            low, high, mean = (results[n].reshape(-1) for n in names)
            seen = ChannelStatistics(low, high, mean, samples)
            if not all(
                np.isfinite(x).all() for x in (seen.low, seen.high, seen.mean)
            ):  # the runtime's minimum passes over NaN, its mean does not
                raise ModelError(f"tensor {name} is not finite on the calibration data; check the model and the preprocessing")
            table.update(name, seen)
        table.samples += samples
        progress("calibrating", table.samples, total)
    for name, seen in table.statistics.items():
        table.statistics[name] = replace(seen, mean=seen.mean.astype(np.float32))
    return table


def _reduce(graph: Graph, tensor: Tensor, axes: list[int]) -> list[Tensor]:
    """Smallest, largest and mean values of ``tensor`` over ``axes``, in the order of the fields of `ChannelStatistics`.

    The mean is taken in two steps: over all axes but the first, of each sample alone, and over the first in float64. Then no rounding
    depends on how many samples lie in a batch.
    """
    name = tensor.name

    def reduced(op: str, source: Tensor, over: list[int], kind: type, keep: int = 0) -> Tensor:
        if not over:
            return source
        numbers = graph.constant(f"{name}/axes", np.array(over, np.int64))
        result = graph.insert(op, [source, numbers], name=f"{name}/{op}", keepdims=keep)
        result.dtype, result.shape = (
            np.dtype(kind),
            [d if i not in over else 1 for i, d in enumerate(source.shape) if keep or i not in over],
        )
        return result

    each = reduced("ReduceMean", tensor, [axis for axis in axes if axis], np.float32, keep=1)
    wide = graph.insert("Cast", [each], name=f"{name}/wide", like=each, to=TensorProto.DOUBLE)
    wide.dtype = np.dtype(np.float64)
    mean = reduced("ReduceMean", wide, [axis for axis in axes if not axis], np.float64)
    return [*(reduced(op, tensor, axes, np.float32) for op in ("ReduceMin", "ReduceMax")), mean]


def glance(graph: Graph, names: Iterable[str], batches: Iterable[Feed], *, threads: int) -> dict[str, ChannelStatistics]:
    """Statistics of tensors with channels last on a few samples alone: enough to choose a rewrite that is exact whatever it is."""
    axes = dict.fromkeys(names, (-1,))
    return collect(graph, axes, limited(graph.inputs, batches, FEW), 0, threads=threads, progress=silent).statistics if axes else {}
