"""sampling: the same rows as the runtime computes, few of them, reproducibly."""

import numpy as np
import pytest

from tests.builders import Batches, Feed, graph_of
from vitq_compiler.graph import Graph
from vitq_compiler.progress import silent
from vitq_compiler.sampling import sample_matrices, sample_rows

TEXT = "g (float[B, 6, 4] x) => (float[B, 6, 4] y) { r = Neg(x) y = Relu(r) }"


def graph() -> Graph:
    return graph_of(TEXT)


def feeds(g: Graph) -> list[Feed]:
    return list(Batches(g.inputs, batches=3, batch_size=5).calibration())


def test_rows_come_from_every_batch_and_are_rows() -> None:
    g = graph()
    rows = sample_rows(g, ["r"], feeds(g), 15, rows=30, threads=1, progress=silent)["r"]
    assert rows.shape == (30, 4)
    for feed in feeds(g):
        everything = (-feed["x"]).reshape(-1, 4)
        assert sum(any(np.array_equal(row, other) for other in everything) for row in rows) == 10
    np.testing.assert_array_equal(rows, sample_rows(g, ["r"], feeds(g), 15, rows=30, threads=1, progress=silent)["r"])
    assert g.output_names == ["y"], "the graph is not changed"


def test_no_more_rows_than_there_are() -> None:
    g = graph()
    assert sample_rows(g, ["r"], feeds(g), 15, rows=7, threads=1, progress=silent)["r"].shape == (7, 4)
    assert sample_rows(g, ["r"], feeds(g), 15, rows=10**6, threads=1, progress=silent)["r"].shape == (90, 4)


def test_matrices_are_whole_and_of_samples_spread_over_all() -> None:
    g = graph()
    every = np.concatenate([feed["x"] for feed in feeds(g)])
    found = sample_matrices(g, ["r", "x"], feeds(g), 15, images=4, threads=1, progress=silent)
    np.testing.assert_array_equal(found["x"], every[[0, 3, 7, 11]])
    np.testing.assert_array_equal(found["r"], -found["x"])


@pytest.mark.parametrize("size", [1, 4, 7, 15])
def test_matrices_do_not_depend_on_batches(size: int) -> None:
    g = graph()
    every = np.concatenate([feed["x"] for feed in feeds(g)])
    other = [{"x": every[start : start + size]} for start in range(0, 15, size)]
    one, two = (sample_matrices(g, ["r"], f, 15, images=4, threads=1, progress=silent)["r"] for f in (feeds(g), other))
    np.testing.assert_array_equal(one, two)


def test_matrices_of_a_fixed_batch_come_from_whole_batches() -> None:
    g = graph_of(TEXT.replace("B", "5"))
    found = sample_matrices(g, ["x"], feeds(g), 15, images=2, threads=1, progress=silent)["x"]
    np.testing.assert_array_equal(found, [feed["x"][0] for feed in feeds(g)[:2]])
