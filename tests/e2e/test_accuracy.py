"""The shipped model stays as good as it was: top-1 on 500 labelled test images of CIFAR-10, float against integer."""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from tests.e2e.command import SHIPPED
from vitq_compiler.compiler import compile

LABELLED = Path(__file__).parents[1] / "data" / "cifar10_test_500.npz"
MIN_TOP1 = 0.75
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


def test_accuracy(tmp_path: Path) -> None:
    if not SHIPPED.is_file():
        pytest.skip(f"{SHIPPED.name} is not there")
    data = np.load(LABELLED)
    report = compile(SHIPPED, tmp_path / "out.onnx")
    assert report.data.source == "32 built-in images"
    floating, integer = (classes(path, data["images"]) for path in (SHIPPED, tmp_path / "out.onnx"))
    before, after = (int(np.sum(found == data["labels"])) for found in (floating, integer))
    assert before >= MIN_TOP1 * len(data["labels"])
    assert after >= before - MAX_LOST
    assert np.mean(floating == integer) >= MIN_AGREEMENT
