"""Arrays in .npy and .npz files, left on disk where that is possible."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitq_compiler.errors import DataError

Array = NDArray[Any]


def load_arrays(source: Path, names: list[str]) -> dict[str, Array]:
    """The arrays of a file by input name; an array alone in its file belongs to the only input, whatever it is called.

    Raises:
        DataError: the names differ, or the file cannot be read (pickled objects never are).
    """
    where = str(source)
    try:
        with source.open("rb") as file:
            loaded = np.load(file, allow_pickle=False) if source.suffix.lower() == ".npz" else {"array": map_array(source)}
            if isinstance(loaded, np.ndarray):
                raise ValueError("an .npy file with the name of an .npz")
            stored = sorted(loaded)
            if stored != sorted(names) and not len(stored) == len(names) == 1:
                raise DataError(f"{source}: has arrays {stored}, the model's inputs are {sorted(names)}; save one array for each, by name")
            arrays = {}
            for name, key in zip(sorted(names), stored, strict=True):
                where = f"{source}, array {key!r}"
                arrays[name] = loaded[key]
                if not isinstance(arrays[name], np.ndarray):
                    raise ValueError("not an array")
            return arrays
    except (ValueError, OSError, EOFError, KeyError, NotImplementedError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{where}: {' '.join(str(error).split())}; save plain numbers with numpy.savez or numpy.save") from error


def map_array(path: Path) -> Array:
    """The array of a .npy file, left on disk where that is possible: one without elements cannot be mapped."""
    try:
        return np.lib.format.open_memmap(path, mode="r")  # type: ignore[no-any-return, no-untyped-call, unused-ignore]
    except ValueError:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)  # type: ignore[no-any-return, no-untyped-call, unused-ignore]


def read_array(where: str, array: Array, dtype: np.dtype[Any], index: int) -> Array:
    """One sample, cast to ``dtype``.

    Raises:
        DataError: a number is not finite, or does not fit the type.
    """
    value = np.array(array[index])  # out of the file, where it is mapped
    with np.errstate(all="ignore"):
        cast: Array = value.astype(dtype)
    if not (np.isfinite(cast).all() if dtype.kind == "f" else np.array_equal(cast, value)):
        raise DataError(f"{where}, sample {index}: NaN, Inf or a number too large for {dtype}; save finite numbers that fit")
    return cast
