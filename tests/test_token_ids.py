"""Integer inputs: which numbers a graph takes there, and samples made of them."""

import numpy as np
import onnx
import pytest

from tests.builders import graph_of
from vitq_compiler.data import open_data
from vitq_compiler.errors import DataError
from vitq_compiler.graph import InputSpec
from vitq_compiler.preprocess import resolve
from vitq_compiler.token_ids import MASK, id_limits

TEXT = """g (int64[B, 6] ids, int32[B, 6] kinds, int64[B, 6] mask, float[B, 3, 8, 8] image) => (float y, float z, float u) {
    flat = Reshape(ids, minus)
    a = Gather(words, flat)
    b = Gather(short, ids)
    wide = Cast <to = 7> (kinds)
    c = Gather(types, wide)
    m = Cast <to = 1> (mask)
    y = Add(b, c)
    z = Mul(a, a)
    u = Relu(m)
}"""
TABLES = {"words": np.zeros((30, 4), np.float32), "short": np.zeros((20, 4), np.float32), "types": np.zeros((2, 4), np.float32)}


def test_limits_are_those_of_the_smallest_table() -> None:
    graph = graph_of(TEXT, minus=np.array([-1]), **TABLES)
    assert id_limits(graph) == {"ids": 20, "kinds": 2, "mask": MASK}


def test_ids_are_in_range_seeded_and_different() -> None:
    inputs = [InputSpec("ids", np.dtype(np.int64), ("n", 6)), InputSpec("mask", np.dtype(np.int32), ("n", "t"))]
    data = open_data(None, inputs, resolve("none", None), samples=12, ids={"ids": 5, "mask": MASK})
    batches = list(data.calibration())
    ids = np.concatenate([batch["ids"] for batch in batches])
    assert (ids.shape, ids.dtype, set(ids.flat)) == ((12, 6), np.int64, {0, 1, 2, 3, 4})
    assert all((batch["mask"] == 1).all() and batch["mask"].shape[1] == 64 for batch in batches)
    assert data.synthetic
    assert "random token ids" in data.description
    assert "random token ids" in data.warnings[0]
    again = open_data(None, inputs, resolve("none", None), samples=12, ids={"ids": 5, "mask": MASK})
    np.testing.assert_array_equal(ids, np.concatenate([batch["ids"] for batch in again.calibration()]))
    unseen = next(data.validation())["ids"]
    assert not any((unseen[0] == row).all() for row in ids)


def test_images_beside_ids() -> None:
    inputs = [InputSpec("pixels", np.dtype(np.float32), ("n", 3, 16, 16)), InputSpec("ids", np.dtype(np.int64), ("n", 4))]
    batch = next(open_data(None, inputs, resolve("imagenet", None), samples=2, ids={"ids": 9}).calibration())
    assert {name: array.shape for name, array in batch.items()} == {"pixels": (2, 3, 16, 16), "ids": (2, 4)}


def test_other_inputs_are_refused() -> None:
    inputs = [InputSpec("ids", np.dtype(np.int64), ("n", 4)), InputSpec("vector", np.dtype(np.float32), ("n", 9))]
    with pytest.raises(DataError, match=r"input vector float32 \[\?, 9\] is neither an image nor token ids"):
        open_data(None, inputs, resolve("none", None), ids={"ids": 9})


def test_a_table_by_columns() -> None:
    graph = graph_of("g (int64[B] ids) => (float y) { y = Gather <axis = 1> (words, ids) }", words=np.zeros((4, 7), np.float32))
    assert id_limits(graph) == {"ids": 7}
    assert graph.to_proto().graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64
