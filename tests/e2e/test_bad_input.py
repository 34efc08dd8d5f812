"""Bad input: one line that says what is wrong, where, and what to do; exit code 2; nothing written, nothing damaged."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
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
    result = run(*words, "-q", *FAST)
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
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.uint8(128), "z")]
    )
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


MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (Path.unlink, ()),
    "truncated": (cut, ()),
    "random bytes": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), ()),
    "text": (lambda path: path.write_text("not a model\n"), ()),
    "empty": (lambda path: path.write_bytes(b""), ()),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), ()),
    "external data lost": (write_external, ()),
    "no inputs": (edited(without_inputs), ()),
    "opset too new": (with_opset(99), ()),
    "opset too old": (with_opset(7), ()),
    "custom operator": (edited(with_custom_op), ()),
    "already quantized": (edited(quantized), ()),
    "float16": (edited(lambda model: change_weight(model, lambda array: array.astype(np.float16))), ()),
    "NaN": (poisoned(np.nan), ()),
    "Inf": (poisoned(-np.inf), ()),
    "mlp": (MLP, ()),
    "convnet": (CONVNET, ()),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(folder: Path, name: str) -> None:
    write, fragments = MODELS[name]
    write(folder / "vit.onnx")
    line = refusal(folder, "vit.onnx", "-o", "out.onnx")
    print(name,'=>',line)
    assert "vit.onnx" in line
    assert [f for f in fragments if f not in line] == []


@pytest.mark.parametrize("w", [["--exclude","."],["--calibration","nowhere"],["--recipe","w8a9"],["--recipe","none.toml"],["--passes","canonicalize,bogus"],["--passes","canonicalize{"],["--passes",""],["--passes","canonicalize{x=1}"],
 ["--target","tpu"],["--preprocess","bogus"],["--preprocess","mean=0.5"],["--exclude","("],["--explain","("],["-o","vit.onnx"],["-o","./../"+"X/vit.onnx"],["-o","."],["-o","no/out.onnx"],["--samples","0"],["--samples","-3"],["--report","no/r.json"],["--report","."],["--report","vit.onnx"],["--exclude","."],["--passes","canonicalize,insert-qdq"],["--dump-after","correct-bas"]], ids=str)
def test_words(folder: Path, w) -> None:
    w=[x.replace("X", folder.name) for x in w]
    line = refusal(folder, "vit.onnx", *w)
    print(w,'=>',line)
