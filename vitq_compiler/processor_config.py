"""What the configuration files beside a model say of preprocessing, whoever wrote them: transformers, timm or open_clip.

Read as their own readers read them: sizes as numbers or nested, steps that are switched off, and defaults for what a file leaves out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Config = Mapping[str, Any]
Settings = dict[str, Any]  # fields of `preprocess.Preprocess`, all but its source

NAMES = ("processor_config.json", "preprocessor_config.json", "open_clip_config.json", "config.json")
"""The files that are read, in the order in which transformers itself prefers them."""

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of the pictures that many models were trained on: what timm and open_clip take where a file is silent."""

_DEFAULT_SIZE = 224
_LARGEST_EDGE = 1 << 14  # a "longest_edge" beyond this is a budget of pixels
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def config_files(folders: Sequence[Path]) -> Iterator[Path]:
    """The files there are that may say something, those of the first folder first."""
    return (folder / name for folder in folders for name in NAMES if (folder / name).is_file())


def read_config(path: Path) -> tuple[str, Settings] | None:
    """The library that wrote a file, and the preprocessing that it tells; None where it says nothing of that.

    The name of the library is followed by what of its preprocessing is left out, where something is.

    Raises:
        ValueError, TypeError, LookupError, AttributeError, OSError: it cannot be read, or is malformed.
    """
    config = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(config, dict):
        return None
    for part, read in _READERS:
        if (found := part(config)) is not None:
            return read(found)
    return None


def numbers(values: Any) -> tuple[float, ...]:
    """One number or a list of them as floats."""
    return tuple(float(v) for v in (values if isinstance(values, list | tuple) else [values]))


# Which part of a file tells it, by library


def _transformers_part(config: Config) -> Config | None:
    """An image processor, which transformers 5 puts into the configuration of a processor for pictures and text."""
    nested = config.get("image_processor")
    config = nested if isinstance(nested, dict) else config
    return config if any(key in config for key in ("image_mean", "do_rescale", "do_resize")) else None


def _open_clip_part(config: Config) -> Config | None:
    return config if isinstance(config.get("preprocess_cfg"), dict) else None


def _timm_part(config: Config) -> Config | None:
    """In a file of its own, in the configuration of the model, or in that of transformers' wrapper around it."""
    nested = config.get("pretrained_cfg")
    config = nested if isinstance(nested, dict) else config
    return config if "mean" in config and "std" in config else None


# What it tells


def _from_transformers(config: Config) -> tuple[str, Settings]:
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    # What a file leaves out is as its class has it: almost all normalize, and what normalizes rescales, also in files from before that.
    normalizes = config.get("do_normalize", "image_mean" in config and not kind.startswith("MobileViT"))
    mean, std = (numbers(config["image_mean"]), numbers(config["image_std"])) if normalizes else ((0.0,), (1.0,))
    rescale = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", normalizes) else 1.0
    resample = config.get("resample", 2)
    crops = config.get("do_center_crop", "crop_size" in config)
    crop = _pair(config.get("crop_size", _DEFAULT_SIZE)) if crops else None
    size = config.get("size") if config.get("do_resize", True) else None
    # A bare number is the shorter side where a crop follows, and both sides elsewhere; DeiT's squeezes and then crops.
    resize = _resized(size, square=not crops or kind.startswith(("ViT", "DeiT", "Beit")))
    if kind.startswith("Levit") and isinstance(resize, int):  # its code enlarges what the file says
        resize = int(256 / 224 * resize)
    if config.get("crop_pct") and isinstance(resize, int):  # ConvNeXT's rule
        crop = _pair(resize)
        resize = int(resize / config["crop_pct"]) if resize < 384 else crop
    settings = _settings(mean, std, rescale, resize, crop, _RESAMPLE.get(resample, str(resample)))
    settings["flip"] = bool(config.get("do_flip_channel_order"))
    pads = config.get("do_pad") and isinstance(size, dict) and "longest_edge" in size and "shortest_edge" not in size
    return f"transformers{', pictures fill the frame instead of being padded' if pads else ''}", settings


def _resized(size: Any, square: bool) -> int | tuple[int, int] | None:
    """The shorter side, or (height, width), or None, where the size stays or depends on the number of pixels of each picture.

    A limit on the longer side alone becomes the shorter side: what would be padded is filled.
    """
    if size is None or (isinstance(size, int) and not square):
        return size
    if not isinstance(size, dict):
        return _pair(size)
    if size.keys() & {"max_pixels", "min_pixels"}:
        return None
    edges = [int(size[key]) for key in ("shortest_edge", "longest_edge") if size.get(key)]
    if not edges:
        return _pair(size)
    return edges[0] if max(edges) <= _LARGEST_EDGE else None


def _pair(size: Any) -> tuple[int, int]:
    """(height, width), however it is written."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple):
        height, width = size
        return int(height), int(width)
    if "shortest_edge" in size:
        return _pair(size["shortest_edge"])
    return (int(size["max_height"]), int(size["max_width"])) if "max_height" in size else (int(size["height"]), int(size["width"]))


def _from_timm(config: Config) -> tuple[str, Settings]:
    _, height, width = config.get("input_size") or (3, _DEFAULT_SIZE, _DEFAULT_SIZE)
    crop_pct = float(config.get("crop_pct") or 0.875)  # timm's own default
    sides = math.floor(height / crop_pct), math.floor(width / crop_pct)
    resize = sides if config.get("crop_mode") == "squash" else min(sides)
    mean, std = config["mean"] or IMAGENET[0], config["std"] or IMAGENET[1]
    interpolation = (config.get("interpolation") or "bicubic").replace("random", "bilinear")
    return "timm", _settings(numbers(mean), numbers(std), 1 / 255, resize, (height, width), interpolation)


def _from_open_clip(config: Config) -> tuple[str, Settings]:
    told = config["preprocess_cfg"]
    vision = config.get("model_cfg", {}).get("vision_cfg", {})
    size = _pair(vision.get("image_size") or told.get("size") or _DEFAULT_SIZE)
    resize = size if told.get("resize_mode") == "squash" else min(size)
    mean, std = told.get("mean") or CLIP[0], told.get("std") or CLIP[1]
    interpolation = (told.get("interpolation") or "bicubic").replace("random", "bicubic")
    return "open_clip", _settings(numbers(mean), numbers(std), 1 / 255, resize, size, interpolation)


def _settings(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    rescale: float,
    resize: int | tuple[int, int] | None,
    crop: tuple[int, int] | None,
    interpolation: str,
) -> Settings:
    return {"mean": mean, "std": std, "rescale": rescale, "resize": resize, "crop": crop, "interpolation": interpolation}


_READERS: tuple[tuple[Callable[[Config], Config | None], Callable[[Config], tuple[str, Settings]]], ...] = (
    (_open_clip_part, _from_open_clip),
    (_timm_part, _from_timm),
    (_transformers_part, _from_transformers),
)
