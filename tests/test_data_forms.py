"""Calibration data that do not vary, and pictures for models without a batch axis."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.test_data import IMAGE, NONE, folder, numbered, ramps, refusal, save, spec
from vitq_compiler.data import open_data
from vitq_compiler.graph import InputSpec, Layout

# Samples that do not vary


@pytest.mark.parametrize(
    ("array", "inputs", "what"),
    [
        (np.zeros((40, 3, 8, 8), np.float32), [IMAGE], "a picture of one colour"),
        (np.full((1, 3, 8, 8), 7, np.float32), [IMAGE], "a picture of one colour"),
        (np.broadcast_to(np.array([3, 1, 2], np.uint8), (5, 9, 7, 3)), [IMAGE], "a picture of one colour"),
        (np.full((6, 4), 2, np.float32), [spec("n", 4)], "a sample of one number"),
        (np.zeros((6, 4), np.int64), [spec("n", 4, dtype="int64")], "a sample of one number"),
    ],
)
def test_samples_of_one_number_are_refused(tmp_path: Path, array: NDArray[Any], inputs: list[InputSpec], what: str) -> None:
    assert f"holds nothing but {what}" in refusal(save(tmp_path / "flat.npz", pixels=array), inputs)


def test_a_folder_of_one_grey_is_refused(tmp_path: Path) -> None:
    for number in range(4):
        Image.new("L", (9, 7), 128).save(tmp_path / f"{number}.png")
    assert "picture of one colour" in refusal(tmp_path, [IMAGE])


def test_equal_samples_are_told(tmp_path: Path) -> None:
    data = open_data(save(tmp_path / "same.npz", pixels=ramps(10, 3, 8, 8)), [IMAGE], NONE)
    (warning,) = data.warnings
    assert warning.startswith(f"all 10 samples of {tmp_path / 'same.npz'} are equal: ranges are those of one")


def test_one_of_many_that_differs_is_enough(tmp_path: Path) -> None:
    array = np.zeros((10, 3, 8, 8), np.float32)
    array[7] = 1
    assert open_data(save(tmp_path / "a.npz", pixels=array), [IMAGE], NONE).warnings == []


def test_a_mask_of_ones_beside_ids_that_vary_is_no_fault(tmp_path: Path) -> None:
    inputs = [spec("n", 4, dtype="int64", name="ids"), spec("n", 4, dtype="int64", name="mask")]
    arrays = {"ids": numbered(6, 4, dtype="int64"), "mask": np.ones((6, 4), np.int64)}
    assert open_data(save(tmp_path / "a.npz", **arrays), inputs, NONE).warnings == []


# Inputs without a batch axis


def alone(*shape: int | str, channels: int, dtype: str = "float32") -> InputSpec:
    return InputSpec("pixels", np.dtype(dtype), shape, Layout(batched=False, channels=channels))


LAST, FIRST = alone("h", "w", 3, channels=2, dtype="uint8"), alone(3, 8, 8, channels=0)


@pytest.mark.parametrize(("one", "shape"), [(LAST, (224, 224, 3)), (FIRST, (3, 8, 8)), (alone(16, 8, 3, channels=2), (16, 8, 3))])
def test_pictures_come_one_by_one(tmp_path: Path, one: InputSpec, shape: tuple[int, ...]) -> None:
    for source in (None, folder(tmp_path / "photos", 9)):
        data = open_data(source, [one], NONE, samples=5, validation_samples=3, batch_size=4)
        assert (data.calibration_count, data.validation_count) == (5, 3)
        feeds = [*data.calibration(), *data.validation()]
        assert [feed["pixels"].shape for feed in feeds] == [shape] * 8
        assert {feed["pixels"].dtype for feed in feeds} == {one.dtype}


def test_altered_copies_of_single_pictures(tmp_path: Path) -> None:
    data = open_data(folder(tmp_path, 6), [FIRST], NONE, samples=3, validation_samples=2, augment=2)
    assert [feed["pixels"].shape for feed in data.calibration()] == [(3, 8, 8)] * 9


@pytest.mark.parametrize("one", [LAST, FIRST])
def test_arrays_of_many_and_of_one(tmp_path: Path, one: InputSpec) -> None:
    shape = [size if isinstance(size, int) else 12 for size in one.shape]
    many = (np.arange(7 * np.prod(shape)) % 251).astype(one.dtype).reshape(7, *shape)
    data = open_data(save(tmp_path / "many.npz", pixels=many), [one], NONE, samples=4, validation_samples=2)
    seen = [feed["pixels"] for feed in [*data.calibration(), *data.validation()]]
    assert len(seen) == 6
    assert all(any(np.array_equal(picture, other) for other in many) for picture in seen)
    single = open_data(save(tmp_path / "one.npz", pixels=many[2]), [one], NONE)
    assert (single.calibration_count, single.validation_count) == (1, 16)
    np.testing.assert_array_equal(next(single.calibration())["pixels"], many[2])


def test_arrays_that_are_neither_one_nor_many(tmp_path: Path) -> None:
    assert "the model expects float32 [N, 3, 8, 8]" in refusal(save(tmp_path / "a.npz", pixels=numbered(2, 8, 8)), [FIRST])


def test_the_graph_knows_better_than_sizes_which_axis_is_channels() -> None:
    turned = InputSpec("pixels", np.dtype("float32"), ("n", "h", "w", "c"), Layout(batched=True, channels=3))
    assert next(open_data(None, [turned], NONE, samples=2, batch_size=2).calibration())["pixels"].shape == (2, 224, 224, 3)
