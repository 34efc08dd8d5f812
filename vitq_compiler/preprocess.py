"""From a picture to the float32 [C, H, W] that a model was trained on, and the decision what that is.

Resize and centre crop as torchvision does them (same sizes, same rounding), then ``(pixel * rescale - mean) / std``.
What is used comes from, in this order: the text of ``--preprocess``, a configuration file of the model (see `processor_config`),
else ImageNet's numbers; `Preprocess.source` says which and why.

The text is a name, or settings, or a name and then settings that change it::

    imagenet      inception      clip      none
    mean=0.5/0.5/0.5,std=0.5,resize=256,crop=224,scale=1/255,interpolation=bicubic
    imagenet,resize=384x384,crop=none
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vitq_compiler.errors import DataError
from vitq_compiler.model_folder import config_folders
from vitq_compiler.processor_config import CLIP, IMAGENET, config_files, numbers, read_config

_FILTERS = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos")}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_DEFAULT_SIZE = 224
_LARGEST_SIZE = 1 << 14
_LARGEST_EXCESS = 64  # a resized picture of more pixels than this many crops (a strip of 1 x 10000) is never built


@dataclass(frozen=True)
class Preprocess:
    """How pixels become numbers.

    Attributes:
        mean: per channel, subtracted after ``rescale``; one number stands for all channels.
        std: per channel, divides; one number stands for all channels.
        rescale: factor from pixels 0..255; 1/255 almost everywhere.
        resize: shorter side in pixels, or exact (height, width); None keeps the size, or without ``crop`` takes the model's.
        crop: centre crop, (height, width).
        interpolation: nearest, bilinear, bicubic or lanczos.
        source: which preprocessing this is and why it was chosen, for the report.
        flip: reverse the channels in the end, for models that take blue first.
        assumed: whether nothing says so: neither the user nor a configuration file.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float
    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    interpolation: str
    source: str
    flip: bool = False
    assumed: bool = False

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("std", self.std), ("scale", (self.rescale,))):
            if len(values) not in (1, 3, 4) or not all(math.isfinite(v) and (v > 0 or name == "mean") for v in values):
                raise ValueError(f"{name} must be 1, 3 or 4 finite numbers, std and scale greater than 0, not {list(values)}")
        for size in (self.resize, self.crop):
            if not all(1 <= s <= _LARGEST_SIZE for s in (() if size is None else (size,) if isinstance(size, int) else size)):
                raise ValueError(f"resize and crop must be from 1 to {_LARGEST_SIZE} pixels, not {size}")
        if self.interpolation not in _FILTERS:
            raise ValueError(f"interpolation {self.interpolation!r} is unknown, expected {', '.join(_FILTERS)}")

    def __call__(self, image: Image.Image, height: int, width: int, channels: int) -> NDArray[np.float32]:
        """Resize, crop and normalise.

        Args:
            image: any Pillow mode and size; see `pixels`.
            height: what the model takes, in pixels; wins over ``crop`` and ``resize``, whose ratio is kept.
            width: likewise.
            channels: 1 (luminance), 3 (RGB) or 4 (RGB and alpha).

        Returns:
            float32 [channels, height, width].

        Raises:
            DataError: mean or std does not fit the channels. A picture that cannot be decoded raises whatever Pillow raises.
        """
        return self.normalize(self.pixels(image, height, width, channels))

    def normalize(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """``(pixel * rescale - mean) / std``: uint8 [C, H, W] to float32 [C, H, W]; DataError where mean does not fit C."""
        mean = _per_channel("mean", self.mean, len(pixels), alpha=0.0)
        std = _per_channel("std", self.std, len(pixels), alpha=1.0)
        values: NDArray[np.float32] = (pixels.astype(np.float32) * np.float32(self.rescale) - mean) / std
        return values[::-1] if self.flip and len(values) == 3 else values

    def pixels(self, image: Image.Image, height: int, width: int, channels: int) -> NDArray[np.uint8]:
        """Decode, turn upright by EXIF, resize and crop: uint8 [channels, height, width]; arguments as for a call."""
        if self.resize is not None and self.interpolation != "nearest":
            # A JPEG can be decoded at 1/2, 1/4 or 1/8: much faster, and still at least twice the size it is resized to.
            side = 2 * max(self.resized(image.height, image.width, height, width))
            image.draft(image.mode, (side, side))
        image = _flatten(ImageOps.exif_transpose(image), channels)
        full_height, full_width = self.resized(image.height, image.width, height, width)
        top, left, filter_ = round((full_height - height) / 2), round((full_width - width) / 2), _FILTERS[self.interpolation]
        if full_height * full_width <= _LARGEST_EXCESS * height * width:
            resized = image.resize((full_width, full_height), filter_, reducing_gap=3.0)
            cropped = resized.crop((left, top, left + width, top + height))
        else:  # the same pixels, up to the filter's reach over the edge of the crop, in bounded memory
            y, x = image.height / full_height, image.width / full_width
            box = (left * x, top * y, (left + width) * x, (top + height) * y)
            cropped = image.resize((width, height), filter_, box=box, reducing_gap=3.0)
        array = np.asarray(cropped, np.uint8)
        return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))

    def resized(self, image_height: int, image_width: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the picture between resize and crop; never smaller than the model's height and width."""
        if self.crop is None and not isinstance(self.resize, int):
            return height, width
        ratio = max(height / self.crop[0], width / self.crop[1]) if self.crop else 1.0
        if isinstance(self.resize, tuple):
            return max(height, round(self.resize[0] * ratio)), max(width, round(self.resize[1] * ratio))
        shorter = min(image_height, image_width)
        side = shorter if self.resize is None else round(self.resize * ratio)
        size = side * image_height // shorter, side * image_width // shorter
        if size[0] >= height and size[1] >= width:
            return size
        # Too small one way: the smallest size that covers the model's.
        return max(height, width * image_height // image_width), max(width, height * image_width // image_height)

    def default_size(self) -> tuple[int, int]:
        """(height, width) for a model that takes any."""
        size = self.crop or self.resize or _DEFAULT_SIZE
        return (size, size) if isinstance(size, int) else size


_IMAGENET = Preprocess(*IMAGENET, 1 / 255, 256, (224, 224), "bicubic", "imagenet")
_PLAIN = Preprocess((0.0,), (1.0,), 1 / 255, None, None, "bicubic", "explicit")
_NAMED = {
    "imagenet": _IMAGENET,
    "inception": replace(_IMAGENET, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize=248, source="inception"),
    "clip": replace(_IMAGENET, mean=CLIP[0], std=CLIP[1], resize=224, source="clip"),
    "none": replace(_PLAIN, rescale=1.0, source="none"),  # pixels 0..255 as float, resized only
}
NAMES = tuple(_NAMED)
"""What ``--preprocess`` knows by name. ``none`` feeds float pixels 0..255, resized to the model's size and nothing else."""


def resolve(text: str | None, model_path: Path | None) -> Preprocess:
    """Decide on the preprocessing.

    Args:
        text: what the user asked for (see the module's grammar), or None.
        model_path: the model's file or folder; see `model_folder.config_folders` for where configuration files are looked for.

    Raises:
        DataError: the text or a configuration file cannot be understood.
    """
    if text is not None:
        with _explained(f"--preprocess {text!r}", f"give one of {', '.join(NAMES)}, or mean=...,std=...,resize=...,crop=..."):
            return _parse(text)
    if model_path is None:
        return replace(_IMAGENET, source="imagenet (default)", assumed=True)
    folders = config_folders(model_path)
    for path in config_files(folders):
        with _explained(str(path), "repair the file, or pass --preprocess"):
            found = read_config(path)
            if found:
                library, settings = found
                where = "beside the model" if path.parent == folders[0] else "one folder above the model"
                return Preprocess(**settings, source=f"{path.name} {where} ({library})")
    missing = "no preprocessor_config.json or config.json with mean and std beside the model"
    return replace(_IMAGENET, source=f"imagenet (default: {missing})", assumed=True)


@contextmanager
def _explained(where: str, remedy: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a DataError of one line with the place and the remedy."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, OSError, ArithmeticError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise DataError(f"{where}: {reason}; {remedy}") from error


def _parse(text: str) -> Preprocess:
    items = [item.strip() for item in text.split(",")]
    name = "explicit" if "=" in items[0] else items.pop(0).lower()
    if name not in (*NAMES, "explicit"):
        raise ValueError(f"{name!r} is unknown")
    settings: dict[str, str] = {}
    for item in items:
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in _SETTINGS or key in settings or not value:
            raise ValueError(f"{item!r} is given twice or not one of {'=..., '.join(_SETTINGS)}=...")
        settings[key] = value
    if name == "explicit" and ("mean" in settings) != ("std" in settings):
        raise ValueError("mean and std are needed together")
    changes: dict[str, Any] = {_SETTINGS[key][0]: _SETTINGS[key][1](value) for key, value in settings.items()}
    source = f"{name} (--preprocess {text})" if settings else f"{name} (--preprocess)"
    return replace(_NAMED.get(name, _PLAIN), **changes, source=source)


def _parse_size(value: str) -> tuple[int, int] | None:
    height, _, width = value.partition("x")
    return None if value == "none" else (int(height), int(width or height))


_SETTINGS: dict[str, tuple[str, Callable[[str], object]]] = {
    "mean": ("mean", lambda value: numbers(value.split("/"))),
    "std": ("std", lambda value: numbers(value.split("/"))),
    "resize": ("resize", lambda value: int(value) if value.isdecimal() else _parse_size(value)),
    "crop": ("crop", _parse_size),
    "scale": ("rescale", lambda value: float(Fraction(value))),
    "interpolation": ("interpolation", str),
}
"""Word of the grammar -> field of `Preprocess` and how its value is read."""


def _per_channel(name: str, values: tuple[float, ...], channels: int, alpha: float) -> NDArray[np.float32]:
    """``values`` as float32 [channels, 1, 1]: one serves all, grey takes the average, and alpha is left as it is."""
    if channels == 1 or len(values) == 1:
        values = (sum(values) / len(values),) * channels
    elif channels == 4 and len(values) == 3:
        values = (*values, alpha)
    if len(values) != channels:
        raise DataError(f"preprocessing: {name} has {len(values)} numbers, the model has {channels} channels; pass --preprocess {name}=...")
    return np.array(values, np.float32)[:, None, None]


def _flatten(image: Image.Image, channels: int) -> Image.Image:
    """Eight bits a channel, in the wanted mode; see-through pixels are laid on white, as viewers do, unless the model takes alpha."""
    if channels not in _MODES:
        raise DataError(f"the model takes {channels} channels, pictures have 1, 3 or 4: pass the inputs as .npz")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(_MODES[channels])


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale deep grey to 0..255; Pillow's own conversion would cut everything above 255."""
    values = np.asarray(image).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("the pixels have NaN or Inf")
    largest = float(values.max())
    # Only 16 bits say their range; for 32 bits and floats the usual ranges are 0..1, 0..255 and 0..65535.
    tops = (65535.0,) if image.mode.startswith("I;16") else (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    top = next((t for t in tops if largest <= t), largest)
    return Image.fromarray(np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8))
