"""Sessions, probes and the optimizer's view."""

import gc
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.builders import feed_of, graph_of, model_of, run_model
from vitq_compiler import runtime
from vitq_compiler.errors import TargetError
from vitq_compiler.graph import Graph, InputSpec, Layout
from vitq_compiler.quant import E4M3

DOUBLE_RELU = "g (float[B, 4] x) => (float[B, 4] y) { a = Relu(x) b = Identity(a) y = Relu(b) }"


def broken() -> onnx.ModelProto:
    """A graph that reads a tensor nobody makes."""
    model = model_of(DOUBLE_RELU)
    model.graph.node[2].input[0] = "nobody"
    return model


def test_session_from_a_proto_and_from_a_file(tmp_path: Path) -> None:
    model = model_of(DOUBLE_RELU)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    x = np.array([[-1, 2, -3, 4]], np.float32)
    for source in (model, path, graph_of(DOUBLE_RELU)):
        np.testing.assert_array_equal(runtime.run(runtime.session(source, threads=1), {"x": x})[0], np.maximum(x, 0))


def test_a_session_from_a_graph_outlives_its_weights() -> None:
    graph = graph_of("g (float[B, 4096] x) => (float[B, 4096] y) { y = Add(x, w) }", w=np.ones(4096, np.float32))
    session = runtime.session(graph, threads=1)
    graph.tensor("w").values = np.full(4096, 2, np.float32)
    gc.collect()
    others = [np.full(4096, 7, np.float32) for _ in range(100)]
    np.testing.assert_array_equal(runtime.run(session, {"x": np.zeros((1, 4096), np.float32)})[0], 1)
    assert len(others) == 100


def test_a_weight_of_any_memory_layout_can_be_shared() -> None:
    graph = graph_of("g (float[n, 64] x) => (float[n, 64] y) { y = MatMul(x, w) }", w=np.eye(64, dtype=np.float32))
    weight = graph.find("MatMul")[0].inputs[1]
    weight.values = np.asfortranarray(np.arange(4096, dtype=np.float32).reshape(64, 64))
    (y,) = runtime.run(runtime.session(graph), {"x": np.eye(64, dtype=np.float32)})
    np.testing.assert_array_equal(y, np.arange(4096).reshape(64, 64))


def test_outputs_can_be_chosen() -> None:
    session = runtime.session(model_of("g (float[2] x) => (float[2] y, float[2] z) { y = Neg(x) z = Abs(x) }"), threads=1)
    results = runtime.run(session, {"x": np.float32([1, -2])}, ["z"])
    assert len(results) == 1
    np.testing.assert_array_equal(results[0], [1, 2])


def test_outputs_of_all_batches_are_joined() -> None:
    session = runtime.session(graph_of("g (float[B, 2] x) => (float[B, 2] y, float z) { y = Neg(x) z = ReduceSum<keepdims = 0>(x) }"))
    feeds = [{"x": np.full((count, 2), count, np.float32)} for count in (1, 3)]
    y, z = runtime.run_all(session, feeds)
    np.testing.assert_array_equal(y, [[-1, -1], *[[-3, -3]] * 3])
    np.testing.assert_array_equal(z, [2, 18])
    assert len(runtime.run_all(session, feeds, ["z"])) == 1


def test_failures_are_target_errors_of_one_line() -> None:
    with pytest.raises(TargetError, match=r"^onnxruntime [\d.]+ cannot load the graph: ") as caught:
        runtime.session(broken())
    assert "\n" not in str(caught.value)
    session = runtime.session(model_of(DOUBLE_RELU), threads=1)
    with pytest.raises(TargetError, match=r"^onnxruntime [\d.]+ cannot run the graph: ") as caught:
        runtime.run(session, {"x": np.zeros((1, 5), np.float32)})
    assert "\n" not in str(caught.value)
    with pytest.raises(TargetError, match="cannot run"):
        runtime.run(session, {"other": np.zeros((1, 4), np.float32)})


def test_probe_reads_inner_tensors_and_leaves_the_graph_alone() -> None:
    graph = graph_of("g (float[B, 2] x) => (float[B, 2] y) { a = Neg(x) y = Abs(a) }")
    before = graph.text()
    feeds = [{"x": np.float32([[1, -2]])}, {"x": np.float32([[3, 4], [5, 6]])}]
    first, second = runtime.probe(graph, ["a", "y", "a"], feeds, threads=1)
    assert list(first) == ["a", "y"]
    np.testing.assert_array_equal(first["a"], [[-1, 2]])
    np.testing.assert_array_equal(second["y"], [[3, 4], [5, 6]])
    assert graph.text() == before


