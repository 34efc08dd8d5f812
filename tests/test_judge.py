"""The judge: reading the log of a build, verdicts where NVIDIA's compiler is installed, and a hint where it is not."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.builders import Sizes, model_of, vit
from vitq_compiler import judge as judges
from vitq_compiler.catalog import pipeline_for
from vitq_compiler.check import check
from vitq_compiler.compiler import compile
from vitq_compiler.errors import TargetError
from vitq_compiler.judge import HINT, Verdict, judge, read_layers
from vitq_compiler.lint.rule import INFORMATION
from vitq_compiler.recipe import load_recipe
from vitq_compiler.targets.tensorrt import Tensorrt

installed = pytest.mark.skipif(not judges.available(), reason="TensorRT-RTX is not installed")


def layer(name: str, kind: str, inputs: str, constants: str, outputs: str) -> str:
    def tensors(types: str) -> str:
        """``Half:a``: of that type and name."""
        pairs = [(t.partition(":")[0], t.partition(":")[2] or "t") for t in types.split()]
        return ", ".join(f"{{ Name: {n}, Dimensions: [1], Datatype: {t}, Format: (Linear) }}" for t, n in pairs)

    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [{tensors(inputs)}], Constants: [{tensors(constants)}], "
        f"Outputs: [{tensors(outputs)}], TacticName: x, StreamId: 0, Metadata: "
    )


def test_layers_of_a_log() -> None:
    log = [
        "some words",
        layer("fc_0", "gemm", "Int8", "Int8 Float", "Half:a") + "\n" + layer("fc_1", "runtime_fusion", "Int8 Half", "", "Half:b"),
        layer("_gemm_mha_v2_myl0_8", "kgen", "Half Half Half", "", "Int8"),
        layer("__myl_MulAdd_3", "kgen", "Half:a Half:c", "Half:__mye12_folded_matmul_myl0", "Int8"),
        layer("__myl_MulAdd_4", "kgen", "Half:a", "Half:__mye13_folded_matmul_myl0 Half", "Half:c"),
        layer("__myl_MulAdd_5", "kgen", "Half:b", "Float:__mye14_folded_matmul_myl0 Half", "Half"),
        layer("shape", "shape_call", "", "", ""),
    ]
    attention, products, others, unscaled = read_layers(log)
    assert attention == {"Half/Half/Half->Int8": 1}
    assert products == {"Int8 x Int8->Half": 1, "Int8 x Half->Half": 1}
    assert (others, unscaled) == (3, 1)
    verdict = Verdict("c", "8.0", True, True, (), (), attention, products, others, 1, unscaled)
    assert (verdict.fused, verdict.integer, verdict.kernels) == (1, 1, 6)


def test_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "PACKAGES", ("no_such_compiler",))
    assert not judges.available()
    with pytest.raises(TargetError) as caught:
        judge(Path("a.onnx"))
    assert HINT in str(caught.value)


@installed
def test_an_unknown_capability(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"compute capability '9.9': TensorRT-RTX builds for 7.5, 8.0"):
        judge(tmp_path / "a.onnx", "9.9")


@installed
def test_what_the_parser_refuses(tmp_path: Path) -> None:
    zero = {"s": np.float32(0.1), "z": np.int8(3)}
    model = model_of("g (float[4, 32] x) => (float[4, 32] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }", **zero)
    onnx.save(model, tmp_path / "a.onnx")
    verdict = judge(tmp_path / "a.onnx")
    assert (verdict.parsed, verdict.built) == (False, False)
    assert "zero" in verdict.errors[0].lower()


@installed
@pytest.mark.parametrize("capability", ["8.0", "8.9"])
@pytest.mark.parametrize(
    ("attention", "types"), [("float", "Half/Half/Half->Int8"), ("int8", "Int8/Int8/Int8->Int8")], ids=["float", "int8"]
)
def test_a_compiled_model_runs_in_integers(attention: str, types: str, capability: str, tmp_path: Path) -> None:
    path = tmp_path / "vit.onnx"
    onnx.save(vit(Sizes(image=32, patch=4, width=64, heads=2, hidden=128, depth=2, classes=16)), path)
    compile(path, tmp_path / "out.onnx", target="tensorrt", attention=attention, threads=1, samples=4)
    verdict = judge(tmp_path / "out.onnx", capability)
    assert verdict.built, verdict.errors
    assert verdict.attention == {types: 2}
    assert verdict.products["Int8 x Int8->Half"] == 2 * 4 + 1, "two blocks and the patch embedding"
    assert verdict.compiler.startswith("TensorRT-RTX ")
    assert verdict.unscaled == 0


@installed
def test_products_that_are_scaled_too_late(tmp_path: Path) -> None:
    """Without the pass, NVIDIA's compiler writes sums of codes as halves, and `--check` says so."""
    path = tmp_path / "vit.onnx"
    onnx.save(vit(Sizes(image=32, patch=4, width=64, heads=2, hidden=128, depth=2, classes=16)), path)
    passes = str(pipeline_for(load_recipe("w8a8"), Tensorrt())).replace("split-weight-scales,", "")
    compile(path, tmp_path / "late.onnx", target="tensorrt", passes=passes, threads=1, samples=4)
    compile(path, tmp_path / "out.onnx", target="tensorrt", threads=1, samples=4)
    late, kept = (check(tmp_path / name, "tensorrt", with_judge=True) for name in ("late.onnx", "out.onnx"))
    assert late.verdict is not None
    assert kept.verdict is not None
    assert (late.verdict.unscaled, kept.verdict.unscaled) == (8, 0)
    assert late.verdict.kernels == kept.verdict.kernels
    told = [f for f in late.findings if f.rule.id == "J02"]
    assert [f.detail for f in told] == ["8 products are written in half precision before they are scaled"]
    assert [f for f in kept.findings if f.severity is not INFORMATION] == []


@installed
def test_8_bit_float_attention_between_integer_products(tmp_path: Path) -> None:
    path = tmp_path / "vit.onnx"
    onnx.save(vit(Sizes(image=32, patch=4, width=64, heads=2, hidden=128, depth=2, classes=16)), path)
    compile(path, tmp_path / "out.onnx", target="tensorrt", attention="fp8", threads=1, samples=4)
    verdict = judge(tmp_path / "out.onnx", "8.9")
    assert verdict.attention == {"FP8/FP8/FP8->Half": 2}
    assert verdict.products["Int8 x Int8->Half"] == 2 * 4 + 1, "two blocks and the patch embedding"


@installed
def test_8_bit_floats(tmp_path: Path) -> None:
    path = tmp_path / "vit.onnx"
    onnx.save(vit(Sizes(image=32, patch=4, width=64, heads=2, hidden=128, depth=2, classes=16)), path)
    compile(path, tmp_path / "out.onnx", target="tensorrt", recipe="fp8", threads=1, samples=4)
    verdict = judge(tmp_path / "out.onnx", "8.9")
    assert verdict.attention == {"FP8/FP8/FP8->FP8": 2}
    assert verdict.integer == 2 * 4
    old = judge(tmp_path / "out.onnx", "8.0")
    assert (old.parsed, old.built) == (True, False)
    assert "fp8" in old.errors[0]
