"""Statistics of activations, reduced inside ONNX Runtime so that no activation ever leaves it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.errors import ModelError
from vitq_compiler.graph import Graph
from vitq_compiler.pipeline import Progress
from vitq_compiler.runtime import Feed, run, session

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class ChannelRange:
    """Smallest and largest value seen per channel, each of shape [channels]."""

    low: Vector
    high: Vector

    def merge(self, other: ChannelRange) -> ChannelRange:
        """The range of both samples together."""
        return ChannelRange(np.minimum(self.low, other.low), np.maximum(self.high, other.high))


@dataclass
class CalibrationTable:
    """Range of every calibrated tensor, by tensor name, and the number of samples seen."""

    ranges: dict[str, ChannelRange] = field(default_factory=dict)
    samples: int = 0

    def update(self, name: str, seen: ChannelRange) -> None:
        """Add one batch of a tensor."""
        known = self.ranges.get(name)
        self.ranges[name] = seen if known is None else known.merge(seen)

    def rescale(self, name: str, scale: Vector, shift: Vector) -> None:
        """Follow a rewrite that replaced the tensor x by (x + shift) / scale, channel by channel; scale is positive."""
        known = self.ranges[name]
        self.ranges[name] = ChannelRange((known.low + shift) / scale, (known.high + shift) / scale)


def collect(graph: Graph, channel_axes: dict[str, int], batches: Iterable[Feed], total: int, *, threads: int, progress: Progress) -> CalibrationTable:
    """Run ``batches`` and keep the range of each tensor per channel.

    Args:
        graph: the float graph; not changed.
        channel_axes: tensor name -> the axis of its channels.
        batches: inputs by name.
        total: number of samples to come, for the progress display.
        threads: as in `runtime.session`.
        progress: told after every batch.

    Raises:
        ModelError: a tensor is not finite.
    """
    copy = graph.snapshot()
    reductions: list[tuple[str, str, str]] = []
    outputs = []
    for name, axis in channel_axes.items():
        tensor = copy.tensor(name)
        axes = copy.constant(f"{name}/axes", np.array([i for i in range(len(tensor.shape)) if i != axis % len(tensor.shape)], np.int64))
        low, high = (copy.insert(op, [tensor, axes], name=f"{name}/{op}", keepdims=0) for op in ("ReduceMin", "ReduceMax"))
        for statistic in (low, high):
            statistic.dtype, statistic.shape = np.dtype(np.float32), [tensor.shape[axis]]
        reductions.append((name, low.name, high.name))
        outputs += [low, high]
    copy.set_outputs(outputs)
    runtime = session(copy.to_proto(), threads=threads)
    table = CalibrationTable()
    for feed in batches:
        results = dict(zip([t.name for t in outputs], run(runtime, feed), strict=True))
        for name, low_name, high_name in reductions:
            seen = ChannelRange(results[low_name], results[high_name])
            if not (np.isfinite(seen.low).all() and np.isfinite(seen.high).all()):
                raise ModelError(f"tensor {name} is not finite on the calibration data; check the model and the preprocessing")
            table.update(name, seen)
        table.samples += _batch_size(feed)
        progress("calibrating", table.samples, total)
    return table


def _batch_size(feed: Feed) -> int:
    sizes: Sequence[int] = [len(a) for a in feed.values() if a.ndim]
    return sizes[0] if sizes else 1