def test_operators_that_the_runtime_lacks_are_written_in_older_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """No release has RoiAlign of opset 22, and all have that of 16; RMSNormalization comes with 1.23."""
    graph = graph_of(
        """g (float[B, 4, 4] x) => (float y) {
            n = RMSNormalization(x, gamma) i = Unsqueeze(n, axes) y = RoiAlign <output_height = 2, output_width = 2> (i, rois, picture)
        }""",
        gamma=np.arange(1, 5, dtype=np.float32),
        axes=np.array([1]),
        rois=np.array([[0, 0, 3, 3]], np.float32),
        picture=np.array([1]),
    )
    assert runtime.run(runtime.session(graph), feed_of(graph))[0].shape == (1, 1, 2, 2)
    assert (graph.opset, len(graph.find("RMSNormalization"))) == (23, 1), "the graph itself stays"
    norm = graph_of("g (float[B, 4] x) => (float[B, 4] y) { y = RMSNormalization(x, gamma) }", gamma=np.arange(1, 5, dtype=np.float32))
    (expected,) = runtime.run(runtime.session(norm), feed_of(norm))
    monkeypatch.setattr(runtime, "INSTALLED", "1.20")
    (got,) = runtime.run(runtime.session(norm), feed_of(norm))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_optimized_shows_what_the_optimizer_left() -> None:
    model = model_of(DOUBLE_RELU)
    left = runtime.optimized(model)
    assert "Identity" not in [node.op_type for node in left.graph.node]
    x = np.array([[-1, 2, -3, 4]], np.float32)
    np.testing.assert_array_equal(run_model(left, {"x": x})[0], run_model(model, {"x": x})[0])


@pytest.mark.parametrize(("zero", "left_out"), [(np.int8(0), []), (E4M3.type(0), ["QDQSelectorActionTransformer"])], ids=["int8", "float8"])
@pytest.mark.parametrize("as_graph", [False, True])
def test_8_bit_floats_are_kept_from_integer_kernels(
    zero: np.generic, left_out: list[str], as_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "g (float[B, 4] x) => (float[B, 4] y) { q = QuantizeLinear (x, scale, zero) y = DequantizeLinear (q, scale, zero) }"
    model = model_of(text, scale=np.float32(0.5), zero=np.asarray(zero))
    real, given = runtime.ort.InferenceSession, []
    monkeypatch.setattr(runtime.ort, "InferenceSession", lambda *args, **words: given.append(words) or real(*args, **words))
    x = np.float32([[-1, 0, 2, 3.5]])
    np.testing.assert_array_equal(runtime.run(runtime.session(Graph.from_proto(model) if as_graph else model), {"x": x})[0], x)
    assert [words["disabled_optimizers"] for words in given] == [left_out]


def test_half_precision_is_rounded_to_codes() -> None:
    assert runtime.rounds_half() is True, "since onnxruntime 1.30"


@pytest.mark.parametrize(
    ("error", "line"), [(ValueError("a\nb"), "a"), (ValueError(""), "ValueError"), (ValueError("  \n x\ny"), "x"), (KeyError(), "KeyError")]
)
def test_first_line(error: Exception, line: str) -> None:
    assert runtime.first_line(error) == line


def test_samples_of_a_batch() -> None:
    free, fixed = (InputSpec("x", np.dtype("float32"), (size, 3)) for size in ("n", 4))
    feed = {"x": np.arange(12, dtype=np.float32).reshape(4, 3)}
    assert runtime.sample_count([free], feed) == runtime.sample_count([fixed], feed) == 4
    np.testing.assert_array_equal(runtime.first_samples([free], feed, 2)["x"], feed["x"][:2])
    np.testing.assert_array_equal(runtime.some_samples([free], feed, 1, 2)["x"], feed["x"][1:2])
    assert runtime.first_samples([fixed], feed, 2) is feed, "it takes nothing less"


def test_the_first_samples_of_many_batches() -> None:
    free, fixed = (InputSpec("x", np.dtype("float32"), (size, 3)) for size in ("n", 4))
    feeds = [{"x": np.full((4, 3), number, np.float32)} for number in range(3)]
    assert [len(feed["x"]) for feed in runtime.limited([free], feeds, 6)] == [4, 2]
    assert [len(feed["x"]) for feed in runtime.limited([free], feeds, 4)] == [4]
    assert [len(feed["x"]) for feed in runtime.limited([fixed], feeds, 6)] == [4, 4]
    assert len(list(runtime.limited([free], feeds, 99))) == 3


def test_a_picture_without_a_batch_is_one_sample_whatever_its_height() -> None:
    spec = InputSpec("x", np.dtype("uint8"), ("h", "w", 3), Layout(batched=False, channels=2))
    feed = {"x": np.zeros((48, 64, 3), np.uint8)}
    assert (runtime.sample_count([spec], feed), runtime.first_samples([spec], feed, 2) is feed) == (1, True)
    assert (spec.batched, spec.fixed_batch) == (False, None)
    scalar = InputSpec("s", np.dtype("float32"), ())
    assert (scalar.batched, runtime.sample_count([scalar], {"s": np.float32(1)})) == (False, 1)
