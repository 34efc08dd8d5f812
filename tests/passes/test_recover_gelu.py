"""recover-gelu: every order of factors, and constants that make it another function."""

import numpy as np
import pytest

from tests.builders import (
    GELUS,
    Writer,
    assert_golden,
    changes_of,
    compilation,
    decomposed_gelu,
    difference,
    feed_of,
    graph_of,
    ops,
    run_model,
)
from vitq_compiler.pipeline import Compilation

ERF = (
    "g (float[B, 4] x, float[B, 4] w) => (float[B, 4] y) {{ z = {z} e = {bent}(z) g1 = Add(e, {one}) h = Mul({x}, g1) y = Mul(h, {half}) }}"
)
TANH = """g (float[B, 4] x, float[B, 4] w) => (float[B, 4] y) {{
    c = Pow(x, {three}) s = Mul(c, {cubic}) i = Add({x}, s) z = Mul(i, {root}) e = Tanh(z) g1 = Add(e, one) h = Mul(x, g1) y = Mul(h, half)
}}"""
NUMBERS = {
    "one": 1,
    "two": 2,
    "three": 3,
    "half": 0.5,
    "root_half": 0.7071067811865476,
    "root_two": 1.4142135,
    "cubic": 0.044715,
    "root": 0.7978845608,
    "other_root": 0.82,
    "other_cubic": 0.05,
    "other_half": 0.51,
    "other_one": 1.01,
    "sigmoid_like": 1.702,
}
PLAIN_ERF = {"z": "Div(x, root_two)", "bent": "Erf", "one": "one", "x": "x", "half": "half"}
PLAIN_TANH = {"three": "three", "cubic": "cubic", "x": "x", "root": "root"}


def written(text: str, choices: dict[str, str]) -> Compilation:
    full = text.format(**choices)
    return compilation(graph_of(full, **{n: np.array(v, np.float32) for n, v in NUMBERS.items()}))


def recovered(c: Compilation) -> int:
    """Number of Gelu nodes made; outputs are kept to 1e-5 and a second run finds nothing."""
    feed = {name: 2 * array for name, array in feed_of(c.graph).items()}
    before = run_model(c.graph, feed)
    changes = changes_of(c, "recover-gelu")
    assert len(c.graph.find("Gelu")) == changes
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    assert changes_of(c, "recover-gelu") == 0
    return changes


@pytest.mark.parametrize("kind", ["erf", "tanh"])
@pytest.mark.parametrize("order", GELUS)
def test_every_order_of_factors(order: str, kind: str) -> None:
    w = Writer()
    x = w.op("Add", "x", w.number(0.25))
    y = decomposed_gelu(w, x, int(order), kind)
    c = compilation(w.model({"x": ["B", 6]}, {y: ["B", 6]}))
    assert recovered(c) == 1
    assert ops(c.graph) == ["Add", "Gelu"]
    assert c.graph.nodes[1].attrs["approximate"] == ("none" if kind == "erf" else "tanh")


@pytest.mark.parametrize(("text", "choices"), [(ERF, PLAIN_ERF), (TANH, PLAIN_TANH)], ids=["erf", "tanh"])
def test_golden(text: str, choices: dict[str, str]) -> None:
    c = written(text, choices)
    assert recovered(c) == 1
    assert_golden(c.graph, f"recover_gelu_{'erf' if text is ERF else 'tanh'}")


@pytest.mark.parametrize(
    "choices",
    [
        {"z": "Mul(x, root_two)"},
        {"z": "Div(x, root_half)"},
        {"z": "Mul(x, sigmoid_like)"},
        {"z": "Div(x, two)"},
        {"z": "Identity(x)"},
        {"z": "Div(w, root_two)"},
        {"half": "other_half"},
        {"half": "two"},
        {"half": "x"},
        {"one": "other_one"},
        {"one": "x"},
        {"x": "w"},
        {"bent": "Tanh"},
        {"bent": "Sigmoid"},
    ],
    ids=str,
)
def test_other_functions_stay_erf(choices: dict[str, str]) -> None:
    c = written(ERF, PLAIN_ERF | choices)
    before = sorted(ops(c.graph))
    assert recovered(c) == 0
    assert sorted(ops(c.graph)) == before


