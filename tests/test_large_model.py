"""The graph of the memory benchmark: what it writes loads, and compiles with its weights outside."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from benchmarks.compile_time import run_measured
from benchmarks.large import BUDGET_MB
from benchmarks.large_model import write_vit
from vitq_compiler import compiler, runtime, verdict
from vitq_compiler import graph as graph_module
from vitq_compiler.compiler import compile
from vitq_compiler.graph import LARGE, Graph, value
from vitq_compiler.model_io import convert_opset, file_bytes, read_model
from vitq_compiler.tensors import is_external


def test_a_small_one_compiles(tmp_path: Path) -> None:
    parameters = write_vit(tmp_path / "vit.onnx", width=64, depth=2, heads=4)
    graph = Graph.from_proto(read_model(tmp_path / "vit.onnx"))
    assert parameters == sum(value(t).size for t in graph.constants() if value(t).dtype.kind == "f")
    report = compile(tmp_path / "vit.onnx", tmp_path / "out.onnx", samples=4, threads=1)
    assert {row.role for row in report.linears if not row.integer} == {"head"}
    assert len({row.block for row in report.linears if row.block}) == 4


def test_weights_stay_in_their_file(tmp_path: Path) -> None:
    write_vit(tmp_path / "vit.onnx", width=64, depth=1, heads=4)
    source = read_model(tmp_path / "vit.onnx")
    outside = [t for t in source.graph.initializer if is_external(t)]
    assert {int(np.prod(t.dims)) >= LARGE for t in outside} == {True}
    assert len(outside) == 9  # 6 Linear layers, the patches, the positions, the head
    graph = Graph.from_proto(convert_opset(source, 23, tmp_path / "vit.onnx"))
    mapped = [t for t in graph.constants() if isinstance(value(t).base, np.memmap)]
    assert {t.name for t in mapped} == {t.name for t in outside}
    loaded = onnx.load(tmp_path / "vit.onnx")
    for tensor in loaded.graph.initializer:
        np.testing.assert_array_equal(value(graph.tensor(tensor.name)), numpy_helper.to_array(tensor))


def save_in_half_precision(path: Path) -> None:
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, path, save_as_external_data=True, location="half.data")


@pytest.mark.parametrize("half", [False, True])
def test_the_thrifty_way_gives_the_same_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    """Weights as inputs of sessions, one session at a time: the integer graph is the same to the last bit."""
    path = tmp_path / "vit.onnx"
    write_vit(path, width=64, depth=2, heads=4)
    if half:
        save_in_half_precision(path)
    usual = compile(path, tmp_path / "a.onnx", samples=4, threads=1)
    for module in (compiler, runtime, verdict):
        monkeypatch.setattr(module, "LARGE_MODEL", 0)
    thrifty = compile(path, tmp_path / "b.onnx", samples=4, threads=1)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert thrifty.linears == usual.linears
    assert thrifty.validation.outputs[0].sqnr_db == pytest.approx(usual.validation.outputs[0].sqnr_db, abs=0.5)
    assert [row.name for row in thrifty.validation.blocks] == [row.name for row in usual.validation.blocks]
    assert [(row.threads, row.batch) for row in thrifty.validation.latency] == [(1, 1)]
    assert any("one after the other" in warning for warning in thrifty.warnings)


def test_the_size_of_a_proto_beyond_protobuf(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = numpy_helper.from_array(np.ones((100, 100), np.float32), "w")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [], [weight]))
    assert graph_module.proto_bytes(model) == model.ByteSize()
    monkeypatch.setattr(graph_module, "LARGE_MODEL", 0)
    assert graph_module.proto_bytes(model) == weight.ByteSize() + node.ByteSize()


@pytest.mark.slow
def test_over_two_gigabytes(tmp_path: Path) -> None:
    """800 M parameters, more than a protobuf holds, in at most the memory of the model and 4 GB."""
    write_vit(tmp_path / "vit.onnx", width=1792, depth=21, heads=28)
    size = file_bytes(tmp_path / "vit.onnx")
    assert size > 2**31
    options = ("-o", str(tmp_path / "out.onnx"), "--report", str(tmp_path / "report.json"), "--samples", "2", "--threads", "1", "-q")
    done = run_measured([sys.executable, "-m", "vitq_compiler", str(tmp_path / "vit.onnx"), *options])
    assert done.peak_mb <= size / 1e6 + BUDGET_MB
    report = json.loads((tmp_path / "report.json").read_text())
    assert {row["role"] for row in report["linears"] if not row["integer"]} == {"head"}
    assert report["validation"]["outputs"][0]["sqnr_db"] > 15
