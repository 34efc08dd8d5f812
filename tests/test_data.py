"""Calibration data: folders with good and bad files, arrays, built-in images; counts, order, and errors."""

import os
import tracemalloc
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vitq_compiler import data as data_module
from vitq_compiler.builtin_images import dead_leaves
from vitq_compiler.data import Data, Feed, open_data
from vitq_compiler.errors import DataError
from vitq_compiler.graph import InputSpec
from vitq_compiler.preprocess import resolve

NONE = resolve("none", None)


def spec(*shape: int | str, dtype: str = "float32", name: str = "pixels") -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


IMAGE = spec("batch", 3, 8, 8)


def join(feeds: Iterable[Feed], name: str = "pixels") -> NDArray[Any]:
    """All batches of one input in one array."""
    return np.concatenate([feed[name] for feed in feeds])


def colours(feeds: Iterable[Feed]) -> list[int]:
    """The red value at the top left of every sample, which `folder` makes the number of the file."""
    return [int(sample[0, 0, 0]) for feed in feeds for sample in feed["pixels"]]


def folder(path: Path, count: int, start: int = 1) -> Path:
    """``count`` pictures whose colour is their number, but for a corner; two levels of folders."""
    (path / "sub").mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        plain(number).save(path / ("sub" if number % 2 else ".") / f"{number:03}.png")
    return path


def plain(red: int) -> Image.Image:
    """A picture of one colour, but for its lower right corner."""
    image = Image.new("RGB", (9, 7), (red, 0, 0))
    image.putpixel((8, 6), (red, 255, 0))
    return image


def truncated(path: Path) -> None:
    """A JPEG whose header is fine and whose pixels end early."""
    Image.fromarray(dead_leaves(0, 64, 64)).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:1500])


def open_folder(path: Path, **options: Any) -> Data:
    return open_data(path, [IMAGE], NONE, **options)


def refusal(source: Path | None, inputs: list[InputSpec], **options: Any) -> str:
    """The message of the DataError, which is always one line."""
    with pytest.raises(DataError) as caught:
        open_data(source, inputs, NONE, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert source is None or str(source) in message
    assert "; " in message, "what to do"
    return message


# Folders


def test_folder(tmp_path: Path) -> None:
    data = open_folder(folder(tmp_path, 20), samples=10, validation_samples=5, batch_size=4)
    assert (data.calibration_count, data.validation_count) == (10, 5)
    assert data.description == f"10 images from {tmp_path}/"
    assert (data.warnings, data.skipped, data.preprocess) == ([], [], NONE)
    batches = list(data.calibration())
    assert [batch["pixels"].shape for batch in batches] == [(4, 3, 8, 8), (4, 3, 8, 8), (2, 3, 8, 8)]
    assert all(list(batch) == ["pixels"] and batch["pixels"].dtype == np.float32 for batch in batches)
    used, kept = colours(data.calibration()), colours(data.validation())
    assert len(set(used) | set(kept)) == 15, "no picture is used twice"
    assert set(used) | set(kept) <= set(range(1, 21))
    assert used != sorted(used), "shuffled"


def test_starting_again_gives_the_same(tmp_path: Path) -> None:
    data = open_folder(folder(tmp_path, 12))
    first = data.calibration()
    next(first)
    np.testing.assert_array_equal(join(data.calibration()), join(data.calibration()))
    np.testing.assert_array_equal(join(data.validation()), join(data.validation()))


def test_seed_decides_the_choice(tmp_path: Path) -> None:
    folder(tmp_path, 20)
    chosen = [tuple(colours(open_folder(tmp_path, samples=6, seed=seed).calibration())) for seed in (0, 0, 1, 2)]
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) == 3


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = colours(open_folder(folder(tmp_path, 20)).calibration())
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda top: reversed([(root, dirs, files[::-1]) for root, dirs, files in walk(top)]))
    assert colours(open_folder(tmp_path).calibration()) == expected


