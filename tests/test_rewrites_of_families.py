"""Every exact rewrite over every family of `tests/data/zoo`: it keeps the outputs where it applies, and says why where it does not."""

from pathlib import Path

import numpy as np
import pytest

from tests.builders import compilation, difference, feed_of, find_pass, run_model
from vitq_compiler.catalog import FRONT
from vitq_compiler.model_io import read_model
from vitq_compiler.pipeline import Compilation, Pipeline

FOLDER = Path(__file__).parent / "data" / "zoo"
FAMILIES = sorted(path.stem for path in FOLDER.glob("*.onnx"))
TOLERANCE = 1e-4
# Rewrite -> the passes after annotate that do it.
PASSES = {
    "fold-attention-scale": "fold-attention-scale",
    "fold-layernorm-affine": "fold-layernorm-affine",
    "rotate-residual": "rotate-residual",
    "rotate-heads": "rotate-heads",
    "center-keys": "center-keys",
    "center-values": "center-values",
    "equalize-heads": "equalize-heads",
    "equalize-values": "calibrate,equalize-values",
    "equalize-hidden": "calibrate,equalize-hidden",
    "reparameterize-layernorm": "calibrate,reparameterize-layernorm",
}
ROTARY = ("dinov3", "dinov3_hf", "eva02", "eva02_norms", "rope_mixed")
QUERIES = ("fold-attention-scale", "center-keys", "equalize-heads")
VALUES = ("rotate-heads", "center-values", "equalize-values")  # rotate-heads: of the values at least
HEADS = (*QUERIES, *VALUES)
FOLDS = ("fold-layernorm-affine", "reparameterize-layernorm")
AFFINE = {"rotate-residual": "scales or shifts each channel in its own way"}  # a normalization behind which something else reads too
OUTPUT = {"rotate-residual": "output is a graph output"}
# What is refused altogether: family -> rewrite -> part of the reason.
REFUSED: dict[str, dict[str, str]] = {
    **{family: dict.fromkeys(QUERIES, "queries and keys are rotated by their positions") for family in ROTARY},
    "query_key_norm": dict.fromkeys(QUERIES, "queries and keys are normalized"),
    "parallel": dict.fromkeys(QUERIES, "queries and keys are normalized") | AFFINE,
    "swinv2": dict.fromkeys(QUERIES, "queries and keys are divided by their lengths")
    | AFFINE
    | dict.fromkeys(FOLDS, "Add node_add_240 reads it"),
    "convit": dict.fromkeys(HEADS, "softmax is read by Mul, not by one MatMul"),
    "hiera": dict.fromkeys(HEADS, "an operand has 5 axes"),
    "beit3": dict.fromkeys(HEADS, "is read by LayerNormalization"),
    "bert": dict.fromkeys(FOLDS, "/attention/output/Add reads it") | OUTPUT,
    "clip_text": OUTPUT,
    "quick_gelu": OUTPUT,
}
REFUSED["dinov3_hf"] |= OUTPUT
REFUSED["eva02_norms"] |= dict.fromkeys(VALUES, "is read by LayerNormalization")


@pytest.mark.parametrize("family", FAMILIES)
def test_applies_or_says_why(family: str) -> None:
    c = compilation(read_model(FOLDER / f"{family}.onnx"))
    Pipeline.parse(FRONT, find_pass).run(c)
    feed = feed_of(c.graph)
    reference = run_model(c.graph, feed)
    refused = {}
    for name, passes in PASSES.items():
        copy = Compilation(c.graph.snapshot(), c.recipe, c.target, c.data, threads=1)
        results = Pipeline.parse(f"canonicalize,annotate,{passes}", find_pass).run(copy)
        changes = next(result.changes for result in results if result.spec == name)
        reasons = [note.reason for note in copy.notes if note.stage == name]
        assert changes or reasons, f"{name} leaves the model alone without a word"
        assert difference(reference, run_model(copy.graph, feed)) <= TOLERANCE, name
        if not changes:
            refused[name] = reasons
    expected = REFUSED.get(family, {})
    assert refused.keys() == expected.keys()
    for name, reasons in refused.items():
        assert any(expected[name] in reason for reason in reasons), (name, reasons)


@pytest.mark.parametrize("family", ["swin", "deit_distilled", "pvt_v2", "layer_scale", "segformer"])
def test_all_together(family: str) -> None:
    """The rewrites of one model one after the other, as a recipe runs them."""
    c = compilation(read_model(FOLDER / f"{family}.onnx"))
    Pipeline.parse(FRONT, find_pass).run(c)
    feed = feed_of(c.graph)
    reference = run_model(c.graph, feed)
    heads = "fold-attention-scale,rotate-heads,center-keys,center-values,equalize-heads"
    after = "calibrate,reparameterize-layernorm{common=median limit=8},equalize-values,equalize-hidden"
    copy = Compilation(c.graph.snapshot(), c.recipe, c.target, c.data, threads=1)
    results = Pipeline.parse(f"canonicalize,annotate,fold-layernorm-affine,rotate-residual,{heads},{after}", find_pass).run(copy)
    assert all(result.changes for result in results if result.spec.partition("{")[0] in PASSES)
    after_all = run_model(copy.graph, feed)
    assert difference(reference, after_all) <= TOLERANCE
    assert np.isfinite(after_all[0]).all()
