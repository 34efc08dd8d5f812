"""Inputs of every opset and operators that are new or gone, for every target: what the result is written in, and what it says it needs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.builders import DYNAMO, OLD_TORCH, Dialect, Sizes, variant, vit, with_text
from tests.e2e.command import run
from vitq_compiler.compiler import compile
from vitq_compiler.errors import TargetError
from vitq_compiler.report import CompileReport

SIZES = Sizes(depth=1, image=16, patch=4, width=32, heads=2, hidden=64)
TARGETS: dict[str, dict[str, Any]] = {
    "onnxruntime": {},
    "onnxruntime 1.16": {"target_options": {"version": "1.16"}},
    "onnxruntime newest": {"target_options": {"version": "newest"}},
    "tensorrt 10": {"target": "tensorrt"},
    "tensorrt 8.6": {"target": "tensorrt", "target_options": {"version": "8.6"}},
}


def compiled(model: onnx.ModelProto, folder: Path, **options: Any) -> tuple[CompileReport, onnx.ModelProto]:
    """The report and the graph of a compile with few samples."""
    onnx.save(model, folder / "vit.onnx")
    report = compile(folder / "vit.onnx", folder / "out.onnx", samples=8, threads=1, **options)
    graph = onnx.load(folder / "out.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert graph.opset_import[0].version == report.needs.opset
    return report, graph


def stamped(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The same nodes in another opset, where they mean the same."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.opset_import[0].version = opset
    onnx.checker.check_model(copy, full_check=True)
    return copy


def refused(*words: object) -> str:
    """The line on stderr of a command that cannot compile."""
    result = run(*words, "-q")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    return line


def ops(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("dialect", [Dialect(), Dialect(layernorm="pow-sqrt-div")], ids=["operator", "decomposed"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_rms_normalization(target: dict[str, Any], dialect: Dialect, tmp_path: Path) -> None:
    report, graph = compiled(vit(replace(SIZES, norm="rms"), dialect), tmp_path, **target)
    newest = target == TARGETS["onnxruntime newest"]
    assert ("RMSNormalization" in ops(graph)) == newest
    assert report.quantized == len(report.linears) - 1
    assert report.validation.outputs[0].sqnr_db > 20
    (moved,) = [row.changes for row in report.passes if row.spec.startswith("reparameterize-layernorm")]
    assert moved > 0, "it is known as a normalization"
    assert not any(warning.startswith("S02") for warning in report.warnings), "nothing but its statistics is in float32 for tensorrt"


SCHEMES: dict[str, dict[str, Any]] = {
    "10": {"target": "tensorrt"},
    "8.6": {"target": "tensorrt", "target_options": {"version": "8.6"}},
    "fp32": {"target": "tensorrt", "target_options": {"float_type": "fp32"}},
    "few bits": {"target": "tensorrt", "recipe": "best", "bits": "w4a4"},
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize(
    ("opset", "dynamic"),
    [(22, False), *(pytest.param(opset, dynamic, marks=pytest.mark.slow) for opset in (21, 23, 24) for dynamic in (True, False))],
)
def test_new_opsets_for_tensorrt(opset: int, dynamic: bool, scheme: dict[str, Any], tmp_path: Path) -> None:
    report, graph = compiled(stamped(vit(SIZES, variant(DYNAMO, dynamic=dynamic)), opset), tmp_path, **scheme)
    assert report.needs.opset == (17 if scheme == SCHEMES["8.6"] else 20)
    assert report.validation.outputs[0].sqnr_db > (5 if "bits" in scheme else 20)
    assert {a.name for node in graph.graph.node for a in node.attribute}.isdisjoint({"output_dtype"})


@pytest.mark.parametrize("opset", [21, 24])
def test_new_opsets(opset: int, tmp_path: Path) -> None:
    """The file is as from the older one."""
    _, old = compiled(vit(SIZES, DYNAMO), tmp_path)
    report, new = compiled(stamped(vit(SIZES, DYNAMO), opset), tmp_path)
    assert old.SerializeToString(deterministic=True) == new.SerializeToString(deterministic=True)
    assert (report.needs.opset, report.needs.ir_version, report.needs.onnxruntime) == (20, 9, "1.17")


@pytest.mark.parametrize("dialect", [DYNAMO, OLD_TORCH], ids=["opset 20", "opset 17"])
def test_without_gelu_nothing_needs_more_than_17(dialect: Dialect, tmp_path: Path) -> None:
    def relu(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            if node.op_type == "Gelu":
                node.op_type = "Relu"
                del node.attribute[:]
            elif node.op_type == "Erf":  # then its chain is no GELU
                node.op_type = "Tanh"

    report, _ = compiled(with_text(vit(SIZES, dialect), relu), tmp_path)
    assert (report.needs.opset, report.needs.onnxruntime) == (17, "1.15")


def pooled(graph: onnx.GraphProto) -> None:
    """A mean over tokens beside the logits, its axes an input or an attribute as the opset has it."""
    stream = next(node.output[0] for node in reversed(graph.node) if node.op_type == "LayerNormalization")
    graph.node.append(helper.make_node("ReduceMean", [stream], ["pooled"], "pool", axes=[1], keepdims=0))
    graph.output.append(helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["batch", SIZES.width]))


def test_axes_are_written_as_the_lowest_opset_has_them(tmp_path: Path) -> None:
    model = with_text(vit(SIZES, Dialect()), pooled)
    for version, inputs in (("", 2), ("1.16", 1)):
        _, graph = compiled(model, tmp_path, target_options={"version": version})
        (node,) = [n for n in graph.graph.node if n.op_type == "ReduceMean"]
        assert len(node.input) == inputs


def crops(graph: onnx.GraphProto) -> None:
    """Crops of the image, by an operator that no release has as it is from opset 22 on."""
    rois = numpy_helper.from_array(np.array([[0, 0, 8, 8]], np.float32), "rois")
    graph.initializer.extend([rois, numpy_helper.from_array(np.array([0]), "picture")])
    graph.node.append(helper.make_node("RoiAlign", ["image", "rois", "picture"], ["crops"], "crop", output_height=2, output_width=2))
    graph.output.append(helper.make_tensor_value_info("crops", TensorProto.FLOAT, [1, 3, 2, 2]))


@pytest.mark.parametrize("opset", [17, 22])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_an_operator_without_a_newer_kernel(target: dict[str, Any], opset: int, tmp_path: Path) -> None:
    """The graph stays where it runs: at opset 22 not even the input does."""
    model = stamped(with_text(vit(SIZES, DYNAMO if opset > 17 else Dialect()), crops), opset)
    report, graph = compiled(model, tmp_path, **target)
    assert report.needs.opset <= 20
    assert "Attention" not in ops(graph), "for which the opset would have to be 23"
    assert report.warnings == () or not any("does not run the result" in w for w in report.warnings)
    session = ort.InferenceSession(str(tmp_path / "out.onnx"), providers=["CPUExecutionProvider"])
    assert session.run(["crops"], {"image": np.ones((2, 3, 16, 16), np.float32)})[0].shape == (1, 3, 2, 2)


def scattered(graph: onnx.GraphProto) -> None:
    """An operator of opset 24 that is in no other words."""
    arrays = {"update": np.zeros((1, 3, 1, 16), np.float32), "place": np.array([2])}
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    graph.node.append(helper.make_node("Slice", ["image", "zero", "one"], ["first"], "first"))
    graph.initializer.extend(numpy_helper.from_array(np.array([number]), name) for number, name in enumerate(("zero", "one")))
    graph.node.append(helper.make_node("TensorScatter", ["first", "update", "place"], ["scattered"], "scatter"))
    graph.output.append(helper.make_tensor_value_info("scattered", TensorProto.FLOAT, [1, 3, 16, 16]))


def test_an_operator_without_an_older_form(tmp_path: Path) -> None:
    model = stamped(with_text(vit(SIZES, DYNAMO), scattered), 24)
    report, graph = compiled(model, tmp_path)
    assert (report.needs.opset, report.needs.onnxruntime, report.needs.reason) == (24, "1.25", "TensorScatter of opset 24")
    assert "TensorScatter node scatter has no form in opset 20, which the graph would have else" in report.warnings
    assert "Attention" not in ops(graph)
    report, _ = compiled(model, tmp_path, target_options={"version": "1.20"})
    told = "onnxruntime 1.20 does not run the result, onnxruntime 1.25 and later does: TensorScatter of opset 24"
    assert told in report.warnings
    with pytest.raises(TargetError, match="TensorScatter node scatter: opset 20 has no such operator; name a later version"):
        compiled(model, tmp_path, target="tensorrt")
    line = refused(tmp_path / "vit.onnx", "--target", "tensorrt", "--trt-version", "8.6", "-o", tmp_path / "a.onnx")
    assert "TensorScatter node scatter: opset 17 has no such operator" in line
    assert not (tmp_path / "a.onnx").exists()


def test_weights_of_four_bits_need_a_release_that_widens_them(tmp_path: Path) -> None:
    options: dict[str, Any] = {"recipe": "minmax", "bits": "w4a8", "storage": "native"}
    report, _ = compiled(vit(SIZES), tmp_path, **options)
    assert (report.needs.opset, report.needs.ir_version, report.needs.onnxruntime) == (21, 10, "1.23")
    words = ["--recipe", "minmax", "--bits", "w4a8", "--storage", "native", "--onnxruntime", "1.22"]
    line = refused(tmp_path / "vit.onnx", *words)
    assert "target onnxruntime of 1.22 runs no INT4 weights beside quantized activations: leave out --storage native" in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--onnxruntime", "1.2"), "onnxruntime '1.2': give a version from 1.15 on, such as 1.32, or newest"),
        (("--onnxruntime", "new"), "'new' is no version such as 1.20, nor newest"),
        (("--onnxruntime", "1.20", "--target", "tensorrt"), "--onnxruntime is for target onnxruntime, not tensorrt: leave it out"),
        (("--trt-version", "10"), "--trt-version is for target tensorrt, not onnxruntime: leave it out"),
    ],
)
def test_wrong_versions(words: tuple[str, ...], line: str, tmp_path: Path) -> None:
    assert line in refused(tmp_path / "vit.onnx", *words)


def test_the_version_in_the_printed_pipeline() -> None:
    assert "fuse-attention" not in run("--print-pipeline").stdout
    assert "fuse-attention" not in run("--print-pipeline", "--onnxruntime", "1.23").stdout
    assert "fuse-attention,separate-heads" in run("--print-pipeline", "--onnxruntime", "1.24.1").stdout
