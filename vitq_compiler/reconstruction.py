"""Training of a quantized part of a network, with straight-through gradients, towards what the float network computes.

Weights are held in units of their scale:  w = s (clip(round(v)) - z),  with v, log s and the scales of activations trained and
round taken as the identity in the gradient (learned step sizes, arXiv 1902.08153). v starts at the real weight, moved no further
than it must be to round to the codes it has now: training continues from whatever rounding came before. The state that serves
held-back samples best is kept, so the loss on them never grows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.errors import RecipeError
from vitq_compiler.quant import Edge, QuantParams, quantize
from vitq_compiler.torch_graph import Taps, Tensor, require_torch

MARGIN = 0.49  # how far from its code a weight may start, in steps
Loss = Callable[[int, Taps], Tensor]  # number of a batch, quantizers -> loss


@dataclass(frozen=True)
class Schedule:
    """How to train.

    Attributes:
        steps: number of minibatches.
        weight_rate: learning rate of weights and biases, in codes.
        scale_rate: learning rate of the logarithms of scales.
        checks: how often the held-back samples are looked at.
        seed: of the order of batches.
    """

    steps: int
    weight_rate: float
    scale_rate: float
    checks: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Weight:
    """One quantized weight: its real value, its codes and their meaning."""

    value: NDArray[np.float32]
    codes: NDArray[Any]
    params: QuantParams


class Quantizers:
    """The trained quantizers of a part of a graph, and biases.

    Args:
        activations: edge -> (key, params); edges with equal keys share one quantizer.
        weights: edge -> weight.
        biases: edge -> (bias, unit in which it is trained).
        device: of torch.
    """

    def __init__(
        self,
        activations: Mapping[Edge, tuple[str, QuantParams]],
        weights: Mapping[Edge, Weight],
        biases: Mapping[Edge, tuple[NDArray[np.float32], NDArray[np.float32]]],
        device: str,
    ) -> None:
        self._torch = require_torch("reconstruction")
        self.activations, self.weights, self.biases, self.device = activations, weights, biases, device
        self.latents: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        for key, params in dict(activations.values()).items():
            self.scales[f"activation {key}"] = self._parameter(np.log(params.scale))
        for edge, weight in weights.items():
            scale, zero_point = _along(weight.params.scale, weight), _along(weight.params.zero_point, weight)
            codes = weight.codes.astype(np.float32)
            self.latents[f"weight {edge}"] = self._parameter(np.clip(weight.value / scale + zero_point, codes - MARGIN, codes + MARGIN))
            self.scales[f"weight {edge}"] = self._parameter(np.log(scale))
        for edge, (bias, _) in biases.items():
            self.latents[f"bias {edge}"] = self._parameter(np.zeros_like(bias))

    def taps(self) -> dict[Edge, Callable[[Tensor], Tensor]]:
        """The functions to compute with; see `TorchGraph`."""
        taps: dict[Edge, Callable[[Tensor], Tensor]] = {}
        for edge, (key, params) in self.activations.items():
            taps[edge] = partial(self._activation, self.scales[f"activation {key}"].exp(), params)
        for edge, weight in self.weights.items():
            taps[edge] = partial(self._weight, f"weight {edge}", self._tensor(_along(weight.params.zero_point, weight)), weight.params)
        for edge, (bias, unit) in self.biases.items():
            taps[edge] = partial(self._bias, f"bias {edge}", self._tensor(bias), self._tensor(unit))
        return taps

    def _activation(self, scale: Tensor, params: QuantParams, x: Tensor) -> Tensor:
        zero_point = int(params.zero_point)
        return self._nearest(x / scale).clamp(params.quant_min - zero_point, params.quant_max - zero_point) * scale

    def _weight(self, key: str, zero_point: Tensor, params: QuantParams, _: Tensor) -> Tensor:
        codes = self._nearest(self.latents[key]).clamp(params.quant_min, params.quant_max)
        return (codes - zero_point) * self.scales[key].exp()

    def _bias(self, key: str, bias: Tensor, unit: Tensor, _: Tensor) -> Tensor:
        return bias + self.latents[key] * unit

    def _nearest(self, x: Tensor) -> Tensor:
        """Rounded, with the gradient of the identity."""
        return x + (x.round() - x).detach()

    def activation_params(self, edge: Edge) -> QuantParams:
        """The trained quantizer of an activation edge."""
        key, params = self.activations[edge]
        return replace(params, scale=self._array(self.scales[f"activation {key}"].exp()))

    def weight_codes(self, edge: Edge) -> tuple[NDArray[Any], QuantParams]:
        """The trained codes of a weight and what they mean."""
        weight = self.weights[edge]
        codes = np.clip(np.rint(self._array(self.latents[f"weight {edge}"])), weight.params.quant_min, weight.params.quant_max)
        scale = self._array(self.scales[f"weight {edge}"].exp()).reshape(weight.params.scale.shape)
        return codes.astype(weight.params.dtype), replace(weight.params, scale=scale)

    def bias(self, edge: Edge) -> NDArray[np.float32]:
        """A trained bias."""
        bias, unit = self.biases[edge]
        return (bias + self._array(self.latents[f"bias {edge}"]) * unit).astype(np.float32)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Everything that is trained, by name."""
        return {**{f"latent {k}": t for k, t in self.latents.items()}, **{f"scale {k}": t for k, t in self.scales.items()}}

    def fingerprint(self, *more: object) -> str:
        """A name for the state now and whatever else decides the training."""
        digest = hashlib.sha256(repr(more).encode())
        for name, parameter in self.parameters.items():
            digest.update(name.encode() + self._array(parameter).tobytes())
        return digest.hexdigest()[:24]

    def _parameter(self, array: Any) -> Tensor:
        return self._tensor(array).requires_grad_()

    def _tensor(self, array: Any) -> Tensor:
        return self._torch.tensor(np.asarray(array, np.float32), device=self.device)

    def _array(self, tensor: Tensor) -> NDArray[np.float32]:
        return np.asarray(tensor.detach().cpu().numpy(), np.float32)


