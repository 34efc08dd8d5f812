"""Which part of preprocessing is left to do before a graph that does some of it."""

from dataclasses import replace

import numpy as np
import pytest

from vitq_compiler.blocks.picture import Affine, Picture
from vitq_compiler.graph import InputSpec, Layout
from vitq_compiler.preprocess import Preprocess, resolve
from vitq_compiler.preprocess_in_graph import leave_out

IMAGENET = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
HALF = np.full(1, 0.5), np.full(1, 0.5)
CLIP = np.array((0.481, 0.458, 0.408)), np.array((0.269, 0.261, 0.276))
SPEC = InputSpec("image", np.dtype("float32"), (0, 3, 32, 32))
NORMALIZATIONS = {"imagenet": IMAGENET, "inception": HALF, "clip": CLIP}


def normalizing(mean: np.ndarray, std: np.ndarray, top: float = 1.0) -> Affine:
    """(x / top - mean) / std"""
    return Affine(1 / (top * std), -mean / std)


def picture(affine: Affine, *, resized: bool = False) -> Picture:
    return Picture("image", Layout(batched=True, channels=1), affine, resized)


def found(name: str) -> Preprocess:
    """As a configuration file says it."""
    return replace(resolve(name, None), source="a file")


def arriving(preprocess: Preprocess, affine: Affine) -> np.ndarray:
    """What a graph makes of black, grey and white."""
    pixels = np.broadcast_to(np.array([0, 128, 255], np.uint8), (3, 1, 3))
    return affine.scale[:, None, None] * preprocess.normalize(pixels) + affine.offset[:, None, None]


