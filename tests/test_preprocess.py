"""Preprocessing: exact numbers, sizes as torchvision has them, every Pillow mode, and the decision which to use."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitq_compiler.errors import DataError
from vitq_compiler.preprocess import NAMES, Preprocess, resolve

NONE = resolve("none", None)
IMAGENET = resolve("imagenet", None)

TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 1000,
    "pretrained_cfg": {
        "tag": "augreg_in21k_ft_in1k",
        "input_size": [3, 224, 224],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.5, 0.5],
        "classifier": "head",
    },
}
VIT = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "ViTImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}
CLIP = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}
DINO = VIT | {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "image_processor_type": "BitImageProcessor",
    "resample": 3,
    "size": {"shortest_edge": 256},
}


def write(folder: Path, name: str, content: Any) -> Path:
    """A model's path beside a configuration file."""
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder / "model.onnx"


def gradient(height: int, width: int) -> Image.Image:
    """Red grows to the right, green downwards; blue is 128."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


# Numbers


def test_normalisation_is_exact() -> None:
    pixels = np.array([[[0, 255], [51, 102]]] * 3, np.uint8).transpose(1, 2, 0)
    expected = [(np.array([[0, 1], [0.2, 0.4]]) - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    result = replace(IMAGENET, resize=None, crop=None)(Image.fromarray(pixels), 2, 2, 3)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


def test_none_is_raw_pixels() -> None:
    picture = gradient(16, 16)
    np.testing.assert_array_equal(NONE(picture, 16, 16, 3), np.asarray(picture, np.float32).transpose(2, 0, 1))


def test_none_resizes_without_cropping() -> None:
    result = NONE(gradient(40, 80), 20, 20, 3)
    assert result.shape == (3, 20, 20)
    assert result[0, 0, 0] < 10
    assert result[0, 0, -1] > 245, "both ends of the long side are still there"


def test_luminance_takes_the_average_mean() -> None:
    result = replace(IMAGENET, mean=(0.2, 0.4, 0.6), std=(0.5,), resize=None, crop=None)(Image.new("RGB", (4, 4), (255, 0, 0)), 4, 4, 1)
    assert result.shape == (1, 4, 4)
    np.testing.assert_allclose(result, (76 / 255 - 0.4) / 0.5, atol=1e-6)  # 0.299 * 255 = 76


def test_four_channels_keep_alpha_as_it_is() -> None:
    result = IMAGENET(Image.new("RGBA", (4, 4), (255, 0, 0, 102)), 4, 4, 4)
    np.testing.assert_allclose(result[:, 0, 0], [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225, 0.4], atol=1e-5)


def test_mean_that_does_not_fit_the_channels() -> None:
    with pytest.raises(DataError, match=r"mean has 4 numbers, the model has 3 channels; pass --preprocess"):
        replace(IMAGENET, mean=(0.1, 0.2, 0.3, 0.4))(gradient(8, 8), 8, 8, 3)
    with pytest.raises(DataError, match="2 channels"):
        IMAGENET(gradient(8, 8), 8, 8, 2)


# Sizes


@pytest.mark.parametrize(
    ("text", "image", "model", "expected"),
    [
        ("imagenet", (500, 375), (224, 224), (341, 256)),  # torchvision: int(256 * 500 / 375)
        ("imagenet", (375, 500), (224, 224), (256, 341)),
        ("imagenet", (375, 500), (32, 32), (37, 49)),  # a small model keeps the ratio 256 / 224
        ("inception", (400, 400), (224, 224), (248, 248)),
        ("imagenet,resize=512x256", (90, 500), (224, 224), (512, 256)),
        ("imagenet,resize=256x320,crop=none", (90, 500), (224, 192), (224, 192)),
        ("imagenet,crop=none", (300, 600), (224, 224), (256, 512)),
        ("imagenet,resize=100,crop=none", (300, 600), (224, 224), (224, 448)),  # grows until it covers the model
        ("imagenet,resize=none", (300, 600), (224, 224), (300, 600)),
        ("imagenet,resize=none", (100, 300), (224, 224), (224, 672)),
        ("imagenet", (100, 100), (100, 400), (457, 457)),  # wide model: 256 * 400 / 224
        ("none", (50, 900), (20, 30), (20, 30)),
    ],
)
def test_resized(text: str, image: tuple[int, int], model: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resolve(text, None).resized(*image, *model) == expected


sizes = st.integers(1, 600)


@given(st.sampled_from(["imagenet", "none", "imagenet,resize=none", "imagenet,crop=none", "clip,crop=200x100"]), sizes, sizes, sizes, sizes)
def test_resized_covers_the_model(text: str, image_height: int, image_width: int, height: int, width: int) -> None:
    size = resolve(text, None).resized(image_height, image_width, height, width)
    assert size[0] >= height
    assert size[1] >= width


def test_crop_is_from_the_centre() -> None:
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[2:6, 4:8] = 200
    result = resolve("none,crop=4", None)(Image.fromarray(pixels), 4, 4, 3)
    np.testing.assert_array_equal(result, np.full((3, 4, 4), 200, np.float32))


def test_matches_resize_then_crop() -> None:
    picture = gradient(375, 500)
    by_hand = picture.resize((341, 256), Image.Resampling.BICUBIC).crop((58, 16, 282, 240))
    np.testing.assert_array_equal(IMAGENET.pixels(picture, 224, 224, 3), np.asarray(by_hand).transpose(2, 0, 1))


def test_a_strip_is_never_blown_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 x 4000 at a shorter side of 256 would be a million pixels wide: 786 MB."""
    made: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def note(image: Image.Image, size: tuple[int, int], *rest: Any, **named: Any) -> Image.Image:
        made.append(size)
        return resize(image, size, *rest, **named)

    monkeypatch.setattr(Image.Image, "resize", note)
    strip = Image.fromarray(np.repeat(np.linspace(0, 255, 4000, dtype=np.uint8)[None, :, None], 3, 2))
    result = resolve("none,resize=256,crop=224", None)(strip, 224, 224, 3)
    assert result.shape == (3, 224, 224)
    np.testing.assert_allclose(result, 127, atol=2)
    assert made == [(224, 224)]


