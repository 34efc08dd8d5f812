"""Pictures made by rule, for calibration without files: dead leaves with natural-image statistics.

Discs of power-law radius (density r^-3, so that every octave of size covers the same area) fall on each other and hide
what lies below. That gives edges, occlusion and a power spectrum near 1/f^2 at every scale, as photographs have.
Every leaf carries a colour, a shading gradient and its own piece of 1/f texture.

Sources: Lee, Mumford and Huang, "Occlusion models for natural images" (IJCV 2001) for the model and the exponent;
Ruderman, Cronin and Chiao, "Statistics of cone responses to natural images" (JOSA A 1998) for the colour axes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet
# Brightness, blue against yellow, green against magenta: the axes along which colours of photographs vary independently.
_AXES = np.array([[0.577, 0.577, 0.577], [0.707, 0.0, -0.707], [-0.408, 0.816, -0.408]], np.float32)
# Standard deviation along each axis, between pictures and between the leaves of one; together near ImageNet's 0.225 a channel.
_PICTURE_SPREAD = np.array([0.20, 0.06, 0.02], np.float32)
_LEAF_SPREAD = np.array([0.34, 0.09, 0.035], np.float32)

_SIZES = 20  # distinct radii in a picture
_COVERAGE = 5.0  # leaves lying on a pixel, on average: e^-5 of the picture shows the ground
_TILE = 256  # side of the texture; a power of two, so that wrapping around is a bit mask


def dead_leaves(index: int, height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Make one picture; the same arguments always give the same one.

    Args:
        index: which picture of the endless series that ``seed`` stands for.
        height: pixels, at least 1.
        width: pixels, at least 1.
        seed: the series.

    Returns:
        RGB, uint8 [height, width, 3].
    """
    rng = np.random.default_rng([seed, index])
    leaf, centres, radii = _drop_leaves(rng, height, width)
    count = len(radii)

    vivid = np.array([1.0, *np.exp(rng.normal(0.0, 0.6, 2))], np.float32)  # some pictures are nearly grey, some colourful
    ground = _MEAN + (rng.normal(size=3).astype(np.float32) * _PICTURE_SPREAD) @ _AXES
    colours = ground + (rng.normal(size=(count, 3)).astype(np.float32) * (_LEAF_SPREAD * vivid)) @ _AXES
    slopes = rng.normal(0.0, 0.06, (count, 2)).astype(np.float32) / radii[:, None]
    contrasts = rng.gamma(1.5, 0.035, count).astype(np.float32)
    shifts = rng.integers(0, _TILE, (count, 2))

    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    light = rng.normal(0.0, 0.12, 2)
    shade = (light[0] * (y / height - 0.5) + light[1] * (x / width - 0.5)).astype(np.float32)  # one lamp over the whole scene
    constant = -(slopes * centres).sum(1, dtype=np.float32)
    shade += slopes[:, 0][leaf] * y.astype(np.float32) + slopes[:, 1][leaf] * x.astype(np.float32) + constant[leaf]
    shade += contrasts[leaf] * _texture().ravel()[((y + shifts[:, 0][leaf]) % _TILE) * _TILE + (x + shifts[:, 1][leaf]) % _TILE]

    picture = _blur(colours[leaf] + shade[..., None])
    return np.asarray(np.clip(picture * 255.0 + 0.5, 0.0, 255.0), np.uint8)


def _drop_leaves(rng: np.random.Generator, height: int, width: int) -> tuple[NDArray[np.int32], NDArray[Any], NDArray[np.float32]]:
    """Which leaf is on top at every pixel, and where the leaves are.

    Returns:
        leaf: int32 [height, width], an index into the other two; 0 is the ground.
        centres: float32 [leaves, 2] as (y, x).
        radii: float32 [leaves].
    """
    smallest, largest = max(1.0, min(height, width) * rng.uniform(0.004, 0.012)), max(2.0, max(height, width) * rng.uniform(0.2, 0.5))
    sizes = np.geomspace(smallest, largest, _SIZES)
    counts = [int(rng.poisson(_COVERAGE / _SIZES * (height + 2 * r) * (width + 2 * r) / (np.pi * r * r))) for r in sizes]
    ranks = rng.permutation(sum(counts)).astype(np.int32) + 1
    centres = np.zeros((len(ranks) + 1, 2), np.float32)
    radii = np.full(len(ranks) + 1, max(height, width), np.float32)
    centres[0] = height / 2, width / 2

    top = np.zeros((height + 2, width + 2), np.int32)  # the frame of one pixel takes what falls outside
    layer = np.zeros_like(top)
    start = 0
    for r, count in zip(sizes, counts, strict=True):
        # Within one size the ranks ascend, and numpy keeps the last value written to a repeated index: the topmost leaf.
        rank = np.sort(ranks[start : start + count])
        start += count
        cy = rng.integers(-int(r), height + int(r) + 1, count)
        cx = rng.integers(-int(r), width + int(r) + 1, count)
        centres[rank, 0], centres[rank, 1], radii[rank] = cy, cx, r
        dy, dx = _disc(float(r))
        layer[:] = 0
        rows = np.clip(cy[:, None] + (dy + 1), 0, height + 1)
        columns = np.clip(cx[:, None] + (dx + 1), 0, width + 1)
        layer.ravel()[rows * (width + 2) + columns] = rank[:, None]
        np.maximum(top, layer, out=top)
    return top[1:-1, 1:-1], centres, radii


def _disc(radius: float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    reach = int(radius)
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    inside = dy * dy + dx * dx <= radius * radius
    return dy[inside], dx[inside]


@lru_cache(maxsize=1)
def _texture() -> NDArray[np.float32]:
    """A periodic field of amplitude 1/f, zero mean and unit deviation; float32 [_TILE, _TILE]. The same for all seeds."""
    noise = np.fft.rfft2(np.random.default_rng(0).normal(size=(_TILE, _TILE)))
    frequency = np.hypot(np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None, :])
    frequency[0, 0] = np.inf
    field = np.fft.irfft2(noise / frequency, s=(_TILE, _TILE))
    return np.asarray(field / field.std(), np.float32)


def _blur(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    """Soften by [1 6 1]/8 both ways, as a lens does: edges one pixel hard would tilt the spectrum up at its end."""
    for axis in (0, 1):
        padded = np.pad(picture, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        size = picture.shape[axis]
        first, middle, last = (padded.take(range(i, i + size), axis) for i in range(3))
        picture = (first + 6.0 * middle + last) * np.float32(0.125)
    return picture
