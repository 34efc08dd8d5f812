"""The part of preprocessing that a graph does itself, so that no picture is scaled or normalized twice.

A graph that computes y = scale * x + offset of its input x (see `blocks.picture`) wants x in one of few forms: pixels 0..255,
pixels 0..1, or pixels normalized already. Which one is decided by what y then is: networks are trained on
(pixel / 255 - mean) / std with means and deviations in narrow bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import numpy as np

from vitq_compiler.blocks.picture import Affine, Picture
from vitq_compiler.graph import InputSpec
from vitq_compiler.preprocess import Preprocess

CLOSE = 0.02  # relative difference up to which two normalizations are the same


@dataclass(frozen=True)
class Bounds:
    """Means and deviations, of pixels 0..1, that networks are trained with."""

    mean: tuple[float, float]
    std: tuple[float, float]

    def hold(self, total: Affine) -> bool:
        """Whether ``total``, an affine of pixels 0..255, normalizes within the bounds, up to the sign."""
        mean, std = _moments(total, 255.0)
        low, high = self.mean
        return bool(((low <= mean) & (mean <= high)).all() and ((self.std[0] <= abs(std)) & (abs(std) <= self.std[1])).all())


# The narrower, the more another form of the input would give the same.
OF_PIXELS = Bounds((-0.05, 1.05), (0.08, 1.1))
OF_CENTRED_PIXELS = Bounds((0.2, 0.75), (0.8 / 255, 1.25 / 255))  # of older networks, which only subtract a mean of some 100
OF_UNITS = Bounds((0.1, 0.8), (0.1, 1.1))
OF_NORMALIZED = Bounds((-0.05, 1.05), (0.17, 1.1))  # twice the same normalization has a smaller deviation

PIXELS, UNITS = (Affine(np.ones(1), np.zeros(1)), Affine(np.full(1, 1 / 255), np.zeros(1)))


def leave_out(wanted: Preprocess, picture: Picture, spec: InputSpec, *, told: bool) -> tuple[Preprocess, list[str]]:
    """What is to be done before the graph, and what the user should know of that.

    Args:
        wanted: the preprocessing that was chosen without looking at the graph.
        picture: what the graph does to its input.
        spec: the input.
        told: whether the user asked for ``wanted``: then it is done as it is, unless the graph does the very same.

    Returns:
        ``wanted`` without what the graph does; its `source` says which part is done where.

    Raises:
        DataError: mean or std does not fit the channels.
    """
    graph = picture.affine
    if spec.dtype == np.uint8:
        return _raw(wanted, picture, PIXELS, "pixels 0..255 as uint8"), []
    if graph.is_identity:
        return replace(wanted, source=f"{wanted.source}{_resizing(picture)}"), []
    own = _affine_of(wanted, _channels(picture, spec))
    for form, given in ((PIXELS, "pixels 0..255"), (UNITS, "pixels 0..1")):
        if not wanted.assumed and _are_close(_after(graph, form), own):
            return _raw(wanted, picture, form, given), []
    as_it_is = replace(wanted, source=f"{wanted.source}; the graph goes on with {_formula(picture, own)}{_resizing(picture)}")
    if not wanted.assumed and OF_NORMALIZED.hold(_after(graph, own)):
        return as_it_is, []
    if not wanted.assumed and not graph.offset.any() and (graph.scale == graph.scale[0]).all() and graph.scale[0] > 0:
        scaled = Affine(own.scale / graph.scale[0], own.offset / graph.scale[0])
        kept = Affine(scaled.scale[::-1], scaled.offset[::-1]) if wanted.flip and len(scaled.scale) == 3 else scaled  # it turns in the end
        source = f"{wanted.source}, without its scale: the graph itself computes {_formula(picture, scaled)}{_resizing(picture)}"
        return replace(wanted, rescale=1.0, std=_numbers(1 / kept.scale), mean=_numbers(-kept.offset / kept.scale), source=source), []
    if not told:
        if any(bounds.hold(_after(graph, PIXELS)) for bounds in (OF_PIXELS, OF_CENTRED_PIXELS)):
            return _raw(wanted, picture, PIXELS, "pixels 0..255"), _contradiction(wanted, picture, PIXELS)
        if OF_UNITS.hold(_after(graph, UNITS)):
            return _raw(wanted, picture, UNITS, "pixels 0..1"), _contradiction(wanted, picture, UNITS)
        if OF_NORMALIZED.hold(_after(graph, own)):
            return as_it_is, []
    unfit = (
        f"the graph itself computes {_formula(picture, own)} of its input {picture.name}, which does not fit preprocessing by "
        f"{wanted.source}: say with --preprocess what comes before the graph, such as none for pixels 0..255 or mean=0,std=1 for 0..1"
    )
    return as_it_is, [unfit]


def _contradiction(wanted: Preprocess, picture: Picture, form: Affine) -> list[str]:
    """A warning where a configuration file says something else than the graph."""
    if wanted.assumed:
        return []
    return [f"{wanted.source} differs from the graph, which itself computes {_formula(picture, form)}: the graph's is taken"]


def _raw(wanted: Preprocess, picture: Picture, form: Affine, given: str) -> Preprocess:
    """``wanted`` with sizes alone, for a graph that takes pixels as they are, or divided by 255."""
    does = "" if picture.affine.is_identity else f" and itself computes {_formula(picture, form)}"
    told = f"the graph takes {given}{does}{_resizing(picture)}; sizes as for {wanted.source}"
    return replace(wanted, rescale=float(form.scale[0]), mean=(0.0,), std=(1.0,), source=told)


def _resizing(picture: Picture) -> str:
    return "; it also resizes or crops" if picture.resized else ""


def _channels(picture: Picture, spec: InputSpec) -> int:
    size = spec.shape[picture.layout.channels] if picture.layout is not None else 0
    return size if isinstance(size, int) and size > 0 else max(picture.affine.scale.size, 3)


def _affine_of(preprocess: Preprocess, channels: int) -> Affine:
    """What ``preprocess`` does to pixels 0..255."""
    black, white = (preprocess.normalize(np.full((channels, 1, 1), level, np.uint8)).reshape(-1).astype(np.float64) for level in (0, 255))
    return Affine((white - black) / 255, black)


def _after(second: Affine, first: Affine) -> Affine:
    """``second`` of ``first``."""
    return Affine(second.scale * first.scale, second.scale * first.offset + second.offset)


def _moments(total: Affine, top: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of (x / top - mean) / std."""
    with np.errstate(divide="ignore", invalid="ignore"):
        std = np.where(total.scale == 0, inf, 1 / (total.scale * top))
        return -total.offset * std, std


def _are_close(one: Affine, other: Affine) -> bool:
    return bool(np.allclose(one.scale, other.scale, rtol=CLOSE, atol=0) and np.allclose(one.offset, other.offset, rtol=CLOSE, atol=CLOSE))


def _formula(picture: Picture, form: Affine) -> str:
    """The affine of the graph in words, of an input x; divided by 255 first where it takes pixels 0..255 and normalizes them."""
    affine = picture.affine
    divided = _are_close(form, PIXELS) and not (abs(affine.scale) > 0.5).any()
    mean, std = _moments(affine, 255.0 if divided else 1.0)
    text = "x / 255" if divided else "x"
    if not np.allclose(mean, 0, atol=1e-4):
        text = f"({text} - {_shown(mean)})"
    if (abs(std) < 0.01).all():
        return f"{text} * {_shown(1 / std)}"
    return text if np.allclose(std, 1, rtol=1e-3) else f"{text} / {_shown(std)}"


def _shown(numbers: np.ndarray) -> str:
    """As ``--preprocess`` takes them."""
    return f"{numbers[0]:.4g}" if np.allclose(numbers, numbers[0]) else "/".join(f"{number:.4g}" for number in numbers)


def _numbers(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
