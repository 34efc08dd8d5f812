"""What `--explain` says of nodes that are no Linear layers."""

import onnx
import pytest

from tests.builders import OLD_TORCH, Sizes, vit
from vitq_compiler.compiler import compile
from vitq_compiler.explain import explain
from vitq_compiler.report import CompileReport, NodeRow


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> CompileReport:
    """Of a model with decomposed normalization and GELU, and one block that is none."""
    path = tmp_path_factory.mktemp("model") / "vit.onnx"
    onnx.save(vit(Sizes(image=16, width=32, heads=2, hidden=64), OLD_TORCH), path)
    return compile(path, None, samples=8, threads=1)


def rows(report: CompileReport, op: str) -> list[NodeRow]:
    return [row for row in report.nodes if row.op == op]


def test_every_node_of_the_model_has_a_row(report: CompileReport) -> None:
    model = onnx.load(report.model)
    assert [row.name for row in report.nodes] == [n.name for n in model.graph.node if n.op_type != "Constant"]
    assert all(row.history or row.state for row in report.nodes)


def test_parts_of_what_a_pass_recovered(report: CompileReport) -> None:
    for row in rows(report, "Erf"):
        assert "recover-gelu made it part of Gelu" in row.history[0]
        assert row.block.startswith("mlp")
    assert len(rows(report, "Erf")) == 2
    for row in rows(report, "Sqrt"):
        assert "recover-layernorm made it part of LayerNormalization" in row.history[0]
        assert "has nothing for LayerNormalization" in row.state


def test_members_of_attention(report: CompileReport) -> None:
    for index, row in enumerate(rows(report, "Softmax")):
        assert row.block == f"attention {index}"
        assert row.state.startswith(f"Softmax {row.name} computes in float: recipe w8a8 quantizes inputs and weights of Linear")
    products = [row for row in rows(report, "MatMul") if row.block.startswith("attention") and "multiplies activations" in row.state]
    assert len(products) == 4
    assert all("keeps attention products in float" in row.state for row in products)


def test_parts_of_layers(report: CompileReport) -> None:
    (convolution,) = rows(report, "Conv")
    assert convolution.block == "patch_embed"
    assert convolution.state.startswith("it is part of the patch_embed layer")
    assert convolution.state.endswith("weight and activation are quantized")
    assert [row.state.rpartition(", ")[2] for row in rows(report, "Gemm")] == ["whose weight stays in float"]


def test_what_canonicalize_took_out(report: CompileReport) -> None:
    assert all("canonicalize took it out" in row.history[0] for row in rows(report, "Dropout"))
    assert all("canonicalize" in row.history[0] for row in rows(report, "Shape")[1:])


def test_the_words(report: CompileReport) -> None:
    lines = explain(report, "^Softmax$")
    assert lines[0] == "'^Softmax$' finds 0 Linear layers and 2 other nodes"
    assert lines[1].endswith(": Softmax of attention 0")
    assert lines[2].endswith("has nothing for Softmax")
    assert any("separate-heads" in line for line in explain(report, "^Squeeze$"))
    assert explain(report, "attention 1")[0].startswith("'attention 1' finds 2 Linear layers and ")
