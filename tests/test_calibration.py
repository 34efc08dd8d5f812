"""Ranges reduced inside the runtime against numpy on the same data."""

from collections.abc import Iterator

import numpy as np
import pytest

from tests.builders import Feed, compilation, graph_of, vit
from vitq_compiler.calibration import CalibrationTable, ChannelStatistics, collect
from vitq_compiler.errors import ModelError
from vitq_compiler.graph import Graph, Layout
from vitq_compiler.pipeline import silent

TEXT = "g (float[B, 3, 4] x) => (float[B, 3, 4] y) { a = Mul(x, w) y = Neg(a) }"
W = np.array([1, 10, -3, 0], np.float32)


def batches(count: int = 3, shape: tuple[int, ...] = (2, 3, 4)) -> list[Feed]:
    random = np.random.default_rng(0)
    return [{"x": random.normal(i, 1, shape).astype(np.float32)} for i in range(count)]


def gather(graph: Graph, axes: dict[str, tuple[int, ...]], feeds: list[Feed]) -> CalibrationTable:
    return collect(graph, axes, feeds, len(feeds), threads=1, progress=silent)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_ranges_are_those_of_numpy(axis: int) -> None:
    feeds = batches()
    table = gather(graph_of(TEXT, w=W), {"a": (axis,)}, feeds)
    values = [feed["x"] * W for feed in feeds]
    others = tuple(i for i in range(3) if i != axis % 3)
    np.testing.assert_array_equal(table.statistics["a"].low, np.min([v.min(others) for v in values], 0))
    np.testing.assert_array_equal(table.statistics["a"].high, np.max([v.max(others) for v in values], 0))
    np.testing.assert_allclose(table.statistics["a"].mean, np.mean([v.mean(others) for v in values], 0), rtol=1e-5)
    assert table.samples == 6


def test_channels_on_several_axes_are_counted_through() -> None:
    feeds = batches(shape=(2, 3, 4))
    seen = gather(graph_of(TEXT, w=W), {"a": (1, -1)}, feeds).statistics["a"]
    values = np.concatenate([feed["x"] * W for feed in feeds])
    np.testing.assert_array_equal(seen.low, values.min(0).reshape(-1))
    np.testing.assert_array_equal(seen.high, values.max(0).reshape(-1))


def test_several_tensors_inputs_and_outputs_too() -> None:
    feeds = batches()
    table = gather(graph_of(TEXT, w=W), {"x": (-1,), "a": (1,), "y": (2,)}, feeds)
    assert set(table.statistics) == {"x", "a", "y"}
    assert table.statistics["a"].low.shape == (3,)
    np.testing.assert_array_equal(table.statistics["x"].high, np.concatenate([f["x"] for f in feeds]).max((0, 1)))
    np.testing.assert_array_equal(table.statistics["y"].low, np.concatenate([-f["x"] * W for f in feeds]).min((0, 1)))


def test_images_are_reduced_per_colour() -> None:
    graph = graph_of("g (float[B, 3, 4, 4] x) => (float[B, 3, 4, 4] y) { y = Relu(x) }")
    feeds = batches(2, (5, 3, 4, 4))
    table = gather(graph, {"x": (1,)}, feeds)
    np.testing.assert_array_equal(table.statistics["x"].low, np.concatenate([f["x"] for f in feeds]).min((0, 2, 3)))


def test_a_matrix_of_one_row_per_image() -> None:
    graph = graph_of("g (float[B, 4] x) => (float[B, 4] y) { y = Relu(x) }")
    feeds = batches(2, (3, 4))
    assert gather(graph, {"x": (-1,)}, feeds).statistics["x"].low.shape == (4,)


def test_the_graph_is_left_alone() -> None:
    graph = graph_of(TEXT, w=W)
    before = graph.text()
    gather(graph, {"a": (-1,)}, batches())
    assert graph.text() == before


def test_the_order_of_batches_does_not_matter() -> None:
    graph = compilation(vit()).graph
    feeds = [{"image": np.random.default_rng(seed).normal(size=(2, 3, 8, 8)).astype(np.float32)} for seed in range(3)]
    name = graph.find("LayerNormalization")[0].outputs[0].name
    one, other = gather(graph, {name: (-1,)}, feeds), gather(graph, {name: (-1,)}, feeds[::-1])
    np.testing.assert_array_equal(one.statistics[name].low, other.statistics[name].low)
    assert (one.statistics[name].low < one.statistics[name].high).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_tensors_that_are_not_finite_are_refused(bad: float) -> None:
    feeds = batches()
    feeds[1]["x"][1, 2, 3] = bad
    with pytest.raises(ModelError, match=r"tensor x is not finite on the calibration data"):
        gather(graph_of(TEXT, w=W), {"x": (-1,)}, feeds)


