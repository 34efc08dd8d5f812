"""For every rule that a graph can break: a graph that breaks it and one that does not, and what NVIDIA's compiler says of the first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx

from tests.builders import model_of
from vitq_compiler.lint.rule import Platform

HALF = np.float16
RANDOM = np.random.default_rng(0)
CODES = RANDOM.integers(-127, 128, (64, 64))
# Everything that the texts below name. n: scales of a channel; capital letters: weights.
WEIGHTS: dict[str, Any] = {
    "s": HALF(0.1),
    "s2": HALF(0.2),
    "t": HALF(1 / 127),
    "z": np.int8(0),
    "u": np.uint8(0),
    "sn": np.full(64, 0.01, HALF),
    "zn": np.zeros(64, np.int8),
    "W": CODES.astype(np.int8),
    "V": CODES.T.astype(np.int8),
    "F": (CODES / 100).astype(HALF),
    "g": np.ones(64, HALF),
    "b": np.zeros(64, HALF),
    "two": HALF(2),
    "root": HALF(2**0.5),
    "half": HALF(0.5),
    "one": HALF(1),
    "eighth": HALF(0.125),
}
# An int8 weight, an int8 activation, and their product.
WEIGHT = "dw = DequantizeLinear <axis = 1> (W, sn, zn)"
ACTIVATION = "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z)"
LINEAR = f"{ACTIVATION} {WEIGHT} y = MatMul (d, dw)"
ROWS = "g (float16[4, 64] x) => (float16 y)"


def qdq(name: str, source: str, zero: str = "z", scale: str = "s") -> str:
    """A quantizer and a dequantizer."""
    return f"q{name} = QuantizeLinear ({source}, {scale}, {zero}) {name} = DequantizeLinear (q{name}, {scale}, {zero})"


def linear(source: str, output: str, weight: str = "W") -> str:
    """A quantized product with a weight of its own."""
    return (
        f"{qdq(f'{output}d', source)} {output}w = DequantizeLinear <axis = 1> ({weight}, sn, zn) {output} = MatMul ({output}d, {output}w)"
    )


def attention(
    quantized: str = "", between: str = "m = Identity (a)", after: str = "p = Identity (e)", code: str = "z", tail: str = ""
) -> str:
    """softmax(q k) v on inputs q, k (transposed) and v; ``quantized`` names those of q, k, v, p that go through quantizers."""
    body = [qdq(f"d{name}", name, code) if name in quantized else f"d{name} = Identity ({name})" for name in "qkv"]
    body += ["a = MatMul (dq, dk)", between, "e = Softmax <axis = -1> (m)", after]
    body.append(qdq("dp", "p", code, "t" if code == "z" else "t8") if "p" in quantized else "dp = Identity (p)")
    return " ".join([*body, "y = MatMul (dp, dv)" if not tail else f"c = MatMul (dp, dv) {tail}"])


def heads(size: int = 32, tokens: int = 16) -> str:
    """The header of a graph that is attention."""
    return f"g (float16[1, 2, {tokens}, {size}] q, float16[1, 2, {size}, {tokens}] k, float16[1, 2, {tokens}, {size}] v) => (float16 y)"


@dataclass(frozen=True)
class Case:
    """One rule.

    Attributes:
        bad, good: graphs in ONNX text.
        verdict: what TensorRT-RTX does with the bad one: it refuses to parse or to build it, or takes it.
        bad_opset, opset: of the two.
        imports: opset imports of other domains.
        weights: constants of this case.
        platform: what it is checked for.
    """

    bad: str
    good: str
    verdict: Literal["parse", "build", "ok"] = "ok"
    bad_opset: int = 21
    opset: int = 21
    imports: dict[str, int] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    platform: Platform = Platform("10", 8.9)  # noqa: RUF009  # frozen

    def model(self, text: str, opset: int) -> onnx.ModelProto:
        """One of the two."""
        return model_of(text, opset=opset, imports=self.imports, **(WEIGHTS | self.weights))

    @property
    def broken(self) -> onnx.ModelProto:
        """The graph that breaks the rule."""
        return self.model(self.bad, self.bad_opset)

    @property
    def kept(self) -> onnx.ModelProto:
        """The graph that does not."""
        return self.model(self.good, self.opset)


GOOD = f"{ROWS} {{ {LINEAR} }}"
F8 = {"f": np.zeros((), ml_dtypes.float8_e4m3fn), "t8": HALF(1 / 448)}
OLD = Platform("8.6")
FP8_ROWS = f"{ROWS} {{ {qdq('d', 'x', 'f')} y = MatMul (d, F) }}"

CASES: dict[str, Case] = {
    "T01": Case(f"{ROWS} {{ {qdq('d', 'x', 'z3')} y = MatMul (d, F) }}", GOOD, "parse", weights={"z3": np.int8(3)}),
    "T02": Case(f"{ROWS} {{ {qdq('d', 'x', 'z', 'minus')} y = MatMul (d, F) }}", GOOD, "parse", weights={"minus": HALF(-0.1)}),
    "T03": Case(f"g (float16[4, 64] x, float16[1] r) => (float16 y) {{ {qdq('d', 'x', 'z', 'r')} y = MatMul (d, F) }}", GOOD),
    "T04": Case("g (uint8[4, 64] x) => (float16 y) { d = DequantizeLinear (x, s, u) y = MatMul (d, F) }", GOOD, "parse"),
    "T05": Case(f"{ROWS} {{ {qdq('d', 'x', 'u')} y = MatMul (d, F) }}", GOOD),
    "T06": Case(f"{ROWS} {{ q = QuantizeLinear (x, s) d = DequantizeLinear (q, s) y = MatMul (d, F) }}", GOOD),
    "T07": Case(f"{ROWS} {{ {qdq('d', 'x', 'z16')} y = MatMul (d, F) }}", GOOD, "parse", weights={"z16": np.int16(0)}),
    "T08": Case(FP8_ROWS, GOOD, "build", weights=F8, platform=Platform("10", 8.0)),
    "T09": Case(FP8_ROWS, FP8_ROWS, bad_opset=17, weights=F8),
    "T10": Case(
        f"{ROWS} {{ dw = DequantizeLinear <axis = 0, block_size = 32> (I, n3) y = MatMul (x, dw) }}",
        f"{ROWS} {{ dw = DequantizeLinear <axis = 0, block_size = 32> (I, n2) y = MatMul (x, dw) }}",
        "parse",
        weights={"I": (CODES // 16).astype(ml_dtypes.int4), "n2": np.full((2, 64), 0.01, HALF), "n3": np.full((3, 64), 0.01, HALF)},
    ),
    "T11": Case(
        f"{ROWS} {{ {qdq('d', 'x', 'z4')} y = MatMul (d, F) }}",
        GOOD,
        "build",
        bad_opset=23,
        weights={"z4": np.zeros((), ml_dtypes.float4_e2m1fn)},
    ),
    "T12": Case(
        f"{ROWS} {{ dw = DequantizeLinear <axis = 0, block_size = 32> (W, e) y = MatMul (x, dw) }}",
        GOOD,
        "parse",
        bad_opset=24,
        weights={"e": np.ones((2, 64), ml_dtypes.float8_e8m0fnu)},
    ),
    "T13": Case(
        f"{ROWS} {{ {ACTIVATION} dw = DequantizeLinear <axis = 1> (W, n5, z5) y = MatMul (d, dw) }}",
        GOOD,
        "parse",
        weights={"n5": np.full(5, 0.1, HALF), "z5": np.zeros(5, np.int8)},
    ),
    "T14": Case(f"{ROWS} {{ {ACTIVATION} dw = DequantizeLinear (W, sn, zn) y = MatMul (d, dw) }}", GOOD),
    "T15": Case(f"{ROWS} {{ {ACTIVATION} dw = DequantizeLinear <axis = 0> (W, sn, zn) y = MatMul (d, dw) }}", GOOD),
    "T16": Case(
        f"{ROWS} {{ q = QuantizeLinear <axis = 1> (x, sn, zn) d = DequantizeLinear <axis = 1> (q, sn, zn) {WEIGHT} y = MatMul (d, dw) }}",
        GOOD,
    ),
    "T17": Case(
        f"{ROWS} {{ {ACTIVATION} {WEIGHT} m = MatMul (d, dw) db = DequantizeLinear <axis = 0> (c, sn, cz) y = Add (m, db) }}",
        f"{ROWS} {{ {ACTIVATION} {WEIGHT} m = MatMul (d, dw) y = Add (m, b) }}",
        "parse",
        weights={"c": np.arange(64, dtype=np.int32), "cz": np.zeros(64, np.int32)},
    ),
    "T18": Case(f"{ROWS} {{ w = Cast <to = 10> (W) y = MatMul (x, w) }}", GOOD, "build"),
    "T19": Case(
        "g (float[4, 64] x) => (float y) { dw = DequantizeLinear <axis = 1> (W, fn, zn) y = MatMul (x, dw) }",
        "g (float[4, 64] x) => (float y) { q = QuantizeLinear <axis = 1> (w, fn, zn) dw = DequantizeLinear <axis = 1> (q, fn, zn) "
        "y = MatMul (x, dw) }",
        bad_opset=17,
        opset=17,
        weights={"fn": np.full(64, 0.01, np.float32), "w": (CODES / 100).astype(np.float32)},
        platform=OLD,
    ),
    "T20": Case(
        f"{ROWS} {{ {qdq('d', 'x', 'z', 'long')} c = Cast <to = 10> (d) y = MatMul (c, F) }}", GOOD, weights={"long": np.float32(0.1)}
    ),
    "T21": Case("g (int8[4, 64] x) => (int32 y) { y = MatMulInteger (x, W) }", GOOD, "parse"),
    "T22": Case(
        f"{ROWS} {{ y = my.Op (x) }}",
        f"{ROWS} {{ {qdq('y', 'x').replace('= ', '= com.microsoft.')} }}",
        "parse",
        imports={"my": 1, "com.microsoft": 1},
    ),
    "T23": Case(
        f'{ROWS} {{ y = my.f (x) }} <domain: "my", opset_import: ["" : 17]> f (a) => (r) {{ r = Relu (a) }}',
        f"{ROWS} {{ y = Relu (x) }}",
        bad_opset=17,
        opset=17,
        imports={"my": 1},
        platform=OLD,
    ),
    "T24": Case("g (int32[4] x) => (int32 y) { y = BitwiseNot (x) }", GOOD, "parse"),
    "T25": Case(
        f"{ROWS.replace('y)', 'y, float m)')} {{ y, m = LayerNormalization (x, g, b) }}",
        f"{ROWS} {{ y = LayerNormalization (x, g, b) }}",
        "parse",
    ),
    "T26": Case("g (float16 x) => (float16 y) { q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) y = Mul (d, F) }", GOOD),
    "T28": Case(
        f"{ROWS} {{ {ACTIVATION} dw = DequantizeLinear <axis = 1> (N, sn, zn) y = MatMul (d, dw) }}",
        GOOD,
        weights={"N": np.where(CODES == -127, -128, CODES).astype(np.int8)},
    ),
    "S01": Case(f"{ROWS} {{ {ACTIVATION} y = MatMul (d, F) }}", GOOD),
    "S02": Case("g (float[4, 64] x) => (float y) { y = Relu (x) }", f"{ROWS} {{ y = Relu (x) }}"),
    "S03": Case(
        f"{ROWS} {{ q = QuantizeLinear (x, s, z) l = DequantizeLinear (q, long, z) d = Cast <to = 10> (l) {WEIGHT} y = MatMul (d, dw) }}",
        GOOD,
        weights={"long": np.float32(0.1)},
    ),
    "S04": Case(
        f"{heads()} {{ {attention(between='m = Clip (a, half, two)')} }}", f"{heads()} {{ {attention(between='m = Mul (a, eighth)')} }}"
    ),
    "S05": Case(f"{heads()} {{ {attention('qkv')} }}", f"{heads()} {{ {attention('qkvp')} }}"),
    "S06": Case(f"{heads(80)} {{ {attention('qkvp')} }}", f"{heads(64)} {{ {attention('qkvp')} }}"),
    "S07": Case(
        f"{heads()} {{ {attention('qkvp', code='f')} }}",  # its output, an output of the graph, is not quantized
        f"{heads()} {{ {attention('qkvp', code='f', tail=qdq('y', 'c', 'f'))} }}",
        weights=F8,
    ),
    "S08": Case(f"{heads()} {{ {attention('qkvp')} }}", f"{heads()} {{ {attention()} }}"),
    "S09": Case(f"{heads()} {{ {attention(after='p = Round (e)')} }}", f"{heads()} {{ {attention()} }}"),
    "S10": Case(
        f"{heads().replace('32, 16', '16, 32')} {{ {qdq('dq', 'q')} {qdq('dk', 'k')} {qdq('dv', 'v')} y = Attention (dq, dk, dv) }}",
        f"{heads().replace('32, 16', '16, 32')} {{ y = Attention (q, k, v) }}",
        bad_opset=23,
        opset=23,
    ),
    "S11": Case(
        f"{heads()} {{ {attention('qkvp').replace('MatMul (dq', 'MatMul (sq').replace('a =', 'sq = Mul (dq, eighth) a =')} }}",
        f"{heads()} {{ {attention('qkvp')} }}",
    ),
    "S12": Case(
        f"{ROWS} {{ {qdq('n', 'x')} l = LayerNormalization (n, g, b) {linear('l', 'y')} }}",
        f"{ROWS} {{ l = LayerNormalization (x, g, b) {linear('l', 'y')} }}",
    ),
    "S13": Case(
        f"{ROWS} {{ {linear('x', 'm')} {qdq('r', 'm')} y = Add (x, r) }}",
        f"{ROWS} {{ {linear('x', 'm')} y = Add (x, m) }}",
    ),
    "S14": Case(
        f"{ROWS} {{ {linear('x', 'm')} {qdq('r', 'm')} v = Div (r, root) e = Erf (v) a = Add (e, one) h = Mul (m, a) y = Mul (h, half) }}",
        f"{ROWS} {{ {linear('x', 'm')} v = Div (m, root) e = Erf (v) a = Add (e, one) h = Mul (m, a) y = Mul (h, half) }}",
    ),
    "S15": Case(GOOD.replace("4, 64", "1, 64"), GOOD),
    "S16": Case(
        "g (float16[1, 3, 16, 16] x) => (float16 y) "
        f"{{ {ACTIVATION} dw = DequantizeLinear <axis = 0> (P, s6, z6) y = Conv <strides = [4, 4]> (d, dw) }}",
        "g (float16[1, 3, 16, 16] x) => (float16 y) "
        f"{{ {ACTIVATION} dw = DequantizeLinear <axis = 0> (O, s8, z8) y = Conv <strides = [4, 4]> (d, dw) }}",
        weights={
            "P": CODES.reshape(-1)[: 6 * 48].reshape(6, 3, 4, 4).astype(np.int8),
            "s6": np.full(6, 0.01, HALF),
            "z6": np.zeros(6, np.int8),
            "O": CODES.reshape(-1)[: 8 * 48].reshape(8, 3, 4, 4).astype(np.int8),
            "s8": np.full(8, 0.01, HALF),
            "z8": np.zeros(8, np.int8),
        },
    ),
    "S17": Case(
        f"{ROWS} {{ {linear('x', 'l')} {linear('x', 'r', 'V').replace(', s, z', ', s2, z')} y = Add (l, r) }}",
        f"{ROWS} {{ {linear('x', 'l')} {linear('x', 'r', 'V')} y = Add (l, r) }}",
    ),
    "S18": Case(
        f"{ROWS} {{ {qdq('l', 'x')} {qdq('r', 'x2', 'z', 's2')} c = Concat <axis = 0> (l, r) {WEIGHT} y = MatMul (c, dw) }}".replace(
            " x)", " x, float16[4, 64] x2)"
        ),
        f"{ROWS} {{ {qdq('l', 'x')} {qdq('r', 'x2')} c = Concat <axis = 0> (l, r) {WEIGHT} y = MatMul (c, dw) }}".replace(
            " x)", " x, float16[4, 64] x2)"
        ),
    ),
    "S19": Case(f"{ROWS} {{ {qdq('d', 'x')} y = Relu (d) }}", GOOD),
    "S20": Case(
        f"{ROWS} {{ {qdq('d', 'x', 'f')} dw = DequantizeLinear <axis = 0> (E, sn, fn) w = Transpose (dw) y = MatMul (d, w) }}",
        f"{ROWS} {{ {qdq('d', 'x', 'f')} dw = DequantizeLinear <axis = 1> (E, sn, fn) y = MatMul (d, dw) }}",
        weights=F8 | {"E": (CODES / 16).astype(ml_dtypes.float8_e4m3fn), "fn": np.zeros(64, ml_dtypes.float8_e4m3fn)},
    ),
    "S21": Case(
        f"{ROWS} {{ w = Gather (levels, L) y = MatMul (x, w) }}",
        GOOD,
        weights={"levels": np.linspace(-1, 1, 16).astype(HALF), "L": (CODES % 16).astype(np.int64)},
    ),
    "S23": Case(GOOD.replace("4, 64", "B, 64"), GOOD),
}
