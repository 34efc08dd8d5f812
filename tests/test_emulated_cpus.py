"""The integer kernels of other CPUs: what x86 without VNNI computes, pair by pair, and what ARM computes.

Each case is a small model, its input and what numpy says of it. docs/cpus.md tells the rules that come out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.builders import Array, Feed, model_of, run_model
from tests.e2e.command import SHIPPED
from tests.emulated_cpu import ARM_MAX, CORTEX_A53, CORTEX_A76, HASWELL, NEHALEM, Cpu, run_models
from vitq_compiler import metrics
from vitq_compiler.compiler import compile
from vitq_compiler.graph import Graph
from vitq_compiler.pairs import saturating_product
from vitq_compiler.saturation import saturated

Multiply = Callable[[Array, Array], Array]


# The kernel in numpy


def exact_product(a: Array, w: Array) -> Array:
    """``a @ w`` in int32."""
    return a.astype(np.int32) @ w.astype(np.int32)


@pytest.mark.parametrize(
    ("a", "w", "expected"),
    [
        ([255, 255], [127, 127], 32767),
        ([255, 255], [-128, -128], -32768),
        ([255, 255], [64, 64], 32640),
        ([255, 255], [127, -128], -255),
        ([255, 0, 0, 255], [127, 127, 127, 127], 64770),  # the second and the third are no pair
        ([255, 255, 255], [127, 127, 127], 32767 + 32385),
    ],
)
def test_kernel_by_hand(a: list[int], w: list[int], expected: int) -> None:
    assert saturating_product(np.array([a], np.uint8), np.array([w], np.int8).T).tolist() == [[expected]]


# Cases


@dataclass(frozen=True)
class Case:
    """A model, its input, and the output that is expected."""

    name: str
    model: onnx.ModelProto
    feed: Feed
    expected: Array


def wrong(cases: list[Case], cpu: Cpu = HASWELL, **config: str) -> list[str]:
    """The cases of which any output differs on ``cpu``; ``config`` are entries of the session."""
    entries = {f"session.{name}": entry for name, entry in config.items()}
    found = run_models([case.model for case in cases], [case.feed for case in cases], cpu, entries)
    return [case.name for case, y in zip(cases, found, strict=True) if (y != case.expected).any()]


def codes(random: np.random.Generator, kind: type, *shape: int) -> Array:
    """Random codes of the whole range, its ends more often than others."""
    ends = np.iinfo(kind)
    return random.integers(ends.min - 40, ends.max + 41, shape).clip(ends.min, ends.max).astype(kind)


def declared(name: str, array: Array) -> str:
    """An input in ONNX text."""
    return f"{array.dtype}[{', '.join(map(str, array.shape))}] {name}"


def matrix_product(a: Array, w: Array, expected: Array, *, constant: bool = True) -> Case:
    """MatMulInteger of two operands without zero points."""
    inputs = declared("a", a) if constant else f"{declared('a', a)}, {declared('w', w)}"
    model = model_of(f"g ({inputs}) => (int32 y) {{ y = MatMulInteger(a, w) }}", **({"w": w} if constant else {}))
    name = f"{inputs}{'' if constant else ', computed'}"
    return Case(name, model, {"a": a} if constant else {"a": a, "w": w}, expected)


@dataclass(frozen=True)
class Convolution:
    """Channels in and out, side of the square kernel, groups."""

    inputs: int
    outputs: int
    kernel: int
    groups: int = 1

    def weight(self, random: np.random.Generator, kind: type) -> Array:
        return codes(random, kind, self.outputs, self.inputs // self.groups, self.kernel, self.kernel)

    def accumulators(self, x: Array, w: Array, multiply: Multiply) -> Array:
        """int32 [outputs] of an image as large as the kernel: a product for each group; K runs over positions, then channels."""
        depth = self.inputs // self.groups
        rows = x[0].reshape(self.groups, depth, -1).transpose(0, 2, 1).reshape(self.groups, 1, -1)
        columns = w.reshape(self.groups, -1, depth, self.kernel**2).transpose(0, 3, 2, 1).reshape(self.groups, rows.shape[2], -1)
        return np.concatenate([multiply(row, column)[0] for row, column in zip(rows, columns, strict=True)])

    def images(self, random: np.random.Generator) -> Iterator[tuple[Array, Array]]:
        """Two random images, each with what the kernel sees of it: one as large as the kernel, and a larger one, even in each channel."""
        small = codes(random, np.uint8, 1, self.inputs, self.kernel, self.kernel)
        yield small, small
        even = np.repeat(np.repeat(codes(random, np.uint8, 1, self.inputs, 1, 1), self.kernel + 2, 2), self.kernel + 2, 3)
        yield even, even[:, :, : self.kernel, : self.kernel]


DENSE = [Convolution(8, 16, 3), Convolution(6, 10, 3), Convolution(3, 16, 3), Convolution(3, 24, 4), Convolution(5, 8, 3)]
DENSE += [Convolution(1, 16, 3), Convolution(8, 16, 1), Convolution(7, 13, 1)]
GROUPED = [Convolution(8, 16, 3, 2), Convolution(6, 8, 3, 2), Convolution(9, 12, 3, 3)]
MULTIPLIED = [Convolution(4, 8, 3, 4)]  # depthwise with two outputs per channel
DEPTHWISE = [Convolution(16, 16, 3, 16), Convolution(8, 8, 5, 8), Convolution(5, 5, 3, 5)]


def convolutions(kinds: list[Convolution], multiply: Multiply, weights: type = np.int8, least: int = -128) -> list[Case]:
    """QLinearConv of random codes, those of the weights from ``least`` up, with scales of 1.

    The bias cancels the accumulators that are expected, so where they are right, every output code is its zero point.
    """
    random, cases = np.random.default_rng(0), []
    for c in kinds:
        w = c.weight(random, weights).clip(least if weights is np.int8 else 0)
        for x, seen in c.images(random):
            bias = -c.accumulators(seen, w, multiply)
            text = f"g ({declared('a', x)}) => (uint8 y) {{ y = QLinearConv <group: int = {c.groups}> (a, s, z, w, s, o, s, m, b) }}"
            model = model_of(text, s=np.float32(1), z=np.uint8(0), w=w, o=w.dtype.type(0), m=np.uint8(128), b=bias)
            cases.append(Case(f"{c} of {x.shape}", model, {"a": x}, np.array(128)))
    return cases


# x86 without VNNI


@pytest.mark.slow
def test_two_large_products_saturate() -> None:
    cases = []
    for kind, expected in ((np.int8, 32767), (np.uint8, 64770)):
        a, w = np.array([[255, 255]], np.uint8), np.full((2, 1), 127, kind)
        cases.append(matrix_product(a, w, np.array(expected)))
        text = "g (uint8[1, 2] a) => (float[1, 1] y) { y = com.microsoft.QGemm(a, one, zero, w, one, none) }"
        numbers = {"one": np.float32(1), "zero": np.uint8(0), "none": kind(0), "w": w}
        cases.append(Case(f"QGemm {kind.__name__}", model_of(text, imports={"com.microsoft": 1}, **numbers), {"a": a}, np.array(expected)))
    assert wrong(cases) == []


@pytest.mark.slow
def test_matrix_products_saturate_by_pairs() -> None:
    """One row is the matrix-vector kernel; K is cut into slices of 384; zero points are added outside the pairs."""
    random, cases = np.random.default_rng(0), []
    for m, k, n, constant in product((1, 2, 5), (1, 2, 3, 5, 64, 67, 386, 771), (1, 16, 23), (True, False)):
        a, w = codes(random, np.uint8, m, k), codes(random, np.int8, k, n)
        cases.append(matrix_product(a, w, saturating_product(a, w), constant=constant))
        assert k < 64 or (cases[-1].expected != exact_product(a, w)).any()
    for m in (1, 7):
        a, w = codes(random, np.uint8, m, 67), codes(random, np.int8, 67, 20)
        model = model_of(f"g ({declared('a', a)}) => (int32 y) {{ y = MatMulInteger(a, w, o, p) }}", w=w, o=np.uint8(131), p=np.int8(-9))
        sums = 67 * 131 * -9 - 131 * w.sum(0, dtype=np.int32) + 9 * a.sum(1, dtype=np.int32, keepdims=True)
        cases.append(Case(f"zero points, {m} rows", model, {"a": a}, saturating_product(a, w) + sums))
    assert wrong(cases) == []


@pytest.mark.slow
def test_convolutions_saturate_by_pairs_of_positions_then_channels() -> None:
    """With an odd number of channels per group, pairs run across positions; a depthwise kernel with a multiplier pairs positions."""
    kinds = DENSE + GROUPED + MULTIPLIED
    assert wrong(convolutions(kinds, saturating_product)) == []


def test_another_order_or_no_saturation_would_be_seen() -> None:
    def shifted(a: Array, w: Array) -> Array:
        return saturating_product(np.roll(a, 1, axis=1), np.roll(w, 1, axis=0))

    random = np.random.default_rng(0)
    for c in DENSE + GROUPED + MULTIPLIED:
        w = c.weight(random, np.int8)
        x, _ = next(c.images(random))
        channels_first = saturating_product(x.reshape(1, -1), w.reshape(c.outputs, -1).T)[0] if c.groups == 1 and c.inputs > 1 else None
        found = c.accumulators(x, w, saturating_product)
        assert (found != c.accumulators(x, w, exact_product)).any()
        assert (found != c.accumulators(x, w, shifted)).any()
        assert channels_first is None or c.kernel == 1 or (found != channels_first).any()


@pytest.mark.slow
def test_other_types_and_depthwise_convolutions_are_exact() -> None:
    random, cases = np.random.default_rng(0), []
    for a, w in ((np.uint8, np.uint8), (np.int8, np.int8), (np.int8, np.uint8)):
        one, other = codes(random, a, 1, 2, 9, 33), codes(random, w, 1, 2, 33, 9)
        cases += [matrix_product(one, other, exact_product(one, other), constant=constant) for constant in (True, False)]
    c = Convolution(4, 6, 3)
    for kind in (np.uint8, np.int8):
        w = c.weight(random, kind)
        x, _ = next(c.images(random))
        model = model_of(f"g ({declared('a', x)}) => (int32 y) {{ y = ConvInteger(a, w) }}", w=w)
        cases.append(Case(f"ConvInteger {kind.__name__}", model, {"a": x}, c.accumulators(x, w, exact_product).reshape(1, 6, 1, 1)))
    cases += convolutions(DENSE + GROUPED + MULTIPLIED + DEPTHWISE, exact_product, np.uint8)
    cases += convolutions(DEPTHWISE, exact_product)
    assert wrong(cases) == []


@pytest.mark.slow
def test_products_of_two_activations() -> None:
    """uint8 queries by int8 keys saturate. Probabilities do not: two codes sum to at most 256, and 256 * -128 fits into int16."""
    random = np.random.default_rng(0)
    queries, keys = codes(random, np.uint8, 9, 32), codes(random, np.int8, 32, 9)
    shares = np.array([[0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0]])
    probabilities = np.rint(255 * shares).astype(np.uint8)
    values = np.array([[-128, 127, 127], [-128, 127, -128], [-128, 127, 127], [-128, 127, -128]], np.int8)
    assert probabilities[0].sum() == 256
    assert (saturating_product(queries, keys) != exact_product(queries, keys)).any()
    cases = [matrix_product(queries, keys, saturating_product(queries, keys), constant=False)]
    cases += [matrix_product(probabilities, values, exact_product(probabilities, values), constant=False)]
    assert wrong(cases) == []


@pytest.mark.slow
def test_exact_sessions_are_exact_where_weights_are_constant() -> None:
    random = np.random.default_rng(0)
    a, w = codes(random, np.uint8, 5, 67), codes(random, np.int8, 67, 24)
    cases = [matrix_product(a, w, exact_product(a, w)), matrix_product(a, w, saturating_product(a, w), constant=False)]
    assert wrong(cases, x64quantprecision="1") == []
    assert wrong(cases) == [cases[0].name]


# Other processors


@pytest.mark.slow
@pytest.mark.parametrize("cpu", [NEHALEM, CORTEX_A76, ARM_MAX], ids=lambda cpu: cpu.model.split(",")[0])
def test_exact_processors(cpu: Cpu) -> None:
    """Depthwise kernels of ARM add two positions in int16, which -128 times -128, twice, wraps."""
    random, cases = np.random.default_rng(0), []
    for m, k, n, kind in product((1, 5), (3, 64, 67), (1, 23), (np.int8, np.uint8)):
        a, w = codes(random, np.uint8, m, k), codes(random, kind, k, n)
        cases.append(matrix_product(a, w, exact_product(a, w)))
    for kind in (np.int8, np.uint8):
        cases += convolutions(DENSE + GROUPED + MULTIPLIED, exact_product, kind)
        cases += convolutions(DEPTHWISE, exact_product, kind, least=-127)
    assert wrong(cases, cpu) == []


@pytest.mark.slow
def test_arm_without_dot_product_is_exact_but_for_the_lowest_code() -> None:
    """It adds two products of signed codes in int16, those of k and k + 8; uint8 activations are shifted by 128 before."""
    random, cases = np.random.default_rng(0), []
    for kind in (np.int8, np.uint8):
        a, w = codes(random, np.uint8, 5, 67), codes(random, kind, 67, 24).clip(-127 if kind is np.int8 else 0)
        cases.append(matrix_product(a, w, exact_product(a, w)))
        cases += convolutions(DENSE + GROUPED + MULTIPLIED + DEPTHWISE, exact_product, kind, least=-127)
    lowest = np.zeros((16, 15), np.int8)
    lowest[0] = lowest[np.arange(1, 16), np.arange(15)] = -128  # column n: rows 0 and n + 1
    wrapped = np.array([[-(2**16) if n + 1 == 8 else 0 for n in range(15)]])
    cases.append(matrix_product(np.zeros((1, 16), np.uint8), lowest, wrapped))
    assert wrong(cases, CORTEX_A53) == []


# Whole models


def shipped(cpu: str, folder: Path, **options: Any) -> onnx.ModelProto:
    """The shipped model, compiled."""
    compile(SHIPPED, folder / "int8.onnx", target_options={"cpu": cpu}, samples=8, seed=1, threads=1, **options)
    return onnx.load(folder / "int8.onnx")


WAYS = [{}, {"attention": "int8"}, {"recipe": "minmax", "bits": "w8a8"}, {"recipe": "best", "bits": "w8a4"}]


def images() -> Feed:
    return {"pixel_values": np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_compiled_model_is_exact_without_vnni(options: dict[str, str], tmp_path: Path) -> None:
    """Products of weights, and with ``attention`` those of two activations."""
    model, feed = shipped("any", tmp_path, **options), images()
    (plain,) = run_models([model], [feed])
    (exact,) = run_models([model], [feed], config={"session.x64quantprecision": "1"})
    np.testing.assert_array_equal(plain, exact)


@pytest.mark.slow
def test_saturation_is_foretold(tmp_path: Path) -> None:
    """Free weights saturate on the emulated CPU, and by as much as is worked out for it on this one."""
    model, feed = shipped("vnni", tmp_path), images()
    (plain,) = run_models([model], [feed])
    graph = Graph.from_proto(model)
    graph.infer_shapes()
    exact, foretold = run_model(graph, feed, optimize=True)[0], run_model(saturated(graph), feed, optimize=True)[0]
    assert metrics.sqnr(exact, plain) < 35
    assert metrics.sqnr(plain, foretold) > metrics.sqnr(exact, plain) + 10
    assert metrics.sqnr(exact, foretold) == pytest.approx(metrics.sqnr(exact, plain), abs=0.5)
