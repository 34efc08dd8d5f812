"""What a quantizer is: a box of free numbers, and the parameters at a point of it.

A point of the box is what a range search moves; the first point it is given covers the whole observed range. Coordinates
are logarithms to base 2 wherever a factor is meant, so that a search can halve intervals.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.quant import QuantParams, QuantSpec, anchor
from vitq_compiler.registry import load

Point = tuple[float, ...]
Box = tuple[tuple[float, float], ...]
NARROWEST = -6.0  # log2 of the smallest part of a range that a search may keep


class Quantizer(ABC):
    """One way of placing 2^bits codes.

    Attributes:
        name: as in a recipe.
        plain: whether QuantizeLinear and DequantizeLinear alone compute it.
    """

    name: ClassVar[str]
    plain: ClassVar[bool] = False

    @abstractmethod
    def box(self, low: float, high: float, spec: QuantSpec) -> Box:
        """The interval of each free number for values from ``low`` to ``high``."""

    @abstractmethod
    def start(self, low: float, high: float, spec: QuantSpec) -> Point:
        """The point of the box that covers all values."""

    @abstractmethod
    def spread(self, point: Point, low: float, high: float, spec: QuantSpec) -> QuantParams:
        """The parameters at ``point`` of the box, zero where it comes to lie."""

    def place(self, point: Point, low: float, high: float, spec: QuantSpec) -> QuantParams:
        """The parameters at ``point`` of the box, anchored where ``spec`` says so."""
        params = self.spread(point, low, high, spec)
        return anchor(params) if spec.anchored else params

    def from_range(self, low: float, high: float, spec: QuantSpec) -> QuantParams:
        """The parameters that cover ``low`` to ``high``."""
        return self.place(self.start(low, high, spec), low, high, spec)


def quantizer_for(spec: QuantSpec) -> Quantizer:
    """The quantizer that ``spec`` names.

    Raises:
        RecipeError: there is none of that name.
    """
    found: Quantizer = load("quantizers", spec.quantizer)()
    return found


def scalar(number: float) -> NDArray[np.float32]:
    """A scale for the whole tensor."""
    return np.asarray(number, np.float32)


def code(number: int) -> NDArray[np.int32]:
    """A zero point for the whole tensor."""
    return np.asarray(number, np.int32)
