"""recover-layernorm: every way to write it, and what must be left alone."""

import numpy as np
import pytest

from tests.builders import (
    LAYERNORMS,
    OPSET,
    Writer,
    assert_golden,
    changes_of,
    compilation,
    decomposed_layernorm,
    difference,
    feed_of,
    graph_of,
    ops,
    run_model,
)
from vitq_compiler.graph import Graph, value
from vitq_compiler.pipeline import Compilation

WIDTH = 4
GAMMA = np.array([1, -2, 0.5, 3], np.float32)
BETA = np.array([0.25, 0, -1, 2], np.float32)


def decomposed(
    variant: str, *, flipped: bool = False, shape: tuple[int, ...] = (WIDTH,), opset: int = OPSET, epsilon: float = 1e-3
) -> Compilation:
    w = Writer(opset=opset)
    gamma, beta = w.weight("gamma", GAMMA.reshape(shape)), w.weight("beta", BETA.reshape(shape))
    y = decomposed_layernorm(w, "x", gamma, beta, variant, flipped=flipped, epsilon=epsilon)
    return compilation(w.model({"x": ["B", 3, WIDTH]}, {y: ["B", 3, WIDTH]}))


def recovered(c: Compilation) -> int:
    """Number of LayerNormalization nodes made; outputs are kept to 1e-5 and a second run finds nothing."""
    feed = feed_of(c.graph, batch=4)  # as many as the text has tokens and channels, so that a mean without its axis still broadcasts
    before = run_model(c.graph, feed)
    changes = changes_of(c, "recover-layernorm")
    assert len(c.graph.find("LayerNormalization")) == changes
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    assert changes_of(c, "recover-layernorm") == 0
    return changes


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("variant", [*LAYERNORMS, "mul-sqrt-reciprocal", "mul-pow-div", "pow-pow-reciprocal"])
def test_every_variant(variant: str, flipped: bool) -> None:
    c = decomposed(variant, flipped=flipped)
    assert recovered(c) == 1
    assert ops(c.graph) == ["LayerNormalization"]
    node = c.graph.nodes[0]
    assert node.attrs["epsilon"] == pytest.approx(1e-3)
    assert node.attrs["axis"] == -1
    np.testing.assert_array_equal(value(node.inputs[1]), GAMMA)
    np.testing.assert_array_equal(value(node.inputs[2]), BETA)


def test_golden() -> None:
    c = decomposed("pow-sqrt-div", flipped=True, epsilon=0.5)
    assert changes_of(c, "recover-layernorm") == 1
    assert_golden(c.graph, "recover_layernorm")


@pytest.mark.parametrize("shape", [(1, WIDTH), (1, 1, WIDTH)])
def test_parameters_with_leading_ones(shape: tuple[int, ...]) -> None:
    c = decomposed("pow-sqrt-div", shape=shape)
    assert recovered(c) == 1
    assert value(c.graph.nodes[0].inputs[1]).shape == (WIDTH,)


@pytest.mark.parametrize("opset", [13, 17])
def test_axes_as_attributes_of_older_opsets(opset: int) -> None:
    c = decomposed("pow-sqrt-div", opset=opset)
    changes_of(c, "canonicalize")
    assert recovered(c) == 1


TEXT = """g (float[B, 4, 4] x) => (float[B, 4, 4] y) {{
    m = ReduceMean <keepdims = {keep}> (x, {first}) d = Sub({source}, m) s = {square} v = ReduceMean <keepdims = {keep}> (s, {second})
    e = Add(v, epsilon) r = {root} n = Div(d, r) g1 = Mul(n, gamma) y = Add(g1, beta)
}}"""
CHOICES = {"keep": 1, "first": "last", "source": "x", "square": "Pow(d, two)", "second": "last", "root": "Sqrt(e)"}