@pytest.mark.parametrize(
    ("there", "samples", "validation", "expected"),
    [(100, 32, 16, (32, 16)), (40, 32, 16, (32, 8)), (33, 32, 16, (32, 1)), (32, 32, 16, (26, 6)), (10, 32, 16, (8, 2)),
     (2, 32, 16, (1, 1)),
     (10, 4, 0, (4, 0)), (4, 10, 0, (4, 0)), (50, 50, 4, (46, 4))],
)  # fmt: skip
def test_counts(tmp_path: Path, there: int, samples: int, validation: int, expected: tuple[int, int]) -> None:
    data = open_folder(folder(tmp_path, there), samples=samples, validation_samples=validation)
    assert (data.calibration_count, data.validation_count) == expected
    used, kept = colours(data.calibration()), colours(data.validation())
    assert (len(used), len(kept)) == expected
    assert not set(used) & set(kept)
    assert data.warnings == []


def test_single_image_is_validated_on_built_in_ones(tmp_path: Path) -> None:
    data = open_folder(folder(tmp_path, 1))
    assert (data.calibration_count, data.validation_count) == (1, 16)
    assert colours(data.calibration()) == [1]
    assert join(data.validation()).std() > 20, "not the one of plain red"
    assert data.warnings == [f"{tmp_path} has too few samples to keep any back: validated on built-in images"]


def test_one_image_file(tmp_path: Path) -> None:
    path = tmp_path / "no suffix"
    plain(40).save(path, "png")
    data = open_folder(path)
    assert (data.calibration_count, data.validation_count) == (1, 16)
    assert data.description == f"1 images from {path}"
    assert colours(data.calibration()) == [40]


def test_every_mode_of_file(tmp_path: Path) -> None:
    red = Image.new("RGB", (30, 20), (200, 40, 40))
    for mode, suffix in [
        ("L", "png"),
        ("P", "png"),
        ("P", "gif"),
        ("RGBA", "png"),
        ("LA", "png"),
        ("1", "png"),
        ("CMYK", "jpg"),
        ("CMYK", "tif"),
    ]:
        red.convert(mode).save(tmp_path / f"{mode}.{suffix}")
    Image.fromarray(np.full((20, 30), 9999, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "tiny.BMP")
    Image.new("RGB", (3, 2000)).save(tmp_path / "strip.webp")
    data = open_folder(tmp_path)
    assert data.skipped == []
    assert data.calibration_count + data.validation_count == 11
    assert join([*data.calibration(), *data.validation()]).shape == (11, 3, 8, 8)


def test_unreadable_files_are_named_and_replaced(tmp_path: Path) -> None:
    folder(tmp_path, 30)
    truncated(tmp_path / "000_truncated.jpg")
    (tmp_path / "999_text.jpg").write_text("no picture")
    (tmp_path / "500_empty.png").touch()
    (tmp_path / "sub" / "link.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    data = open_folder(tmp_path, samples=24, validation_samples=6)  # all 30 good ones: every bad one is met
    assert (data.calibration_count, data.validation_count) == (24, 6)
    assert sorted(colours(data.calibration()) + colours(data.validation())) == list(range(1, 31))
    reasons = dict(data.skipped)
    assert "truncated" in reasons.pop("000_truncated.jpg")
    unknown, irregular = "not an image, or of a format Pillow does not know", "not a regular file"
    assert reasons == {"999_text.jpg": unknown, "500_empty.png": unknown, "sub/link.png": irregular, "pipe.png": irregular}
    assert data.description == f"24 images from {tmp_path}/ (5 skipped)"


def test_bad_files_that_are_not_drawn_are_not_read(tmp_path: Path) -> None:
    folder(tmp_path, 3)
    for number in range(40):
        (tmp_path / f"bad{number}.png").touch()
    few = open_folder(tmp_path, samples=1, validation_samples=0)
    assert few.calibration_count == 1
    assert len(few.skipped) < 40


def test_too_many_pixels_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "bomb.png")
    folder(tmp_path, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)  # Pillow warns above this, and fails above twice as many
    data = open_folder(tmp_path)
    assert [name for name, _ in data.skipped] == ["bomb.png"]
    assert "decompression bomb" in data.skipped[0][1]
    assert data.calibration_count + data.validation_count == 3


def test_hidden_and_other_files_are_passed_over(tmp_path: Path) -> None:
    folder(tmp_path, 5)
    for name in ("._001.png", "labels.txt", "model.onnx", "png"):
        (tmp_path / name).write_text("no picture")
    assert open_folder(tmp_path).skipped == []


def test_odd_names_stay_on_one_line(tmp_path: Path) -> None:
    folder(tmp_path, 2)
    (tmp_path / "two\nlines.png").touch()
    (tmp_path / os.fsdecode(b"latin\xe9.png")).touch()
    skipped = [name for name, _ in open_folder(tmp_path).skipped]
    assert sorted(skipped) == ["latin\\udce9.png", "two\\nlines.png"]


def test_file_that_breaks_during_the_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "_CACHE_BYTES", 0)
    data = open_folder(folder(tmp_path, 4))
    for path in tmp_path.rglob("*.png"):
        path.write_text("gone")
    with pytest.raises(DataError, match=r"00\d\.png: not an image.*; leave the calibration data alone"):
        list(data.calibration())


