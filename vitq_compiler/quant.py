"""Quantization in numpy: what to do (`QuantSpec`), with which numbers (`QuantParams`), and the arithmetic.

    code(x) = clip(round_half_even(f(x) / scale) + zero_point, quant_min, quant_max)
    dequantize(code) = f^-1(scale * (code - zero_point))

f is the identity for affine quantization: what QuantizeLinear and DequantizeLinear compute (ONNX operator specification),
so a fake-quantized value here is the value the integer graph sees. Any other quantizer is a `Curve` around the same two
operators (companding).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from vitq_compiler.pairs import Pairs

if TYPE_CHECKING:
    from vitq_compiler.graph import Graph, Tensor

Float = NDArray[np.floating[Any]]
Format = Literal["int", "e4m3"]
Granularity = Literal["per_tensor", "per_channel"]
Common = Literal["mean", "median"]

E4M3: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST_E4M3 = 448


@dataclass(frozen=True)
class Edge:
    """One input of one node: the key of specs and params. A tensor read twice may be quantized in two ways."""

    node: str
    index: int


@dataclass(frozen=True)
class QuantSpec:
    """What an edge should become, before any number is known.

    Attributes:
        bits: code width, 2 to 8.
        signed: codes from -2^(bits-1) rather than from 0.
        symmetric: zero maps to the middle code; for signed codes the range is then +-(2^(bits-1) - 1).
        anchored: zero is code 0, wherever it lies in the range, and codes reach from there as far as they must in a signed 8-bit
            container: an asymmetric quantizer of fewer than 8 bits for kernels without zero points, with the same values.
        granularity: one scale for the tensor, or one per output channel (shape [channels]).
        format: ``int``, or ``e4m3``: 8-bit floats with a sign, 4 bits of exponent and 3 of mantissa, up to 448, none infinite
            (arXiv 2209.05433); ``bits``, ``signed`` and ``symmetric`` say nothing then.
        quantizer: how the codes are spread over the range, a name of `vitq_compiler.quantizers`.
        base: of the log quantizers: ratio of neighbouring values; 0 leaves it to the search.
        shift: of the shifted log: what is added before the logarithm; 0 leaves it to the search.
        zero: of the log quantizer: its smallest code stands for zero rather than for the smallest power.
        pair_limit: of a weight: what two neighbouring codes may sum to in magnitude, see `pairs`; 0 sets no limit.
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    granularity: Granularity = "per_tensor"
    format: Format = "int"
    quantizer: str = "affine"
    base: float = 0.0
    shift: float = 0.0
    zero: bool = False
    anchored: bool = False
    pair_limit: int = 0

    def __post_init__(self) -> None:
        if self.anchored and (self.bits > 7 or self.granularity != "per_tensor" or self.symmetric):
            raise ValueError("anchored codes are asymmetric, of one scale, and of at most 7 bits")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {self.bits}")
        if self.format not in ("int", "e4m3"):
            raise ValueError(f"format must be int or e4m3, got {self.format!r}")
        if self.base != 0 and not 1 < self.base <= 16:
            raise ValueError(f"base must be above 1 and at most 16, or 0 to search it, got {self.base}")
        if self.shift < 0:
            raise ValueError(f"shift must not be negative, got {self.shift}")
        if self.pair_limit and not (self.signed and self.symmetric):
            raise ValueError("a pair limit needs signed symmetric codes")

    @property
    def has_zero_point(self) -> bool:
        """Whether any code may stand for zero."""
        return not (self.symmetric or self.anchored)

    @property
    def quant_min(self) -> int:
        half = 1 << (self.bits - 1)
        return (1 if self.symmetric else 0) - half if self.signed else 0

    @property
    def quant_max(self) -> int:
        return (1 << (self.bits - 1 if self.signed else self.bits)) - 1


class Curve(ABC):
    """A rising map f; the codes of a tensor lie evenly on f(x). Numpy here is the truth that the emitted operators follow."""

    @abstractmethod
    def forward(self, x: Float) -> Float:
        """f(x), float32."""

    @abstractmethod
    def inverse(self, t: Float) -> Float:
        """The value that ``t`` stands for, float32."""

    @abstractmethod
    def emit(self, graph: Graph, tensor: Tensor) -> Tensor:
        """Standard operators for `forward`, such that QuantizeLinear needs no Clip before it."""

    @abstractmethod
    def emit_inverse(self, graph: Graph, tensor: Tensor) -> Tensor:
        """Standard operators for `inverse`."""


@dataclass(frozen=True)
class QuantParams:
    """The numbers of one quantizer.

    Attributes:
        scale: float32, shape [] or [channels], positive and finite.
        zero_point: int32, the shape of ``scale``, within the code range.
        axis: the axis of ``scale`` where it is not a scalar.
        quant_min: smallest code.
        quant_max: largest code.
        format: of the codes, see `QuantSpec`.
        curve: what the codes lie evenly on; None: the values themselves.
        signed: the container is signed also where no code is negative.
        pairs: what neighbouring codes of a weight must keep to; None: nothing.
    """

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    axis: int | None
    quant_min: int
    quant_max: int
    format: Format = "int"
    curve: Curve | None = None
    signed: bool = False
    pairs: Pairs | None = None

    def __post_init__(self) -> None:
        if self.scale.shape != self.zero_point.shape or self.scale.ndim != (0 if self.axis is None else 1):
            raise ValueError(f"scale {self.scale.shape}, zero point {self.zero_point.shape} and axis {self.axis} do not fit")
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ValueError("scales must be positive and finite")
        if (self.zero_point < self.quant_min).any() or (self.zero_point > self.quant_max).any():
            raise ValueError("zero point outside the code range")

    @property
    def dtype(self) -> np.dtype[Any]:
        """The container: int8 for signed codes, else uint8; 8-bit floats are their own."""
        if self.format == "e4m3":
            return E4M3
        return np.dtype(np.int8 if self.signed or self.quant_min < 0 else np.uint8)


