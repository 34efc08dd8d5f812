"""An MLP with ReLU, trained to give what the same MLP gives with GELU (GLF-Q, step 2; APHQ-ViT, arXiv 2504.02508).

    f(x) = relu(x W1 + b1) W2 + b2,     loss  (mean |f(x) - y|^2 + 2 mean |f_clip(x) - y|^2) / var y

f_clip is f with the hidden layer clipped at the 99th percentile of what is positive of it under GELU: what will be quantized shall
not lean on the few largest values. Trained are differences, in units of the root mean square of the weight that they are added to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.torch_graph import Taps, Tensor, require_torch
from vitq_compiler.training.learned import Noise

CLIPPED = 2.0  # weight of the error with the hidden layer clipped
PERCENTILE = 0.99

Weights = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class GeluMlp:
    """What is imitated: ``weights`` by the names W1, b1, W2, b2, and which GELU."""

    weights: Weights
    approximate: str


class ReluMlp:
    """The imitation; `loop.train` trains it.

    Args:
        teacher: what is imitated, and where to start.
        inputs: batches of x, for the percentile and the variance.
        device: of torch.
    """

    def __init__(self, teacher: GeluMlp, inputs: Sequence[NDArray[np.float32]], device: str) -> None:
        torch = require_torch("refit-mlp")
        self._functional, self._approximate, self.device = torch.nn.functional, teacher.approximate, device
        self._start = {name: torch.tensor(array, device=device) for name, array in teacher.weights.items()}
        unit = {"W1": "W1", "b1": "W1", "W2": "W2", "b2": "W2"}
        self._unit = {name: self._start[of].square().mean().sqrt() for name, of in unit.items()}
        self._steps = {name: torch.zeros_like(x).requires_grad_() for name, x in self._start.items()}
        with torch.no_grad():
            hidden = torch.cat([self._hidden(self.tensor(x)).flatten() for x in inputs])
            positive = hidden[hidden > 0].cpu().numpy()
            self._top = float(np.quantile(positive, PERCENTILE)) if positive.size else 0.0
            self._variance = float(torch.cat([self.wanted(self.tensor(x)).flatten() for x in inputs]).var()) or 1.0

    def tensor(self, x: NDArray[np.float32]) -> Tensor:
        """``x`` in torch."""
        return require_torch("refit-mlp").from_numpy(np.array(x)).to(self.device)

    def _hidden(self, x: Tensor) -> Tensor:
        return self._functional.gelu((x @ self._start["W1"]).float() + self._start["b1"], approximate=self._approximate)

    def wanted(self, x: Tensor) -> Tensor:
        """What the MLP with GELU gives."""
        return (self._hidden(x) @ self._start["W2"]).float() + self._start["b2"]

    def error(self, x: Tensor) -> Tensor:
        """The loss on ``x`` [..., features]."""
        w = {name: self._start[name] + step * self._unit[name] for name, step in self._steps.items()}
        hidden = ((x @ w["W1"]).float() + w["b1"]).relu()
        wanted = self.wanted(x).detach()
        whole, clipped = ((((h @ w["W2"]).float() + w["b2"]) - wanted).square().mean() for h in (hidden, hidden.clamp(max=self._top)))
        return (whole + CLIPPED * clipped) / self._variance

    def weights(self) -> Weights:
        """The weights as they are now."""
        return {n: (self._start[n] + step * self._unit[n]).detach().cpu().numpy() for n, step in self._steps.items()}

    def taps(self, noise: Noise | None = None) -> Taps:
        """Nothing is quantized."""
        return {}

    def penalty(self, sharpness: float) -> Tensor | None:
        """Nothing is rounded."""
        return None

    @property
    def codes(self) -> dict[str, Tensor]:
        """Differences of weights, by name."""
        return {name: self._steps[name] for name in ("W1", "W2")}

    @property
    def scales(self) -> dict[str, Tensor]:
        """There are none."""
        return {}

    @property
    def steps(self) -> dict[str, Tensor]:
        """Differences of biases, by name."""
        return {name: self._steps[name] for name in ("b1", "b2")}

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Everything that is trained, by name."""
        return self._steps
