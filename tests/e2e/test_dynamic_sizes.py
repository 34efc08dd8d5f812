"""A model of any image size, its positions interpolated, through both exporters."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.builders import run_model
from vitq_compiler.compiler import compile
from vitq_compiler.metrics import sqnr

pytestmark = pytest.mark.torch
pytest.importorskip("onnxscript")
torch = pytest.importorskip("torch")
WIDTH, HEADS, DEPTH = 32, 2, 2


def network() -> Any:
    """A ViT without a class token that interpolates its positions."""
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

        def forward(self, x: Any) -> Any:
            batch, tokens, width = x.shape
            q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-2, -1) * (width // HEADS) ** -0.5).softmax(-1)
            x = x + self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
            return x + self.mlp(self.norm2(x))

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, WIDTH, 8, 8)
            self.positions = nn.Parameter(torch.randn(1, WIDTH, 4, 4))
            self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
            self.head = nn.Linear(WIDTH, 5)

        def forward(self, image: Any) -> Any:
            x = self.embed(image)
            x = x + nn.functional.interpolate(self.positions, size=x.shape[2:], mode="bilinear")
            return self.head(self.blocks(x.flatten(2).transpose(1, 2)).mean(1))

    torch.manual_seed(0)
    return Vit().eval()


def export(path: Path, dynamo: bool) -> None:
    image = torch.randn(2, 3, 32, 32)
    names = {"input_names": ["image"], "output_names": ["logits"]}
    if dynamo:
        shapes = {"image": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)}
        torch.onnx.export(network(), (image,), path, dynamo=True, dynamic_shapes=shapes, verbose=False, external_data=False, **names)
    else:
        axes = {"image": {0: "batch", 2: "height", 3: "width"}, "logits": {0: "batch"}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter is old and says so
            torch.onnx.export(network(), (image,), path, dynamo=False, opset_version=17, dynamic_axes=axes, **names)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_every_image_size(tmp_path: Path, dynamo: bool) -> None:
    export(tmp_path / "vit.onnx", dynamo)
    report = compile(tmp_path / "vit.onnx", tmp_path / "out.onnx", samples=8, threads=1, preprocess="resize=32,crop=32")
    assert {row.role for row in report.linears if not row.integer} <= {"head", "patch_embed"}, "a convolution on open sizes"
    assert {row.kernel for row in report.linears if row.integer} == {"QGemm"}
    assert len({row.block for row in report.linears if row.block}) == 2 * DEPTH
    original, result = onnx.load(tmp_path / "vit.onnx"), onnx.load(tmp_path / "out.onnx")
    for height, width in ((32, 32), (48, 64), (88, 40)):
        feed = {"image": np.random.default_rng(height).standard_normal((3, 3, height, width)).astype(np.float32)}
        reference, integer = (run_model(model, feed, optimize=True)[0] for model in (original, result))
        assert sqnr(reference, integer) > 25
