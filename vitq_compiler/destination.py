"""Where a compiled graph goes: a file, or a model folder, whose configurations come with it.

A folder appears whole or not at all. In one that is there already, only the compiled graph is replaced.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from vitq_compiler.errors import ModelError, OutputError
from vitq_compiler.graph import PRODUCER
from vitq_compiler.model_folder import ONNX_FOLDER, compiled_name, configs_of, part_of
from vitq_compiler.model_io import check_output, write_bytes, write_model
from vitq_compiler.model_source import ModelSource


@dataclass(frozen=True)
class Destination:
    """Where a compiled graph goes.

    Attributes:
        file: the ONNX file.
        folder: the model folder that it is in; None for a file on its own.
        configs: what is copied into the folder, by name.
        is_named: whether the user gave the name of the file.
    """

    file: Path
    folder: Path | None = None
    configs: Mapping[str, Path] = field(default_factory=dict)
    is_named: bool = True

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is missing for others to load it."""
        if self.folder is None or "config.json" in self.configs or (self.folder / "config.json").is_file():
            return ()
        return (f"there is no config.json beside the model to copy to {self.folder}: transformers.js and optimum need one",)

    def dump(self, name: str) -> Path:
        """Where the graph after a pass goes."""
        if self.folder is None:
            return self.file.with_suffix(f".after-{name}.onnx")
        return self.folder.parent / f"{self.folder.absolute().name}.after-{name}.onnx"

    def check(self, model: Path) -> None:
        """Refuse what cannot be written, before any work is done.

        Raises:
            OutputError: the file or folder cannot be written; a file that this program has not written would be replaced though it was
                not named; or a configuration of the same name, but another content, is in the folder.
        """
        if self.folder is None:
            check_output(self.file, model)
        elif self.folder.is_dir():
            self._check_into(self.folder, model)
        else:
            check_output(self.folder, model)  # for a folder that is not there the rules are those for a file
            if self.folder.exists():
                raise OutputError(f"output {self.folder}: is a file; give the name of a folder, or leave out the slash")
        if not self.is_named and self.file.exists() and not _is_ours(self.file):
            raise OutputError(f"output {self.file}: is there already, made by another program; name the output file with -o")

    def _check_into(self, folder: Path, model: Path) -> None:
        if self.file.parent.is_dir():
            check_output(self.file, model)
        elif not os.access(folder, os.W_OK):
            raise OutputError(f"output {folder}: not writable; check its permissions")
        for name, source in self.configs.items():
            there = folder / name
            if there.exists() and there.read_bytes() != source.read_bytes():
                raise OutputError(f"output {there}: is there already and differs from {source}; remove it, or give another folder")

    def write(self, model: onnx.ModelProto) -> None:
        """Write the graph, and the configurations where it goes into a folder.

        Raises:
            OutputError: the disk refuses.
        """
        if self.folder is None:
            write_model(model, self.file)
        elif self.folder.is_dir():
            self._write_into(self.folder, model)
        else:
            self._write_new(self.folder, model)

    def _write_new(self, folder: Path, model: onnx.ModelProto) -> None:
        try:
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as stage:
                staged = Path(stage) / folder.name  # a folder of its own has the usual permissions
                (staged / ONNX_FOLDER).mkdir(parents=True)
                for name, source in self.configs.items():
                    shutil.copyfile(source, staged / name)
                write_model(model, staged / ONNX_FOLDER / self.file.name)
                staged.rename(folder)
        except OSError as error:
            raise _unwritten(folder, error) from error
        except OutputError as error:  # it names the staged file
            raise _unwritten(folder, error.__cause__ or error) from error

    def _write_into(self, folder: Path, model: onnx.ModelProto) -> None:
        """Add what is not there and write the graph last; whatever stops this, what was added is taken away again."""
        added: list[Path] = []
        try:
            if not self.file.parent.is_dir():
                added.append(self.file.parent)
                self.file.parent.mkdir()
            for name, source in self.configs.items():
                if not (folder / name).exists():
                    added.append(folder / name)
                    write_bytes(source.read_bytes(), folder / name)
            write_model(model, self.file)
        except BaseException as error:
            for path in reversed(added):
                with suppress(OSError):
                    path.rmdir() if path.is_dir() else path.unlink()
            if isinstance(error, OSError):
                raise _unwritten(folder, error) from error
            raise


def place_output(output: Destination | Path | str | None, source: ModelSource) -> Destination:
    """Where the compiled graph of ``source`` goes.

    Args:
        output: a file; a folder, which is there or ends in a slash; None for ``MODEL_int8.onnx`` beside the model, and for a model from
            the hub a folder ``NAME_int8`` here; or what this function returned.

    Raises:
        ModelError: what was found in a folder has the name that its compiled graph would get.
    """
    if isinstance(output, Destination):
        return output
    if output is None and source.origin:
        return _in_folder(source.beside(f"{source.title}_int8"), source)
    if output is None:
        file = source.beside(f"{part_of(source.file.name) if source.in_folder else source.file.stem}_int8.onnx")
        if file == source.file:
            raise ModelError(f"model {source.name}: already quantized, as its name says; give the float model")
        return Destination(file, is_named=not source.in_folder)
    if os.fspath(output).endswith(("/", os.sep)) or Path(output).is_dir():
        return _in_folder(Path(output), source)
    return Destination(Path(output))


def _in_folder(folder: Path, source: ModelSource) -> Destination:
    return Destination(folder / ONNX_FOLDER / compiled_name(source.file.name), folder, configs_of(source.file), is_named=False)


def _unwritten(folder: Path, error: BaseException) -> OutputError:
    return OutputError(f"output {folder}: cannot be written ({getattr(error, 'strerror', None) or error})")


def _is_ours(file: Path) -> bool:
    """Whether this program has written a model."""
    try:
        return bool(onnx.load(file, load_external_data=False).producer_name == PRODUCER)
    except Exception:  # whatever it is, it is nothing that was compiled
        return False
