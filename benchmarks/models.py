"""The models that are measured: exports of timm models with random weights, and ONNX files.

Random weights are as good as trained ones for latency, with one exception that is repaired here: fresh biases are zero and
fresh LayerNorms are the identity, which an optimizer may remove. All vectors of a model get seeded noise.

Imports nothing slow: `benchmarks.compile_time` measures the memory of processes it starts, which begin as large as itself.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIMM = {
    "vit_tiny": "vit_tiny_patch16_224",
    "deit_tiny": "deit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
}
OPSETS = {"dynamo": 20, "torchscript": 17}
NOISE = 0.02


def shared_folder() -> Path:
    """The folder of optional data: ``VITQ_SHARED``, else a folder ``shared`` beside the repository."""
    return Path(os.environ.get("VITQ_SHARED") or ROOT.parent / "shared")


def obtain(name: str, exporter: str, folder: Path, seed: int = 0) -> Path:
    """The ONNX file of a model: the file itself where ``name`` ends in ``.onnx``, else an export into ``folder``.

    Args:
        name: one of `TIMM`, or the path of an ONNX file.
        exporter: one of `OPSETS`; of no meaning for a file.
        folder: where to write an export.
        seed: of the random weights.
    """
    if name.endswith(".onnx"):
        if not Path(name).is_file():
            raise SystemExit(f"{name}: there is no such file")
        return Path(name)
    if name not in TIMM:
        raise SystemExit(f"model {name!r} is unknown; give one of {', '.join(TIMM)}, or an ONNX file")
    path = folder / f"{name}_{exporter}.onnx"
    export(TIMM[name], exporter, path, seed)
    return path


def export(architecture: str, exporter: str, path: Path, seed: int = 0) -> None:
    """Export a timm model with random weights; input ``pixel_values`` with an open batch, output ``logits``."""
    timm, torch = import_timm()
    torch.manual_seed(seed)
    model = timm.create_model(architecture, pretrained=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += NOISE * torch.randn_like(parameter)
    names: dict[str, Any] = {"input_names": ["pixel_values"], "output_names": ["logits"], "opset_version": OPSETS[exporter]}
    example = (torch.zeros(2, *model.default_cfg["input_size"]),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            shapes = ({0: torch.export.Dim("batch")},)
            program = torch.onnx.export(model, example, dynamic_shapes=shapes, dynamo=True, verbose=False, **names)
            program.save(path, external_data=False)
        else:
            axes = {"pixel_values": {0: "batch"}, "logits": {0: "batch"}}
            torch.onnx.export(model, example, path, dynamic_axes=axes, dynamo=False, **names)


def import_timm() -> tuple[Any, Any]:
    """timm and torch, or an exit that says what to install."""
    torch = import_torch()
    try:
        import timm
    except ImportError as error:
        raise SystemExit("models are built with timm: pip install timm, or give an ONNX file") from error
    return timm, torch


def import_torch() -> Any:
    """torch; a torchvision whose operators do not fit torch's build is helped by the shim in `shared_folder`."""
    import torch

    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        pass
    except RuntimeError:
        shim = shared_folder() / "tools" / "torchvision_shim.py"
        if not shim.is_file():
            raise
        spec = importlib.util.spec_from_file_location("torchvision_shim", shim)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["torchvision_shim"] = module  # torch forgets the operators when nobody keeps it
    return torch
