"""Configuration files as transformers 5, timm and open_clip write them; where transformers is installed, its own pixels are the judge."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitq_compiler.preprocess import Preprocess, resolve

HALF = [0.5, 0.5, 0.5]
STEPS = {"do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": HALF, "image_std": HALF, "rescale_factor": 1 / 255}
SIGLIP = {
    **STEPS,
    "do_convert_rgb": True,
    "image_processor_type": "SiglipImageProcessor",
    "resample": 3,
    "size": {"height": 64, "width": 48},
}
CLIP = {**SIGLIP, "do_center_crop": True, "crop_size": {"height": 60, "width": 60}, "size": {"shortest_edge": 64}}
OPEN_CLIP = {
    "model_cfg": {"embed_dim": 512, "vision_cfg": {"image_size": 256, "layers": 12, "width": 768, "patch_size": 32}, "text_cfg": {}},
    "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": HALF, "interpolation": "bicubic", "resize_mode": "shortest"},
}
TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"in_chans": 3, "img_size": [224, 224]},
    "pretrained_cfg": {"input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"},
}


def found(folder: Path, **files: Any) -> Preprocess:
    """What is resolved for ``onnx/model.onnx`` in a folder with these files, named without ``.json``; ``onnx__`` stands for the folder."""
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    (folder / "onnx").mkdir(exist_ok=True)
    return resolve(None, folder / "onnx" / "model.onnx")


def test_a_processor_holds_its_image_processor(tmp_path: Path) -> None:
    given = found(tmp_path, processor_config={"processor_class": "SiglipProcessor", "image_processor": SIGLIP})
    assert (given.mean, given.std, given.resize, given.crop, given.interpolation) == ((0.5,) * 3, (0.5,) * 3, (64, 48), None, "bicubic")
    assert given.source == "processor_config.json one folder above the model (transformers)"


def test_an_older_processor_holds_none(tmp_path: Path) -> None:
    given = found(tmp_path, processor_config={"processor_class": "CLIPProcessor"}, preprocessor_config=CLIP)
    assert (given.resize, given.crop) == (64, (60, 60))
    assert given.source.startswith("preprocessor_config.json one folder above")


def test_the_nearest_file_wins(tmp_path: Path) -> None:
    given = found(tmp_path, preprocessor_config=CLIP, onnx__preprocessor_config=SIGLIP)
    assert (given.resize, given.source) == ((64, 48), "preprocessor_config.json beside the model (transformers)")


def test_only_the_folder_onnx_has_configs_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found(tmp_path, preprocessor_config=CLIP, other__unread={})
    assert resolve(None, tmp_path / "other" / "model.onnx").source.startswith("imagenet (default")
    monkeypatch.chdir(tmp_path / "onnx")
    assert resolve(None, Path("model.onnx")).resize == 64, "also where the path does not name that folder"


@pytest.mark.parametrize(
    ("changes", "resize", "crop"),
    [
        ({"size": {"height": 20, "width": 30}}, (20, 30), (60, 60)),
        ({"size": 40}, 40, (60, 60)),
        ({"size": 40, "crop_size": 30}, 40, (30, 30)),
        ({"size": [40, 50], "do_center_crop": False}, (40, 50), None),
        ({"size": 40, "do_center_crop": False}, (40, 40), None),
        ({"do_resize": False}, None, (60, 60)),
        ({"crop_size": {"shortest_edge": 32}}, 64, (32, 32)),  # BridgeTower's
        ({"size": {"shortest_edge": 800, "longest_edge": 1333}, "do_center_crop": False}, 800, None),  # DETR's
        ({"size": {"max_height": 32, "max_width": 40}, "do_center_crop": False}, (32, 40), None),
        ({"size": {"shortest_edge": 3136, "longest_edge": 1003520}, "do_center_crop": False}, None, None),  # numbers of pixels
        ({"size": {"min_pixels": 3136, "max_pixels": 1003520}, "do_center_crop": False}, None, None),
        ({"size": {"shortest_edge": 224}, "image_processor_type": "LevitImageProcessor"}, 256, (60, 60)),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875, "do_center_crop": False}, 256, (224, 224)),
    ],
)
def test_sizes(tmp_path: Path, changes: Mapping[str, Any], resize: Any, crop: Any) -> None:
    given = found(tmp_path, preprocessor_config={**CLIP, **changes})
    assert (given.resize, given.crop) == (resize, crop)


def test_what_is_padded_fills_the_frame_and_the_report_says_so(tmp_path: Path) -> None:
    padded = {**SIGLIP, "do_pad": True, "size": {"longest_edge": 1024}, "pad_size": {"height": 1024, "width": 1024}}  # SAM's
    given = found(tmp_path, preprocessor_config=padded)
    assert given.resize == 1024
    assert given.source.endswith("(transformers, pictures fill the frame instead of being padded)")


def without(config: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The configuration with some entries left out."""
    return {name: value for name, value in config.items() if name not in names}