def test_reading_again_without_the_cache_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = join(open_folder(folder(tmp_path, 9)).calibration())
    monkeypatch.setattr(data_module, "_CACHE_BYTES", 0)
    data = open_folder(tmp_path)
    np.testing.assert_array_equal(join(data.calibration()), expected)
    np.testing.assert_array_equal(join(data.calibration()), expected)


def test_memory_does_not_grow_with_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "_CACHE_BYTES", 1 << 16)

    def peak(samples: int) -> int:
        tracemalloc.start()
        for batch in open_data(None, [spec("n", 3, 64, 64)], NONE, samples=samples, validation_samples=0).calibration():
            assert len(batch["pixels"]) == 8
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(8)
    assert peak(96) < peak(24) + 500_000, "72 more samples are 0.9 MB as bytes and 3.5 MB as floats"


def test_nothing_usable(tmp_path: Path) -> None:
    assert "there is no such file or folder" in refusal(tmp_path / "nowhere", [IMAGE])
    assert "no image files among 0 files" in refusal(tmp_path, [IMAGE])
    (tmp_path / "notes.txt").write_text("text")
    assert "no image files among 1 files" in refusal(tmp_path, [IMAGE])
    assert "none of 1 image files can be read (notes.txt: not an image" in refusal(tmp_path / "notes.txt", [IMAGE])
    (tmp_path / "a.jpg").write_text("text")
    truncated(tmp_path / "b.jpg")
    assert "none of 2 image files can be read" in refusal(tmp_path, [IMAGE])


@pytest.mark.parametrize("options", [{"samples": 0}, {"validation_samples": -1}, {"batch_size": 0}, {"seed": -1}])
def test_senseless_counts(options: dict[str, int]) -> None:
    ((name, value),) = options.items()
    assert f"{name}={value}" in refusal(None, [IMAGE], **options)


def test_no_inputs() -> None:
    assert "0 inputs" in refusal(None, [])


# What the model takes


@pytest.mark.parametrize(
    ("shape", "sample"),
    [
        (("n", 3, 8, 6), (3, 8, 6)),
        (("n", 1, 8, 6), (1, 8, 6)),
        (("n", 4, 8, 6), (4, 8, 6)),
        (("n", 8, 6, 3), (8, 6, 3)),
        (("n", 8, 6, 1), (8, 6, 1)),
        ((0, 3, 0, 0), (3, 224, 224)),
        (("n", 3, "h", 6), (3, 224, 6)),
        (("n", "h", "w", 3), (224, 224, 3)),
        (("n", "c", "h", "w"), (3, 224, 224)),
    ],
)
def test_layouts(shape: tuple[int | str, ...], sample: tuple[int, ...]) -> None:
    data = open_data(None, [spec(*shape)], NONE, samples=2, validation_samples=0)
    assert join(data.calibration()).shape == (2, *sample)


def test_dynamic_size_comes_from_the_preprocessing(tmp_path: Path) -> None:
    data = open_data(folder(tmp_path, 2), [spec("n", 3, "h", "w")], resolve("imagenet,resize=20,crop=16x12", None))
    assert join(data.calibration()).shape == (1, 3, 16, 12)


def test_channels_last_is_the_same_picture_turned() -> None:
    first, last = (
        join(open_data(None, [spec(*shape)], resolve(None, None), samples=2).calibration())
        for shape in (("n", 3, 16, 16), ("n", 16, 16, 3))
    )
    np.testing.assert_array_equal(first.transpose(0, 2, 3, 1), last)


