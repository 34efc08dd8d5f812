"""The shipped model: what becomes of it, and its top-1 on 500 labelled test images of CIFAR-10, float against integer."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from tests.e2e.command import SHIPPED
from vitq_compiler.compiler import compile
from vitq_compiler.metrics import sqnr
from vitq_compiler.report import CompileReport

LABELLED = Path(__file__).parents[1] / "data" / "cifar10_test_500.npz"
MIN_SQNR = 25.0
MIN_TOP1 = 0.80
MAX_LOST = 5  # images, one point of 500
MIN_AGREEMENT = 0.97


def pixels_of(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the model takes; preprocessing as the configuration beside it says."""
    config = json.loads((SHIPPED.parent / "preprocessor_config.json").read_text())
    pixels = images.astype(np.float32) * config["rescale_factor"]
    pixels = (pixels - np.array(config["image_mean"])) / np.array(config["image_std"])
    return pixels.transpose(0, 3, 1, 2).astype(np.float32)


def logits(model: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"pixel_values": batch})[0] for batch in np.array_split(pixels_of(images), 10)])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompileReport]:
    """The integer file, alone in its folder, and the report."""
    if not SHIPPED.is_file():
        pytest.skip(f"{SHIPPED.name} is not there")
    output = tmp_path_factory.mktemp("shipped") / "out.onnx"
    before = SHIPPED.read_bytes()
    report = compile(SHIPPED, output)
    assert SHIPPED.read_bytes() == before
    return output, report


def test_the_shipped_model(compiled: tuple[Path, CompileReport]) -> None:
    output, report = compiled
    assert [path.name for path in output.parent.iterdir()] == ["out.onnx"]
    assert output.stat().st_size < SHIPPED.stat().st_size / 3
    assert Counter(row.role for row in report.linears if row.integer) == {"patch_embed": 1, "qkv": 6, "proj": 6, "fc1": 6, "fc2": 6}
    floating = [row for row in report.linears if not row.integer]
    assert [row.role for row in floating] == ["head"]
    assert report.validation.outputs[0].sqnr_db > MIN_SQNR
    assert report.data.source == "32 built-in images"
    assert report.data.preprocess.startswith("preprocessor_config.json beside the model")


def labelled() -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of the test set."""
    with np.load(LABELLED) as data:
        return data["images"], data["labels"]


def test_top1(compiled: tuple[Path, CompileReport]) -> None:
    images, labels = labelled()
    floating, integer = (logits(path, images).argmax(1) for path in (SHIPPED, compiled[0]))
    before, after = (int(np.sum(found == labels)) for found in (floating, integer))
    assert before >= MIN_TOP1 * len(labels)
    assert after >= before - MAX_LOST
    assert np.mean(floating == integer) >= MIN_AGREEMENT


@pytest.mark.slow
def test_rounding_with_feedback_belongs_into_the_sweep(tmp_path: Path) -> None:
    """Done after compensate-weights and not within, it changes the inputs to which the layers behind were fitted."""
    images, _ = labelled()
    np.savez(tmp_path / "calibration.npz", pixel_values=pixels_of(images[:64]))
    before = "canonicalize,recover-layernorm,recover-gelu,separate-linears,annotate,calibrate,reparameterize-layernorm"
    before += ",compute-qparams,search-ranges{centered}"
    floating = logits(SHIPPED, images[64:])
    found = []
    for fitting in ("compensate-weights,round-weights{method=gptq}", "compensate-weights{gptq}"):
        passes = f"{before},{fitting},insert-qdq,legalize"
        compile(
            SHIPPED, tmp_path / "out.onnx", recipe="best", bits="w3a3", calibration=tmp_path / "calibration.npz", samples=64, passes=passes
        )
        found.append(sqnr(floating, logits(tmp_path / "out.onnx", images[64:])))
    assert found[1] > found[0] + 0.3, found
