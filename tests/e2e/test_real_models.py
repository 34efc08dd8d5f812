"""Published models, where they are at hand: every block is understood and every Linear in it is computed on integers.

The folder is ``VITQ_DATA``, else ``.data/real`` in the repository; a model that is not in it is skipped.
"""

import math
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import onnx
import pytest

from tests.e2e.command import ROOT
from vitq_compiler.compiler import compile

pytestmark = pytest.mark.slow

FOLDER = Path(os.environ.get("VITQ_DATA") or ROOT / ".data" / "real")


class Expected(NamedTuple):
    """What a model has, and the least SQNR in dB of its float outputs."""

    attentions: int
    mlps: int
    gelus: int
    layernorms: int
    min_sqnr: float


MODELS = {
    "dinov2s_backbone": Expected(12, 12, 12, 25, 25.0),
    "vit_s_focus": Expected(12, 12, 12, 25, 25.0),
    "svtr_ocr": Expected(6, 12, 14, 26, 25.0),  # its other six blocks mix by convolution
}


@pytest.mark.parametrize("name", MODELS)
def test_real_model(tmp_path: Path, name: str) -> None:
    model, expected = FOLDER / f"{name}.onnx", MODELS[name]
    if not model.is_file():
        pytest.skip(f"no {model.name} in {FOLDER}")
    report = compile(model, tmp_path / "out.onnx", samples=8, preprocess="imagenet")
    assert [row.name for row in report.linears if row.role != "head" and not (row.quantized and row.integer)] == []
    kinds = Counter(row.block.partition(" ")[0] for row in report.linears if row.role in ("proj", "fc2"))
    assert kinds == {"attention": expected.attentions, "mlp": expected.mlps}
    refused = [note.where for note in report.notes if note.stage == "annotate" and note.reason.startswith("not an attention block")]
    assert refused == []
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node)
    assert (ops["Attention"], ops["Gelu"], ops["LayerNormalization"]) == (expected.attentions, expected.gelus, expected.layernorms)
    assert min(output.sqnr_db for output in report.validation.outputs if not math.isnan(output.sqnr_db)) > expected.min_sqnr