def written(**choices: object) -> Graph:
    weights = {
        "last": np.array([-1]),
        "third": np.array([2]),
        "middle": np.array([1]),
        "both": np.array([1, 2]),
        "two": np.array(2, np.float32),
        "three": np.array(3, np.float32),
        "half": np.array(0.5, np.float32),
        "third_root": np.array(1 / 3, np.float32),
        "epsilon": np.array(1e-5, np.float32),
        "gamma": GAMMA,
        "beta": BETA,
    }
    weights.update({k: choices.pop(k) for k in list(choices) if isinstance(choices[k], np.ndarray)})  # type: ignore[misc]
    text = TEXT.format(**(CHOICES | choices))
    return graph_of(text, **weights)


def test_the_text_is_recovered_as_it_stands() -> None:
    assert recovered(compilation(written())) == 1
    assert recovered(compilation(written(first="third", second="third"))) == 1


@pytest.mark.parametrize(
    "choices",
    [
        {"first": "middle", "second": "middle"},
        {"first": "both", "second": "both"},
        {"first": "middle"},
        {"second": "middle"},
        {"square": "Pow(d, three)"},
        {"square": "Mul(d, x)"},
        {"square": "Pow(x, two)"},
        {"root": "Pow(e, third_root)"},
        {"root": "Identity(e)"},
        {"epsilon": np.full(4, 1e-5, np.float32)},
        {"keep": 0},
    ],
    ids=str,
)
def test_what_is_something_else_stays(choices: dict[str, object]) -> None:
    graph = written(**choices)
    before = ops(graph)
    c = compilation(graph)
    assert recovered(c) == 0
    assert sorted(ops(c.graph)) == sorted(before)
    assert {n.reason.partition(":")[0] for n in c.notes} == {"not a LayerNormalization"}, "why is told"


@pytest.mark.parametrize(
    ("choices", "left"),
    [
        ({"gamma": np.ones((4, 4), np.float32)}, ["Mul", "Add"]),
        ({"gamma": np.ones((4, 1), np.float32), "beta": np.ones((4, 1), np.float32)}, ["Mul", "Add"]),
        ({"gamma": np.array(2, np.float32), "beta": np.array(2, np.float32)}, ["Mul", "Add"]),
        ({"gamma": np.array([2], np.float32)}, ["Mul", "Add"]),
        ({"beta": np.ones((4, 4), np.float32)}, ["Add"]),
    ],
    ids=str,
)
def test_parameters_that_are_not_per_channel_stay_behind_it(choices: dict[str, object], left: list[str]) -> None:
    c = compilation(written(**choices))
    assert recovered(c) == 1
    assert ops(c.graph) == ["LayerNormalization", *left]
    assert not c.notes


MEAN = "v = ReduceMean(s, last) e = Add(v, epsilon)"
SUM = "t = ReduceSum(s, last) v = Div(t, four) e = Add(v, epsilon)"
AFFINE = "g1 = Mul(n, gamma) y = Add(g1, beta)"
FORMS = {
    "no beta": f"{MEAN} r = Sqrt(e) n = Div(d, r) y = Mul(n, gamma)",
    "no parameters": f"{MEAN} r = Sqrt(e) y = Div(d, r)",
    "no gamma": f"{MEAN} r = Sqrt(e) n = Div(d, r) y = Add(n, beta)",
    "negative power": f"{MEAN} r = Pow(e, minus_half) n = Mul(d, r) {AFFINE}",
    "one over root": f"{MEAN} q = Sqrt(e) r = Div(one, q) n = Mul(d, r) {AFFINE}",
    "sum over width": f"{SUM} r = Sqrt(e) n = Div(d, r) {AFFINE}",
    "sum times": f"{SUM.replace('Div(t, four)', 'Mul(t, quarter)')} r = Sqrt(e) n = Div(d, r) {AFFINE}",
    "slope first": f"{MEAN} q = Sqrt(e) r = Reciprocal(q) k = Mul(r, gamma) n = Mul(d, k) y = Add(n, beta)",
    "gamma first": f"{MEAN} r = Pow(e, minus_half) k = Mul(gamma, d) n = Mul(k, r) y = Add(beta, n)",
    "tensorflow": f"{MEAN} q = Sqrt(e) r = Reciprocal(q) k = Mul(r, gamma) a = Mul(x, k) o = Mul(m, k) b = Sub(beta, o) y = Add(a, b)",
}
FORM_NUMBERS = {"epsilon": 1e-5, "minus_half": -0.5, "one": 1, "four": 4, "quarter": 0.25, "three": 3}