def expected(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    levels = np.broadcast_to(np.array([0, 128, 255]) / 255, (3, 1, 3))
    return (levels - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize("top", [1.0, 255.0])
@pytest.mark.parametrize("name", NORMALIZATIONS)
@pytest.mark.parametrize("chosen", ["default", "file", "told"])
def test_what_a_graph_normalizes_is_normalized_once(name: str, top: float, chosen: str) -> None:
    affine = normalizing(*NORMALIZATIONS[name], top)
    wanted = resolve(None, None) if chosen == "default" else found(name) if chosen == "file" else resolve(name, None)
    left, warnings = leave_out(wanted, picture(affine), SPEC, told=chosen == "told")
    np.testing.assert_allclose(arriving(left, affine), expected(*NORMALIZATIONS[name]), atol=0.02)
    assert warnings == []
    assert ("takes pixels 0..255" in left.source, "takes pixels 0..1" in left.source) == (top == 255, top == 1)
    assert left.source.endswith(f"; sizes as for {wanted.source}")
    assert (left.resize, left.crop) == (wanted.resize, wanted.crop)


def test_the_report_says_what_the_graph_does() -> None:
    left, _ = leave_out(resolve(None, None), picture(normalizing(*IMAGENET, 255), resized=True), SPEC, told=False)
    assert "itself computes (x / 255 - 0.485/0.456/0.406) / 0.229/0.224/0.225; it also resizes or crops" in left.source


@pytest.mark.parametrize("text", ["none", "mean=0,std=1"])
def test_what_the_user_tells_is_done_outside(text: str) -> None:
    affine = normalizing(*IMAGENET, 255.0 if text == "none" else 1.0)
    wanted = resolve(text, None)
    left, warnings = leave_out(wanted, picture(affine), SPEC, told=True)
    assert warnings == []
    np.testing.assert_allclose(arriving(left, affine), expected(*IMAGENET), atol=0.02)
    assert left.source.startswith(f"{wanted.source}; the graph goes on with (x")


def test_what_the_user_tells_is_done_though_it_fits_badly() -> None:
    wanted = resolve("mean=0,std=1", None)
    left, (warning,) = leave_out(wanted, picture(normalizing(*IMAGENET, 255)), SPEC, told=True)
    assert (left.mean, left.std, left.rescale) == (wanted.mean, wanted.std, wanted.rescale)
    assert "does not fit preprocessing by explicit (--preprocess mean=0,std=1): say with --preprocess" in warning


def test_a_graph_that_only_scales_gets_pixels_by_default_and_the_rest_where_a_file_says_so() -> None:
    scaling = picture(Affine(np.full(1, 1 / 255), np.zeros(1)))
    left, warnings = leave_out(resolve(None, None), scaling, SPEC, told=False)
    assert (left.rescale, left.mean, left.std, warnings) == (1.0, (0.0,), (1.0,), [])
    assert "itself computes x / 255;" in left.source
    rest, warnings = leave_out(found("imagenet"), scaling, SPEC, told=False)
    np.testing.assert_allclose(arriving(rest, scaling.affine), expected(*IMAGENET), atol=0.02)
    assert "without its scale: the graph itself computes" in rest.source
    assert warnings == []


def test_a_file_that_contradicts_the_graph_is_told() -> None:
    affine = normalizing(*HALF, 255)
    left, (warning,) = leave_out(found("imagenet"), picture(affine), SPEC, told=False)
    np.testing.assert_allclose(arriving(left, affine), expected(np.full(3, 0.5), np.full(3, 0.5)), atol=0.02)
    assert warning == "a file differs from the graph, which itself computes (x / 255 - 0.5) / 0.5: the graph's is taken"


@pytest.mark.parametrize("wanted", [resolve(None, None), found("imagenet")])
def test_a_graph_that_changes_one_normalization_into_another_gets_the_first(wanted: Preprocess) -> None:
    """As torchvision's Inception and GoogLeNet do."""
    mean, std = IMAGENET
    affine = Affine(std / 0.5, (mean - 0.5) / 0.5)
    left, warnings = leave_out(wanted, picture(affine), SPEC, told=False)
    np.testing.assert_allclose(arriving(left, affine), expected(np.full(3, 0.5), np.full(3, 0.5)), atol=0.02)
    assert warnings == []


def test_older_networks_subtract_a_mean_of_pixels() -> None:
    affine = Affine(np.ones(1), -255 * IMAGENET[0])
    left, warnings = leave_out(resolve(None, None), picture(affine), SPEC, told=False)
    assert (left.rescale, left.mean, left.std, warnings) == (1.0, (0.0,), (1.0,), [])


def test_a_normalization_that_fits_nothing_is_told() -> None:
    left, (warning,) = leave_out(resolve(None, None), picture(Affine(np.full(1, 40.0), np.full(1, 9.0))), SPEC, told=False)
    assert left.rescale == 1 / 255
    assert "the graph itself computes" in warning


def test_bytes_are_given_as_they_are() -> None:
    spec = replace(SPEC, dtype=np.dtype(np.uint8))
    left, warnings = leave_out(resolve(None, None), picture(normalizing(*IMAGENET, 255)), spec, told=False)
    assert left.source.startswith("the graph takes pixels 0..255 as uint8 and itself computes (x / 255 - 0.485")
    plain, _ = leave_out(resolve(None, None), picture(Affine(np.ones(1), np.zeros(1))), spec, told=False)
    assert plain.source.startswith("the graph takes pixels 0..255 as uint8; sizes as for")
    assert warnings == []


def test_a_graph_that_leaves_pictures_alone_changes_nothing() -> None:
    wanted = resolve("clip", None)
    assert leave_out(wanted, picture(Affine(np.ones(1), np.zeros(1))), SPEC, told=True) == (wanted, [])


def test_grey_pictures() -> None:
    affine = Affine(np.full(1, 1 / (255 * 0.3081)), np.full(1, -0.1307 / 0.3081))
    left, warnings = leave_out(resolve(None, None), picture(affine), replace(SPEC, shape=(0, 1, 28, 28)), told=False)
    assert (left.rescale, warnings) == (1.0, [])
