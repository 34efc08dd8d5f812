"""The graph of the memory benchmark: what it writes loads, and compiles with its weights outside."""

from pathlib import Path

import pytest

from benchmarks.large_model import write_vit
from vitq_compiler.compiler import compile
from vitq_compiler.graph import Graph, value
from vitq_compiler.model_io import file_bytes, read_model


def test_a_small_one_compiles(tmp_path: Path) -> None:
    parameters = write_vit(tmp_path / "vit.onnx", width=64, depth=2, heads=4)
    graph = Graph.from_proto(read_model(tmp_path / "vit.onnx"))
    assert parameters == sum(value(t).size for t in graph.constants() if value(t).dtype.kind == "f")
    report = compile(tmp_path / "vit.onnx", tmp_path / "out.onnx", samples=4, threads=1)
    assert {row.role for row in report.linears if not row.integer} == {"head"}
    assert len({row.block for row in report.linears if row.block}) == 4


@pytest.mark.slow
def test_over_two_gigabytes(tmp_path: Path) -> None:
    """800 M parameters: more than a protobuf holds, before and in between."""
    write_vit(tmp_path / "vit.onnx", width=1792, depth=21, heads=28)
    assert file_bytes(tmp_path / "vit.onnx") > 2**31
    report = compile(tmp_path / "vit.onnx", tmp_path / "out.onnx", samples=2, threads=1)
    assert {row.role for row in report.linears if not row.integer} == {"head"}
    assert report.validation.outputs[0].sqnr_db > 15
