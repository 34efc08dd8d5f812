"""Rounding with the gradient of the identity, and quantizers around it, each one step of the graph of gradients.

    nearest        round(x)                              gradient: that of y
    fake_quantize  y = s (c - z),  c = clip(round(x / s) + z)    x: g inside, s: (y - x inside) g / s, z: -s g outside
    dequantize     y = s (clip(c) - z)                           c: s g inside, s: y g / s

with g the gradient of y, and inside where clip changes nothing (learned step sizes, arXiv 1902.08153). Written as a chain of
operations the same takes six times as long: memory, not arithmetic, is what training waits for beside the products.
"""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

from vitq_compiler.pairs import Pairs
from vitq_compiler.torch_graph import Tensor, require_torch


def nearest(x: Tensor) -> Tensor:
    """Rounded, with the gradient of the identity."""
    return _functions().nearest(x)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, first: int, last: int) -> Tensor:
    """``x`` at the nearest of its codes; ``scale`` and ``zero_point`` are of one number, the latter whole."""
    return _functions().fake_quantize(x, scale, zero_point, first, last)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, first: int, last: int) -> Tensor:
    """What codes are worth; ``scale`` and ``zero_point`` broadcast to their shape, the latter is not trained."""
    return _functions().dequantize(codes, scale, zero_point, first, last)


def held(codes: Tensor, first: int, last: int, pairs: Pairs) -> Tensor:
    """``codes`` of a weight clipped, and pairs of them beyond the limit moved onto it, both by the same; the gradient of the identity.

    Codes that are no whole numbers (`rounding_styles.Adaround` on its way) stay such.
    """
    torch = require_torch("training")
    with torch.no_grad():
        order = [*pairs.walk, *(axis for axis in range(codes.ndim) if axis not in pairs.walk)]
        moved = codes.clamp(first, last).permute(order)
        rows = moved.reshape(-1, codes.numel() // math.prod(moved.shape[: len(pairs.walk)]))
        even = torch.nn.functional.pad(rows, (0, 0, 0, len(rows) % 2)).reshape(-1, 2, rows.shape[1])
        total = even.sum(1)
        excess = (total.abs() - pairs.limit).clamp(min=0).ceil()
        parts = torch.stack([(excess / 2).ceil(), (excess / 2).floor()], 1) * total.sign()[:, None]
        wanted = (even - parts).reshape(-1, rows.shape[1])[: len(rows)].reshape(moved.shape)
        change = wanted.permute([order.index(axis) for axis in range(codes.ndim)]) - codes.clamp(first, last)
    return codes.clamp(first, last) + change if bool(change.any()) else codes


@cache
def _functions() -> SimpleNamespace:
    torch = require_torch("training")

    class Nearest(torch.autograd.Function):  # type: ignore[misc, name-defined]
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    class FakeQuantize(torch.autograd.Function):  # type: ignore[misc, name-defined]
        @staticmethod
        def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, first: int, last: int) -> Tensor:
            codes = torch.div(x, scale).round_().add_(zero_point)
            y = codes.clamp(first, last)
            inside = codes.eq_(y)
            y.sub_(zero_point).mul_(scale)
            ctx.save_for_backward(x, y, inside, scale)
            return y

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            x, y, inside, scale = ctx.saved_tensors
            of_x = g * inside
            _, scales, zero_points, *_ = ctx.needs_input_grad
            of_scale = ((_dot(g, y) - _dot(of_x, x)) / scale).reshape(scale.shape) if scales else None
            of_zero_point = (scale * (of_x.sum() - g.sum())).reshape(scale.shape) if zero_points else None
            return of_x, of_scale, of_zero_point, None, None

    class Dequantize(torch.autograd.Function):  # type: ignore[misc, name-defined]
        @staticmethod
        def forward(ctx: Any, codes: Tensor, scale: Tensor, zero_point: Tensor, first: int, last: int) -> Tensor:
            y = codes.clamp(first, last)
            inside = codes.eq(y)
            y.sub_(zero_point).mul_(scale)
            ctx.save_for_backward(y, inside, scale)
            return y

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            y, inside, scale = ctx.saved_tensors
            of_codes, scales, *_ = ctx.needs_input_grad
            of_scale = (g * y).sum_to_size(scale.shape).div_(scale) if scales else None
            return g.mul(scale).mul_(inside) if of_codes else None, of_scale, None, None, None

    def _dot(a: Tensor, b: Tensor) -> Tensor:
        return torch.dot(a.reshape(-1), b.reshape(-1))

    return SimpleNamespace(nearest=Nearest.apply, fake_quantize=FakeQuantize.apply, dequantize=Dequantize.apply)