def from_range(low: Float, high: Float, spec: QuantSpec, axis: int | None = None) -> QuantParams:
    """Parameters that cover [low, high], widened to contain zero so that zero is a code.

    Args:
        low: smallest value, shape [] or [channels].
        high: largest value, the shape of ``low``.
        spec: the intent.
        axis: the axis the channels lie on.
    """
    low = np.minimum(np.asarray(low, np.float64), 0.0)
    high = np.maximum(np.asarray(high, np.float64), 0.0)
    smallest = np.finfo(np.float32).tiny * 2.0**24  # a constant zero channel still needs a positive, normal scale
    if spec.format == "e4m3":
        step = np.maximum(np.maximum(np.abs(low), high) / LARGEST_E4M3, smallest)
        return QuantParams(step.astype(np.float32), np.zeros(step.shape, np.int32), axis, -LARGEST_E4M3, LARGEST_E4M3, spec.format)
    codes = spec.quant_max - spec.quant_min
    if spec.symmetric:
        middle = 0 if spec.signed else (codes + 1) // 2
        reach = spec.quant_max - middle
        scale = np.maximum(np.abs(low), high) / reach
        zero_point = np.full(scale.shape, middle)
    else:
        scale = (high - low) / codes
        with np.errstate(divide="ignore", invalid="ignore"):
            zero_point = np.where(scale > 0, np.clip(np.rint(spec.quant_min - low / scale), spec.quant_min, spec.quant_max), spec.quant_min)
    numbers = np.maximum(scale, smallest).astype(np.float32), zero_point.astype(np.int32)
    pairs = Pairs(spec.pair_limit) if spec.pair_limit else None
    return QuantParams(*numbers, axis, spec.quant_min, spec.quant_max, pairs=pairs)


def anchor(params: QuantParams) -> QuantParams:
    """The same values from codes with zero for a zero point; see `QuantSpec.anchored`."""
    zero_point = int(params.zero_point)
    first, last = params.quant_min - zero_point, params.quant_max - zero_point
    return replace(params, zero_point=np.zeros_like(params.zero_point), quant_min=first, quant_max=last, signed=True)


def check_strength(strength: float) -> None:
    """Refuse a strength of `equalizing_scale`: ValueError outside 0 to 1."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in 0 to 1, got {strength}")


def equalizing_scale(
    width: Float, strength: float, *, common: Common = "mean", limit: float = inf
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """How much to divide each channel by, so that one scale serves all.

    A dead channel counts as if its range were a thousandth of the median one, so that no scale vanishes.

    Args:
        width: size of each channel's range, shape [channels].
        strength: 1 makes all ranges equal, 0 changes nothing (the alpha of SmoothQuant, arXiv 2211.10438).
        common: the width that keeps its size: the mean one (RepQ-ViT, arXiv 2212.08254), or the median one, which outliers
            do not pull (DopQ-ViT, arXiv 2408.03291).
        limit: the largest factor may be this many times the smallest; where it would be more, the strength is lowered until it fits.

    Returns:
        The widths with dead channels raised, and (width / common width)^strength.
    """
    live = np.maximum(np.asarray(width, np.float64), 1e-3 * max(float(np.median(width)), 1e-12))
    spread = np.log(live.max() / live.min())
    if strength * spread > np.log(limit):
        strength = float(np.log(limit) / spread)
    middle = live.mean() if common == "mean" else np.median(live)
    return live, ((live / middle) ** strength).astype(np.float32)


def quantize(x: Float, params: QuantParams) -> NDArray[Any]:
    """Codes of ``x``, in the container type."""
    scale, zero_point = _spread(params, x.ndim)
    if params.format == "e4m3":
        return np.asarray(np.clip(np.asarray(x, np.float32) / scale, params.quant_min, params.quant_max).astype(params.dtype))
    t = np.asarray(x, np.float32) if params.curve is None else params.curve.forward(np.asarray(x, np.float32))
    steps = t / scale
    codes = np.clip(np.rint(steps) + zero_point, params.quant_min, params.quant_max)
    if params.pairs is not None:
        codes = params.pairs.hold(codes, steps)
    return np.asarray(codes.astype(params.dtype))


def dequantize(codes: NDArray[Any], params: QuantParams) -> NDArray[np.float32]:
    """The values that ``codes`` stand for."""
    scale, zero_point = _spread(params, codes.ndim)
    if params.format == "e4m3":
        return codes.astype(np.float32) * scale
    t = ((codes.astype(np.int32) - zero_point) * scale).astype(np.float32)
    return t if params.curve is None else np.asarray(params.curve.inverse(t), np.float32)


def fake_quantize(x: Float, params: QuantParams) -> NDArray[np.float32]:
    """``x`` after quantization: dequantize(quantize(x))."""
    return dequantize(quantize(x, params), params)


def _spread(params: QuantParams, ndim: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    if params.axis is None:
        return params.scale, params.zero_point
    shape = [-1 if i == params.axis % ndim else 1 for i in range(ndim)]
    return params.scale.reshape(shape), params.zero_point.reshape(shape)