def form(text: str) -> Compilation:
    full = f"g (float[B, 4, 4] x) => (float[B, 4, 4] y) {{ m = ReduceMean(x, last) d = Sub(x, m) s = Mul(d, d) {text} }}"
    weights = {n: np.array(v, np.float32) for n, v in FORM_NUMBERS.items()}
    return compilation(graph_of(full, last=np.array([-1]), gamma=GAMMA, beta=BETA, **weights))


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_every_form(text: str) -> None:
    c = form(text)
    assert recovered(c) == 1
    assert ops(c.graph) == ["LayerNormalization"]
    gamma, beta = map(value, c.graph.nodes[0].inputs[1:])
    np.testing.assert_array_equal(gamma, GAMMA if "gamma" in text else np.ones(4))
    np.testing.assert_array_equal(beta, BETA if "beta" in text else np.zeros(4))


def test_an_unbiased_variance_is_refused_with_its_divisor() -> None:
    c = form(FORMS["sum over width"].replace("four", "three"))
    assert recovered(c) == 0
    assert "a sum over 4 channels is divided by 3.0" in c.notes[0].reason


def test_the_nearest_miss_is_told() -> None:
    c = form(f"{MEAN.replace('Mean', 'Max')} r = Sqrt(e) n = Div(d, r) {AFFINE}")
    assert changes_of(c, "recover-layernorm") == 0
    assert [(n.where, n.reason) for n in c.notes] == [
        ("Div_6", "not a LayerNormalization: ReduceMax ReduceMax_3 stands where ReduceMean is looked for")
    ]


def test_computed_parameters_are_left_alone() -> None:
    c = compilation(
        graph_of(
            TEXT.format(**CHOICES).replace("(n, gamma)", "(n, x)"),
            last=np.array([-1]),
            two=np.array(2, np.float32),
            epsilon=np.array(1e-5, np.float32),
            beta=BETA,
        )
    )
    assert recovered(c) == 1
    assert ops(c.graph) == ["LayerNormalization", "Mul", "Add"]


def test_intermediate_results_that_are_read_elsewhere_stay() -> None:
    c = compilation(written())
    graph = c.graph
    graph.set_outputs([graph.tensor("y"), graph.tensor("d")])
    assert recovered(c) == 1
    assert sorted(ops(graph)) == ["LayerNormalization", "ReduceMean", "Sub"]


def test_two_in_a_row_and_a_repeated_difference() -> None:
    w = Writer()
    gamma, beta = w.weight("gamma", GAMMA), w.weight("beta", BETA)
    first = decomposed_layernorm(w, "x", gamma, beta, "pow-sqrt-div")
    y = decomposed_layernorm(w, w.op("Relu", first), gamma, beta, "mul-pow-reciprocal", flipped=True)
    c = compilation(w.model({"x": ["B", WIDTH]}, {y: ["B", WIDTH]}))
    assert recovered(c) == 2
    assert ops(c.graph) == ["LayerNormalization", "Relu", "LayerNormalization"]


def test_a_difference_that_the_exporter_computed_twice() -> None:
    graph = written(root="Sqrt(e) d2 = Sub(x, m)")
    graph.find("Div")[0].inputs[0] = graph.tensor("d2")
    assert recovered(compilation(graph)) == 1