@pytest.mark.parametrize("sizes", [(10,), (4, 4, 2), (3, 7), (1,) * 10])
@pytest.mark.parametrize("text", [TEXT, "g (float[B, 3, 4] x) => (float[M, 4] y) { a = Reshape(x, rows) y = Neg(a) }"])
def test_however_samples_are_divided_into_batches_the_statistics_are_the_same(text: str, sizes: tuple[int, ...]) -> None:
    everything = np.random.default_rng(0).normal(3, 1, (10, 3, 4)).astype(np.float32)
    everything[:4] += 100  # samples unlike the others
    parts = np.split(everything, np.cumsum(sizes)[:-1])
    graph = graph_of(text, w=W, rows=np.array([-1, 4]))
    table = gather(graph, {"a": (-1,)}, [{"x": part} for part in parts])
    whole = gather(graph, {"a": (-1,)}, [{"x": everything}])
    for name in ("low", "high", "mean"):
        seen = getattr(table.statistics["a"], name)
        np.testing.assert_array_equal(seen, getattr(whole.statistics["a"], name))
        assert seen.dtype == np.float32
    assert (table.samples, table.statistics["a"].samples) == (10, 10)


def test_a_picture_without_a_batch_is_one_sample() -> None:
    graph = graph_of("g (float[3, 4] x) => (float[3, 4] y) { y = Neg(x) }")
    graph.layouts = {"x": Layout(batched=False, channels=0)}
    feeds = [{"x": np.full((3, 4), number, np.float32)} for number in (1, 5, 6)]
    table = gather(graph, {"y": (-1,)}, feeds)
    np.testing.assert_array_equal(table.statistics["y"].mean, [-4] * 4)
    assert table.samples == 3


def test_progress_and_laziness() -> None:
    told: list[tuple[str, int, int]] = []
    asked: list[int] = []

    def lazy() -> Iterator[Feed]:
        for index, feed in enumerate(batches(3)):
            asked.append(len(told))
            assert len(told) == index, "a batch is made when the one before it has been counted"
            yield feed

    collect(graph_of(TEXT, w=W), {"a": (-1,)}, lazy(), 6, threads=1, progress=lambda *step: told.append(step))
    assert told == [("calibrating", 2, 6), ("calibrating", 4, 6), ("calibrating", 6, 6)]
    assert asked == [0, 1, 2]


def statistics(low: list[float], high: list[float], mean: list[float], samples: int = 1) -> ChannelStatistics:
    low_, high_, mean_ = (np.array(x, np.float32) for x in (low, high, mean))
    return ChannelStatistics(low_, high_, mean_, samples)


def test_merge_and_update() -> None:
    table = CalibrationTable()
    table.update("t", statistics([-1, 0], [1, 5], [0, 3]))
    table.update("t", statistics([0, -3], [2, 4], [1, 0]))
    table.update("t", statistics([0, 0], [0, 0], [0.25, 7.5], samples=2))
    np.testing.assert_array_equal(table.statistics["t"].low, [-1, -3])
    np.testing.assert_array_equal(table.statistics["t"].high, [2, 5])
    np.testing.assert_allclose(table.statistics["t"].mean, [0.375, 4.5], rtol=1e-6)


def test_rescale_follows_the_rewrite() -> None:
    graph = graph_of("g (float[B, 3, 4] x) => (float[B, 3, 4] y) { a = Add(x, shift) y = Div(a, scale) }", shift=W, scale=np.abs(W) + 1)
    feeds = batches()
    table = gather(graph, {"x": (-1,), "y": (-1,)}, feeds)
    table.rescale("x", np.abs(W) + 1, W)
    np.testing.assert_allclose(table.statistics["x"].low, table.statistics["y"].low, rtol=1e-6)
    np.testing.assert_allclose(table.statistics["x"].high, table.statistics["y"].high, rtol=1e-6)
    np.testing.assert_allclose(table.statistics["x"].mean, table.statistics["y"].mean, rtol=1e-5)


def test_a_widened_range_still_contains_what_was_seen() -> None:
    def vector(*numbers: float) -> np.ndarray:
        return np.array(numbers, np.float32)

    low, high = vector(-1, 4, -6, 0), vector(3, 5, -5, 2)  # about zero, above it, below it, from it
    table = CalibrationTable({"a": ChannelStatistics(low, high, (low + high) / 2)})
    table.widen(1.5)
    np.testing.assert_array_equal(table.statistics["a"].low, vector(-1.5, 3.5, -6.5, 0))
    np.testing.assert_array_equal(table.statistics["a"].high, vector(4.5, 5.5, -4.5, 3))
