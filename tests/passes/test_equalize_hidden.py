"""equalize-hidden: float parity, centred and equal ranges, statistics that follow, and refusals."""

import numpy as np
import pytest

from tests.builders import Dialect, Sizes, changes_of, compilation, difference, feed_of, run_model, run_passes, vit
from vitq_compiler.catalog import pipeline_for
from vitq_compiler.errors import RecipeError
from vitq_compiler.graph import producer, value
from vitq_compiler.passes.equalize_hidden import EqualizeHidden
from vitq_compiler.pipeline import Compilation, Pipeline
from vitq_compiler.quant import Edge
from vitq_compiler.targets.tensorrt import Tensorrt

SIZES = Sizes(depth=1)


def observed(sizes: Sizes = SIZES) -> Compilation:
    c = compilation(vit(sizes, Dialect()))
    run_passes(c, "canonicalize,recover-gelu,separate-linears,annotate,calibrate")
    return c


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_the_outputs_stay_and_ranges_are_centred(gelu: str, bias: bool, strength: float) -> None:
    c = observed(Sizes(depth=1, gelu=gelu, bias=bias))
    feed = feed_of(c.graph, seed=9)
    before = run_model(c.graph, feed)
    assert EqualizeHidden(strength=strength).run(c) == 1
    assert difference(before, run_model(c.graph, feed)) <= 1e-5
    hidden = c.annotations.mlps[0].fc2.input.name
    followed = c.table.statistics[hidden]
    np.testing.assert_allclose(followed.low, -followed.high, atol=2e-6)
    assert followed.high.max() == pytest.approx(4)
    if strength == 1:
        np.testing.assert_allclose(followed.high, followed.high[0], rtol=1e-4)
    changes_of(c, "calibrate")  # what is measured is what was foretold
    seen = c.table.statistics[hidden]
    for field in ("low", "high", "mean"):
        np.testing.assert_allclose(getattr(seen, field), getattr(followed, field), atol=1e-5)


def test_all_blocks_get_one_scale() -> None:
    c = compilation(vit(Sizes(depth=3, width=32, heads=2, hidden=48)), target=Tensorrt())
    run_passes(c, str(pipeline_for(c.recipe, c.target)))
    names = {mlp.fc2.name for mlp in c.annotations.mlps}
    products = [node for node in c.graph.find("MatMul") if node.name in names]
    scales = {float(value(producer(node.inputs[0]).inputs[1])) for node in products}  # type: ignore[union-attr]
    assert (len(products), len(scales)) == (3, 1)
    assert scales.pop() == pytest.approx(4 / 127, rel=1e-3)


def test_a_layer_kept_in_float_and_a_shared_one_are_left_alone() -> None:
    c = observed()
    del c.specs[Edge(c.annotations.mlps[0].fc2.name, 0)]
    assert changes_of(c, "equalize-hidden") == 0
    assert [note.reason for note in c.notes if note.stage == "equalize-hidden"] == ["the hidden layer keeps its ranges: fc2 stays in float"]
    c = observed()
    hidden = c.annotations.mlps[0].fc2.input
    c.graph.set_outputs([*c.graph.outputs, hidden])
    assert changes_of(c, "equalize-hidden") == 0
    assert c.notes[-1].reason == "the hidden layer keeps its ranges: more than fc2 reads it"


def test_a_strength_outside_its_range() -> None:
    with pytest.raises(RecipeError, match="strength must lie in 0 to 1, got 2"):
        Pipeline.parse("equalize-hidden{strength=2}", lambda name: EqualizeHidden)
