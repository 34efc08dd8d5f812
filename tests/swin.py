"""Tiny windowed transformers of two stages, as timm and as transformers write Swin, made without torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from tests.builders import Array, Writer


@dataclass(frozen=True)
class SwinSizes:
    """The mathematics, and how it is written.

    Attributes:
        grid: tokens along one side in the first stage, a multiple of twice the window.
        window: tokens along one side of a window.
        width: channels of the first stage; the second has twice as many.
        heads: in both stages.
        shift: the second block of a stage works on shifted windows.
        embed_norm: a LayerNormalization with an affine writes the stream of the first stage (both libraries have it).
        merging: "reshape" (timm) or "slices" (transformers).
        separate: q, k and v are Linears of their own.
    """

    grid: int = 4
    window: int = 2
    width: int = 8
    heads: int = 2
    shift: bool = True
    embed_norm: bool = False
    merging: str = "reshape"
    separate: bool = False
    seed: int = 0


def swin(s: SwinSizes) -> onnx.ModelProto:
    """Input ``image`` [batch, 3, 2 grid, 2 grid], output ``logits`` [batch, 5]."""
    return _SwinWriter(s).write()


class _SwinWriter:
    def __init__(self, sizes: SwinSizes) -> None:
        self.s, self.w, self.random = sizes, Writer(opset=17), np.random.default_rng(sizes.seed)

    def draw(self, *shape: int, around: float = 0.0) -> Array:
        return (around + self.random.standard_normal(shape) / np.sqrt(shape[0] if len(shape) > 1 else 4)).astype(np.float32)

    def linear(self, x: str, inner: int, outer: int, *, bias: bool = True) -> str:
        product = self.w.op("MatMul", x, self.w.weight("weight", self.draw(inner, outer)))
        return str(self.w.op("Add", product, self.w.weight("bias", self.draw(outer)))) if bias else str(product)

    def norm(self, x: str, width: int) -> str:
        gamma, beta = self.w.weight("gamma", self.draw(width, around=1)), self.w.weight("beta", self.draw(width))
        return str(self.w.op("LayerNormalization", x, gamma, beta, axis=-1, epsilon=1e-5))

    def reshape(self, x: str, *target: int) -> str:
        return str(self.w.op("Reshape", x, self.w.vector(-1, *target)))

    def roll(self, x: str, by: int) -> str:
        for axis in (1, 2):
            ends = self.w.vector(np.iinfo(np.int64).max)
            tail = self.w.op("Slice", x, self.w.vector(by), ends, self.w.vector(axis))
            head = self.w.op("Slice", x, self.w.vector(0), self.w.vector(by), self.w.vector(axis))
            x = self.w.op("Concat", tail, head, axis=axis)
        return x

    def attention(self, x: str, grid: int, width: int, shift: int) -> str:
        """On [batch, grid, grid, width]."""
        s, w, n, dim = self.s, self.w, grid // self.s.window, width // self.s.heads
        tokens = s.window**2
        x = self.roll(x, shift) if shift else x
        x = w.op("Transpose", self.reshape(x, n, s.window, n, s.window, width), perm=[0, 1, 3, 2, 4, 5])
        x = self.reshape(x, tokens, width)
        if s.separate:
            parts = [self.reshape(self.linear(x, width, width), tokens, s.heads, dim) for _ in range(3)]
            q, k, v = (w.op("Transpose", part, perm=[0, 2, 1, 3]) for part in parts)
        else:
            five = w.op("Transpose", self.reshape(self.linear(x, width, 3 * width), tokens, 3, s.heads, dim), perm=[2, 0, 3, 1, 4])
            q, k, v = (w.op("Gather", five, w.weight("index", np.int64(i)), axis=0) for i in range(3))
        scores = w.op("MatMul", w.op("Mul", q, w.number(dim**-0.5)), w.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = w.op("Add", scores, w.weight("position", self.draw(s.heads, tokens, tokens)[None]))
        context = w.op("MatMul", w.op("Softmax", scores, axis=-1), v)
        x = self.linear(self.reshape(w.op("Transpose", context, perm=[0, 2, 1, 3]), tokens, width), width, width)
        x = w.op("Transpose", self.reshape(x, n, n, s.window, s.window, width), perm=[0, 1, 3, 2, 4, 5])
        x = self.reshape(x, grid, grid, width)
        return self.roll(x, grid - shift) if shift else str(x)

    def block(self, x: str, grid: int, width: int, shift: int) -> str:
        x = self.w.op("Add", x, self.attention(self.norm(x, width), grid, width, shift))
        hidden = self.w.op("Relu", self.linear(self.reshape(self.norm(x, width), grid * grid, width), width, 2 * width))
        return str(self.w.op("Add", x, self.reshape(self.linear(hidden, 2 * width, width), grid, grid, width)))

    def merge(self, x: str, grid: int, width: int) -> str:
        w, half = self.w, grid // 2
        if self.s.merging == "reshape":
            x = w.op("Transpose", self.reshape(x, half, 2, half, 2, width), perm=[0, 1, 3, 4, 2, 5])
            x = self.reshape(x, half, half, 4 * width)
        else:
            ends = w.vector(grid, grid)
            starts = [(0, 0), (1, 0), (0, 1), (1, 1)]
            parts = [w.op("Slice", x, w.vector(*start), ends, w.vector(1, 2), w.vector(2, 2)) for start in starts]
            x = w.op("Concat", *parts, axis=-1)
        return self.linear(self.norm(x, 4 * width), 4 * width, 2 * width, bias=False)

    def write(self) -> onnx.ModelProto:
        s, w = self.s, self.w
        kernel, bias = w.weight("patch_weight", self.draw(s.width, 3, 2, 2)), w.weight("patch_bias", self.draw(s.width))
        x = w.op("Transpose", w.op("Conv", "image", kernel, bias, strides=[2, 2], kernel_shape=[2, 2]), perm=[0, 2, 3, 1])
        x = self.norm(x, s.width) if s.embed_norm else x
        grid, width = s.grid, s.width
        for stage in range(2):
            if stage:
                x, grid, width = self.merge(x, grid, width), grid // 2, 2 * width
            for shift in (0, s.window // 2) if s.shift and grid > s.window else (0,):
                x = self.block(x, grid, width, shift)
        pooled = w.op("ReduceMean", self.norm(x, width), axes=[1, 2], keepdims=0)
        logits = w.op("Gemm", pooled, w.weight("head_weight", self.draw(width, 5)), w.weight("head_bias", self.draw(5)))
        w.nodes.append(onnx.helper.make_node("Identity", [logits], ["logits"], "name_logits"))
        return w.model({"image": ["batch", 3, 2 * s.grid, 2 * s.grid]}, {"logits": ["batch", 5]})
