"""What is trained of a quantized network: codes of weights, scales, zero points and biases.

    weight       s (clip(code) - z)                              code by a `RoundingStyle`; log s
    activation   s (clip(round(x / s) + round(z)) - round(z))     log s, and z where the quantizer is not symmetric
    bias         c + u b                                          b, in units u of what a code of the weight is worth

Rounding is the identity in the gradient (learned step sizes, arXiv 1902.08153; with trained ends of the range that is also the
learned clipping of RepQuant, arXiv 2402.05628). A quantizer with a curve is computed by the operators it becomes in the deployed
graph, its numbers as they are. Training starts at the quantized network as it is: a weight begins at its real value, moved no
further than it must be to lie within a margin of the code it has now. Close to the next code, many would change at the first noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.quant import Edge, QuantParams, quantize
from vitq_compiler.torch_graph import Taps, Tensor, require_torch
from vitq_compiler.training.fake_quantize import dequantize, fake_quantize, held, nearest
from vitq_compiler.training.rounding_styles import STYLES, RoundingStyle

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Noise:
    """What differs between training and deployment.

    Attributes:
        drop: the part of activations that stay as they are (QDrop, arXiv 2203.05740).
        seed: of the choice.
    """

    drop: float = 0.0
    seed: int = 0


class Activation:
    """One affine quantizer of an activation.

    Args:
        params: where to start.
        free: whether the zero point is trained too.
        device: of torch.
    """

    def __init__(self, params: QuantParams, free: bool, device: str) -> None:
        self._params = params
        self._codes = params.quant_max - params.quant_min
        self.scale = _trained(np.log(params.scale), device)
        self.shift = _trained(np.zeros(()), device) if free else None  # of the zero point, in parts of all codes

    def __call__(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale.exp(), self._zero_point(), self._params.quant_min, self._params.quant_max)

    def _zero_point(self) -> Tensor:
        start = self.scale.new_tensor(float(self._params.zero_point))
        if self.shift is None:
            return start
        return nearest(start + self._codes * self.shift).clamp(self._params.quant_min, self._params.quant_max)

    def params(self) -> QuantParams:
        """The quantizer as it is now."""
        zero_point = self._params.zero_point if self.shift is None else _array(self._zero_point()).astype(np.int32)
        return replace(self._params, scale=_array(self.scale.exp()), zero_point=zero_point)


class Weight:
    """One quantized weight.

    Args:
        value: the real weight.
        params: what its codes mean.
        codes: those it has; None for the nearest.
        margin: how far from its code a weight may start, in steps; below a half.
        style: how they are trained, of `STYLES`.
        device: of torch.
    """

    def __init__(
        self, value: NDArray[np.float32], params: QuantParams, codes: NDArray[Any] | None, margin: float, style: str, device: str
    ) -> None:
        self._params = params
        shape = [] if params.axis is None else [-1 if axis == params.axis % value.ndim else 1 for axis in range(value.ndim)]
        scale, zero_point = params.scale.reshape(shape), params.zero_point.reshape(shape)
        start = (quantize(value, params) if codes is None else codes).astype(np.float32)
        latent = np.clip(value / scale + zero_point, start - margin, start + margin)
        self.style: RoundingStyle = STYLES[style](_tensor(latent, device))
        self.scale = _trained(np.log(scale), device)
        self._zero_point = _tensor(zero_point, device)

    def _held(self, codes: Tensor) -> Tensor:
        """Codes within the pair limit, if there is one: what is too much is taken from both, and their gradients stay."""
        pairs = self._params.pairs
        return codes if pairs is None else held(codes, self._params.quant_min, self._params.quant_max, pairs)

    def soft(self, _: Tensor) -> Tensor:
        """The weight to train with, in place of any tensor."""
        return self._value(self._held(self.style.soft()))

    def hard(self, _: Tensor) -> Tensor:
        """The weight that is deployed, in place of any tensor."""
        return self._value(self._held(self.style.hard()))

    def _value(self, codes: Tensor) -> Tensor:
        return dequantize(codes, self.scale.exp(), self._zero_point, self._params.quant_min, self._params.quant_max)

    def codes(self) -> NDArray[Any]:
        """The codes as they are now."""
        codes = np.clip(_array(self._held(self.style.hard())), self._params.quant_min, self._params.quant_max)
        return np.asarray(codes.astype(self._params.dtype))

    def params(self) -> QuantParams:
        """What they mean."""
        return replace(self._params, scale=_array(self.scale.exp()).reshape(self._params.scale.shape))


class Bias:
    """One bias [channels], and the unit [channels] in which it is trained."""

    def __init__(self, value: NDArray[np.float32], unit: NDArray[np.float32], device: str) -> None:
        self._value, self._unit = _tensor(value, device), _tensor(unit, device)
        self.steps = _trained(np.zeros_like(value), device)

    def __call__(self, _: Tensor) -> Tensor:
        """The bias, in place of any tensor."""
        return self._value + self.steps * self._unit

    def value(self) -> NDArray[np.float32]:
        """The bias as it is now."""
        return _array(self(self._value))


class Learned:
    """All that is trained of a part of a graph.

    Attributes:
        activations: edge -> quantizer; edges that read one tensor alike share one.
        curves: edge -> the function of a quantizer that is not trained.
        weights: edge -> weight.
        biases: edge -> bias.
        device: of torch.
    """

    def __init__(
        self,
        activations: Mapping[Edge, Activation],
        curves: Mapping[Edge, Function],
        weights: Mapping[Edge, Weight],
        biases: Mapping[Edge, Bias],
        device: str = "cpu",
    ) -> None:
        self.activations, self.curves, self.weights, self.biases, self.device = activations, curves, weights, biases, device

    def taps(self, noise: Noise | None = None) -> Taps:
        """The functions to compute with (see `TorchGraph`): those of training where there is ``noise``, else those of deployment."""
        torch = require_torch("training")
        generator = torch.Generator(self.device).manual_seed(noise.seed) if noise else None

        def dropped(quantize: Function, x: Tensor) -> Tensor:
            if noise is None or noise.drop == 0:
                return quantize(x)
            return torch.where(torch.rand(x.shape, generator=generator, device=x.device) < noise.drop, x, quantize(x))

        activations: dict[Edge, Function] = {**self.activations, **self.curves}
        return {
            **{edge: partial(dropped, function) for edge, function in activations.items()},
            **{edge: weight.soft if noise else weight.hard for edge, weight in self.weights.items()},
            **self.biases,
        }

    def penalty(self, sharpness: float) -> Tensor | None:
        """Mean penalty of all weights; None where their style has none."""
        found = [p for weight in self.weights.values() if (p := weight.style.penalty(sharpness)) is not None]
        return sum(found) / len(found) if found else None

    @property
    def codes(self) -> dict[str, Tensor]:
        """What decides the codes of weights, by name."""
        return {f"code {edge}": weight.style.trained for edge, weight in self.weights.items()}

    @property
    def scales(self) -> dict[str, Tensor]:
        """Logarithms of scales, and zero points, by name."""
        found = {f"scale {edge}": weight.scale for edge, weight in self.weights.items()}
        for number, activation in enumerate(dict.fromkeys(self.activations.values())):
            found[f"activation {number}"] = activation.scale
            if activation.shift is not None:
                found[f"shift {number}"] = activation.shift
        return found

    @property
    def steps(self) -> dict[str, Tensor]:
        """Biases, by name."""
        return {f"bias {edge}": bias.steps for edge, bias in self.biases.items()}

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Everything that is trained, by name."""
        return {**self.codes, **self.scales, **self.steps}

    def fingerprint(self, *more: object) -> str:
        """A name for the state now and whatever else decides the training."""
        digest = hashlib.sha256(repr(more).encode())
        for name, parameter in self.parameters.items():
            digest.update(name.encode() + _array(parameter).tobytes())
        return digest.hexdigest()[:24]


def _trained(array: Any, device: str) -> Tensor:
    return _tensor(array, device).requires_grad_()


def _tensor(array: Any, device: str) -> Tensor:
    return require_torch("training").tensor(np.asarray(array, np.float32), device=device)


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return np.asarray(tensor.detach().cpu().numpy(), np.float32)