@pytest.mark.parametrize(("dtype", "expected"), [("float16", "float16"), ("float64", "float64"), ("uint8", "uint8")])
def test_dtypes(tmp_path: Path, dtype: str, expected: str) -> None:
    data = open_data(folder(tmp_path, 2), [spec("n", 3, 8, 8, dtype=dtype)], resolve("imagenet", None))
    values = join(data.calibration())
    assert values.dtype == expected
    if dtype == "uint8":
        assert values[0, 0, 0, 0] in (1, 2), "raw pixels"
    else:
        assert values[0, 0, 0, 0] == pytest.approx((1.5 / 255 - 0.485) / 0.229, abs=0.02)


def test_fixed_batch_of_the_model_wins(tmp_path: Path) -> None:
    data = open_data(folder(tmp_path, 40), [spec(5, 3, 8, 8)], NONE, batch_size=8)
    assert (data.calibration_count, data.validation_count) == (30, 10)  # 40 pictures are eight batches
    assert {len(batch["pixels"]) for batch in [*data.calibration(), *data.validation()]} == {5}
    assert data.warnings == ["the model's batch is fixed at 5: 30 samples calibrate (32 asked for) and 10 validate (16 asked for)"]


def test_batch_of_one_says_nothing(tmp_path: Path) -> None:
    data = open_data(folder(tmp_path, 10), [spec(1, 3, 8, 8)], NONE)
    assert (data.calibration_count, data.validation_count, data.warnings) == (8, 2, [])
    assert len(list(data.calibration())) == 8


def test_fixed_batch_larger_than_asked_for() -> None:
    data = open_data(None, [spec(12, 3, 8, 8)], NONE, samples=4, validation_samples=4)
    assert (data.calibration_count, data.validation_count) == (12, 12)
    assert "fixed at 12: 12 samples calibrate (4 asked for) and 12 validate" in data.warnings[1]


def test_fewer_samples_than_the_fixed_batch(tmp_path: Path) -> None:
    assert "3 samples, but the model's batch is fixed at 4" in refusal(folder(tmp_path, 3), [spec(4, 3, 8, 8)])


def test_a_single_fixed_batch_is_validated_on_built_in_images(tmp_path: Path) -> None:
    data = open_data(folder(tmp_path, 6), [spec(4, 3, 8, 8)], NONE, samples=8, validation_samples=8)
    assert (data.calibration_count, data.validation_count) == (4, 8)
    assert "validated on built-in images" in data.warnings[0]


# Built-in images


def test_built_in_images() -> None:
    data = open_data(None, [spec("n", 3, 16, 16)], resolve(None, None), samples=10, validation_samples=5)
    assert data.description == "10 built-in images"
    assert (data.calibration_count, data.validation_count, data.skipped) == (10, 5, [])
    (warning,) = data.warnings
    assert "built-in images" in warning
    assert "better ranges" in warning
    everything = np.concatenate([join(data.calibration()), join(data.validation())])
    assert len({sample.tobytes() for sample in everything}) == 15
    assert abs(everything.mean()) < 0.7, "normalised"
    np.testing.assert_array_equal(join(data.calibration()), everything[:10])


def test_built_in_images_follow_the_seed_and_are_not_resized() -> None:
    zero, one = (join(open_data(None, [IMAGE], NONE, samples=2, seed=seed).calibration()) for seed in (0, 1))
    assert not np.array_equal(zero, one)
    np.testing.assert_array_equal(one[1], dead_leaves(1, 8, 8, seed=1).transpose(2, 0, 1))


@pytest.mark.parametrize(
    "inputs",
    [
        [spec("n", 16)],
        [spec("n", 12, 197, 64)],
        [spec("n", 3, 8, 8, dtype="int64")],
        [spec()],
        [IMAGE, spec("n", 16, name="tokens")],
    ],
)
def test_inputs_that_are_no_image_need_arrays(tmp_path: Path, inputs: list[InputSpec]) -> None:
    for source in (None, folder(tmp_path, 3)):
        message = refusal(source, inputs)
        assert "pass a .npz" in message
        assert all(one.name in message for one in inputs)


# Arrays


def numbered(count: int, *shape: int, dtype: str = "float32") -> NDArray[Any]:
    """Samples filled with their index."""
    return np.broadcast_to(np.arange(count, dtype=dtype).reshape(-1, *(1,) * len(shape)), (count, *shape)).copy()


