"""Bad input: one line that says what is wrong, where, and what to do; exit code 2; nothing written, nothing damaged."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from tests import builders
from tests.e2e.command import FAST, OLD, contents, run, start, write_vit
from vitq_compiler.cli import PROGRAM


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a good ``vit.onnx`` and an older ``out.onnx``."""
    monkeypatch.chdir(tmp_path)
    write_vit(tmp_path / "vit.onnx")
    (tmp_path / "out.onnx").write_bytes(OLD)
    return tmp_path


def refusal(folder: Path, *words: object) -> str:
    """The one line on stderr of a command that is refused and leaves ``folder`` as it was."""
    before = contents(folder)
    result = run(*FAST, *words, "-q")
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert contents(folder) == before
    (line,) = result.stderr.splitlines()
    start = f"{PROGRAM}: error: "
    assert line.startswith(start)
    return line.removeprefix(start)


def edited(edit: Callable[[onnx.ModelProto], object]) -> Callable[[Path], object]:
    """Writes the ViT to a file after ``edit`` of it."""

    def write(path: Path) -> None:
        model = builders.vit()
        edit(model)
        onnx.save(model, path)

    return write


def change_weight(model: onnx.ModelProto, change: Callable[[Any], Any]) -> None:
    """Replace the first weight matrix."""
    tensor = next(t for t in model.graph.initializer if t.name.startswith("weight"))
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), tensor.name))


def poisoned(value: float) -> Callable[[Path], object]:
    """Writes the ViT with ``value`` in one weight."""

    def put(array: Any) -> Any:
        array[1, 2] = value
        return array

    return edited(lambda model: change_weight(model, put))


def without_inputs(model: onnx.ModelProto) -> None:
    del model.graph.input[:]
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 3, 8, 8), np.float32), "image"))


def with_custom_op(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type, model.graph.node[-1].domain = "FusedThing", "com.vendor"
    model.opset_import.append(helper.make_opsetid("com.vendor", 1))


def with_opset(version: int) -> Callable[[Path], object]:
    return edited(lambda model: setattr(model.opset_import[0], "version", version))


def quantized(model: onnx.ModelProto) -> None:
    model.graph.initializer.extend([numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.uint8(128), "z")])
    model.graph.node[-1].input[0], logits = "logits_int", model.graph.node[-1].input[0]
    model.graph.node.insert(len(model.graph.node) - 1, helper.make_node("QuantizeLinear", [logits, "s", "z"], ["codes"], "q"))
    model.graph.node.insert(len(model.graph.node) - 1, helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["logits_int"], "dq"))


def write_external(path: Path) -> None:
    """The ViT with its weights in a file that is then lost."""
    onnx.save(builders.vit(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (path.parent / "weights.bin").unlink()


def write_network(text: str, **weights: tuple[int, ...]) -> Callable[[Path], object]:
    """Writes a network given as ONNX text, with random weights."""
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}
    return lambda path: onnx.save(builders.model_of(text, opset=17, **arrays), path)


MLP = write_network(
    """g (float[N, 3, 8, 8] image) => (float[N, 5] y) {
    flat = Flatten <axis = 1> (image)
    hidden = MatMul (flat, w1)
    positive = Relu (hidden)
    y = MatMul (positive, w2)
    }""",
    w1=(192, 16),
    w2=(16, 5),
)
CONVNET = write_network(
    """g (float[N, 3, 8, 8] image) => (float[N, 4, 6, 6] y) {
    hidden = Conv <kernel_shape = [3, 3]> (image, w)
    y = Relu (hidden)
    }""",
    w=(4, 3, 3, 3),
)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


# What to write over vit.onnx, and what the line then says: what is wrong, and what to do.
MODELS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (Path.unlink, "no such file", ""),
    "truncated": (cut, "not a readable ONNX file", "export it again"),
    "random bytes": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "not a readable ONNX file", "export it again"),
    "text": (lambda path: path.write_text("not a model\n"), "not a readable ONNX file", "export it again"),
    "empty": (lambda path: path.write_bytes(b""), "not an ONNX model", "export it again"),
    "empty folder": (lambda path: (path.unlink(), path.mkdir()), "no .onnx file in this folder", "export the model to ONNX first"),
    "external data lost": (write_external, "external data file weights.bin is missing", "put it beside the model"),
    "no inputs": (edited(without_inputs), "has no inputs", "export it with its image input"),
    "opset too new": (with_opset(99), "opset 99 is not supported", "export with opset 11 to"),
    "opset too old": (with_opset(7), "opset 7 is not supported", "export with opset 11 to"),
    "custom operator": (edited(with_custom_op), "operator com.vendor.FusedThing", "export without it"),
    "already quantized": (edited(quantized), "already quantized (QuantizeLinear node q)", "give the float32 model"),
    "NaN": (poisoned(np.nan), "holds NaN or Inf", "export a healthy checkpoint"),
    "Inf": (poisoned(-np.inf), "holds NaN or Inf", "export a healthy checkpoint"),
    "mlp": (MLP, "no transformer block found", "give a vision transformer"),
    "convolutions": (CONVNET, "no transformer block found", "give a vision transformer"),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(folder: Path, name: str) -> None:
    write, fault, remedy = MODELS[name]
    write(folder / "vit.onnx")
    line = refusal(folder, "vit.onnx", "-o", "out.onnx")
    assert line.startswith("model vit.onnx: ")
    assert fault in line
    assert line.endswith(remedy) or f"; {remedy}" in line or f", {remedy}" in line


