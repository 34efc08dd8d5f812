"""What is trained: it starts at the quantized network, its gradients are those of learned step sizes, and it comes back as codes."""

import numpy as np
import pytest
from numpy.typing import NDArray

from vitq_compiler.quant import Edge, QuantParams, fake_quantize, quantize

torch = pytest.importorskip("torch")
from vitq_compiler.training.learned import Activation, Bias, Learned, Noise, Weight  # noqa: E402  # needs torch
from vitq_compiler.training.rounding_styles import SHARPNESS, STYLES, WARM_UP, Adaround, sharpness  # noqa: E402

pytestmark = pytest.mark.torch
RANDOM = np.random.default_rng(0)
EDGE = Edge("node", 0)


def affine(scale: float = 0.3, zero_point: int = 3) -> QuantParams:
    return QuantParams(np.float32(scale).reshape(()), np.int32(zero_point).reshape(()), None, 0, 15)


def per_channel(axis: int, channels: int) -> QuantParams:
    return QuantParams(np.linspace(0.1, 0.3, channels, dtype=np.float32), np.zeros(channels, np.int32), axis, -7, 7)


@pytest.mark.parametrize("free", [False, True])
def test_an_activation_starts_as_the_quantizer_that_it_is(free: bool) -> None:
    x = RANDOM.normal(0, 2, (5, 7)).astype(np.float32)
    activation = Activation(affine(), free, "cpu")
    np.testing.assert_allclose(activation(torch.from_numpy(x)).detach().numpy(), fake_quantize(x, affine()), atol=1e-6)
    assert activation.params().scale == pytest.approx(0.3)
    assert int(activation.params().zero_point) == 3


def test_gradients_of_scale_and_zero_point() -> None:
    """Inside: code - x / s for the scale, nothing for the zero point; outside: the last code's, and minus a step."""
    activation = Activation(affine(scale=1.0), True, "cpu")
    x = torch.tensor([0.3], requires_grad=True)
    activation(x).sum().backward()
    assert [float(t.grad) for t in (x, activation.scale, activation.shift)] == pytest.approx([1, -0.3, 0])
    activation.scale.grad, activation.shift.grad, x.grad = None, None, None
    (activation(x + 100)).sum().backward()
    assert [float(t.grad) for t in (x, activation.scale, activation.shift)] == pytest.approx([0, 15 - 3, -15])


def test_a_zero_point_moves_and_stays_within_the_codes() -> None:
    activation = Activation(affine(), True, "cpu")
    with torch.no_grad():
        activation.shift += 2.4 / 15
    assert int(activation.params().zero_point) == 5
    with torch.no_grad():
        activation.shift += 1
    assert int(activation.params().zero_point) == 15


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("shape", "axis"), [((6, 4), 1), ((4, 3, 2, 2), 0)])
def test_a_weight_starts_at_its_codes(style: str, shape: tuple[int, ...], axis: int) -> None:
    value = RANDOM.normal(0, 1, shape).astype(np.float32)
    params = per_channel(axis, 4)
    codes = np.clip(quantize(value, params) + RANDOM.integers(-1, 2, shape), -7, 7).astype(np.int8)
    weight = Weight(value, params, codes, 0.3, style, "cpu")
    np.testing.assert_array_equal(weight.codes(), codes)
    np.testing.assert_allclose(weight.params().scale, params.scale, rtol=1e-6)
    spread = params.scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    np.testing.assert_allclose(weight.hard(torch.zeros(())).detach().numpy(), codes * spread, rtol=1e-5)


def adaround(latent: NDArray[np.floating]) -> Adaround:
    return Adaround(torch.tensor(latent))


def test_adaround_starts_at_the_real_weight_and_chooses_among_two_codes() -> None:
    latent = RANDOM.uniform(-5, 5, 100)
    style = adaround(latent)
    np.testing.assert_allclose(style.soft().detach().numpy(), latent, atol=1e-3)
    with torch.no_grad():
        style.trained += torch.from_numpy(RANDOM.normal(0, 20, 100))
    assert set(np.unique(style.hard().numpy() - np.floor(latent))) == {0, 1}


def test_the_penalty_of_adaround_is_none_at_codes_and_one_half_way() -> None:
    assert adaround(np.array([0.5, 2.5])).penalty(2.0).item() == pytest.approx(1)
    at_codes = adaround(np.array([0.5, 0.5]))
    with torch.no_grad():
        at_codes.trained += torch.tensor([20.0, -20.0])
    assert at_codes.penalty(2.0).item() == pytest.approx(0)
    style = adaround(RANDOM.uniform(0.1, 0.9, 6))
    style.penalty(4.0).backward()
    step = 1e-6 * torch.eye(6, dtype=torch.float64)
    for i in range(6):
        moved = [adaround(np.zeros(6)) for _ in range(2)]
        for other, sign in zip(moved, (1, -1), strict=True):
            other.trained = style.trained.detach() + sign * step[i]
        slope = (moved[0].penalty(4.0).item() - moved[1].penalty(4.0).item()) / 2e-6
        assert float(style.trained.grad[i]) == pytest.approx(slope, rel=1e-5)


def test_the_penalty_sharpens() -> None:
    assert sharpness(WARM_UP / 2) is None
    found = [sharpness(done) for done in (WARM_UP, 0.6, 1.0)]
    assert found == pytest.approx([SHARPNESS[0], 11, SHARPNESS[1]])


def test_dropped_values_stay_as_they_are_in_training_only() -> None:
    x = torch.from_numpy(RANDOM.normal(0, 1, 4000).astype(np.float32))
    learned = Learned({EDGE: Activation(affine(), False, "cpu")}, {}, {}, {})
    quantized = learned.taps()[EDGE](x)
    noisy = learned.taps(Noise(0.5, seed=1))[EDGE](x)
    kept = noisy == x
    assert 0.45 < float(kept.float().mean()) < 0.55
    torch.testing.assert_close(noisy[~kept], quantized[~kept])
    torch.testing.assert_close(learned.taps(Noise(0.5, seed=1))[EDGE](x), noisy)
    torch.testing.assert_close(learned.taps(Noise())[EDGE](x), quantized)


def test_what_reads_one_tensor_is_trained_once() -> None:
    activation = Activation(affine(), True, "cpu")
    bias = Bias(np.ones(2, np.float32), np.array([0.5, 2], np.float32), "cpu")
    learned = Learned({EDGE: activation, Edge("other", 0): activation}, {}, {}, {EDGE: bias})
    assert len(learned.parameters) == 3
    with torch.no_grad():
        bias.steps += 1
    np.testing.assert_allclose(bias.value(), [1.5, 3])
