"""Quantizers with a gradient of their own give what the chain of operations gives that they stand for."""

import pytest

torch = pytest.importorskip("torch")
from vitq_compiler.training.fake_quantize import dequantize, fake_quantize, nearest  # noqa: E402  # needs torch

pytestmark = pytest.mark.torch


def straight_through(x):  # type: ignore[no-untyped-def]
    return x + (x.round() - x).detach()


def compared(function, chain, *inputs):  # type: ignore[no-untyped-def]
    """Values and gradients of both, for the same gradient of the result."""
    found = []
    for f in (function, chain):
        leaves = [i.clone().requires_grad_() for i in inputs]
        y = f(*leaves)
        y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape))
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_nearest() -> None:
    compared(nearest, straight_through, torch.randn(50, dtype=torch.float64) * 3)


@pytest.mark.parametrize("zero_point", [0.0, 3.0, 15.0])
def test_fake_quantize(zero_point: float) -> None:
    compared(
        lambda x, s, z: fake_quantize(x, s, z, 0, 15),
        lambda x, s, z: ((straight_through(x / s) + z).clamp(0, 15) - z) * s,
        torch.randn(4, 5, 7, dtype=torch.float64) * 4,
        torch.tensor(0.3, dtype=torch.float64),
        torch.tensor(zero_point, dtype=torch.float64),
    )


@pytest.mark.parametrize("shape", [(1, 6), (5, 1), ()])
def test_dequantize(shape: tuple[int, ...]) -> None:
    zero_point = torch.ones(shape, dtype=torch.float64)
    compared(
        lambda c, s: dequantize(c, s, zero_point, -3, 4),
        lambda c, s: (c.clamp(-3, 4) - zero_point) * s,
        torch.randint(-6, 7, (5, 6)).double() + 0.25,
        torch.rand(shape, dtype=torch.float64) + 0.1,
    )
