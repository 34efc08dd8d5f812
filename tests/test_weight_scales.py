"""Scales of weights: an outlier on a quiet input is clipped, one on a loud input is not."""

import numpy as np
import pytest

from vitq_compiler.quant import QuantSpec, fake_quantize, from_range
from vitq_compiler.weight_scales import fit_scales


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_never_worse_than_the_whole_range(granularity: str, symmetric: bool) -> None:
    random = np.random.default_rng(0)
    weight, energy = random.normal(size=(64, 5)) ** 3, random.uniform(0, 2, 64)
    spec = QuantSpec(4, signed=True, symmetric=symmetric, granularity=granularity)  # type: ignore[arg-type]
    axes, axis = (0, 1) if granularity == "per_channel" else (None, None)
    whole = from_range(weight.min(axes), weight.max(axes), spec, axis)
    fitted = fit_scales(weight, spec, energy)
    losses = [(energy[:, None] * np.square(weight - fake_quantize(weight, params))).sum() for params in (whole, fitted)]
    assert losses[1] < losses[0]
    assert fitted.scale.shape == whole.scale.shape
    assert fitted.axis == axis


@pytest.mark.parametrize(("loud", "shrinks"), [(100.0, False), (1e-6, True)])
def test_the_energy_of_inputs_decides(loud: float, shrinks: bool) -> None:
    weight = np.linspace(-1, 1, 33)[:, None].copy()
    weight[-1] = 2
    energy = np.ones(33)
    energy[-1] = loud
    scale = fit_scales(weight, QuantSpec(4, signed=True, symmetric=True, granularity="per_channel"), energy).scale[0]
    assert (scale < 2 / 7 * 0.9) == shrinks