@pytest.mark.parametrize(
    ("config", "mean", "rescale"),
    [
        ({**SIGLIP, "do_normalize": False}, (0.0,), 1 / 255),
        ({**SIGLIP, "do_rescale": False}, (0.5,) * 3, 1.0),
        (without(SIGLIP, "do_rescale", "rescale_factor"), (0.5,) * 3, 1 / 255),  # from before there was such a step
        (without(SIGLIP, "do_normalize"), (0.5,) * 3, 1 / 255),
        (without(SIGLIP, "do_normalize", "image_mean", "image_std"), (0.0,), 1 / 255),  # a class without the step
        (without(SIGLIP, *STEPS), (0.0,), 1.0),
        ({**SIGLIP, "image_mean": 0.25, "image_std": 0.5}, (0.25,), 1 / 255),
    ],
)
def test_steps_that_are_switched_off_or_missing(tmp_path: Path, config: dict[str, Any], mean: Any, rescale: float) -> None:
    given = found(tmp_path, preprocessor_config={**config, "do_resize": True})
    assert (given.mean, given.rescale) == (mean, rescale)


def test_channels_in_reverse(tmp_path: Path) -> None:
    mobile = {**without(CLIP, "do_normalize"), "do_flip_channel_order": True, "image_processor_type": "MobileViTImageProcessor"}
    result = found(tmp_path, preprocessor_config=mobile)(Image.new("RGB", (60, 60), (255, 0, 51)), 60, 60, 3)
    np.testing.assert_allclose(result[:, 0, 0], [0.2, 0.0, 1.0], atol=1e-6)


def test_timm(tmp_path: Path) -> None:
    given = found(tmp_path, config={**TIMM, "pretrained_cfg": {**TIMM["pretrained_cfg"], "mean": [0.4] * 3, "std": None}})  # type: ignore[dict-item]
    assert (given.mean, given.std, given.resize, given.crop) == ((0.4,) * 3, (0.229, 0.224, 0.225), 248, (224, 224))
    assert given.source == "config.json one folder above the model (timm)"


@pytest.mark.parametrize(
    ("changes", "size", "resize", "crop"),
    [
        ({}, 256, 256, (256, 256)),
        ({"resize_mode": "squash"}, 384, (384, 384), (384, 384)),
        ({}, [240, 320], 240, (240, 320)),
        ({"resize_mode": "longest"}, 64, 64, (64, 64)),
    ],
)
def test_open_clip(tmp_path: Path, changes: Mapping[str, Any], size: Any, resize: Any, crop: Any) -> None:
    model = {**OPEN_CLIP["model_cfg"], "vision_cfg": {"image_size": size}}
    given = found(tmp_path, open_clip_config={"model_cfg": model, "preprocess_cfg": {**OPEN_CLIP["preprocess_cfg"], **changes}})
    assert (given.mean, given.std, given.resize, given.crop) == ((0.1, 0.2, 0.3), (0.5,) * 3, resize, crop)
    assert given.source == "open_clip_config.json one folder above the model (open_clip)"


def test_open_clip_leaves_out_what_is_usual(tmp_path: Path) -> None:
    given = found(tmp_path, open_clip_config={"model_cfg": {}, "preprocess_cfg": {}})
    assert (round(given.mean[0], 3), given.crop, given.interpolation) == (0.481, (224, 224), "bicubic")


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *(
            (name, {})
            for name in ("ViT", "DeiT", "Beit", "CLIP", "Siglip", "Bit", "Levit", "ConvNext", "PoolFormer", "Pvt", "DPT", "Segformer")
        ),
        ("ConvNext", {"size": {"shortest_edge": 224}}),
        ("MobileViT", {"size": {"shortest_edge": 288}}),
        ("CLIP", {"do_center_crop": False}),
        ("ViT", {"do_rescale": False, "do_normalize": False}),
    ],
)
def test_pixels_as_transformers_makes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    processor = getattr(importlib.import_module("transformers"), f"{name}ImageProcessorPil")(**changes)
    processor.save_pretrained(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((576, 384), Image.Resampling.BICUBIC)  # crops have a middle
    (expected,) = processor(picture, return_tensors="np")["pixel_values"]
    given = resolve(None, tmp_path / "model.onnx")
    np.testing.assert_allclose(given(picture, *expected.shape[1:], 3), expected, rtol=0, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