def test_big_strip_route_gives_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = gradient(300, 500)
    expected = NONE.pixels(picture, 64, 64, 3), IMAGENET.pixels(picture, 64, 64, 3)
    monkeypatch.setattr("vitq_compiler.preprocess._LARGEST_EXCESS", 0)
    result = NONE.pixels(picture, 64, 64, 3), IMAGENET.pixels(picture, 64, 64, 3)
    np.testing.assert_allclose(np.stack(result).astype(int), np.stack(expected).astype(int), atol=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("imagenet", (224, 224)), ("clip,crop=none,resize=336", (336, 336)), ("none", (224, 224)), ("none,resize=8x9", (8, 9))],
)
def test_size_for_a_model_that_takes_any(text: str, expected: tuple[int, int]) -> None:
    assert resolve(text, None).default_size() == expected


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_interpolations_are_pillows(interpolation: str) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
    by_hand = picture.resize((6, 6), Image.Resampling[interpolation.upper()])
    result = resolve(f"none,interpolation={interpolation}", None).pixels(picture, 6, 6, 3)
    np.testing.assert_array_equal(result, np.asarray(by_hand).transpose(2, 0, 1))


# Modes


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (4, 4), 77), (77, 77, 77)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.new("RGB", (4, 4), (1, 2, 3)).quantize(), (1, 2, 3)),
        (Image.new("RGBA", (4, 4), (200, 100, 0, 255)), (200, 100, 0)),
        (Image.new("RGBA", (4, 4), (200, 100, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("LA", (4, 4), (50, 255)), (50, 50, 50)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("YCbCr", (4, 4), (128, 128, 128)), (128, 128, 128)),
        (Image.fromarray(np.full((4, 4), 257 * 40, np.uint16)), (40, 40, 40)),
        (Image.fromarray(np.full((4, 4), 200, np.uint16)), (1, 1, 1)),
        (Image.fromarray(np.full((4, 4), 257 * 40, np.int32)), (40, 40, 40)),
        (Image.fromarray(np.full((4, 4), 40, np.int32)), (40, 40, 40)),
        (Image.fromarray(np.full((4, 4), 0.2, np.float32)), (51, 51, 51)),
        (Image.fromarray(np.full((4, 4), 60.0, np.float32)), (60, 60, 60)),
        (Image.fromarray(np.full((4, 4), -3.0, np.float32)), (0, 0, 0)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_modes(image: Image.Image, expected: tuple[int, int, int]) -> None:
    assert tuple(NONE.pixels(image, 4, 4, 3)[:, 0, 0].tolist()) == expected


def test_palette_with_a_clear_colour_is_laid_on_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    image.info["transparency"] = 1
    assert NONE.pixels(image, 4, 4, 3).min() == 255


def test_floats_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        NONE(Image.fromarray(np.full((4, 4), np.nan, np.float32)), 4, 4, 3)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    upright = gradient(40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        assert image.size == (40, 60)
        np.testing.assert_array_equal(NONE(image, 40, 60, 3), NONE(upright, 40, 60, 3))


def test_big_jpeg_decoded_small_looks_the_same(tmp_path: Path) -> None:
    picture = gradient(1200, 1600)
    picture.save(tmp_path / "big.jpg", quality=95)
    with Image.open(tmp_path / "big.jpg") as image:
        result = resolve("none,resize=64,crop=56", None)(image, 56, 56, 3)
        assert image.size == (400, 300), "decoded at a quarter"
    np.testing.assert_allclose(result, resolve("none,resize=64,crop=56", None)(picture, 56, 56, 3), atol=4)


# The text


def test_names_are_known() -> None:
    assert NAMES == ("imagenet", "inception", "clip", "none")
    for name in NAMES:
        assert resolve(name, None).source == f"{name} (--preprocess)"
    assert resolve("inception", None).mean == resolve(" Inception ", None).std == (0.5, 0.5, 0.5)
    assert resolve("clip", None).mean == (0.48145466, 0.4578275, 0.40821073)


def test_grammar() -> None:
    text = "mean=0.5/0.4/0.3,std=0.5,resize=256,crop=224x192,scale=1/128,interpolation=lanczos"
    expected = Preprocess((0.5, 0.4, 0.3), (0.5,), 1 / 128, 256, (224, 192), "lanczos", f"explicit (--preprocess {text})")
    assert resolve(text, None) == expected
    assert resolve("mean=0, std=1", None) == Preprocess(
        (0.0,), (1.0,), 1 / 255, None, None, "bicubic", "explicit (--preprocess mean=0, std=1)"
    )
    assert resolve("imagenet,resize=384x320,crop=none,scale=0.5", None) == replace(
        IMAGENET, resize=(384, 320), crop=None, rescale=0.5, source="imagenet (--preprocess imagenet,resize=384x320,crop=none,scale=0.5)"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is unknown"),
        ("imagnet", "'imagnet' is unknown"),
        ("mean=0.5", "mean and std are needed together"),
        ("imagenet,mean", "'mean' is given twice or not one of"),
        ("imagenet,median=1", "'median=1'"),
        ("imagenet,crop=", "'crop='"),
        ("imagenet,crop=1,crop=2", "given twice"),
        ("imagenet,mean=a/b/c", "'a'"),
        ("imagenet,mean=0.1/0.2", "1, 3 or 4"),
        ("imagenet,mean=nan", "finite"),
        ("imagenet,std=0", "greater than 0"),
        ("imagenet,std=-1", "greater than 0"),
        ("imagenet,scale=1/0", "0"),
        ("imagenet,resize=0", "from 1 to"),
        ("imagenet,crop=-4", "from 1 to"),
        ("imagenet,resize=1x2x3", "2x3"),
        ("imagenet,crop=99999", "from 1 to 16384 pixels"),
        ("imagenet,interpolation=cubic", "nearest, bilinear, bicubic, lanczos"),
    ],
)
def test_text_that_makes_no_sense(text: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        resolve(text, None)
    message = str(caught.value)
    assert reason in message
    assert message.startswith(f"--preprocess {text!r}: ")
    assert "; give one of imagenet, inception, clip, none, or mean=" in message
    assert "\n" not in message


def test_text_wins_over_files(tmp_path: Path) -> None:
    assert resolve("clip", write(tmp_path, "config.json", TIMM)).source == "clip (--preprocess)"


# Configuration files


def test_imagenet_by_default(tmp_path: Path) -> None:
    assert resolve(None, None) == replace(IMAGENET, source="imagenet (default)", assumed=True)
    source = "imagenet (default: no preprocessor_config.json or config.json with mean and std beside the model)"
    assert resolve(None, tmp_path / "model.onnx") == replace(IMAGENET, source=source, assumed=True)


def test_timm(tmp_path: Path) -> None:
    model = write(tmp_path, "config.json", TIMM)
    expected = Preprocess(
        (0.5, 0.5, 0.5), (0.25, 0.5, 0.5), 1 / 255, 248, (224, 224), "bicubic", "config.json beside the model (timm)"
    )  # floor(224 / 0.9)
    assert resolve(None, model) == expected
    assert resolve(None, tmp_path) == expected, "the folder of a model will do"
    (tmp_path / "config.json").write_text(json.dumps(TIMM), encoding="utf-8-sig")
    assert resolve(None, model) == expected, "some editors write a byte order mark"
    write(tmp_path, "config.json", TIMM["pretrained_cfg"])
    assert resolve(None, model) == expected, "older files have the settings at the top"


def test_timm_squash_and_defaults(tmp_path: Path) -> None:
    settings = {"mean": [0, 0, 0], "std": [1, 1, 1], "input_size": [3, 384, 384], "crop_pct": 1.0, "crop_mode": "squash"}
    found = resolve(None, write(tmp_path, "config.json", {"pretrained_cfg": settings}))
    assert (found.resize, found.crop, found.interpolation) == ((384, 384), (384, 384), "bicubic")
    found = resolve(None, write(tmp_path, "config.json", {"mean": 0.5, "std": 0.5}))
    assert (found.mean, found.resize, found.crop) == ((0.5,), 256, (224, 224))


def test_transformers(tmp_path: Path) -> None:
    half, source = (0.5, 0.5, 0.5), "preprocessor_config.json beside the model (transformers)"
    vit = resolve(None, write(tmp_path, "preprocessor_config.json", VIT))
    assert vit == Preprocess(half, half, 0.00392156862745098, (224, 224), None, "bilinear", source)
    clip = resolve(None, write(tmp_path, "preprocessor_config.json", CLIP))
    assert clip == replace(resolve("clip", None), source=source)
    dino = resolve(None, write(tmp_path, "preprocessor_config.json", DINO))
    assert (dino.resize, dino.crop, dino.interpolation) == (256, (224, 224), "bicubic")


@pytest.mark.parametrize(
    ("changes", "resize", "crop"),
    [
        ({"size": 224}, (224, 224), None),  # older ViT files: both sides
        (
            {"feature_extractor_type": "DeiTFeatureExtractor", "image_processor_type": None, "size": 256, "crop_size": 224},
            (256, 256),
            (224, 224),
        ),
        ({"size": 224, "do_center_crop": False, "crop_size": 200}, (224, 224), None),
        ({"do_resize": False}, None, None),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875, "image_processor_type": "ConvNextImageProcessor"}, 256, (224, 224)),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875, "image_processor_type": "ConvNextImageProcessor"}, (384, 384), (384, 384)),
    ],
)
def test_transformers_sizes(tmp_path: Path, changes: dict[str, Any], resize: Any, crop: Any) -> None:
    found = resolve(None, write(tmp_path, "preprocessor_config.json", VIT | changes))
    assert (found.resize, found.crop) == (resize, crop)


