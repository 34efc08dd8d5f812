"""Models that take pictures in their own way: normalized inside, without a batch, as bytes, channels last."""

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tests.builders import Sizes, Writer, vit
from tests.e2e.command import FAST, run
from vitq_compiler.builtin_images import dead_leaves
from vitq_compiler.compiler import compile
from vitq_compiler.metrics import sqnr

MEAN, STD = (np.array(x, np.float32).reshape(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
SIZES = Sizes(image=16, width=32, heads=2, hidden=64)
MIN_SQNR = 28.0


def behind(path: Path, preprocess: Callable[[Writer, str], str], shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> Path:
    """A tiny ViT of open batch behind ``preprocess``, which makes [batch, 3, 16, 16] of an input ``image`` of ``shape``."""
    model, w = vit(SIZES), Writer(_number=count(1000))  # names that the ViT has not
    for node in model.graph.node:
        node.input[:] = ["normalized" if name == "image" else name for name in node.input]
    result = preprocess(w, "image")
    nodes = [*w.nodes, helper.make_node("Identity", [result], ["normalized"], "preprocessed"), *model.graph.node]
    del model.graph.node[:], model.graph.input[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    model.graph.input.append(helper.make_tensor_value_info("image", kind, list(shape)))
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in w.weights.items())
    if "batch" not in shape:
        model.graph.output[0].type.tensor_type.shape.dim[0].Clear()
    onnx.save(model, path)
    return path


def normalized(w: Writer, x: str, top: float = 255.0) -> str:
    scaled = w.op("Div", x, w.number(top))
    return str(w.op("Div", w.op("Sub", scaled, w.weight("mean", MEAN)), w.weight("std", STD)))


def resized(w: Writer, x: str) -> str:
    """Bytes [height, width, 3] as a batch of one."""
    floats = w.op("Unsqueeze", w.op("Cast", w.op("Transpose", x, perm=[2, 0, 1]), to=TensorProto.FLOAT), w.vector(0))
    smaller = w.op("Resize", floats, "", "", w.vector(1, 3, 16, 16), mode="linear")
    return str(w.op("Sub", w.op("Div", smaller, w.number(127.5)), w.number(1)))


def photos(number: int, height: int = 16, width: int = 16) -> NDArray[np.uint8]:
    return np.stack([dead_leaves(index, height, width, seed=7) for index in range(number)])


def measured(model: Path, output: Path, feeds: Sequence[dict[str, NDArray[np.generic]]]) -> float:
    """SQNR of the compiled graph on ``feeds``."""
    floating, integer = (ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]) for path in (model, output))
    return sqnr(*(np.concatenate([session.run(None, feed)[0].reshape(-1) for feed in feeds]) for session in (floating, integer)))


@pytest.mark.parametrize("top", [255.0, 1.0])
def test_a_picture_is_normalized_once(tmp_path: Path, top: float) -> None:
    model = behind(tmp_path / "vit.onnx", lambda w, x: normalized(w, x, top), ["batch", 3, 16, 16])
    report = compile(model, tmp_path / "out.onnx", threads=1)
    given = photos(8).transpose(0, 3, 1, 2).astype(np.float32) * np.float32(1 / 255 if top == 1 else 1)
    assert measured(model, tmp_path / "out.onnx", [{"image": given}]) > MIN_SQNR
    assert report.data.preprocess.startswith(f"the graph takes pixels 0..{top:.0f} and itself computes (x")
    assert len(report.warnings) == 1, "that of built-in images"


def test_the_report_on_a_terminal_says_which_part_is_done_where(tmp_path: Path) -> None:
    model = behind(tmp_path / "vit.onnx", normalized, ["batch", 3, 16, 16])
    told = " ".join(run(model, *FAST).stdout.split())
    assert "Preprocessing the graph takes pixels 0..255 and itself computes (x / 255 - 0.485/0.456/0.406) / 0.229/0.224/0.225" in told


def test_channels_last_and_bytes(tmp_path: Path) -> None:
    def preprocess(w: Writer, x: str) -> str:
        return normalized(w, w.op("Transpose", w.op("Cast", x, to=TensorProto.FLOAT), perm=[0, 3, 1, 2]))

    model = behind(tmp_path / "vit.onnx", preprocess, ["batch", 16, 16, "c"], TensorProto.UINT8)
    for index, picture in enumerate(photos(10)):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    report = compile(model, tmp_path / "out.onnx", calibration=tmp_path, preprocess="resize=16x16", threads=1)
    assert measured(model, tmp_path / "out.onnx", [{"image": photos(8)}]) > MIN_SQNR
    assert "takes pixels 0..255 as uint8" in report.data.preprocess


@pytest.mark.parametrize("source", ["built-in", "many", "one", "folder"])
def test_one_picture_of_bytes_at_a_time(tmp_path: Path, source: str) -> None:
    model = behind(tmp_path / "vit.onnx", resized, ["h", "w", 3], TensorProto.UINT8)
    pictures = photos(10, 24, 40)
    path = None if source == "built-in" else tmp_path / "photos" if source == "folder" else tmp_path / "pictures.npz"
    if source == "folder":
        (tmp_path / "photos").mkdir()
        for index, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / "photos" / f"{index}.png")
    elif path is not None:
        np.savez(path, image=pictures if source == "many" else pictures[0])
    report = compile(model, tmp_path / "out.onnx", calibration=path, threads=1)
    assert report.data.calibration_samples == {"built-in": 32, "many": 8, "one": 1, "folder": 8}[source]
    assert measured(model, tmp_path / "out.onnx", [{"image": picture} for picture in photos(8, 20, 30)]) > MIN_SQNR - 4 * (source == "one")
    assert report.integer == len(report.linears) - 1, "all but the head, the patch embedding behind Resize too"
    assert report.validation.outputs[0].agreement is not None, "one decision of each picture"
    assert {row.batch for row in report.validation.latency} == {1}
    result = onnx.load(tmp_path / "out.onnx")
    assert [d.dim_param or d.dim_value for d in result.graph.input[0].type.tensor_type.shape.dim] == ["h", "w", 3]


