"""narrow-floats: types, numbers, what stays in float32 and why, scales and codes, and refusals."""

import ml_dtypes
import numpy as np
import onnx
import pytest

from tests.builders import changes_of, compilation, feed_of, model_of, ops, run_model
from vitq_compiler.errors import RecipeError, TargetError
from vitq_compiler.graph import Graph, value
from vitq_compiler.passes import narrow_floats
from vitq_compiler.passes.narrow_floats import NarrowFloats, round_up
from vitq_compiler.pipeline import Compilation, Pipeline

HALF = np.dtype(np.float16)


def narrowed(text: str, to: str = "fp16", shape: str = "B, 4", opset: int = 23, **weights: np.ndarray) -> tuple[Compilation, Graph]:
    """The compilation after the pass, and the graph before."""
    c = compilation(Graph.from_proto(model_of(f"g (float[{shape}] x) => (float y) {{ {text} }}", opset=opset, **weights)))
    before = c.graph.snapshot()
    NarrowFloats(to=to).run(c)
    onnx.checker.check_model(c.graph.to_proto(), full_check=True)
    return c, before


def test_everything_between_two_casts_is_half() -> None:
    c, before = narrowed("m = MatMul(x, w) a = Add(m, b) y = Softmax(a)", w=np.eye(4, dtype=np.float32), b=np.ones(4, np.float32))
    assert ops(c.graph) == ["Cast", "MatMul", "Add", "Softmax", "Cast"]
    assert {t.dtype for n in c.graph.find("MatMul", "Add", "Softmax") for t in (*n.inputs, *n.outputs)} == {HALF}
    assert c.graph.output_names == ["y"]
    feed = feed_of(before)
    (y,), (reference,) = run_model(c.graph, feed), run_model(before, feed)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, reference, atol=2e-3)


def test_what_would_overflow_stays_in_float32() -> None:
    c, before = narrowed("a = Mul(x, big) b = Mul(a, small) y = Relu(b)", big=np.float32(1e6), small=np.float32(1e-6))
    assert ops(c.graph) == ["Mul", "Mul", "Cast", "Relu", "Cast"]
    assert len(c.notes) == 2
    assert all("stays in float32: it meets values of" in note.reason for note in c.notes)
    (told,) = c.warnings
    assert told.startswith("2 operations stay in float32, the first is ")
    assert told.endswith("e+06 are met, too near the largest half (65504)")
    feed = feed_of(before)
    np.testing.assert_allclose(run_model(c.graph, feed)[0], run_model(before, feed)[0], rtol=2e-3)


def test_a_number_too_small_for_a_half_keeps_its_node() -> None:
    c, _ = narrowed("s = Mul(x, x) a = Add(s, tiny) y = Sqrt(a)", tiny=np.float32(1e-12))
    assert ops(c.graph) == ["Cast", "Mul", "Cast", "Add", "Cast", "Sqrt", "Cast"]
    assert [note.reason for note in c.notes] == ["stays in float32: its constant 1e-12 is no half"]


def test_what_lies_below_the_normal_halves_is_told() -> None:
    c, _ = narrowed("a = Mul(x, small) y = Relu(a)", small=np.float32(1e-4))
    assert c.notes == []
    c, _ = narrowed("a = Mul(x, small) b = Mul(a, small) c = Mul(b, small) y = Relu(c)", small=np.float32(1e-2))
    assert ops(c.graph).count("Cast") == 2, "told, and narrowed all the same"
    assert [note.reason.partition(": its")[0] for note in c.notes] == ["below the normal halves, with fewer digits"]
    assert c.warnings == []


def test_a_mask_beyond_the_range_stays_finite() -> None:
    c, _ = narrowed("m = Add(x, mask) y = Softmax(m)", mask=np.full(4, -1e9, np.float32))
    assert c.graph.find("Softmax")[0].inputs[0].dtype == HALF or c.notes  # masked or kept, never -inf
    (y,) = run_model(c.graph, feed_of(c.graph))
    np.testing.assert_allclose(y.sum(-1), 1, atol=1e-2)


def test_a_graph_input_that_is_read_twice_is_cast_once() -> None:
    c, _ = narrowed("a = Relu(x) b = Neg(x) y = Add(a, b)")
    assert ops(c.graph).count("Cast") == 2


def test_bfloat16_leaves_a_graph_that_can_run() -> None:
    c, before = narrowed("m = MatMul(x, w) y = Relu(m)", to="bf16", w=np.eye(4, dtype=np.float32))
    assert value(c.graph.find("MatMul")[0].inputs[1]).dtype == ml_dtypes.bfloat16
    assert c.runnable is not None
    assert ops(c.runnable) == ops(before)
    assert "float32 remainder" in c.warnings[0]


@pytest.mark.parametrize("half", [HALF, np.dtype(ml_dtypes.bfloat16)])
def test_scales_are_rounded_up(half: np.dtype) -> None:
    scale = np.float32([1.0, 0.1, 3e-8, 1e-5, 0.3])
    rounded = round_up(scale, half)
    assert rounded.dtype == half
    assert (rounded.astype(np.float32) >= scale).all()
    np.testing.assert_allclose(rounded.astype(np.float32)[[0, 1, 4]], scale[[0, 1, 4]], rtol=0.01)


