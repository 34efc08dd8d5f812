"""Views: every traced index against numpy on real arrays, through ONNX Runtime."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import graph_of, run_model
from vitq_compiler import views
from vitq_compiler.graph import Graph
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.views import trace

BATCH, TOKENS, HEADS, DIM = 2, 5, 3, 4
FEATURES = 3 * HEADS * DIM
RESHAPE = "a = Reshape(x, five) "
FIVE = np.array([0, 0, 3, HEADS, DIM])
CHAINS = {
    "gather": RESHAPE + "b = Transpose <perm = [2, 0, 3, 1, 4]> (a) y = Gather <axis = 0> (b, one)",
    "slice and squeeze": RESHAPE + "b = Transpose <perm = [2, 0, 3, 1, 4]> (a) c = Slice(b, i1, i2, i0) y = Squeeze(c, i0)",
    "split and squeeze": RESHAPE
    + "b = Transpose <perm = [2, 0, 3, 1, 4]> (a) q, k, v = Split <num_outputs = 3, axis = 0> (b) y = Squeeze(v, i0)",
    "uneven split": "q, k = Split <axis = -1> (x, uneven) r = Reshape(k, four) y = Transpose <perm = [0, 2, 1, 3]> (r)",
    "split into unequal parts": "q, y = Split <axis = 1, num_outputs = 2> (x)",
    "split into equal parts": "q, k, y = Split <axis = -1, num_outputs = 3> (x)",
    "reshape to zero sizes": "y = Reshape <allowzero = 1> (x, flat)",
    "negative axes": "a = Unsqueeze(x, minus2) b = Transpose <perm = [2, 1, 0, 3]> (a) c = Slice(b, i0, i1, minus4) y = Squeeze(c, minus4)",
    "flatten everything": "y = Flatten <axis = 0> (x)",
    "flatten from the end": "y = Flatten <axis = -1> (x)",
    "unsqueeze": "a = Unsqueeze(x, last) b = Squeeze(a, last) y = Transpose(b)",
    "squeeze all": "a = Unsqueeze(x, last) y = Squeeze(a)",
    "identity and flatten": "a = Identity(x) b = Flatten <axis = 2> (a) y = Transpose <perm = [1, 0]> (b)",
    "flatten": "y = Flatten(x)",
    "slice with steps": "y = Slice(x, i1, far, i2, i2)",
    "slice from the end": "y = Slice(x, back, far, i2)",
    "slice of several axes": "y = Slice(x, pair, ends)",
    "gather several": "y = Gather <axis = 2> (x, some)",
    "reshape to minus one": "a = Reshape(x, rows) y = Reshape(a, back3)",
    "gather and back": RESHAPE + "b = Gather <axis = 2> (a, one) y = Transpose <perm = [0, 2, 3, 1]> (b)",
}
ARGUMENTS: dict[str, np.ndarray] = {
    "five": FIVE,
    "four": np.array([0, TOKENS, 2 * HEADS, DIM]),
    "one": np.array(1),
    "some": np.array([3, 0, 3, -1]),
    "i0": np.array([0]),
    "i1": np.array([1]),
    "i2": np.array([2]),
    "last": np.array([3]),
    "flat": np.array([-1]),
    "minus2": np.array([-2]),
    "minus4": np.array([-4]),
    "uneven": np.array([HEADS * DIM, 2 * HEADS * DIM]),
    "far": np.array([2**31 - 1]),
    "back": np.array([-3]),
    "pair": np.array([0, 1]),
    "ends": np.array([2, 4]),
    "rows": np.array([-1, FEATURES]),
    "back3": np.array([-1, TOKENS, FEATURES]),
}


def viewed(text: str, batch: str = "B", **weights: np.ndarray) -> Graph:
    """``y`` as a view of the input ``x``, whose batch is open; unused arguments are left out."""
    return graph_of(f"g (float[{batch}, {TOKENS}, {FEATURES}] x) => (float y) {{ {text} }}", **(ARGUMENTS | weights))


def assert_view_is_right(graph: Graph, scale: float = 1.0) -> None:
    """What `trace` says of ``y`` is what the runtime computes."""
    x = np.random.default_rng(0).normal(size=(BATCH, TOKENS, FEATURES)).astype(np.float32)
    view = trace(graph.tensor("y"))
    assert view.source is graph.tensor("x")
    assert view.source_shape == x.shape
    assert view.scale == pytest.approx(scale)
    expected = run_model(graph, {"x": x})[0]
    assert view.index.shape == expected.shape
    np.testing.assert_allclose(view.scale * x.reshape(-1)[view.index], expected, rtol=1e-6)


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_index_is_what_the_runtime_computes(chain: str) -> None:
    assert_view_is_right(viewed(chain))


@pytest.mark.parametrize(
    "text", ["y = Mul(x, half)", "y = Mul(half, x)", "y = Div(x, two)", "a = Mul(x, half) b = Transpose(a) y = Identity(b)"]
)
def test_numbers_on_the_way_are_collected(text: str) -> None:
    assert_view_is_right(viewed(text, half=np.float32(0.5), two=np.float32(2)), scale=0.5)


def test_numbers_multiply() -> None:
    assert trace(viewed("a = Mul(x, half) y = Div(a, two)", half=np.float32(0.5), two=np.float32(2)).tensor("y")).scale == 0.25


def test_the_chain_ends_at_other_operations() -> None:
    graph = viewed("a = Relu(x) y = Transpose(a)")
    assert trace(graph.tensor("y")).source is graph.tensor("a")
    graph = viewed("a = Transpose(x) b = Mul(a, vector) y = Transpose(b)", vector=np.ones(BATCH, np.float32))
    assert trace(graph.tensor("y")).source is graph.tensor("b")


def test_an_unknown_shape_is_refused() -> None:
    graph = graph_of("g (float[B, S, T] x) => (float y) { y = Transpose(x) }")
    graph.tensor("x").shape = None
    with pytest.raises(MatchFailure, match="unknown"):
        trace(graph.tensor("y"))


def test_one_more_axis_may_be_dynamic() -> None:
    graph = graph_of("g (float[B, T, 4] x) => (float y) { y = Transpose <perm = [0, 2, 1]> (x) }")
    view = trace(graph.tensor("y"))
    assert view.source_shape == (BATCH, views.OTHERS[0], 4)
    np.testing.assert_array_equal(view.index, np.arange(BATCH * views.OTHERS[0] * 4).reshape(BATCH, views.OTHERS[0], 4).swapaxes(1, 2))


def test_a_reshape_that_fixes_the_batch_is_refused() -> None:
    with pytest.raises(MatchFailure, match="fixes the batch"):
        trace(viewed("y = Reshape(x, one_image)", one_image=np.array([1, TOKENS, FEATURES])).tensor("y"))


def test_slices_that_run_backwards_are_refused() -> None:
    with pytest.raises(MatchFailure, match="backwards"):
        trace(viewed("y = Slice(x, far, i0, i2, minus)", minus=np.array([-1])).tensor("y"))


def test_a_static_batch_is_kept() -> None:
    view = trace(viewed("y = Transpose(x)", batch="3").tensor("y"))
    assert view.source_shape == (3, TOKENS, FEATURES)


@settings(max_examples=40)
@given(st.data())
def test_random_chains(data: st.DataObject) -> None:
    """Chains of up to four random layout operations on a [2, 6, 4] tensor."""
    text, weights, shape, name = [], {}, [2, 6, 4], "x"
    for step in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["Transpose", "Reshape", "Gather", "Slice", "Unsqueeze", "Split"]))
        result, argument = f"r{step}", f"w{step}"
        axis = data.draw(st.integers(0, len(shape) - 1))
        if kind == "Transpose":
            perm = data.draw(st.permutations(range(len(shape))))
            text.append(f"{result} = Transpose <perm = {list(perm)}> ({name})")
            shape = [shape[i] for i in perm]
        elif kind == "Reshape":
            parts = [d for size in shape for d in ([2, size // 2] if size % 2 == 0 and data.draw(st.booleans()) else [size])]
            weights[argument], shape = np.array(parts), parts
            text.append(f"{result} = Reshape({name}, {argument})")
        elif kind == "Gather":
            chosen = data.draw(st.lists(st.integers(-shape[axis], shape[axis] - 1), min_size=1, max_size=3))
            weights[argument], shape = np.array(chosen), [*shape[:axis], len(chosen), *shape[axis + 1 :]]
            text.append(f"{result} = Gather <axis = {axis}> ({name}, {argument})")
        elif kind == "Slice":
            start, step_size = data.draw(st.integers(0, shape[axis] - 1)), data.draw(st.integers(1, 3))
            for suffix, number in zip("seat", (start, 1000, axis, step_size), strict=True):
                weights[argument + suffix] = np.array([number])
            shape = [*shape[:axis], len(range(start, shape[axis], step_size)), *shape[axis + 1 :]]
            text.append(f"{result} = Slice({name}, {argument}s, {argument}e, {argument}a, {argument}t)")
        elif kind == "Unsqueeze":
            weights[argument], shape = np.array([axis]), [*shape[:axis], 1, *shape[axis:]]
            text.append(f"{result} = Unsqueeze({name}, {argument})")
        elif shape[axis] > 1:
            sizes = [1, shape[axis] - 1]
            weights[argument], shape = np.array(sizes), [*shape[:axis], sizes[1], *shape[axis + 1 :]]
            text.append(f"{result}_, {result} = Split <axis = {axis}> ({name}, {argument})")
        else:
            text.append(f"{result} = Identity({name})")
        name = result
    graph = graph_of(f"g (float[2, 6, 4] x) => (float y) {{ {' '.join(text)} y = Identity({name}) }}", **weights)
    x = np.arange(48, dtype=np.float32).reshape(2, 6, 4)
    view = trace(graph.tensor("y"))
    np.testing.assert_array_equal(x.reshape(-1)[view.index], run_model(graph, {"x": x})[0])
