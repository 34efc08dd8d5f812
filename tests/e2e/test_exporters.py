"""What PyTorch's two exporters really write, for a plain ViT and for those of transformers and timm."""

import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import ROOT
from vitq_compiler.compiler import compile

pytestmark = pytest.mark.torch
pytest.importorskip("onnxscript")
torch = pytest.importorskip("torch")

SIDE, DEPTH = 16, 2
MIN_SQNR = 25.0


def plain_vit() -> Any:
    """The network of the training script, smaller."""
    spec = importlib.util.spec_from_file_location("train_vit", ROOT / "models" / "train_vit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ViT(image=SIDE, patch=4, width=64, depth=DEPTH, heads=4)


def optional(module: str, name: str) -> Any:
    """A class of a package that may be missing, or may not load: a torchvision built for another torch breaks both."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{module} cannot be loaded: {' '.join(str(error).split())}")


def transformers_vit(name: str) -> Any:
    """A small `ViTForImageClassification` or the like, with random weights."""
    sizes = {"hidden_size": 64, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "intermediate_size": 256}
    config = optional("transformers", f"{name}Config")(image_size=SIDE, patch_size=4, num_labels=10, **sizes)
    network = optional("transformers", f"{name}ForImageClassification")(config)

    class Logits(torch.nn.Module):
        """The network with a plain tensor as its output."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, pixel_values: Any) -> Any:
            return self.network(pixel_values).logits

    return Logits()


def timm_vit(**options: Any) -> Any:
    """A small timm `VisionTransformer` with random weights."""
    network = optional("timm.models.vision_transformer", "VisionTransformer")
    return network(img_size=SIDE, patch_size=4, embed_dim=64, depth=DEPTH, num_heads=4, num_classes=10, **options)


def export(model: Any, path: Path, dynamo: bool, dynamic: bool, opset: int | None = None) -> Path:
    """Opset 20 with the new exporter and 17 with TorchScript's, unless another is asked for."""
    batch = {0: torch.export.Dim("batch")} if dynamo else {0: "batch"}
    shapes: dict[str, Any] = {}
    if dynamic:
        shapes = {"dynamic_shapes": (batch,)} if dynamo else {"dynamic_axes": {"pixel_values": batch, "logits": batch}}
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn about themselves
        torch.onnx.export(
            model.eval(),
            (torch.randn(2, 3, SIDE, SIDE),),
            path,
            dynamo=dynamo,
            opset_version=opset or (20 if dynamo else 17),
            **names,
            **shapes,
            **({"verbose": False, "external_data": False} if dynamo else {}),
        )
    return path


def assert_compiles(model: Path) -> None:
    """Every Linear of the blocks and the patch embedding is computed on integers, and the outputs stay close."""
    report = compile(model, model.with_name("out.onnx"), samples=8)
    roles = {row.role for row in report.linears if row.integer}
    assert {row.role for row in report.linears if not row.integer} <= {"head"}
    assert {"patch_embed", "proj", "fc1", "fc2"} <= roles
    assert len({row.block for row in report.linears if row.block.startswith("attention")}) == DEPTH
    assert len(report.validation.blocks) == 2 * DEPTH
    assert report.validation.outputs[0].sqnr_db > MIN_SQNR


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_plain_vit(tmp_path: Path, dynamo: bool, dynamic: bool) -> None:
    assert_compiles(export(plain_vit(), tmp_path / "vit.onnx", dynamo, dynamic))


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("name", ["ViT", "DeiT", "Dinov2"])
def test_transformers(tmp_path: Path, name: str, dynamo: bool) -> None:
    assert_compiles(export(transformers_vit(name), tmp_path / "vit.onnx", dynamo, True))


@pytest.mark.slow
@pytest.mark.parametrize(("dynamo", "opset"), [*((False, n) for n in range(14, 21)), *((True, n) for n in range(18, 24))])
def test_every_opset(tmp_path: Path, dynamo: bool, opset: int) -> None:
    assert_compiles(export(plain_vit(), tmp_path / "vit.onnx", dynamo, True, opset))
    assert_compiles(export(transformers_vit("ViT"), tmp_path / "vit.onnx", dynamo, True, opset))


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("options", [{}, {"init_values": 0.1, "global_pool": "avg", "class_token": False}], ids=["plain", "layer-scale"])
def test_timm(tmp_path: Path, options: dict[str, Any], dynamo: bool) -> None:
    assert_compiles(export(timm_vit(**options), tmp_path / "vit.onnx", dynamo, True))