def test_one_picture_of_floats_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = behind(tmp_path / "vit.onnx", lambda w, x: str(w.op("Unsqueeze", x, w.vector(0))), [3, 16, 16])
    pictures = np.random.default_rng(0).standard_normal((20, 3, 16, 16)).astype(np.float32)
    np.save(tmp_path / "pictures.npy", pictures)
    report = compile(model, tmp_path / "out.onnx", calibration=tmp_path / "pictures.npy", augment=1, threads=1)
    assert (report.data.calibration_samples, report.data.validation_samples) == (32, 4)
    assert measured(model, tmp_path / "out.onnx", [{"image": picture} for picture in pictures]) > MIN_SQNR
    assert run(model, "-q", "--inspect").exit_code == 0
    for words in ("--diagnose --samples 4", "-o q.onnx --recipe best --bits w4a4"):
        assert run(model, "-q", *words.split(), "--calibration", tmp_path / "pictures.npy").exit_code == 0


RECIPES = [*((name, "onnxruntime") for name in ("w8a8", "repq-vit", "adalog", "best")), ("w8a8", "tensorrt")]


@pytest.mark.parametrize(("recipe", "target"), RECIPES)
def test_the_file_does_not_depend_on_how_samples_are_divided_into_batches(tmp_path: Path, recipe: str, target: str) -> None:
    model = behind(tmp_path / "vit.onnx", normalized, ["batch", 3, 16, 16])
    files = []
    for size in (10, 5, 4, 3):  # of 10 samples: equal batches, and unequal ones
        compile(model, tmp_path / f"{size}.onnx", samples=10, batch_size=size, recipe=recipe, target=target, threads=1)
        files.append((tmp_path / f"{size}.onnx").read_bytes())
    assert len(set(files)) == 1


def test_a_model_that_does_not_look_at_its_input_is_told(tmp_path: Path) -> None:
    def blind(w: Writer, x: str) -> str:
        return str(w.op("Mul", x, w.number(0.0)))

    report = compile(behind(tmp_path / "vit.onnx", blind, ["batch", 3, 16, 16]), samples=8, threads=1)
    assert any(warning.startswith("the float model gives the same for all 16 samples") for warning in report.warnings)