def test_our_own_output(folder: Path) -> None:
    assert run("vit.onnx", *FAST, "-q", "-o", "out.onnx").exit_code == 0
    assert "out.onnx: already quantized" in refusal(folder, "out.onnx", "-o", "again.onnx")


# Calibration data


def save_broken_pictures(path: Path) -> None:
    path.mkdir()
    (path / "a.jpg").write_bytes(b"\xff\xd8 not a picture")
    (path / "b.png").write_bytes(b"")


def save_one_bad_sample(path: Path) -> None:
    images = np.zeros((8, 3, 8, 8), np.float32)
    images[5, 0, 0, 0] = np.nan
    np.savez(path, image=images)


def save_cut_archive(path: Path) -> None:
    np.savez(path, image=np.ones((8, 3, 8, 8), np.float32))
    path.write_bytes(path.read_bytes()[:-200])


def save_text(path: Path) -> None:
    path.mkdir()
    (path / "readme.txt").write_text("no pictures here")


CALIBRATIONS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("photos", lambda path: None, "no such file or folder; give a folder"),
    "empty folder": ("photos", Path.mkdir, "no image files among 0 files; give a folder"),
    "no pictures": ("photos", save_text, "no image files among 1 files; give a folder"),
    "broken pictures": ("photos", save_broken_pictures, "none of 2 image files can be read"),
    "wrong names": ("c.npz", lambda path: np.savez(path, x=np.zeros(8), y=np.zeros(8)), "the model's inputs are ['image']; save"),
    "wrong shape": ("c.npz", lambda path: np.savez(path, image=np.zeros((8, 3, 9, 8), np.float32)), "expects float32 [N, 3, 8, 8]"),
    "wrong type": ("c.npz", lambda path: np.savez(path, image=np.full((8, 3, 8, 8), "x")), "expects float32 [N, 3, 8, 8]"),
    "pickled": ("c.npz", lambda path: np.savez(path, image=np.array([{}, {}])), "save plain numbers with numpy.savez"),
    "no samples": (
        "c.npz",
        lambda path: np.savez(path, image=np.zeros((0, 3, 8, 8), np.float32)),
        "save as many of each, and at least one",
    ),
    "NaN": ("c.npz", save_one_bad_sample, "sample 5: NaN, Inf"),
    "cut short": ("c.npz", save_cut_archive, "save plain numbers with numpy.savez"),
    "no archive": ("c.npz", lambda path: path.write_bytes(b"PK\x03\x04 no"), "save plain numbers with numpy.savez"),
    "no array": ("c.npy", lambda path: path.write_bytes(b"nothing"), "save plain numbers with numpy.savez"),
}


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_calibration(folder: Path, name: str) -> None:
    source, write, fault = CALIBRATIONS[name]
    write(folder / source)
    line = refusal(folder, "vit.onnx", "-o", "out.onnx", "--samples", "32", "--calibration", source)
    assert line.startswith(source)
    assert fault in line
    assert "; " in line, "what to do"


def test_broken_pictures_beside_good_ones_are_skipped(folder: Path) -> None:
    save_broken_pictures(folder / "photos")
    Image.linear_gradient("L").save(folder / "photos" / "c.png")
    result = run("vit.onnx", *FAST, "--calibration", "photos")
    assert result.exit_code == 0
    assert "2 skipped" in result.stdout


def test_no_image_without_calibration(folder: Path) -> None:
    tokens = """g (float[N, 5, 8] tokens) => (float[N, 5, 8] y) { y = MatMul (tokens, w) }"""
    write_network(tokens, w=(8, 8))(folder / "vit.onnx")
    line = refusal(folder, "vit.onnx")
    assert "tokens float32 [?, 5, 8]" in line
    assert line.endswith("pass a .npz with an array for each name")