def test_transformers_switches(tmp_path: Path) -> None:
    found = resolve(None, write(tmp_path, "preprocessor_config.json", VIT | {"do_normalize": False, "do_rescale": False}))
    assert (found.mean, found.std, found.rescale) == ((0.0,), (1.0,), 1.0)


def test_preprocessor_config_comes_first_and_silent_files_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, "config.json", TIMM)
    assert "transformers" in resolve(None, write(tmp_path, "preprocessor_config.json", VIT)).source
    assert "timm" in resolve(None, write(tmp_path, "preprocessor_config.json", {"sampling_rate": 16000})).source


@pytest.mark.parametrize("content", [{"model_type": "vit", "image_size": 384}, [1, 2], "3", {"mean": 1}, {"pretrained_cfg": "augreg"}])
def test_files_of_other_tools_are_ignored(tmp_path: Path, content: Any) -> None:
    assert resolve(None, write(tmp_path, "config.json", content)).source.startswith("imagenet (default: ")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", "{not json", "Expecting property name"),
        ("config.json", {"mean": ["a"], "std": [1]}, "'a'"),
        ("config.json", {"mean": [0.5] * 3, "std": [0, 1, 1]}, "greater than 0"),
        ("config.json", {"mean": [0.5] * 3, "std": [1] * 3, "input_size": 224}, "unpack"),
        ("config.json", {"mean": [0.5] * 3, "std": [1] * 3, "interpolation": "area"}, "'area' is unknown"),
        ("preprocessor_config.json", {"do_normalize": True, "do_resize": True}, "'image_mean' is missing"),
        ("preprocessor_config.json", VIT | {"size": {"edge": 1024}}, "'height' is missing"),
        ("preprocessor_config.json", VIT | {"resample": 5}, "'5' is unknown"),
        ("preprocessor_config.json", VIT | {"image_mean": None}, "NoneType"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, content: Any, reason: str) -> None:
    model = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        resolve(None, model)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: ")
    assert reason in message
    assert message.endswith("; repair the file, or pass --preprocess")
    assert "\n" not in message
    assert resolve("imagenet", model) == IMAGENET, "and the remedy works"
