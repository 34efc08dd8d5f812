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
from vitq_compiler.report import CompileReport

LABELLED = Path(__file__).parents[1] / "data" / "cifar10_test_500.npz"
MIN_SQNR = 25.0
MIN_TOP1 = 0.80
MAX_LOST = 5  # images, one point of 500
MIN_AGREEMENT = 0.97


def classes(model: Path, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Top-1 class of every image; preprocessing as the configuration beside the model says."""
    config = json.loads((SHIPPED.parent / "preprocessor_config.json").read_text())
    pixels = images.astype(np.float32) * config["rescale_factor"]
    pixels = (pixels - np.array(config["image_mean"])) / np.array(config["image_std"])
    batches = np.split(pixels.transpose(0, 3, 1, 2).astype(np.float32), 10)
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"pixel_values": batch})[0].argmax(1) for batch in batches])


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
    assert Counter(row.role for row in report.linears if row.integer) == {"patch_embed": 1, "qkv": 3 * 6, "proj": 6, "fc1": 6, "fc2": 6}
    floating = [row for row in report.linears if not row.integer]
    assert [row.role for row in floating] == ["head"]
    assert report.validation.outputs[0].sqnr_db > MIN_SQNR
    assert report.data.source == "32 built-in images"
    assert report.data.preprocess.startswith("preprocessor_config.json beside the model")


def test_top1(compiled: tuple[Path, CompileReport]) -> None:
    data = np.load(LABELLED)
    floating, integer = (classes(path, data["images"]) for path in (SHIPPED, compiled[0]))
    before, after = (int(np.sum(found == data["labels"])) for found in (floating, integer))
    assert before >= MIN_TOP1 * len(data["labels"])
    assert after >= before - MAX_LOST
    assert np.mean(floating == integer) >= MIN_AGREEMENT