def test_a_config_beside_the_model(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5')
    line = refusal(folder, "vit.onnx")
    assert line.startswith("preprocessor_config.json: ")
    assert line.endswith("; repair the file, or pass --preprocess")
    assert run("vit.onnx", *FAST, "-q", "--preprocess", "inception").exit_code == 0


# Words


RECIPES = {
    "syntax.toml": ("description = ", "not valid TOML"),
    "key.toml": ("bits = 8", "unknown key 'bits', known are"),
    "missing.toml": ('description = "x"', "is missing"),
    "bits.toml": ('description = "x"\npasses = "calibrate"\nweight = { bits = 99 }\nactivation = { bits = 8 }', "weight"),
    "role.toml": ('description = "x"\npasses = ""\nweight = {}\nactivation = {}\nfloat_roles = ["fc9"]', "known roles are"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_file(folder: Path, name: str) -> None:
    text, fault = RECIPES[name]
    (folder / name).write_text(text)
    line = refusal(folder, "vit.onnx", "-o", "out.onnx", "--recipe", name)
    assert line.startswith((f"recipe {name}: ", f"recipe {Path(name).stem}: "))
    assert fault in line


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("--recipe w8a9", "did you mean w8a8"),
        ("--recipe none.toml", "recipe none.toml: no such file"),
        ("--passes canonicalize,bogus", 'no "bogus" in passes'),
        ("--passes canonicalize{", "cannot read the pipeline 'canonicalize{': write pass,pass{"),
        ("--passes canonicalize,,annotate", "cannot read the pipeline"),
        ("--passes canonicalize{x=1}", "pass canonicalize has no option 'x'"),
        ("--passes canonicalize,insert-qdq", "pass insert-qdq needs what is qparams: put a pass that provides this before it"),
        ("--dump-after correct-bia", "did you mean correct-bias?"),
        ("--passes canonicalize --dump-after annotate", "cannot dump after annotate"),
        ("--target tpu", "--list-targets prints them all"),
        ("--preprocess bogus", "give one of imagenet, inception, clip, none"),
        ("--preprocess mean=0.5", "mean and std are needed together"),
        ("--preprocess mean=1/2,std=1", "mean must be 1, 3 or 4 finite numbers"),
        ("--exclude (", "'(' is not a regular expression"),
        ("--explain [", "'[' is not a regular expression"),
        ("--samples 0", "'--samples'"),
        ("--samples -3", "'--samples'"),
        ("--batch-size 0", "'--batch-size'"),
        ("--exclude .", "model vit.onnx: every Linear is excluded"),
    ],
)
def test_words(folder: Path, words: str, fault: str) -> None:
    assert fault in refusal(folder, "vit.onnx", "-o", "out.onnx", *words.split())


# Output


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("-o vit.onnx", "is the input model or its data; give another name"),
        ("-o sub/../vit.onnx", "is the input model"),
        ("-o link.onnx", "is the input model"),
        ("-o hard.onnx", "is the input model"),
        ("-o none/out.onnx", "the folder none does not exist; create it first"),
        ("-o out.ort", "out.ort: .ort is onnxruntime's own format; give a name in .onnx, and convert the file with"),
        ("-o out.json", "onnx reads .json as json"),
        ("-o out.onnx --report none/r.json", "the folder none does not exist; create it first"),
        ("-o out.onnx --report sub", "is a directory; give a file name"),
        ("-o out.onnx --report vit.onnx", "is the model or the output; give another name"),
        ("-o out.onnx --report ./out.onnx", "is the model or the output; give another name"),
    ],
)
def test_output(folder: Path, words: str, fault: str) -> None:
    (folder / "sub").mkdir()
    (folder / "link.onnx").symlink_to("vit.onnx")
    os.link(folder / "vit.onnx", folder / "hard.onnx")
    assert fault in refusal(folder, "vit.onnx", *words.split())


def test_a_dump_never_overwrites_the_model(folder: Path) -> None:
    shutil.copy("vit.onnx", "out.after-annotate.onnx")
    line = refusal(folder, "out.after-annotate.onnx", "-o", "out.onnx", "--dump-after", "annotate")
    assert "out.after-annotate.onnx: is the input model" in line


@pytest.mark.parametrize(("refused", "words"), [("out.onnx", ""), (".", ""), (".", "--report r.json")])
def test_an_output_without_permission(folder: Path, monkeypatch: pytest.MonkeyPatch, refused: str, words: str) -> None:
    """Root may write anywhere, so the permission is taken away in the question and not on the disk."""
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: allowed(path, mode) and (mode, Path(path)) != (os.W_OK, Path(refused)))
    assert "check its permissions" in refusal(folder, "vit.onnx", "-o", "out.onnx", *words.split())


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    assert refusal(folder, "vit.onnx", "-o", "out.onnx") == "output out.onnx: cannot be written (No space left on device)"


# A shell


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("none.onnx", "model none.onnx: no such file"),
        ("vit.onnx --calibration photos", "photos: there is no such file or folder"),
        ("vit.onnx -o vit.onnx", "output vit.onnx: is the input model"),
    ],
)
def test_in_a_shell(folder: Path, tmp_path_factory: pytest.TempPathFactory, words: str, fault: str) -> None:
    before = contents(folder)
    process = start(*words.split(), folder=folder, temporary=tmp_path_factory.mktemp("temporary"))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    *progress, line = err.splitlines()
    assert progress in ([], ["reading"])
    assert line.startswith(f"{PROGRAM}: error: {fault}")
    assert contents(folder) == before
