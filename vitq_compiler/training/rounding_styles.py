"""How the codes of a weight are trained, from a real weight v in units of its scale.

    nearest    round(v), the gradient that of v (straight-through): codes may move as far as they are pulled
    adaround   floor(v) + h(a),  h(a) = clip(1.2 sigmoid(a) - 0.1, 0, 1): each code is one of two (arXiv 2004.10568)

The h of adaround begins at the fraction of v and ends at 0 or 1, driven by the mean of 1 - |2h - 1|^b, where b falls from 20 to 2.
What is deployed, and judged, is h rounded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from vitq_compiler.torch_graph import Tensor, require_torch
from vitq_compiler.training.fake_quantize import nearest

LOWEST, STRETCH = -0.1, 1.2  # of the rectified sigmoid
WARM_UP = 0.2  # part of the training in which h is left alone
SHARPNESS = 20.0, 2.0  # b after the warm-up, and in the end


class RoundingStyle(ABC):
    """The codes of one weight, as a function of a trained tensor.

    Attributes:
        trained: that tensor, in units of the weight's scale.
    """

    trained: Tensor

    @abstractmethod
    def soft(self) -> Tensor:
        """What to train with: has a gradient."""

    @abstractmethod
    def hard(self) -> Tensor:
        """The codes, as floats."""

    def penalty(self, sharpness: float) -> Tensor | None:
        """Mean distance from codes; None where `soft` gives codes anyway."""
        return None


class Nearest(RoundingStyle):
    """round(v)"""

    def __init__(self, latent: Tensor) -> None:
        self.trained = latent.clone().requires_grad_()

    def soft(self) -> Tensor:
        return nearest(self.trained)

    def hard(self) -> Tensor:
        return self.trained.round()


class Adaround(RoundingStyle):
    """floor(v) + h(a)"""

    def __init__(self, latent: Tensor) -> None:
        torch = require_torch("adaround")
        self._floor = latent.floor()
        part = ((latent - self._floor - LOWEST) / STRETCH).clamp(1e-4, 1 - 1e-4)
        self.trained = torch.log(part / (1 - part)).requires_grad_()

    def _height(self) -> Tensor:
        return (STRETCH * self.trained.sigmoid() + LOWEST).clamp(0, 1)

    def soft(self) -> Tensor:
        return self._floor + self._height()

    def hard(self) -> Tensor:
        return self._floor + (self._height() >= 0.5)

    def penalty(self, sharpness: float) -> Tensor:
        return (1 - (2 * self._height() - 1).abs() ** sharpness).mean()


STYLES: dict[str, type[Nearest] | type[Adaround]] = {"nearest": Nearest, "adaround": Adaround}


def sharpness(done: float) -> float | None:
    """The exponent b when the part ``done`` of the training is over; None during the warm-up."""
    if done < WARM_UP:
        return None
    first, last = SHARPNESS
    return last + (first - last) * (1 - (done - WARM_UP) / (1 - WARM_UP))
