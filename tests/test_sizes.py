"""Probes: which sizes a graph is run at to see what depends on them."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.builders import graph_of, run_model
from vitq_compiler.graph import InputSpec, Layout
from vitq_compiler.sizes import BATCHES, Axis, Probe, open_axes, other_sizes, probes_of, shapes_of, sized

IMAGE = InputSpec("image", np.dtype(np.float32), ("N", 3, "H", "W"))
IDS = InputSpec("ids", np.dtype(np.int64), ("N", "L"))
MASK = InputSpec("mask", np.dtype(np.int64), ("N", "L"))
HEIGHT, WIDTH = ("image", 2), ("image", 3)
SHAPES = {"image": (0, 3, 64, 64)}
STEPS = {HEIGHT: 8, WIDTH: 8}


def sides(runs: Callable[[int, int], bool], shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[tuple[int, int]]:
    """Heights and widths of the probes of a picture, that of the data first, for a graph that takes those for which ``runs`` holds."""
    found = probes_of([[HEIGHT], [WIDTH]], shapes, STEPS, lambda p: runs(*p.shapes["image"][2:]), alone=False)
    assert found[0] == Probe(BATCHES[0], shapes)
    assert len({probe.batch for probe in found}) > 1, "or the batch would pass for a constant"
    return [probe.shapes["image"][2:] for probe in found]  # type: ignore[misc]


def test_a_probe_is_seeded_and_of_the_right_types() -> None:
    probe = Probe(5, {"image": (0, 3, 4, 6), "mask": (4, 2)})
    inputs = [IMAGE, InputSpec("mask", np.dtype(np.int64), (4, 2))]
    feed = probe.feed(inputs)
    assert {name: (a.dtype, a.shape) for name, a in feed.items()} == {
        "image": (np.dtype(np.float32), (5, 3, 4, 6)),
        "mask": (np.dtype(np.int64), (4, 2)),
    }
    assert set(np.unique(feed["mask"])) <= {0, 1}
    np.testing.assert_array_equal(feed["image"], probe.feed(inputs)["image"])
    assert not np.array_equal(feed["image"], probe.feed(inputs, seed=1)["image"])
    assert shapes_of(inputs, feed) == probe.shapes
    assert [spec.shape for spec in sized(inputs, probe.shapes)] == [("N", 3, 4, 6), (4, 2)]


def test_where_only_the_batch_is_open_nothing_is_tried() -> None:
    def never(probe: Probe) -> bool:
        raise AssertionError(probe)

    assert probes_of([], SHAPES, {}, never, alone=False) == [Probe(2, SHAPES), Probe(3, SHAPES)]


@pytest.mark.parametrize(("most", "batches"), [(9, [2, 3]), (1, [1])])
def test_samples_that_come_one_by_one(most: int, batches: list[int]) -> None:
    found = probes_of([], SHAPES, {}, lambda probe: probe.batch <= most, alone=True)
    assert [probe.batch for probe in found] == batches


def test_axes_of_one_name_go_together() -> None:
    assert open_axes([IMAGE, IDS, MASK]) == [[HEIGHT], [WIDTH], [("ids", 1), ("mask", 1)]]
    nameless = InputSpec("x", np.dtype(np.float32), (0, 0, "", 5))
    assert open_axes([nameless]) == [[("x", 1)], [("x", 2)]]
    alone = InputSpec("x", np.dtype(np.uint8), ("H", "W", 3), Layout(batched=False, channels=2))
    assert open_axes([alone]) == [[("x", 0)], [("x", 1)]], "no axis counts samples"
    assert shapes_of([alone], {"x": np.zeros((4, 6, 3), np.uint8)}) == {"x": (4, 6, 3)}


def test_no_probe_is_larger_than_the_data() -> None:
    found = sides(lambda height, width: True)
    assert max(height * width for height, width in found) == 64 * 64
    assert all(height <= 64 and width <= 64 for height, width in found)


@pytest.mark.parametrize("stride", [1, 8, 16, 32, 64])
def test_rounding_on_every_stage_shows(stride: int) -> None:
    """What is padded or cut on a stage, of so many pixels to the step, differs between two probes."""
    for axis in (0, 1):
        steps = {size[axis] // stride % 7 for size in sides(lambda height, width: True, {"image": (0, 3, 256, 256)})}
        assert len(steps) > 1


def test_height_and_width_are_told_apart() -> None:
    heights, widths = zip(*sides(lambda height, width: True), strict=True)
    assert heights != widths
    assert len({h - w for h, w in zip(heights, widths, strict=True)}) > 2


TAKEN: dict[str, Callable[[int, int], bool]] = {
    "multiples of the patch": lambda height, width: height % 8 == 0 == width % 8,
    "squares": lambda height, width: height == width,
    "no smaller ones": lambda height, width: height >= 64 and width >= 64,
    "width alone": lambda height, width: height == 64,
    "multiples of four patches": lambda height, width: height % 32 == 0 == width % 32,
}


@pytest.mark.parametrize("taken", TAKEN.values(), ids=TAKEN)
def test_what_a_graph_does_not_take_is_left_out(taken: Callable[[int, int], bool]) -> None:
    found = sides(taken)
    assert all(taken(*size) for size in found)
    assert len(set(found)) > 1


def test_larger_ones_are_bounded() -> None:
    assert max(height * width for height, width in sides(TAKEN["no smaller ones"])) <= 2 * 64 * 64


def test_a_graph_of_one_size() -> None:
    assert sides(lambda height, width: (height, width) == (64, 64)) == [(64, 64), (64, 64)]


def test_an_axis_that_is_fixed_does_not_hide_another() -> None:
    """Pictures of one size beside texts of any length."""
    shapes = {"image": (0, 3, 64, 64), "ids": (0, 20)}
    groups: list[list[Axis]] = [[HEIGHT], [WIDTH], [("ids", 1)]]
    found = probes_of(groups, shapes, STEPS, lambda p: p.shapes["image"][2:] == (64, 64), alone=False)
    assert len({probe.shapes["ids"] for probe in found}) > 2


def test_the_smallest_other_size() -> None:
    graph = graph_of("g (float[N, L] x) => (float y) { y = Relu(x) }")
    probes = [Probe(2, {"x": (0, size)}) for size in (8, 7, 4)]
    ((feed, outputs),) = other_sizes(probes, graph.inputs, lambda feed: run_model(graph, feed))
    assert feed["x"].shape == outputs[0].shape == (2, 4)
    assert other_sizes(probes[:1], graph.inputs, lambda feed: run_model(graph, feed)) == []
    assert other_sizes(probes, graph.inputs, lambda feed: [np.full(1, np.nan)]) == [], "nothing can be compared with that"