@pytest.mark.parametrize(
    "choices",
    [{"three": "two"}, {"cubic": "other_cubic"}, {"x": "w"}, {"root": "other_root"}, {"root": "x"}],
    ids=str,
)
def test_other_functions_stay_tanh(choices: dict[str, str]) -> None:
    assert recovered(written(TANH, PLAIN_TANH | choices)) == 0


def test_a_vector_of_halves_is_no_number() -> None:
    c = written(ERF, PLAIN_ERF)
    half = c.graph.tensor("half")
    half.values = np.full(4, 0.5, np.float32)
    assert recovered(c) == 0


def test_intermediate_results_that_are_read_elsewhere_stay() -> None:
    c = written(ERF, PLAIN_ERF)
    c.graph.set_outputs([c.graph.tensor("y"), c.graph.tensor("e")])
    assert recovered(c) == 1
    assert sorted(ops(c.graph)) == ["Div", "Erf", "Gelu"]


def test_an_argument_that_is_a_product_of_activations_is_left_alone() -> None:
    text = ERF.replace("{{ z", "{{ p = Mul(x, w) z")
    c = written(text, PLAIN_ERF | {"z": "Div(p, root_two)", "x": "p"})
    assert recovered(c) == 0, "its factors cannot be told from those of the Gelu"


def test_a_scaled_argument_is_seen_through() -> None:
    """0.25 p (1 + erf(x / sqrt 2)) with p = 2 x is the Gelu of x."""
    text = ERF.replace("{{ z", "{{ p = Mul(x, two) z").replace("Mul(h, {half})", "Mul(h, quarter)")
    full = text.format(**(PLAIN_ERF | {"x": "p"}))
    weights = {"root_two": 2**0.5, "one": 1, "two": 2, "quarter": 0.25}
    c = compilation(graph_of(full, **{n: np.array(v, np.float32) for n, v in weights.items()}))
    assert recovered(c) == 1


CUBE = "c = Pow(x, three) s = Mul(c, cubic) i = Add(x, s)"
FACTORED = "s = Mul(q, cubic) i = Add(s, one) p = Mul(x, root) z = Mul(p, i) e = Tanh(z) b = Add(e, one) h = Mul(x, half) y = Mul(h, b)"
OTHER_FORMS = {
    "gate halved, erf": "z = Div(x, root_two) e = Erf(z) a = Mul(e, half) b = Add(a, half) y = Mul(x, b)",
    "gate halved, tanh": f"{CUBE} z = Mul(i, root) e = Tanh(z) a = Mul(e, half) b = Add(half, a) y = Mul(b, x)",
    "factored": f"q = Mul(x, x) {FACTORED}",
    "factored, squared": f"q = Pow(x, two) {FACTORED}",
    "factored otherwise": f"q = Mul(x, cubic) {FACTORED.replace('Mul(q, cubic)', 'Mul(x, q)')}",
    "sigmoid": f"{CUBE} z = Mul(i, double_root) e = Sigmoid(z) y = Mul(x, e)",
}


def form(text: str) -> Compilation:
    numbers = NUMBERS | {"double_root": 2 * NUMBERS["root"]}
    return compilation(
        graph_of(f"g (float[B, 4] x) => (float[B, 4] y) {{ {text} }}", **{n: np.array(v, np.float32) for n, v in numbers.items()})
    )


@pytest.mark.parametrize("text", OTHER_FORMS.values(), ids=OTHER_FORMS)
def test_every_other_form(text: str) -> None:
    c = form(text)
    assert recovered(c) == 1
    assert ops(c.graph) == ["Gelu"]


@pytest.mark.parametrize(
    "text",
    [
        "z = Mul(x, sigmoid_like) e = Sigmoid(z) y = Mul(x, e)",
        "e = Sigmoid(x) y = Mul(x, e)",
        OTHER_FORMS["sigmoid"].replace("double_root", "root"),
        OTHER_FORMS["gate halved, erf"].replace("Mul(e, half)", "Mul(e, other_half)"),
        OTHER_FORMS["factored"].replace("Mul(q, cubic)", "Mul(q, other_cubic)"),
    ],
)
def test_other_gates_stay(text: str) -> None:
    c = form(text)
    before = sorted(ops(c.graph))
    assert recovered(c) == 0
    assert sorted(ops(c.graph)) == before
