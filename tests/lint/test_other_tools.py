"""What the linter says of graphs by onnxruntime.quantization."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from tests.builders import Sizes, vit
from vitq_compiler.lint import onnxruntime, tensorrt
from vitq_compiler.lint.model import Model
from vitq_compiler.lint.rule import Platform, Severity, check

SIZES = Sizes(image=16, width=64, heads=4, hidden=256, classes=16, depth=2)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """One batch of noise."""

    def __init__(self) -> None:
        self.batches = iter([{"image": np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)}])

    def get_next(self) -> Any:
        return next(self.batches, None)


SYMMETRIC = {"ActivationSymmetric": True, "QuantizeBias": False}
MATMUL = ["MatMul", "Gemm"]
KINDS: dict[str, dict[str, Any]] = {
    "U8S8": {"activation_type": QuantType.QUInt8},
    "S8S8": {"activation_type": QuantType.QInt8},
    "symmetric": {
        "activation_type": QuantType.QInt8,
        "op_types_to_quantize": MATMUL,
        "extra_options": {**SYMMETRIC, "OpTypesToExcludeOutputQuantization": MATMUL},
    },
    "QOperator": {"activation_type": QuantType.QInt8, "quant_format": QuantFormat.QOperator},
}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, onnx.ModelProto]:
    """The same tiny ViT, quantized in several ways."""
    folder = tmp_path_factory.mktemp("graphs")
    source = folder / "vit.onnx"
    onnx.save(vit(SIZES), source)
    made: dict[str, onnx.ModelProto] = {}
    for name, how in KINDS.items():
        target: Path = folder / f"{name}.onnx"
        quantize_static(source, target, Reader(), per_channel=True, weight_type=QuantType.QInt8, **how)
        made[name] = onnx.load(target)
    quantize_dynamic(source, folder / "dynamic.onnx")
    made["dynamic"] = onnx.load(folder / "dynamic.onnx")
    return made


def found(model: onnx.ModelProto, *severities: Severity, version: str = "10") -> dict[str, int]:
    """Rule -> places."""
    findings = check(Model(model), tensorrt.RULES, Platform(version))
    return dict(Counter(finding.rule.id for finding in findings if finding.severity in severities))


FAILS = (Severity.ERROR, Severity.SILENT)


def count(model: onnx.ModelProto, *ops: str) -> int:
    """How many nodes of these operators a graph has."""
    return sum(node.op_type in ops for node in model.graph.node)


def test_unsigned_activations(graphs: dict[str, onnx.ModelProto]) -> None:
    faults = found(graphs["U8S8"], *FAILS)
    biases = sum(t.data_type == onnx.TensorProto.INT32 and t.name.endswith("_quantized") for t in graphs["U8S8"].graph.initializer)
    assert set(faults) == {"T01", "T04", "T05", "T17"}
    assert faults["T17"] == biases > 0


def test_asymmetric_activations_and_integer_biases(graphs: dict[str, onnx.ModelProto]) -> None:
    assert set(found(graphs["S8S8"], *FAILS)) == {"T01", "T17"}


def test_quantizers_everywhere_are_slow(graphs: dict[str, onnx.ModelProto]) -> None:
    slow = found(graphs["S8S8"], Severity.WARNING)
    normalizations = count(graphs["S8S8"], "LayerNormalization")
    assert slow["S12"] == normalizations == 2 * SIZES.depth + 1
    assert slow["S14"] == 2 * SIZES.depth, "before Div and before Add of each GELU"
    assert {"S02", "S18", "S19"} <= set(slow)


def test_symmetric_products_only_are_legal(graphs: dict[str, onnx.ModelProto]) -> None:
    assert found(graphs["symmetric"], *FAILS) == {}
    assert found(graphs["symmetric"], Severity.WARNING) == {"S02": 1}, "the rest is FP32"


def test_version_8_wants_float_weights(graphs: dict[str, onnx.ModelProto]) -> None:
    weights = sum(t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1 for t in graphs["symmetric"].graph.initializer)
    assert found(graphs["symmetric"], *FAILS, version="8.6") == {"T19": weights}
    assert found(graphs["symmetric"], Severity.WARNING, version="8.6") == {}


def test_integer_operators(graphs: dict[str, onnx.ModelProto]) -> None:
    faults = found(graphs["QOperator"], *FAILS)
    assert set(faults) == {"T01", "T21", "T22"}
    assert faults["T21"] == count(graphs["QOperator"], "QLinearMatMul", "QLinearConv")
    assert faults["T22"] == sum(node.domain == "com.microsoft" for node in graphs["QOperator"].graph.node)


def test_dynamic_quantization(graphs: dict[str, onnx.ModelProto]) -> None:
    assert found(graphs["dynamic"], *FAILS) == {
        "T21": count(graphs["dynamic"], "MatMulInteger", "ConvInteger", "DynamicQuantizeLinear"),
    }


@pytest.mark.parametrize(("name", "rules"), [("U8S8", {"R05"}), ("S8S8", {"R02", "R05"}), ("symmetric", {"R02", "R03", "R05"})])
def test_onnxruntime_likes_its_own_where_products_are_exact(graphs: dict[str, onnx.ModelProto], name: str, rules: set[str]) -> None:
    for cpu, more in (("any", {"R05"}), ("vnni", set())):
        found = check(Model(graphs[name]), onnxruntime.RULES, Platform(cpu=cpu))
        assert {finding.rule.id for finding in found} == rules - {"R05"} | more
