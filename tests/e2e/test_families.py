"""Every family of `tests/data/zoo`, as torch exports it: each Linear as given has its role and block and runs on integers."""

from collections import Counter
from pathlib import Path

import pytest

from vitq_compiler.compiler import compile

FOLDER = Path(__file__).parents[1] / "data" / "zoo"
MIN_SQNR = 28.0  # of two blocks with random weights, in dB
PLAIN = {"qkv": 6, "proj": 2, "fc1": 2, "fc2": 2}  # q, k and v each a Linear
JOINED = PLAIN | {"qkv": 2}  # one Linear for q, k and v
ENDS = {"patch_embed": 1, "head": 1}
STAGES = {"qkv": 9, "proj": 3, "fc1": 3, "fc2": 3, "linear": 1}  # three blocks, and what merges patches between two stages

FAMILIES = {
    "attention_pooling": {"qkv": 3, "proj": 3, "fc1": 3, "fc2": 3} | ENDS,
    "beit": JOINED | ENDS,
    "beit3": JOINED | ENDS,
    "bert": PLAIN,
    "cait": {"qkv": 8, "proj": 4, "fc1": 4, "fc2": 4, "mix": 4} | ENDS,
    "clip_text": PLAIN,
    "convit": PLAIN | {"qkv": 4} | ENDS,
    "data2vec": PLAIN | ENDS,
    "deit_distilled": JOINED | ENDS | {"head": 2},
    "dinov3": JOINED | {"gate": 2} | ENDS,
    "dinov3_hf": PLAIN | {"gate": 2, "patch_embed": 1},
    "eva02": JOINED | ENDS,
    "eva02_norms": PLAIN | {"gate": 2} | ENDS,
    "hiera": STAGES | {"qkv": 3, "head": 1},
    "layer_scale": JOINED | ENDS,
    "parallel": {"qkv": 2, "proj": 2, "fc2": 2} | ENDS,
    "pvt_v2": PLAIN | {"head": 1},
    "query_key_norm": JOINED | ENDS,
    "quick_gelu": PLAIN | {"patch_embed": 1},
    "relative_position": JOINED | ENDS,
    "rope_mixed": JOINED | ENDS,
    "segformer": PLAIN | {"head": 1},
    "siglip_hf": {"qkv": 7, "proj": 3, "fc1": 3, "fc2": 3, "patch_embed": 1},
    "swiglu": PLAIN | {"gate": 2} | ENDS,
    "swin": STAGES | ENDS,
    "swinv2": STAGES | ENDS,
}
FLOAT = {"head", "mix"}  # what the default recipe leaves in float


def test_every_model_is_tried() -> None:
    assert {path.stem for path in FOLDER.glob("*.onnx")} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    report = compile(FOLDER / f"{family}.onnx", samples=8, threads=1)
    assert Counter(row.role for row in report.linears) == FAMILIES[family]
    assert {row.role for row in report.linears if not row.integer} == {role for role in FAMILIES[family] if role in FLOAT}
    assert all(row.block for row in report.linears if row.role in ("qkv", "proj", "fc1", "fc2", "gate", "mix"))
    blocks = {row.block.split()[0]: row.block for row in report.linears if row.block}
    assert set(blocks) == {"attention", "mlp"}
    assert min(row.sqnr_db for row in report.validation.outputs) > MIN_SQNR
