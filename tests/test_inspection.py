"""`--inspect`: blocks, sizes and what would become integer, counted by hand."""

import json
from pathlib import Path

import onnx
import pytest

from tests.builders import HUGGINGFACE, KERAS, TIMM, Dialect, Sizes, model_of, variant, vit
from vitq_compiler.errors import ModelError
from vitq_compiler.inspection import Structure, inspect

SIZES = Sizes(image=16, width=32, heads=2, hidden=48, depth=2, classes=5)
TOKENS, WIDTH, HIDDEN = 17, 32, 48
QKV = TOKENS * WIDTH * 3 * WIDTH
PRODUCTS = 2 * TOKENS * TOKENS * WIDTH
PROJ, FC = TOKENS * WIDTH * WIDTH, TOKENS * WIDTH * HIDDEN
PATCHES = 16 * WIDTH * 3 * 16
HEAD = WIDTH * 5


def inspected(folder: Path, model: onnx.ModelProto, **options: object) -> Structure:
    onnx.save(model, folder / "vit.onnx")
    return inspect(folder / "vit.onnx", threads=1, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dialect", [TIMM, HUGGINGFACE, KERAS, variant(TIMM, dynamic=False)])
def test_multiplications_are_counted_per_sample(tmp_path: Path, dialect: Dialect) -> None:
    structure = inspected(tmp_path, vit(SIZES, dialect))
    assert structure.macs == 2 * (QKV + PRODUCTS + PROJ + 2 * FC) + PATCHES + HEAD
    assert structure.quantized_macs == structure.macs - 2 * PRODUCTS - HEAD
    assert [block.name for block in structure.blocks][1:5] == ["attention 0", "mlp 0", "attention 1", "mlp 1"]


def test_blocks_add_up(tmp_path: Path) -> None:
    structure = inspected(tmp_path, vit(SIZES))
    attention = structure.blocks[1]
    assert attention.roles == ("qkv", "products", "proj")
    assert attention.parameters == 4 * (WIDTH * WIDTH + WIDTH)
    assert (attention.quantized, attention.layers) == (2, 3)
    assert attention.reason == "products: recipe w8a8 keeps attention products in float"
    assert sum(block.macs for block in structure.blocks) == structure.macs
    patches = structure.blocks[0]
    assert (patches.roles, patches.shape, patches.parameters) == (("patch_embed",), (1, WIDTH, 4, 4), WIDTH * 48 + WIDTH)
    assert structure.blocks[-1].reason == "head: role head stays in float in recipe w8a8"


def test_exclusions_are_seen(tmp_path: Path) -> None:
    structure = inspected(tmp_path, vit(SIZES), exclude=["Conv"])
    assert structure.blocks[0].reason == "patch_embed: excluded by 'Conv'"


def test_json(tmp_path: Path) -> None:
    structure = inspected(tmp_path, vit(SIZES))
    table = json.loads(structure.to_json())
    assert table["totals"] == {
        "macs": structure.macs,
        "quantized_macs": structure.quantized_macs,
        "parameters": structure.parameters,
    }
    assert len(table["blocks"]) == 6
    assert {row["role"] for row in table["layers"]} == {"patch_embed", "qkv", "products", "proj", "fc1", "fc2", "head"}


def test_what_is_almost_a_block_is_told(tmp_path: Path) -> None:
    model = vit(Sizes(image=16, width=32, heads=2, hidden=48, depth=2))
    softmax = [n for n in model.graph.node if n.op_type == "Softmax"][1]
    softmax.input[0], scores = "doubled", softmax.input[0]
    place = list(model.graph.node).index(softmax)
    model.graph.node.insert(place, onnx.helper.make_node("Abs", [scores], ["doubled"], "odd"))
    structure = inspected(tmp_path, model)
    assert any(note.where == softmax.name and "Abs" in note.reason for note in structure.notes)


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    model = model_of("g (float[B, 3, 8, 8] x) => (float[B, 3, 8, 8] y) { y = Relu(x) }")
    with pytest.raises(ModelError, match="no transformer block found"):
        inspected(tmp_path, model)
