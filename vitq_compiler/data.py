"""Samples for calibration and validation: a folder of images, a .npz or .npy file, built-in images, or random token ids.

Every sample is read once when the data is opened: what cannot be decoded is named and replaced by the next one there and
then, so that counts are exact before the first batch. After that samples are read batch by batch as they are asked for;
decoded pictures are kept only up to a fixed number of bytes, so memory does not grow with their number.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vitq_compiler.arrays import load_arrays, read_array
from vitq_compiler.augmentation import altered
from vitq_compiler.builtin_images import dead_leaves
from vitq_compiler.errors import DataError
from vitq_compiler.preprocess import Preprocess

if TYPE_CHECKING:
    from vitq_compiler.graph import InputSpec

Array = NDArray[Any]
Feed = dict[str, Array]
Sizer = Callable[["InputSpec"], "InputSpec"]  # fills in sizes that samples read or made here should have
Reader = Callable[[int], Array]  # index of a sample -> its value for one model input, without the batch dimension

# Hidden files are left out: unpacked archives are full of ._photo.jpg, which are no pictures.
_IMAGE_NAME = re.compile(
    r"[^.].*\.(apng|avif|bmp|dds|dib|gif|hei[cf]|ico|j2k|jfif|jp2|jpe?g?|jpx|jxl|p[bgnp]m|pcx|png|psd|qoi|sgi|tga|tiff?|webp)",
    re.IGNORECASE | re.DOTALL,
)
_TOKENS = 64  # of a made-up text, where the model leaves its length open
_CACHE_BYTES = 32 << 20  # of decoded pictures: some 200 at 224 x 224
_CASTS = {"f": "fiu", "i": "iub", "u": "iub", "b": "b"}  # kind of the model's dtype -> kinds of arrays that may become it


@dataclass
class Data:
    """Calibration and validation samples of one source.

    Attributes:
        description: what calibrates and where it comes from, such as "32 images from photos/ (3 skipped)".
        warnings: sentences the user should read.
        skipped: (file, reason) for every file that looked like an image and could not be read.
        preprocess: what turned pictures into numbers; None where arrays are fed as they are.
    """

    description: str
    warnings: list[str]
    skipped: list[tuple[str, str]]
    preprocess: Preprocess | None
    calibration_count: int
    validation_count: int
    _calibration: Callable[[], Iterator[Feed]] = field(repr=False)
    _validation: Callable[[], Iterator[Feed]] = field(repr=False)
    synthetic: bool = False  # whether the calibration samples are built-in images
    copies: int = 1  # batches that show the same samples, each altered, one after the other

    def calibration(self) -> Iterator[Feed]:
        """Batches by input name, ``calibration_count`` samples in total; every call starts afresh with the same data."""
        return self._calibration()

    def validation(self) -> Iterator[Feed]:
        """Batches of samples that `calibration` does not yield; none at all where ``validation_count`` is 0."""
        return self._validation()


def open_data(
    source: Path | None,
    inputs: Sequence[InputSpec],
    preprocess: Preprocess,
    *,
    samples: int = 32,
    validation_samples: int = 16,
    batch_size: int = 8,
    seed: int = 0,
    ids: Mapping[str, int] | None = None,
    augment: int = 0,
    sized: Sizer = lambda spec: spec,
) -> Data:
    """Open calibration data.

    A batch size fixed in the model wins over ``batch_size``, and counts are then multiples of it; a model that takes one picture
    without a batch axis gets one at a time. Where there are no more than ``samples``, a fifth of them is kept for validation; a
    single one is validated on built-in images.

    Args:
        source: a folder (searched to the bottom), one image, a .npz or .npy file; None for built-in images.
        inputs: the model's inputs.
        preprocess: for pictures; see `vitq_compiler.preprocess.resolve`.
        samples: to calibrate on, at least 1.
        validation_samples: to validate on, at least 0.
        batch_size: samples in a batch, at least 1.
        seed: of the choice of samples, and of built-in images.
        augment: altered copies of each picture to calibrate on too, see `augmentation`.
        ids: inputs that random integers will do for: name -> how many numbers from 0 there are to draw from; 0 gives ones.
        sized: gives pictures and made-up samples the sizes that the model leaves open; what it leaves open too takes usual ones.

    Raises:
        DataError: there is nothing usable in ``source``, or it does not fit the inputs.
    """
    if samples < 1 or validation_samples < 0 or batch_size < 1 or seed < 0 or augment < 0 or not inputs:
        numbers = f"{len(inputs)} inputs, samples={samples}, validation_samples={validation_samples}, batch_size={batch_size}, seed={seed}"
        raise DataError(f"calibration: {numbers}; give a model with inputs, samples and batches of at least 1, and nothing negative")
    inputs = [_plain(spec) for spec in inputs]
    alone = {spec.name for spec in inputs if spec.shape and not spec.batched}
    batch_size = 1 if alone else batch_size
    fixed = {spec.shape[0] for spec in inputs if spec.shape} - {0}
    if len(fixed) > 1:
        raise DataError(f"inputs {', '.join(s.name for s in inputs)}: fixed batch sizes {fixed} differ; export the model with one")
    unit, batch_size = (int(min(fixed)),) * 2 if fixed else (1, batch_size)
    calibrating, validating = max(1, samples // unit), max(1, validation_samples // unit) if validation_samples else 0  # in units
    notes = []
    made_up = source is None and any(spec.name in (ids or {}) for spec in inputs)
    if made_up:
        notes.append("calibrated on random token ids: real inputs give better ranges; pass a .npz with an array for each input")
    elif source is None:
        notes.append("calibrated on built-in images: pictures like those the model will see give better ranges; pass a folder of them")
    pool = _made_up_pool(inputs, preprocess, sized, seed, ids or {}) if made_up else _open_pool(source, inputs, preprocess, sized, seed)
    chosen, skipped = _choose(pool, (calibrating + validating) * unit)
    if not chosen and skipped:
        tried = f"{source}: none of {len(skipped)} image files can be read ({skipped[0][0]}: {skipped[0][1]})"
        raise DataError(f"{tried}; give a folder of pictures, one picture, or a .npz or .npy file")
    if len(chosen) < unit:
        raise DataError(f"{source}: {len(chosen)} samples, but the model's batch is fixed at {unit}; add samples or export a free batch")
    pictures = {spec.name: (2, 3) if axis == 1 else (1, 2) for spec in inputs if (axis := _channel_axis(spec))}
    notes += _check_variation(source, pool, chosen, pictures) if source else []
    calibrating, kept = _split(len(chosen) // unit, calibrating, validating)
    used, unseen, other = chosen[: calibrating * unit], chosen[calibrating * unit : (calibrating + kept) * unit], pool
    if validating and not kept:
        image = len(inputs) == 1 and _channel_axis(inputs[0])
        if image:
            other, unseen = _open_pool(None, inputs, preprocess, sized, seed), list(range(validating * unit))
        notes.append(f"{source} has too few samples to keep any back: validated on {'built-in images' if image else 'nothing'}")
    if samples % unit or validation_samples % unit:
        drawn = f"{len(used)} samples calibrate ({samples} asked for) and {len(unseen)} validate ({validation_samples} asked for)"
        notes.append(f"the model's batch is fixed at {unit}: {drawn}")
    if augment and not pictures:
        raise DataError(f"{augment} altered copies are asked for, and the model takes no pictures: leave them out")
    changes = [f"{augment} altered copies of each"] if augment else []
    changes += [f"{len(skipped)} skipped"] if skipped else []
    return Data(
        f"{len(used)} {pool.label}" + (f" ({', '.join(changes)})" if changes else ""),
        notes,
        skipped,
        preprocess if any(isinstance(read, _PictureReader) for read in (*pool.readers.values(), *other.readers.values())) else None,
        len(used) * (augment + 1),
        len(unseen),
        partial(_taken_out, partial(_augmented, partial(_batches, pool.readers, used, batch_size), pictures, augment, seed), alone),
        partial(_taken_out, partial(_batches, other.readers, unseen, batch_size), alone),
        synthetic=source is None,
        copies=augment + 1,
    )


def _augmented(batches: Callable[[], Iterator[Feed]], pictures: Mapping[str, tuple[int, int]], copies: int, seed: int) -> Iterator[Feed]:
    """Each batch, and after it its altered copies."""
    for number, feed in enumerate(batches()):
        yield feed
        for copy in range(copies):
            yield altered(feed, pictures, (seed, number, copy))


def _taken_out(batches: Callable[[], Iterator[Feed]], alone: set[str]) -> Iterator[Feed]:
    """Each batch, which is of one sample where ``alone`` names any inputs; these without the batch axis."""
    for feed in batches():
        yield {name: array[0] if name in alone else array for name, array in feed.items()}


def _batches(readers: dict[str, Reader], indices: list[int], batch_size: int) -> Iterator[Feed]:
    for start in range(0, len(indices), batch_size):
        yield {name: np.stack([read(index) for index in indices[start : start + batch_size]]) for name, read in readers.items()}


def _split(units: int, calibrating: int, validating: int) -> tuple[int, int]:
    """How many of ``units`` calibrate and validate: a fifth is kept back where calibration could take all."""
    if units > calibrating:
        return calibrating, min(validating, units - calibrating)
    kept = min(validating, max(1, units // 5)) if units > 1 else 0
    return units - kept, kept


def _plain(spec: InputSpec) -> InputSpec:
    """``spec`` with 0 for every dynamic size, and with a batch axis put before one that has none: samples are batches until the end."""
    shape = tuple(s if isinstance(s, int) and s > 0 else 0 for s in spec.shape)
    spec = replace(spec, dtype=np.dtype(spec.dtype), shape=shape)
    if spec.layout is None or spec.layout.batched:
        return spec
    return replace(spec, shape=(0, *shape), layout=replace(spec.layout, channels=spec.layout.channels + 1))


def _channel_axis(spec: InputSpec) -> int | None:
    """1 for [N, C, H, W], 3 for [N, H, W, C], None for an input that is no image; exporters also leave C open."""
    if spec.layout is not None:
        return spec.layout.channels
    if len(spec.shape) != 4 or not (spec.dtype.kind == "f" or spec.dtype == np.uint8):
        return None
    return 1 if spec.shape[1] in (1, 3, 4) else 3 if spec.shape[3] in (1, 3) else 1 if spec.shape[1] == 0 else None


class _UnreadableError(DataError):
    """One picture cannot be decoded; ``reason`` says why without its name."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}; leave the calibration data alone until the compile ends")
        self.reason = reason


