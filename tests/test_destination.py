"""Where a compiled graph goes: names, what is refused before any work, and that a folder appears whole or not at all."""

import os
from pathlib import Path

import onnx
import pytest

from tests.builders import model_of
from tests.e2e.command import contents
from vitq_compiler import destination
from vitq_compiler.destination import Destination, place_output
from vitq_compiler.errors import OutputError
from vitq_compiler.graph import Graph
from vitq_compiler.model_source import ModelSource, find_model

CONFIGS = {"config.json": b'{"model_type": "vit"}', "preprocessor_config.json": b"{}"}


def compiled() -> onnx.ModelProto:
    """Something that this program could have written."""
    return Graph.from_proto(model_of("g (float[2] x) => (float[2] y) { y = Relu(x) }")).to_proto()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSource:
    """The model in the folder ``repo`` of the current folder."""
    monkeypatch.chdir(tmp_path)
    folder = Path("repo")
    (folder / "onnx").mkdir(parents=True)
    onnx.save(model_of("g (float[2] x) => (float[2] y) { y = Neg(x) }"), folder / "onnx" / "model.onnx")
    for name, content in CONFIGS.items():
        (folder / name).write_bytes(content)
    return find_model(folder)


def refused(output: Destination, model: ModelSource, fault: str) -> None:
    """The destination is refused, and nothing has changed."""
    before = contents(Path())
    with pytest.raises(OutputError) as caught:
        output.check(model.file)
    assert fault in str(caught.value)
    assert contents(Path()) == before


def test_names(source: ModelSource) -> None:
    Path("there").mkdir()
    alone = find_model(Path("vit.fp16.onnx"))
    hub = ModelSource(Path("cache/onnx/vision_model.onnx"), True, "hf:owner/clip.vit@1234/onnx/vision_model.onnx")
    assert place_output(None, alone) == Destination(Path("vit.fp16_int8.onnx"))
    assert place_output(None, source).file == Path("repo/onnx/model_int8.onnx")
    assert place_output(None, source).folder is None, "its configs are there already"
    assert place_output(None, hub).file == Path("clip.vit_int8/onnx/vision_model_int8.onnx")
    assert place_output("out/", alone).file == Path("out/onnx/model_int8.onnx")
    assert place_output(Path("there"), source).folder == Path("there")
    assert place_output("out.onnx", source) == Destination(Path("out.onnx"))
    assert place_output(place_output("out/", source), source) == place_output("out/", source)


def test_dumps_are_beside_the_output(source: ModelSource) -> None:
    assert place_output("a/vit.onnx", source).dump("annotate") == Path("a/vit.after-annotate.onnx")
    assert place_output("a/vit.b16/", source).dump("annotate") == Path("a/vit.b16.after-annotate.onnx")


def test_a_new_folder(source: ModelSource) -> None:
    output = place_output("out/", source)
    output.check(source.file)
    output.write(compiled())
    found = contents(Path("out"))
    assert onnx.load_from_string(found.pop("onnx/model_int8.onnx") or b"") == compiled()
    assert found == {**CONFIGS, "onnx": None}
    assert Path("out").stat().st_mode == Path("repo").stat().st_mode, "not as private as a temporary folder"
    assert sorted(path.name for path in Path().iterdir()) == ["out", "repo"]
    output.check(source.file)
    output.write(compiled())  # once more
    assert contents(Path("out")).keys() == {*found, "onnx/model_int8.onnx"}


def test_a_folder_that_is_there_keeps_what_is_in_it(source: ModelSource) -> None:
    Path("out").mkdir()
    Path("out/config.json").write_bytes(CONFIGS["config.json"])
    Path("out/notes.txt").write_text("mine")
    output = place_output("out", source)
    output.check(source.file)
    output.write(compiled())
    assert contents(Path("out")).keys() == {*CONFIGS, "notes.txt", "onnx", "onnx/model_int8.onnx"}
    assert Path("out/notes.txt").read_text() == "mine"


def test_the_folder_of_the_model_itself(source: ModelSource) -> None:
    output = place_output("repo/", source)
    output.check(source.file)
    output.write(compiled())
    assert contents(Path("repo")).keys() == {*CONFIGS, "onnx", "onnx/model.onnx", "onnx/model_int8.onnx"}


def test_what_is_refused(source: ModelSource) -> None:
    refused(place_output("none/out/", source), source, "output none/out: the folder none does not exist; create it first")
    Path("file").touch()
    refused(place_output("file/", source), source, "output file: is a file; give the name of a folder")
    Path("other").mkdir()
    Path("other/config.json").write_text("{}")
    refused(
        place_output("other", source), source, "output other/config.json: is there already and differs from repo/config.json; remove it"
    )


@pytest.mark.parametrize("output", [None, "repo/"])
def test_the_work_of_another_program_is_not_replaced_unasked(source: ModelSource, output: str | None) -> None:
    theirs = source.file.with_name("model_int8.onnx")
    for write in (lambda: onnx.save(model_of("g (float[2] x) => (float[2] y) { y = Abs(x) }"), theirs), lambda: theirs.write_text("?")):
        write()
        refused(place_output(output, source), source, f"output {theirs}: is there already, made by another program; name the output file")
    place_output(theirs, source).check(source.file)  # asked


def test_without_permission(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the permission is taken away in the question and not on the disk."""
    Path("out").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: allowed(path, mode) and (mode, Path(path)) != (os.W_OK, Path("out")))
    refused(place_output("out", source), source, "output out: not writable; check its permissions")


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_whatever_stops_it_leaves_nothing(source: ModelSource, monkeypatch: pytest.MonkeyPatch, there: bool, error: BaseException) -> None:
    if there:
        Path("out").mkdir()
        Path("out/notes.txt").write_text("mine")
    before = contents(Path())

    def stop(model: onnx.ModelProto, path: Path) -> None:
        if not there:
            path.with_name("half").write_bytes(b"half")
        if isinstance(error, OSError):
            raise OutputError(f"output {path}: cannot be written ({error.strerror})") from error
        raise error

    monkeypatch.setattr(destination, "write_model", stop)
    output = place_output("out/", source)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError) as caught:
        output.write(compiled())
    assert contents(Path()) == before
    told = "output out/onnx/model_int8.onnx" if there else "output out"
    assert isinstance(error, KeyboardInterrupt) or str(caught.value) == f"{told}: cannot be written (No space left on device)"


def test_a_missing_config_is_told(source: ModelSource) -> None:
    assert place_output("out/", source).warnings == ()
    Path("repo/config.json").unlink()
    assert "no config.json beside the model to copy to out" in place_output("out/", source).warnings[0]
    assert place_output("out.onnx", source).warnings == ()