def ramps(count: int, *shape: int, dtype: str = "float32") -> NDArray[Any]:
    """Equal samples that count through their elements."""
    return np.broadcast_to((np.arange(np.prod(shape)) % 200).astype(dtype).reshape(1, *shape), (count, *shape)).copy()


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


TWO = [spec("n", 4, name="a"), spec("n", "len", dtype="int32", name="b")]


@pytest.mark.parametrize("kind", ["npy", "npz", "npz of another name", "compressed"])
def test_float_arrays_are_fed_as_they_are(tmp_path: Path, kind: str) -> None:
    array = numbered(20, 3, 8, 8) - 7.25
    path = tmp_path / f"calib.{kind[:3] if kind.startswith('np') else 'npz'}"
    match kind:
        case "npy":
            np.save(path, array)
        case "npz":
            np.savez(path, pixels=array)
        case "compressed":
            np.savez_compressed(path, pixels=array)
        case _:
            np.savez(path, x=array)
    data = open_data(path, [IMAGE], resolve("imagenet", None), samples=12)
    assert (data.calibration_count, data.validation_count, data.preprocess) == (12, 8, None)
    assert data.description == f"12 samples from {path}"
    values = np.concatenate([join(data.calibration()), join(data.validation())])
    assert values.dtype == np.float32
    np.testing.assert_array_equal(np.sort(values[:, 0, 0, 0]), np.arange(20) - 7.25)
    assert not np.array_equal(values, array), "shuffled"


def test_several_inputs_stay_together(tmp_path: Path) -> None:
    path = save(tmp_path / "two.npz", b=numbered(10, 7, dtype="int64"), a=numbered(10, 4, dtype="float64"))
    data = open_data(path, TWO, NONE, batch_size=3)
    assert (data.calibration_count, data.validation_count) == (8, 2)
    for batch in data.calibration():
        assert (str(batch["a"].dtype), str(batch["b"].dtype)) == ("float32", "int32")
        np.testing.assert_array_equal(batch["a"][:, 0], batch["b"][:, 0])


@pytest.mark.parametrize("shape", [(9, 7, 3), (9, 7), (9, 7, 1)])
def test_pictures_in_arrays_go_through_the_preprocessing(tmp_path: Path, shape: tuple[int, ...]) -> None:
    preprocess = resolve("imagenet", None)
    data = open_data(save(tmp_path / "p.npz", pixels=numbered(6, *shape, dtype="uint8")), [IMAGE], preprocess)
    assert data.preprocess == preprocess
    values = np.concatenate([join(data.calibration()), join(data.validation())])
    assert values.shape == (6, 3, 8, 8)
    np.testing.assert_allclose(np.sort(values[:, 0, 4, 4]), (np.arange(6) / 255 - 0.485) / 0.229, atol=1e-5)


def test_uint8_arrays_for_a_uint8_model_are_fed_as_they_are(tmp_path: Path) -> None:
    path = save(tmp_path / "p.npz", pixels=numbered(6, 3, 8, 8, dtype="uint8"))
    data = open_data(path, [spec("n", 3, 8, 8, dtype="uint8")], NONE)
    assert data.preprocess is None
    assert join(data.calibration()).dtype == np.uint8


def test_single_sample_of_no_image_has_no_validation(tmp_path: Path) -> None:
    data = open_data(save(tmp_path / "one.npz", a=ramps(1, 4)), TWO[:1], NONE)
    assert (data.calibration_count, data.validation_count, list(data.validation())) == (1, 0, [])
    assert data.warnings[0].endswith("validated on nothing")


def test_single_sample_of_an_image_is_validated_on_built_in_ones(tmp_path: Path) -> None:
    data = open_data(save(tmp_path / "one.npz", pixels=ramps(1, 3, 8, 8)), [IMAGE], NONE)
    assert (data.calibration_count, data.validation_count, data.preprocess) == (1, 16, NONE)


