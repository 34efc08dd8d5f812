"""What graphs do to pictures, as torch's two exporters write it."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitq_compiler.blocks.picture import Picture, find_pictures
from vitq_compiler.graph import Graph, Layout
from vitq_compiler.model_io import read_model

pytestmark = pytest.mark.torch
pytest.importorskip("onnxscript")
torch = pytest.importorskip("torch")
functional = torch.nn.functional

MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
CHANNELS_FIRST, ALONE = Layout(batched=True, channels=1), Layout(batched=False, channels=2)


def pixels(*shape: int) -> Any:
    return torch.randint(0, 255, shape, dtype=torch.uint8)


def one_by_one(x: Any) -> Any:
    return torch.cat([x[:, i].unsqueeze(1) * (STD[i] / 0.5) + (MEAN[i] - 0.5) / 0.5 for i in range(3)], 1)


def from_bytes(x: Any) -> Any:
    return functional.interpolate(x.permute(2, 0, 1)[None].float(), (16, 16), mode="bilinear", antialias=False) / 127.5 - 1


CASES: dict[str, tuple[Callable[[Any], Any], Any, Layout, Any, Any]] = {
    "normalized": (lambda x: (x / 255 - MEAN) / STD, torch.rand(1, 3, 16, 16), CHANNELS_FIRST, 1 / (255 * STD), -MEAN / STD),
    "bgr": (lambda x: (x[:, [2, 1, 0]] - MEAN) / STD, torch.rand(1, 3, 16, 16), CHANNELS_FIRST, (1 / STD).flip(0), (-MEAN / STD).flip(0)),
    "flip": (lambda x: x.flip(1) * STD, torch.rand(1, 3, 16, 16), CHANNELS_FIRST, STD.flip(0), 0 * STD),
    "one by one": (one_by_one, torch.rand(1, 3, 16, 16), CHANNELS_FIRST, 2 * STD, 2 * MEAN - 1),
    "one picture of bytes": (from_bytes, pixels(20, 30, 3), ALONE, 1 / 127.5 + 0 * STD, 0 * STD - 1),
}


def exported(path: Path, preprocess: Callable[[Any], Any], example: Any, dynamo: bool) -> Picture:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 8, 4, 4)

        def forward(self, image: Any) -> Any:
            return self.patches(preprocess(image)).flatten(2)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(Network().eval(), (example,), str(path), dynamo=dynamo, input_names=["image"], opset_version=18, verbose=False)
    (picture,) = find_pictures(Graph.from_proto(read_model(path)))
    return picture


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("name", CASES)
def test_exported_pictures(tmp_path: Path, name: str, dynamo: bool) -> None:
    preprocess, example, layout, scale, offset = CASES[name]
    picture = exported(tmp_path / "m.onnx", preprocess, example, dynamo)
    assert (picture.layout, picture.resized) == (layout, example.shape[0] != 1)
    for got, wanted in ((picture.affine.scale, scale), (picture.affine.offset, offset)):
        np.testing.assert_allclose(np.broadcast_to(got, 3), np.asarray(wanted).reshape(3), rtol=1e-4, atol=1e-6)
