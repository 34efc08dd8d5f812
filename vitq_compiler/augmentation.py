"""More pictures out of few: altered copies, mirrored or not and moved by up to an eighth of their sides.

What a move uncovers repeats the edge. The same seed gives the same copies; nothing but pictures is altered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
REACH = 8  # one part in so many is the farthest move


def altered(feed: Mapping[str, Array], axes: Mapping[str, tuple[int, int]], seed: tuple[int, ...]) -> dict[str, Array]:
    """One altered copy of every sample of a batch.

    Args:
        feed: arrays [samples, ...] by name.
        axes: of the inputs that are pictures, their axes of height and width.
        seed: of what is done to which sample; inputs that belong to one sample are altered alike.
    """
    count = len(next(iter(feed.values())))
    random = np.random.default_rng(seed)
    mirrored, moves = random.integers(0, 2, count).astype(bool), random.uniform(-1, 1, (count, 2))
    changed = dict(feed)
    for name, (height, width) in axes.items():
        samples = [
            _moved(np.flip(x, width - 1) if flip else x, {height - 1: move[0], width - 1: move[1]})
            for x, flip, move in zip(feed[name], mirrored, moves, strict=True)
        ]
        changed[name] = np.stack(samples)
    return changed


def _moved(x: Array, by: Mapping[int, float]) -> Array:
    """``x`` moved along each axis of ``by``, in parts of the farthest move."""
    for axis, part in by.items():
        size = x.shape[axis]
        x = np.take(x, np.clip(np.arange(size) + round(part * size / REACH), 0, size - 1), axis)
    return x
