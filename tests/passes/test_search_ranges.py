"""search-ranges: less error where the tensor is read, for Linear layers and attention products."""

import numpy as np
import pytest

from tests.builders import Sizes, compilation, run_passes, vit
from vitq_compiler.graph import value
from vitq_compiler.passes.search_ranges import SearchRanges
from vitq_compiler.pipeline import Compilation
from vitq_compiler.progress import silent
from vitq_compiler.quant import Edge, QuantParams, fake_quantize
from vitq_compiler.recipe import load_recipe
from vitq_compiler.sampling import sample_matrices, sample_rows

FRONT = "canonicalize,recover-layernorm,recover-gelu,separate-linears,annotate,calibrate,compute-qparams"


def prepared(recipe: str = "minmax", bits: str = "w4a4") -> Compilation:
    c = compilation(vit(Sizes(width=16, hidden=32, depth=1)), recipe=load_recipe(recipe).with_bits(bits))
    run_passes(c, FRONT)
    return c


def linear_errors(c: Compilation, params: dict[Edge, QuantParams]) -> dict[str, float]:
    names = [linear.input.name for linear in c.annotations.linears]
    rows = sample_rows(c.graph, names, c.data.calibration(), 6, rows=10**4, threads=1, progress=silent)
    errors = {}
    for linear in c.annotations.linears:
        x = rows[linear.input.name]
        errors[linear.name] = float(np.square((fake_quantize(x, params[Edge(linear.name, 0)]) - x) @ value(linear.weight)).sum())
    return errors


def test_every_linear_output_gets_better_or_stays() -> None:
    c = prepared()
    before = linear_errors(c, dict(c.params))
    weights = {edge: params for edge, params in c.params.items() if edge.index == 1 and "scores" not in edge.node}
    assert SearchRanges(rows=10**4).run(c) > len(c.annotations.linears)
    after = linear_errors(c, c.params)
    assert all(after[name] <= before[name] * 1.0001 for name in before)
    assert sum(after.values()) < 0.9 * sum(before.values())
    for linear in c.annotations.linears:
        assert c.params[Edge(linear.name, 1)] is weights[Edge(linear.name, 1)], "weights are not searched here"


def test_readers_of_one_tensor_share_its_parameters() -> None:
    c = prepared()
    SearchRanges().run(c)
    shared: dict[str, set[int]] = {}
    for linear in c.annotations.linears:
        shared.setdefault(linear.input.name, set()).add(id(c.params[Edge(linear.name, 0)]))
    assert max(len(params) for params in shared.values()) == 1


def test_the_values_are_searched_given_the_probabilities() -> None:
    c = prepared("adalog")
    attention = c.annotations.attentions[0]
    names = [attention.context.inputs[i].name for i in (0, 1)]
    p, v = sample_matrices(c.graph, names, c.data.calibration(), 6, images=4, threads=1, progress=silent).values()
    edges = attention.edges

    def error() -> float:
        return float(np.square(fake_quantize(p, c.params[edges["probs"]]) @ fake_quantize(v, c.params[edges["v"]]) - p @ v).sum())

    before = error()
    SearchRanges().run(c)
    assert error() < before
    assert c.params[edges["probs"]].curve is not None


@pytest.mark.parametrize("options", [{"objective": "best"}, {"rows": 0}, {"images": 0}])
def test_options_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        SearchRanges(**options)  # type: ignore[arg-type]


def test_only_the_constant_part_of_an_error_is_left_out() -> None:
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    weight = np.eye(3, dtype=np.float32)
    loss, centered = (SearchRanges(centered=flag)._after_linear(x, weight) for flag in (False, True))
    assert centered(x + np.float32(0.5)) == pytest.approx(0, abs=1e-6)
    assert loss(x + np.float32(0.5)) == pytest.approx(0.25 * x.size, rel=1e-4)
    assert SearchRanges(objective="tensor")._after_linear(x, 7 * weight)(x + np.float32(1)) == pytest.approx(x.size, rel=1e-4)
