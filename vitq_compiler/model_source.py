"""What a user gives as a model: an ONNX file, a folder that holds one, or a model on the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vitq_compiler import hub
from vitq_compiler.model_folder import choose


@dataclass(frozen=True)
class ModelSource:
    """A model, found.

    Attributes:
        file: the ONNX file.
        in_folder: whether it was found in a folder, and not named itself.
        origin: for a model from the hub, ``hf:owner/name@commit/file.onnx``; else empty.
        why: why this file of the folder was taken; empty where there was no other.
        warnings: what the user should know of how it was found.
    """

    file: Path
    in_folder: bool = False
    origin: str = ""
    why: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What reports call it; it can be given back."""
        return self.origin or str(self.file)

    @property
    def title(self) -> str:
        """What a folder for it may be called: the name of the repository, or of the file."""
        return hub.parse(self.origin).repository.partition("/")[2] if self.origin else self.file.stem

    def beside(self, name: str) -> Path:
        """A path for a new file or folder beside the model; in the working folder for a model from the hub, as a cache is left alone."""
        return Path(name) if self.origin else self.file.with_name(name)


def find_model(model: ModelSource | Path | str, *, show_progress: bool = False) -> ModelSource:
    """Find the ONNX file that ``model`` stands for; whether it can be read is seen later.

    Args:
        model: a file, a folder (see `model_folder`), ``hf:owner/name[@revision][/path.onnx]``, or what this function returned.
        show_progress: draw how far a download is.

    Raises:
        ModelError: the folder holds no model or several, or the hub does not give it; see `hub.fetch`.
    """
    if isinstance(model, ModelSource):
        return model
    if os.fspath(model).startswith(hub.PREFIX):
        fetched = hub.fetch(hub.parse(os.fspath(model)), show_progress=show_progress)
        return ModelSource(fetched.file, True, str(fetched.reference), fetched.why, fetched.warnings)
    path = Path(model)
    if not path.is_dir():
        return ModelSource(path)
    choice = choose(_onnx_files(path), str(path))
    return ModelSource(path / choice.name, True, why=choice.why)


def _onnx_files(folder: Path) -> Iterator[str]:
    """The ONNX files of a folder and of the folders in it."""
    for path in (*folder.glob("*.onnx"), *folder.glob("*/*.onnx")):
        if path.is_file():
            yield path.relative_to(folder).as_posix()