def _along(vector: NDArray[Any], weight: Weight) -> NDArray[Any]:
    """Numbers per channel, in a shape that spreads over the weight."""
    if weight.params.axis is None:
        return vector
    return vector.reshape([-1 if i == weight.params.axis % weight.value.ndim else 1 for i in range(weight.value.ndim)])


def current(value: NDArray[np.float32], params: QuantParams, codes: NDArray[Any] | None) -> Weight:
    """A weight with the codes chosen for it, or else the nearest ones."""
    return Weight(value, quantize(value, params) if codes is None else codes, params)


def pick_device(wanted: str) -> str:
    """The name of the device to train on: ``auto`` is a GPU where torch has one.

    Raises:
        RecipeError: torch has no such device here.
    """
    torch = require_torch("reconstruction")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=wanted)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device {wanted!r} cannot be used: {str(error).splitlines()[0]}; --device auto takes what there is") from None
    return wanted


def train(
    quantizers: Quantizers,
    loss: Loss,
    fitted: Sequence[int],
    held_back: Sequence[int],
    schedule: Schedule,
    *,
    checkpoint: Path | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, float]:
    """Train in place; returns the loss on the held-back batches before and after.

    Args:
        quantizers: what to train.
        loss: of one batch.
        fitted: numbers of the batches to train on.
        held_back: numbers of the batches to judge by.
        schedule: how.
        checkpoint: a file to go on from where it is there, and to write to now and then.
        advance: told after every step.
    """
    torch = require_torch("reconstruction")
    latents, scales = list(quantizers.latents.values()), list(quantizers.scales.values())
    optimizer = torch.optim.Adam([{"params": latents, "lr": schedule.weight_rate}, {"params": scales, "lr": schedule.scale_rate}])
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.steps)
    parameters = quantizers.parameters

    def judged() -> float:
        with torch.no_grad():
            return float(np.mean([float(loss(batch, quantizers.taps())) for batch in held_back]))

    def copied() -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in parameters.items()}

    state: dict[str, Any] = {"step": 0}
    if checkpoint is not None and checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        falling.load_state_dict(state["falling"])
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(state["now"][name])
    else:
        before = judged()
        state |= {"before": before, "least": before, "best": copied()}
    order = np.random.default_rng(schedule.seed).permuted(np.tile(fitted, (-(-schedule.steps // len(fitted)), 1)), axis=1).reshape(-1)
    every = max(1, schedule.steps // schedule.checks)
    for step in range(state["step"], schedule.steps):
        optimizer.zero_grad()
        loss(int(order[step]), quantizers.taps()).backward()
        optimizer.step()
        falling.step()
        if (step + 1) % every == 0 or step + 1 == schedule.steps:
            if (now := judged()) < state["least"]:
                state |= {"least": now, "best": copied()}
            if checkpoint is not None:
                state |= {"step": step + 1, "now": copied(), "optimizer": optimizer.state_dict(), "falling": falling.state_dict()}
                partial = checkpoint.with_suffix(".partial")
                torch.save(state, partial)
                partial.replace(checkpoint)
        advance(step + 1, schedule.steps)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state["best"][name])
    return float(state["before"]), float(state["least"])
