"""Every recipe of the package at 4 bits on a small ViT: it compiles, keeps to its bits, and says so."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.builders import Sizes, vit
from vitq_compiler.compiler import compile
from vitq_compiler.recipe import load_recipe, recipe_names

STRICT = [name for name in recipe_names() if load_recipe(name).definition == "strict" and "reconstruct" not in load_recipe(name).passes]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "vit.onnx"
    onnx.save(vit(Sizes(width=16, hidden=32)), path)
    return path


@pytest.mark.parametrize("name", [*STRICT, pytest.param("is-vit", marks=pytest.mark.torch)])
def test_it_compiles_at_four_bits(name: str, model: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "x.npz"
    np.savez(calibration, **{onnx.load(model).graph.input[0].name: np.random.default_rng(0).normal(size=(24, 3, 8, 8)).astype(np.float32)})
    output = tmp_path / "out.onnx"
    report = compile(model, output, recipe=name, bits="w4a4", calibration=calibration, samples=8, batch_size=4, threads=1)
    assert (report.bits, report.definition) == ("w4a4", "strict")
    assert all(row.quantized for row in report.linears)
    assert report.validation.outputs[0].sqnr_db > 3
    proto = onnx.load(output)
    codes = [numpy_helper.to_array(t) for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
    assert len(codes) == sum(len(row.parts) for row in report.linears)
    assert all(len(np.unique(c)) <= 16 for c in codes)
    products = [n for n in proto.graph.node if n.op_type == "MatMul"]
    made = {o: n for n in proto.graph.node for o in n.output}
    assert all(
        made[i].op_type in ("DequantizeLinear", "Exp", "ThresholdedRelu", "LeakyRelu", "Add", "Mul", "Sub")
        for n in products
        for i in n.input
    )