@pytest.mark.parametrize(
    ("arrays", "inputs", "reason"),
    [
        ({"a": numbered(4, 4)}, TWO, "has arrays ['a'], the model's inputs are ['a', 'b']"),
        ({"a": numbered(4, 4), "c": numbered(4, 4)}, TWO, "has arrays ['a', 'c']"),
        ({"pixels": numbered(4, 3, 8, 8), "labels": numbered(4)}, [IMAGE], "has arrays ['labels', 'pixels']"),
        ({"a": numbered(4, 4), "b": numbered(3, 4, dtype="int32")}, TWO, "samples by array {'a': 4, 'b': 3}"),
        ({"pixels": numbered(0, 3, 8, 8)}, [IMAGE], "samples by array {'pixels': 0}"),
        ({"pixels": np.float32(1)}, [IMAGE], "samples by array {'pixels': 0}"),
        ({"pixels": numbered(4, 3, 8, 9)}, [IMAGE], "is float32 [4, 3, 8, 9], the model expects float32 [N, 3, 8, 8] or pictures uint8"),
        ({"pixels": numbered(3, 8, 8)}, [IMAGE], "is float32 [3, 8, 8]"),
        ({"pixels": numbered(4, 3, 8, 8, dtype="uint8")}, [IMAGE], "is uint8 [4, 3, 8, 8]"),
        ({"pixels": numbered(4, 0, 8, 3, dtype="uint8")}, [IMAGE], "is uint8 [4, ?, 8, 3]"),
        ({"a": numbered(4, 5)}, TWO[:1], "array 'a': is float32 [4, 5], the model expects float32 [N, 4]"),
        ({"a": numbered(4, 4, dtype="complex64")}, TWO[:1], "complex64"),
        ({"a": np.array([["x"] * 4] * 4)}, TWO[:1], "<U1"),
        ({"b": numbered(4, 4)}, TWO[1:], "array 'b': is float32 [4, 4], the model expects int32 [N, ?]"),
        ({"b": numbered(4, 4, dtype="int64") + 2**31}, TWO[1:], "NaN, Inf or a number too large for int32"),
        ({"a": numbered(4, 4, dtype="float64") + 1e300}, TWO[:1], "too large for float32"),
        ({"a": numbered(4, 4) * np.nan}, TWO[:1], "array 'a', sample"),
        ({"a": numbered(4, 4) + np.inf}, TWO[:1], "array 'a', sample"),
    ],
)  # fmt: skip
def test_unfit_arrays(tmp_path: Path, arrays: dict[str, Any], inputs: list[InputSpec], reason: str) -> None:
    assert reason in refusal(save(tmp_path / "bad.npz", **arrays), inputs)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    path = tmp_path / "bad.npz"
    np.savez(path, a=np.array([Bomb()] * 2, object), b=numbered(2, 3, dtype="int32"))
    assert "array 'a': Object arrays cannot be loaded" in refusal(path, TWO)
    np.save(tmp_path / "bad.npy", np.array([Bomb()] * 2, object))
    assert "Object arrays cannot be loaded" in refusal(tmp_path / "bad.npy", [IMAGE])
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["bad.npz", "bad.npy"])
@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 and then nothing", b"\x93NUMPY\x01\x00"])
def test_corrupt_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert "save plain numbers with numpy.savez" in refusal(tmp_path / name, [IMAGE])


def test_damaged_members(tmp_path: Path) -> None:
    path = save(tmp_path / "bad.npz", a=numbered(40, 4), b=numbered(40, 4, dtype="int32"))
    content = bytearray(path.read_bytes())
    content[300] ^= 0xFF
    path.write_bytes(content)
    assert "array 'a'" in refusal(path, TWO)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no array")
    assert "array" in refusal(path, [IMAGE])


def test_npy_needs_a_single_input(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", numbered(4, 4))
    assert "the model's inputs are ['a', 'b']" in refusal(tmp_path / "a.npy", TWO)


def test_truncated_and_empty_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", numbered(40, 4))
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content[:-100])
    assert "save plain numbers" in refusal(tmp_path / "a.npy", TWO[:1])
    np.save(tmp_path / "a.npy", numbered(0, 4))
    assert "samples by array {'a': 0}" in refusal(tmp_path / "a.npy", TWO[:1])


def test_npy_is_not_read_into_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "big.npy", ramps(2000, 3, 32, 32))  # 25 MB
    tracemalloc.start()
    list(open_data(tmp_path / "big.npy", [spec("n", 3, 32, 32)], NONE).calibration())
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 3_000_000
