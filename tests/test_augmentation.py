"""Altered copies: mirrored and moved as told by the seed, alike for what belongs together, and nothing else touched."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitq_compiler.augmentation import REACH, altered
from vitq_compiler.data import open_data
from vitq_compiler.errors import DataError
from vitq_compiler.graph import InputSpec
from vitq_compiler.preprocess import resolve

RANDOM = np.random.default_rng(0)


@given(seed=st.integers(0, 2**20), channels_last=st.booleans())
def test_every_copy_is_its_picture_mirrored_or_not_and_moved(seed: int, channels_last: bool) -> None:
    rows, columns = np.meshgrid(np.arange(16), np.arange(24), indexing="ij")
    pictures = np.stack([np.stack([rows, columns]).astype(np.float32)] * 5)
    axes = (2, 3)
    if channels_last:
        pictures, axes = pictures.transpose(0, 2, 3, 1), (1, 2)
    found = altered({"x": pictures}, {"x": axes}, (seed,))["x"]
    for picture in found.transpose(0, 3, 1, 2) if channels_last else found:
        down, right = np.diff(picture[0], axis=0), np.diff(picture[1], axis=1)
        assert set(np.unique(down)) <= {0, 1}
        assert (down == 0).sum(0).max() <= 16 // REACH, "uncovered rows repeat the edge"
        assert len(set(np.unique(right)) - {0}) == 1, "one direction all along"
        assert abs(float(np.median(picture[0])) - 7.5) <= 16 / REACH


def test_the_seed_decides_and_inputs_go_together() -> None:
    feed = {"a": RANDOM.normal(size=(8, 3, 16, 16)), "b": np.arange(8), "c": RANDOM.normal(size=(8, 1, 32, 32))}
    feed["c"] = feed["a"][:, :1].repeat(2, 2).repeat(2, 3)
    first, again, other = (altered(feed, {"a": (2, 3), "c": (2, 3)}, (seed,)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first["a"], again["a"])
    assert (first["a"] != other["a"]).any()
    np.testing.assert_array_equal(first["b"], feed["b"])
    flipped = [bool(altered({"x": np.arange(16.0).reshape(1, 1, 1, 16)}, {"x": (2, 3)}, (s,))["x"][0, 0, 0, 5] > 8) for s in range(40)]
    assert 8 < sum(flipped) < 32, "some are mirrored"


def test_copies_follow_their_batch(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", image=RANDOM.normal(size=(10, 3, 8, 8)).astype(np.float32))
    inputs = [InputSpec("image", np.dtype(np.float32), (0, 3, 8, 8))]
    options = {"samples": 6, "validation_samples": 2, "batch_size": 3}
    plain = list(open_data(tmp_path / "x.npz", inputs, resolve("none", None), **options).calibration())
    data = open_data(tmp_path / "x.npz", inputs, resolve("none", None), augment=2, **options)
    assert (data.calibration_count, data.copies, data.validation_count) == (18, 3, 2)
    assert "2 altered copies of each" in data.description
    feeds = list(data.calibration())
    assert len(feeds) == 6
    for batch, feed in enumerate(plain):
        np.testing.assert_array_equal(feeds[3 * batch]["image"], feed["image"])
        assert (feeds[3 * batch + 1]["image"] != feeds[3 * batch + 2]["image"]).any()


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.arange(20, dtype=np.float32).reshape(4, 5))
    with pytest.raises(DataError, match="2 altered copies are asked for, and the model takes no pictures: leave them out"):
        open_data(tmp_path / "x.npz", [InputSpec("x", np.dtype(np.float32), (0, 5))], resolve("none", None), augment=2)