class _PictureReader:
    """Reads the pictures of one input; keeps what was decoded last, while it fits in `_CACHE_BYTES`."""

    def __init__(self, load: Callable[[int], Image.Image], name: Callable[[int], str], spec: InputSpec, preprocess: Preprocess) -> None:
        self._load, self._name, self._preprocess, self._dtype = load, name, preprocess, spec.dtype
        self._channels_last = _channel_axis(spec) == 3
        *sizes, channels = spec.shape[1:] if self._channels_last else (*spec.shape[2:], spec.shape[1])
        self.height, self.width = (int(size or default) for size, default in zip(sizes, preprocess.default_size(), strict=True))
        self._channels = int(channels or 3)
        self._pixels = lru_cache(max(1, _CACHE_BYTES // (self.height * self.width * self._channels)))(self._decode)

    def __call__(self, index: int) -> Array:
        pixels: Array = self._pixels(index)
        value = pixels if self._dtype == np.uint8 else self._preprocess.normalize(pixels).astype(self._dtype)
        return value.transpose(1, 2, 0) if self._channels_last else value

    def _decode(self, index: int) -> NDArray[np.uint8]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of damaged metadata: the pixels decide
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with self._load(index) as image:
                    return self._preprocess.pixels(image, self.height, self.width, self._channels)
        except UnidentifiedImageError as error:
            raise _UnreadableError(self._name(index), "not an image, or of a format Pillow does not know") from error
        except Exception as error:  # Pillow's decoders let anything out when a file is damaged
            raise _UnreadableError(self._name(index), " ".join(str(error).split()) or type(error).__name__) from error


class _Pool(NamedTuple):
    """All samples of a source, in the order in which they are drawn."""

    readers: dict[str, Reader]
    order: Iterable[int]
    name: Callable[[int], str]
    label: str


def _choose(pool: _Pool, total: int) -> tuple[list[int], list[tuple[str, str]]]:
    """The first ``total`` samples that can be read, and (name, reason) of those before them that cannot."""
    chosen: list[int] = []
    skipped: list[tuple[str, str]] = []
    for index in pool.order:
        if len(chosen) == total:
            break
        try:
            for read in pool.readers.values():
                read(index)
            chosen.append(index)
        except _UnreadableError as error:
            skipped.append((pool.name(index), error.reason))
    return chosen, skipped


def _check_variation(source: Path, pool: _Pool, chosen: Sequence[int], pictures: Mapping[str, tuple[int, int]]) -> list[str]:
    """A warning where samples are alike; ``pictures`` are inputs with their axes of height and width.

    Raises:
        DataError: all samples are equal, and hold one number, or one colour.
    """
    samples = ({name: read(index) for name, read in pool.readers.items()} for index in chosen)
    first = next(samples)
    if any(not np.array_equal(array, first[name]) for sample in samples for name, array in sample.items()):
        return []
    if _is_flat(first, pictures):
        what = "picture of one colour" if pictures else "sample of one number"
        raise DataError(f"{source}: holds nothing but a {what}, on which no range shows; give data like those that the model will see")
    alike = f"all {len(chosen)} samples of {source} are equal: ranges are those of one, and the accuracy is measured on it too"
    return [alike] if len(chosen) > 1 else []


def _is_flat(sample: Feed, pictures: Mapping[str, tuple[int, int]]) -> bool:
    """Whether every picture is of one colour; where there is none, whether every array holds one number."""
    if not pictures:
        return all(array.size == 0 or bool((array == array.flat[0]).all()) for array in sample.values())
    sides = {name: (height - 1, width - 1) for name, (height, width) in pictures.items()}  # in a sample, without the batch
    return all(bool((sample[name] == sample[name].max(axes, keepdims=True)).all()) for name, axes in sides.items())


def _open_pool(source: Path | None, inputs: Sequence[InputSpec], preprocess: Preprocess, sized: Sizer, seed: int) -> _Pool:
    if source and not source.exists():
        raise DataError(f"{source}: there is no such file or folder; give a folder of pictures, or a .npz or .npy file")
    if source and source.suffix.lower() in (".npz", ".npy") and source.is_file():
        return _array_pool(source, inputs, preprocess, sized, seed)
    if len(inputs) != 1 or not _channel_axis(inputs[0]):
        names = ", ".join(f"{spec.name} {_shown(spec.dtype, spec.shape)}" for spec in inputs)
        raise DataError(f"{source or 'built-in images'}: the model takes [{names}], not one image; pass a .npz with an array for each name")
    spec = sized(inputs[0])
    if source:
        return _folder_pool(source, spec, preprocess, seed)
    return _Pool({spec.name: _image_reader(spec, preprocess, seed)}, count(), str, "built-in images")


def _made_up_pool(inputs: Sequence[InputSpec], preprocess: Preprocess, sized: Sizer, seed: int, ids: Mapping[str, int]) -> _Pool:
    """Built-in images and random token ids, for a model that takes nothing else."""
    readers: dict[str, Reader] = {}
    for number, spec in enumerate(map(sized, inputs)):
        if spec.name in ids:
            readers[spec.name] = partial(_random_ids, spec, ids[spec.name], (seed, number))
        elif _channel_axis(spec):
            readers[spec.name] = _image_reader(spec, preprocess, seed)
        else:
            shown = f"input {spec.name} {_shown(spec.dtype, spec.shape)}"
            raise DataError(f"built-in samples: {shown} is neither an image nor token ids; pass a .npz with an array for each input")
    return _Pool(readers, count(), str, "random token ids" if len(ids) == len(inputs) else "built-in images with random token ids")


def _random_ids(spec: InputSpec, limit: int, seed: tuple[int, int], index: int) -> Array:
    """Random numbers below ``limit``; ones where it is 0, as a mask that hides nothing."""
    shape = [int(size) or _TOKENS for size in spec.shape[1:]]
    drawn = np.random.default_rng((*seed, index)).integers(0, limit, shape) if limit else np.ones(shape)
    return drawn.astype(spec.dtype)


def _image_reader(spec: InputSpec, preprocess: Preprocess, seed: int) -> _PictureReader:
    read = _PictureReader(lambda index: Image.fromarray(dead_leaves(index, *size, seed)), str, spec, preprocess)
    size = preprocess.resized(read.height, read.width, read.height, read.width)  # between resize and crop: no resize blurs them
    return read


def _folder_pool(source: Path, spec: InputSpec, preprocess: Preprocess, seed: int) -> _Pool:
    paths = [source]
    if source.is_dir():
        files = [Path(root, name) for root, _, names in os.walk(source) for name in names]
        paths = sorted((path for path in files if _IMAGE_NAME.fullmatch(path.name)), key=lambda path: path.relative_to(source).parts)
        if not paths:
            raise DataError(f"{source}: no image files among {len(files)} files; give a folder with JPEG, PNG or other pictures")

    def name(index: int) -> str:  # printable on one line, whatever the file is called
        return repr(paths[index].relative_to(source if source.is_dir() else source.parent).as_posix())[1:-1]

    def load(index: int) -> Image.Image:
        if not paths[index].is_file():  # a broken link, or a pipe that would wait for ever
            raise OSError("not a regular file")
        return Image.open(paths[index])

    order = np.random.default_rng(seed).permutation(len(paths)).tolist()
    return _Pool({spec.name: _PictureReader(load, name, spec, preprocess)}, order, name, f"images from {source}{'/' * source.is_dir()}")


def _array_pool(source: Path, inputs: Sequence[InputSpec], preprocess: Preprocess, sized: Sizer, seed: int) -> _Pool:
    arrays = load_arrays(source, [spec.name for spec in inputs])
    for spec in inputs:
        array = arrays[spec.name]
        if not spec.batched and _fits(spec.shape[1:], array.shape):  # one picture, as the model takes it
            arrays[spec.name] = array[None]
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        raise DataError(f"{source}: samples by array {counts}; save as many of each, and at least one")
    readers = {spec.name: _array_reader(f"{source}, array {spec.name!r}", spec, arrays[spec.name], preprocess, sized) for spec in inputs}
    order = np.random.default_rng(seed).permutation(counts[inputs[0].name]).tolist()
    return _Pool(readers, order, str, f"samples from {source}")


def _array_reader(where: str, spec: InputSpec, array: Array, preprocess: Preprocess, sized: Sizer) -> Reader:
    image = _channel_axis(spec)
    fits = _fits((0, *spec.shape[1:]), array.shape)
    if image and array.dtype == np.uint8 and not (fits and spec.dtype == np.uint8):
        if array.size and (array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3, 4))):
            grey = array[..., 0] if array.shape[3:] == (1,) else array
            taken = sized(spec)
            return _PictureReader(lambda index: Image.fromarray(grey[index]), lambda index: f"{where}, sample {index}", taken, preprocess)
    elif fits and array.dtype.kind in _CASTS.get(spec.dtype.kind, ""):
        return partial(read_array, where, array, spec.dtype)
    expected = _shown(spec.dtype, ("N", *spec.shape[1:])) + (" or pictures uint8 [N, H, W, 3]" if image else "")
    raise DataError(f"{where}: is {_shown(array.dtype, array.shape)}, the model expects {expected}; save it that way")


def _fits(expected: Sequence[int | str], shape: Sequence[int]) -> bool:
    return len(expected) == len(shape) and all(size in (0, got) for size, got in zip(expected, shape, strict=True))


def _shown(dtype: np.dtype[Any], shape: Sequence[int | str]) -> str:
    return f"{dtype} [{', '.join(str(size or '?') for size in shape)}]"
