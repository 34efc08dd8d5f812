"""refit-mlp: ReLU takes the place of GELU, trained weights make up for it, and the report says how far it went."""

from typing import Any

import numpy as np
import pytest

from tests.builders import Batches, Sizes, compilation, feed_of, find_pass, graph_of, ops, run_model, run_passes, vit
from vitq_compiler.annotations import understand
from vitq_compiler.errors import DataError
from vitq_compiler.graph import value
from vitq_compiler.metrics import sqnr
from vitq_compiler.pipeline import Compilation

torch = pytest.importorskip("torch")
from vitq_compiler.training.relu_mlp import CLIPPED, GeluMlp, ReluMlp  # noqa: E402  # needs torch

pytestmark = pytest.mark.torch
RANDOM = np.random.default_rng(0)
FRONT = "canonicalize,recover-layernorm,recover-gelu,separate-linears,annotate"


def prepared(sizes: Sizes | None = None) -> Compilation:
    c = compilation(vit(sizes or Sizes()))
    c.data = Batches(c.graph.inputs, batches=16, batch_size=8)
    run_passes(c, FRONT)
    return c


def likeness(c: Compilation, sizes: Sizes) -> float:
    feed = feed_of(c.graph, batch=64, seed=5)
    return sqnr(run_model(vit(sizes), feed)[0], run_model(c.graph, feed)[0])


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_training_makes_up_for_the_activation(gelu: str) -> None:
    sizes = Sizes(gelu=gelu)
    c, swapped = prepared(sizes), prepared(sizes)
    for node in swapped.graph.find("Gelu"):
        node.op = "Relu"
        node.attrs.clear()
    assert find_pass("refit-mlp")(steps=200).run(c) == 2
    assert "Gelu" not in ops(c.graph)
    assert likeness(c, sizes) > likeness(swapped, sizes) + 3
    (warning,) = c.warnings
    assert warning.startswith("refit-mlp changed the float network: ReLU in place of GELU in 2 MLPs")


def test_a_layer_without_a_bias_gets_one() -> None:
    c = prepared(Sizes(bias=False))
    assert find_pass("refit-mlp")(steps=3).run(c) == 2
    assert all(mlp.fc1.bias is not None and mlp.fc2.bias is not None for mlp in c.annotations.mlps)
    c.graph.clean()
    run_model(c.graph, feed_of(c.graph))


def test_everything_else_stays() -> None:
    c = prepared()
    mine = {id(linear) for mlp in c.annotations.mlps for linear in (mlp.fc1, mlp.fc2)}
    others = {linear.name: value(linear.weight).copy() for linear in c.annotations.linears if id(linear) not in mine}
    find_pass("refit-mlp")(steps=3).run(c)
    for linear in c.annotations.linears:
        if linear.name in others:
            np.testing.assert_array_equal(value(linear.weight), others[linear.name])


MLP = "g (float[2, 3, 4] x) => (float[2, 3, 4] y{more}) {{ h = MatMul(x, A) {act} y = MatMul(a, B) {tail} }}"
REFUSED = {
    "that is Relu, not GELU": MLP.format(more="", act="a = Relu(h)", tail=""),
    "more than GELU lies between its layers": MLP.format(more="", act="b = Gelu(h) a = Transpose <perm = [1, 0, 2]> (b)", tail=""),
    "more than fc2 reads the hidden layer": MLP.format(more=", float[2, 3, 6] z", act="a = Gelu(h)", tail="z = Relu(a)"),
    "more than the activation reads fc1": MLP.format(more=", float[2, 3, 6] z", act="a = Gelu(h)", tail="z = Relu(h)"),
    "it is gated": MLP.format(more="", act="k = MatMul(x, C) b = Gelu(h) a = Mul(b, k)", tail=""),
}


@pytest.mark.parametrize(("reason", "text"), REFUSED.items(), ids=REFUSED)
def test_refusals(reason: str, text: str) -> None:
    shapes = {"A": (4, 6), "B": (6, 4), "C": (4, 6)}
    c = compilation(graph_of(text, **{name: RANDOM.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}))
    c.annotations = understand(c.graph)
    assert find_pass("refit-mlp")().run(c) == 0
    assert [n.reason for n in c.notes if n.stage == "refit-mlp"] == [f"the MLP keeps its activation: {reason}"]
    assert not c.warnings


def test_a_single_batch_is_refused() -> None:
    c = prepared()
    c.data = Batches(c.graph.inputs, batches=1)
    with pytest.raises(DataError, match="refit-mlp holds samples back: give more of them"):
        find_pass("refit-mlp")().run(c)


@pytest.mark.parametrize("options", [{"steps": 0}, {"rate": 0.0}, {"rate": float("nan")}])
def test_senseless_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="steps and rate must be positive"):
        find_pass("refit-mlp")(**options)


def test_the_loss_is_that_of_the_formula() -> None:
    shapes = {"W1": (4, 6), "b1": (6,), "W2": (6, 3), "b2": (3,)}
    weights = {name: RANDOM.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    x = RANDOM.normal(0, 1, (5, 4)).astype(np.float32)
    mlp = ReluMlp(GeluMlp(weights, "none"), [x], "cpu")
    before = x @ weights["W1"] + weights["b1"]
    hidden = torch.nn.functional.gelu(torch.from_numpy(before)).numpy()
    wanted = hidden @ weights["W2"] + weights["b2"]
    top = np.quantile(hidden[hidden > 0], 0.99)
    errors = [np.square(h @ weights["W2"] + weights["b2"] - wanted).mean() for h in (before.clip(0), before.clip(0, top))]
    expected = (errors[0] + CLIPPED * errors[1]) / wanted.var(ddof=1)
    assert mlp.error(torch.from_numpy(x)).item() == pytest.approx(expected, rel=1e-5)
    for name, array in mlp.weights().items():
        np.testing.assert_array_equal(array, weights[name])
