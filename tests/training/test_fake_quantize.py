"""Quantizers with a gradient of their own give what the chain of operations gives that they stand for."""

import numpy as np
import pytest

from vitq_compiler.pairs import Pairs

torch = pytest.importorskip("torch")
from vitq_compiler.training.fake_quantize import dequantize, fake_quantize, held, nearest  # noqa: E402  # needs torch

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


@pytest.mark.parametrize(("shape", "walk"), [((7, 5), (0,)), ((4, 3, 2, 2), (2, 3, 1))])
def test_held_codes_keep_to_the_limit_and_pass_the_gradient(shape: tuple[int, ...], walk: tuple[int, ...]) -> None:
    pairs, codes = Pairs(128, walk), (torch.randn(shape, dtype=torch.float64) * 90).round().requires_grad_()
    within = held(codes, -127, 127, pairs)
    found = within.detach().numpy().astype(np.int8)
    assert pairs.violations(codes.detach().clamp(-127, 127).numpy().astype(np.int8)) > 0
    assert pairs.violations(found) == 0
    assert np.abs(found).max() <= 127
    within.sum().backward()
    assert torch.equal(codes.grad, (codes.detach().abs() <= 127).double())


def test_held_takes_from_both_alike() -> None:
    codes = torch.tensor([[100.0], [90.0], [127.0], [-127.0], [-100.0], [-33.0]])
    assert held(codes, -127, 127, Pairs(128))[:, 0].tolist() == [69, 59, 127, -127, -97, -31]
