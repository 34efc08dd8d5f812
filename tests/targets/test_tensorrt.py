"""The tensorrt target: form of a lowered block, its contract in every version, options, rules, and what it tells the user."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.builders import (
    DIALECTS,
    Dialect,
    Sizes,
    assert_golden,
    compilation,
    difference,
    feed_of,
    run_model,
    run_passes,
    vit,
)
from vitq_compiler.catalog import load_target, pipeline_for
from vitq_compiler.compiler import compile
from vitq_compiler.errors import RecipeError
from vitq_compiler.graph import InputSpec, is_constant, producer, value
from vitq_compiler.lint.rule import INFORMATION
from vitq_compiler.pipeline import Compilation
from vitq_compiler.quant import E4M3, QuantSpec
from vitq_compiler.recipe import load_recipe
from vitq_compiler.target import Target
from vitq_compiler.targets.onnxruntime import Onnxruntime
from vitq_compiler.targets.tensorrt import Tensorrt

SIZES = Sizes(depth=1, width=32, heads=2, hidden=48, classes=16)


def compiled(target: Tensorrt, dialect: Dialect = Dialect(), attention: str | None = None, sizes: Sizes = SIZES) -> Compilation:  # noqa: B008
    recipe = load_recipe("w8a8").with_attention(attention)
    c = compilation(vit(sizes, dialect), target=target, recipe=recipe)
    run_passes(c, str(pipeline_for(recipe, target)))
    return c


def test_golden() -> None:
    assert_golden(compiled(Tensorrt()).graph, "tensorrt_block", weights=False)


@pytest.mark.parametrize("bits", ["w2a2", "w4a4", "w7a7"])
def test_few_bits_have_no_zero_points_and_lose_nothing_by_it(bits: str) -> None:
    """The steps are those of asymmetric codes: what was seen, by their number."""
    recipe, target = load_recipe("minmax").with_bits(bits), Tensorrt()
    c = compilation(vit(SIZES), target=target, recipe=recipe)
    run_passes(c, str(pipeline_for(recipe, target)))
    last = 2**recipe.activation.bits - 1
    steps, clipped = [float(c.params[edge].scale) for edge, spec in c.specs.items() if spec.anchored], 0
    seen = [(min(float(s.low.min()), 0), max(float(s.high.max()), 0)) for s in c.table.statistics.values()]
    widths = np.array([(high - low) / last for low, high in seen])
    assert len(steps) > 8
    assert all(np.isclose(widths, step, rtol=1e-5).any() for step in steps)
    for node in c.graph.find("QuantizeLinear"):
        assert (value(node.inputs[2]).dtype, value(node.inputs[2]).any()) == (np.int8, False)
        if (clip := producer(node.inputs[0])).op == "Clip":  # the image has 8 bits
            first, end = (round(float(value(t)) / float(value(node.inputs[1]))) for t in clip.inputs[1:])
            assert end - first == last
            clipped += 1
    assert clipped >= 4 * SIZES.depth
    assert {finding.rule.id for finding in target.check(c.graph)} == {"S08", "S09", "S23"}, "no error; the Clip after softmax is told"


@pytest.mark.parametrize("name", ["repq-vit", "adalog", "dopq-vit", "ptq4vit"])
def test_published_recipes_have_no_zero_points_either(name: str) -> None:
    recipe, target = load_recipe(name), Tensorrt()
    c = compilation(vit(SIZES), target=target, recipe=recipe)
    run_passes(c, str(pipeline_for(recipe, target)))
    assert not any(value(node.inputs[2]).any() for node in c.graph.find("QuantizeLinear", "DequantizeLinear"))
    assert target.check(c.graph), "warnings that probabilities on a curve are slow, and no error, which would be raised"


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
@pytest.mark.parametrize(("version", "floats"), [("8.6", ""), ("10", ""), ("10", "fp32"), ("11", "fp16"), ("11", "bf16")])
def test_the_contract(dialect: Dialect, version: str, floats: str) -> None:
    """The rules of the format, read off the graph: see docs/tensorrt.md."""
    target = Tensorrt(version, floats)
    c = compiled(target, dialect)
    onnx.checker.check_model(c.graph.to_proto(), full_check=True)
    quantizers = c.graph.find("QuantizeLinear", "DequantizeLinear")
    assert len(quantizers) >= 4 * 3
    for node in quantizers:
        _, scale, zero_point = node.inputs
        assert is_constant(scale)
        assert is_constant(zero_point)
        assert value(zero_point).dtype == np.int8
        assert not value(zero_point).any()
        assert (value(scale).astype(np.float32) > 0).all()
        assert np.isfinite(value(scale).astype(np.float32)).all()
        assert value(scale).shape == value(zero_point).shape
        floating = node.inputs[0] if node.op == "QuantizeLinear" else node.outputs[0]
        assert value(scale).dtype == floating.dtype
        if value(scale).ndim:
            (reader,) = [r for t in node.outputs for r in t.outputs]
            assert node.attrs["axis"] == {"Conv": 0, "MatMul": 1}.get(reader.op, node.attrs["axis"])
    for node in c.graph.find("MatMul", "Conv"):
        behind = [producer(t) for t in node.inputs[:2]]
        assert len({p is not None and p.op == "DequantizeLinear" for p in behind}) == 1, node.name
    weights = [n for n in c.graph.find("DequantizeLinear") if is_constant(n.inputs[0])]
    assert bool(weights) == (version != "8.6")
    assert c.graph.opset == (17 if version == "8.6" else 20)
    assert bool(c.graph.find("Gelu")) == (version != "8.6")
    assert not c.graph.find("Attention", "Gemm", "Clip")
    assert {spec.dtype for spec in c.graph.inputs} | {t.dtype for t in c.graph.outputs} == {np.dtype(np.float32)}


@pytest.mark.parametrize("version", ["8.6", "10"])
def test_the_compiled_model_is_close_to_float(version: str) -> None:
    model = vit(Sizes(depth=2, width=32, heads=2, hidden=48))
    feed = feed_of(model, 4)
    c = compilation(model, target=Tensorrt(version))
    run_passes(c, str(pipeline_for(c.recipe, c.target)))
    (y,), (reference,) = run_model(c.graph, feed), run_model(model, feed)
    assert 10 * np.log10(np.square(reference).sum() / np.square(reference - y).sum()) > 28


def test_weights_of_the_old_version_are_those_of_the_new() -> None:
    old, new = compiled(Tensorrt("8.6")), compiled(Tensorrt("10", "fp32"))
    feed = feed_of(old.graph)
    assert difference(run_model(new.graph, feed), run_model(old.graph, feed)) <= 1e-5


def test_attention_in_int8_is_all_or_nothing() -> None:
    c = compiled(Tensorrt(), attention="int8")
    (attention,) = c.annotations.attentions
    behind = [producer(t) for node in (attention.scores, attention.context) for t in node.inputs]
    assert [p.op for p in behind if p is not None] == ["DequantizeLinear"] * 4
    c = compiled(Tensorrt(), attention="int8", sizes=Sizes(depth=1, width=24, heads=2, hidden=48))
    assert not any(producer(t).op == "DequantizeLinear" for t in c.annotations.attentions[0].scores.inputs)  # type: ignore[union-attr]
    assert [n.reason for n in c.notes if "attention stays" in n.reason] == [
        "attention stays in float: there is no fused int8 kernel for heads of 12, only of 16, 32, 64"
    ]


@pytest.mark.parametrize(("tokens", "reason"), [(512, ""), (513, "there is no fused int8 kernel for 513 tokens, only up to 512")])
def test_long_sequences_keep_attention_in_float(tokens: int, reason: str) -> None:
    assert Tensorrt().attention_fault(64, tokens, QuantSpec()) == reason


def test_the_report(tmp_path: Path) -> None:
    path = tmp_path / "vit.onnx"
    onnx.save(vit(SIZES), path)
    report = compile(path, tmp_path / "out.onnx", target="tensorrt", threads=1, samples=4)
    assert report.quantized == report.integer == len(report.linears) - 1
    assert {row.kernel for row in report.linears if row.integer} == {"Int8 MatMul"}
    assert report.validation.latency == ()
    assert all(np.isfinite(block.sqnr_db) for block in report.validation.blocks)
    assert report.command == (
        f"trtexec --onnx={tmp_path / 'out.onnx'} --stronglyTyped --minShapes=image:1x3x8x8 --optShapes=image:8x3x8x8"
        f" --maxShapes=image:32x3x8x8 --saveEngine={tmp_path / 'out.engine'}"
    )


@pytest.mark.parametrize(("version", "types"), [("8.6", "--int8 --fp16 "), ("10", "--stronglyTyped "), ("11", "")])
def test_the_command_of_a_static_model(version: str, types: str) -> None:
    fixed = [InputSpec("image", np.dtype(np.float32), (1, 3, 8, 8))]
    assert Tensorrt(version).command(Path("a.onnx"), fixed) == f"trtexec --onnx=a.onnx {types}--saveEngine=a.engine"


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("tensorrt", {"version": "9"}, "TensorRT version '9': known are 8.6, 10, 11"),
        ("tensorrt", {"float_type": "fp64"}, "float type 'fp64': known are fp32, fp16, bf16"),
        ("tensorrt", {"version": "8.6", "float_type": "fp16"}, "TensorRT 8.6 reads scales as float32"),
        ("onnxruntime", {"float_type": "fp16"}, "target onnxruntime has no option float type"),
    ],
)
def test_wrong_options(target: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_target(target, options)


def test_wrong_attention() -> None:
    with pytest.raises(RecipeError, match="attention 'int4' is unknown: known are float, int8, fp8"):
        load_recipe("w8a8").with_attention("int4")


def test_keys_and_values_are_centred_whatever_attention_becomes() -> None:
    """Else the prices of quantized attention would not be those that a compile with it pays."""
    for attention in (None, "int8", "fp8"):
        names = [p.name for p in pipeline_for(load_recipe("w8a8").with_attention(attention), Tensorrt()).passes]
        assert names[names.index("stack-heads") + 1 :][:2] == ["center-keys", "center-values"]


def test_a_pass_of_the_recipe_gives_way() -> None:
    recipe = load_recipe("w8a8")
    names = [p.name for p in pipeline_for(recipe, Tensorrt()).passes]
    assert "split-outlier-channels" in recipe.passes
    assert "split-outlier-channels" not in names
    assert "equalize-hidden" in names
    assert "select-tokens-early" not in names


def test_a_compiled_model_breaks_no_rule() -> None:
    c = compiled(Tensorrt(compute_capability=8.9), sizes=Sizes(depth=2, image=32, patch=8, width=64, heads=2, hidden=128))
    assert c.warnings == []
    assert [f for f in c.target.check(c.graph) if f.severity is not INFORMATION] == []


def test_bfloat16_has_no_float32_island() -> None:
    """The patch embedding is a MatMul there: ONNX has convolutions in bfloat16 only from opset 22."""
    c = compiled(Tensorrt("10", "bf16"))
    assert not c.graph.find("Conv")
    casts = [(node.inputs[0].name, node.outputs[0].name) for node in c.graph.find("Cast")]
    assert len(casts) == 2, casts
    assert c.graph.inputs[0].name == casts[0][0]
    assert c.graph.output_names == [casts[1][1]]


def test_8_bit_floats() -> None:
    recipe = load_recipe("fp8")
    c = compilation(vit(SIZES), target=Tensorrt(compute_capability=8.9), recipe=recipe)
    run_passes(c, str(pipeline_for(recipe, c.target)))
    onnx.checker.check_model(c.graph.to_proto(), full_check=True)
    (attention,) = c.annotations.attentions
    assert {value(n.inputs[2]).dtype for n in c.graph.find("QuantizeLinear", "DequantizeLinear")} == {E4M3}
    probabilities = producer(attention.context.inputs[0])
    assert probabilities is not None
    assert float(value(probabilities.inputs[1])) == pytest.approx(1 / 448, rel=1e-3)
    assert [producer(t).op for n in (attention.scores, attention.context) for t in n.inputs] == ["DequantizeLinear"] * 4  # type: ignore[union-attr]
    assert set(c.target.kernels(c.graph).values()) >= {"FP8 MatMul"}
    feed = feed_of(c.graph)
    (y,), (reference,) = run_model(c.graph, feed), run_model(vit(SIZES), feed)
    assert 10 * np.log10(np.square(reference).sum() / np.square(reference - y).sum()) > 15


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Tensorrt("8.6"), "TensorRT 8.6 has no 8-bit floats"),
        (Tensorrt(compute_capability=8.0), "compute capability 8.0 has no 8-bit floats, 8.9 and above have: take int8"),
        (Onnxruntime(), "target onnxruntime has no 8-bit floats"),
    ],
    ids=["8.6", "sm80", "onnxruntime"],
)
def test_who_has_no_8_bit_floats(target: Target, message: str) -> None:
    recipe = load_recipe("fp8")
    with pytest.raises(RecipeError, match=message):
        run_passes(compilation(vit(SIZES), target=target, recipe=recipe), "canonicalize,annotate")


@pytest.mark.parametrize(("head_dim", "fused"), [(8, False), (9, True), (256, True), (257, False)])
def test_heads_of_8_bit_floats(head_dim: int, fused: bool) -> None:
    assert (Tensorrt().attention_fault(head_dim, 3000, QuantSpec(format="e4m3")) == "") == fused


@pytest.mark.parametrize(("capability", "limited"), [(None, False), (8.9, True), (9.0, False), (12.0, False)])
@pytest.mark.parametrize(("head_dim", "tokens", "large"), [(64, 3072, False), (64, 3073, True), (72, 197, True)])
def test_ada_fuses_small_attention_of_8_bit_floats(
    capability: float | None, limited: bool, head_dim: int, tokens: int, large: bool
) -> None:
    fault = Tensorrt(compute_capability=capability).attention_fault(head_dim, tokens, QuantSpec(format="e4m3"))
    assert bool(fault) == (limited and large)
    assert not fault or fault == (
        f"compute capability 8.9 has no fused kernel of 8-bit floats for heads of {head_dim} and {tokens} tokens, only up to 64 and 3072"
    )


@pytest.mark.parametrize(("capability", "warned"), [(None, True), (8.9, False)])
def test_8_bit_floats_for_a_gpu_that_is_not_named(capability: float | None, warned: bool) -> None:
    c = compiled(Tensorrt(compute_capability=capability), attention="fp8")
    told = "8-bit floats need a GPU of compute capability 8.9 or above; --compute-capability checks yours"
    assert (told in c.warnings) == warned


def test_attention_in_8_bit_floats_between_integer_products() -> None:
    c = compiled(Tensorrt(compute_capability=8.9), attention="fp8")
    (attention,) = c.annotations.attentions
    operands = [producer(t) for node in (attention.scores, attention.context) for t in node.inputs]
    assert {value(node.inputs[2]).dtype for node in operands if node is not None} == {E4M3}
    assert float(value(operands[2].inputs[1])) == pytest.approx(1 / 448, rel=1e-3)  # type: ignore[union-attr]
    codes = {value(n.inputs[2]).dtype for n in c.graph.find("DequantizeLinear") if is_constant(n.inputs[0])}
    assert codes == {np.dtype(np.int8)}
    assert [f for f in c.target.check(c.graph) if f.severity is not INFORMATION and f.rule.id.startswith("T")] == []