def test_codes_follow_their_scale() -> None:
    """A scale that no half is near: the values stay, the codes do not."""
    codes, scale = np.arange(-8, 8, dtype=np.int8).reshape(4, 4) * 8, np.float32([1e-7, 1e-3, 0.1, 1])
    text = "w = DequantizeLinear <axis = 1> (c, s, z) y = MatMul(x, w)"
    c, _ = narrowed(text, c=codes, s=scale, z=np.zeros(4, np.int8))
    held = c.graph.tensor("c").values.astype(np.float32) * value(c.graph.find("DequantizeLinear")[0].inputs[1]).astype(np.float32)
    assert value(c.graph.tensor("c")).dtype == np.int8
    np.testing.assert_allclose(held[:, 1:], (codes * scale)[:, 1:], rtol=1e-3)
    np.testing.assert_allclose(held[:, 0], codes[:, 0] * 1e-7, atol=6e-8)


def test_resize_keeps_its_scales() -> None:
    c, _ = narrowed('y = Resize <mode = "nearest"> (x, , s)', shape="1, 1, 2, 2", s=np.float32([1, 1, 2, 2]))
    assert value(c.graph.find("Resize")[0].inputs[2]).dtype == np.float32


def test_branches_are_refused() -> None:
    model = model_of(
        """g (float[2] x, bool flag) => (float[2] y) {
            y = If (flag) <then_branch = a () => (float[2] r) { r = Relu(x) }, else_branch = b () => (float[2] r2) { r2 = Neg(x) }>
        }"""
    )
    with pytest.raises(TargetError, match=r"If node .* branches.*--float-type fp32"):
        changes_of(compilation(model), "narrow-floats")


CODES = "q = QuantizeLinear(x, s) d = DequantizeLinear(q, s) y = Relu(d)"


@pytest.mark.parametrize(("text", "rounds", "warned"), [(CODES, False, 1), (CODES, True, 0), ("y = Relu(x)", False, 0)])
def test_a_runtime_that_does_not_round_half_judges_float32(text: str, rounds: bool, warned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow_floats, "rounds_half", lambda: rounds)
    c, before = narrowed(text, s=np.float32(0.5))
    assert (c.runnable is not None, len(c.warnings)) == (bool(warned), warned)
    if c.runnable is not None:
        assert ops(c.runnable) == ops(before)
        assert "drops fractions of float16" in c.warnings[0]


@pytest.mark.parametrize(("option", "message"), [("to=int8", "to must be fp16 or bf16"), ("headroom=0.5", "headroom must be at least 1")])
def test_wrong_options(option: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Pipeline.parse(f"narrow-floats{{{option}}}", lambda name: NarrowFloats)


HALFLESS = {
    "no half in the operator": ("y = Celu(x)", "Celu has no fp16 form"),
    "its type is an attribute": ("n = RandomUniformLike <dtype = 1> (x) y = Add(x, n)", "RandomUniformLike has no fp16 form"),
    "its type is no input's": ("n = RandomUniform <shape = [1]> () y = Add(x, n)", "RandomUniform has no fp16 form"),
    "no kernel to check it with": ('y = ScatterND <reduction = "add"> (x, places, rows)', "onnxruntime, which checks the result, adds up"),
}


@pytest.mark.parametrize(("text", "reason"), HALFLESS.values(), ids=HALFLESS)
def test_operators_without_a_half(text: str, reason: str) -> None:
    weights = {"places": np.array([[0]]), "rows": np.ones((1, 4), np.float32)}
    c, before = narrowed(f"a = Relu(x) b = MatMul(a, w) {text.replace('(x', '(b')}", opset=20, w=np.eye(4, dtype=np.float32), **weights)
    assert any(note.reason.startswith(f"stays in float32: {reason}") for note in c.notes)
    assert {t.dtype for t in c.graph.find("MatMul")[0].outputs} == {HALF}, "what is around it is narrowed"
    feed = feed_of(before)
    (y,), (reference,) = run_model(c.graph, feed), run_model(before, feed)
    if "Random" not in text:
        np.testing.assert_allclose(y, reference, atol=5e-3)


def test_the_statistics_of_a_normalization_stay_in_float32() -> None:
    c, before = narrowed(
        "s = Pow(x, two) m = ReduceMean(s, axes) a = Add(m, epsilon) r = Sqrt(a) d = Div(x, r) y = Mul(d, gamma)",
        two=np.float32(2),
        axes=np.array([-1]),
        epsilon=np.float32(1e-2),
        gamma=np.arange(1, 5, dtype=np.float32),
    )
    assert ops(c.graph) == ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Cast", "Mul", "Cast"]
    feed = {"x": feed_of(before)["x"] * 1e-4}  # whose squares are no halves
    np.testing.assert_allclose(run_model(c.graph, feed)[0], run_model(before, feed)[0], rtol=2e-3)
