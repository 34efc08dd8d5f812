"""Outlier channels of an MLP's hidden layer go into a float MLP of their own."""

import numpy as np
import pytest

from tests.builders import Sizes, changes_of, compilation, difference, feed_of, run_model, run_passes, vit
from vitq_compiler.calibration import ChannelStatistics
from vitq_compiler.catalog import FRONT
from vitq_compiler.graph import value
from vitq_compiler.passes.reparameterize_layernorm import ReparameterizeLayernorm
from vitq_compiler.passes.split_outlier_channels import SplitOutlierChannels
from vitq_compiler.pipeline import Compilation
from vitq_compiler.quant import Edge
from vitq_compiler.verdict import linear_rows

HIDDEN = 64
TOLERANCE = 1e-5
OUTLIER = 17


def stretched(block: int = 0) -> Compilation:
    """A ViT in which one hidden channel of one MLP is 50 times as large as the others, calibrated."""
    c = compilation(vit(Sizes(hidden=HIDDEN)))
    run_passes(c, FRONT)
    fc1, fc2 = c.annotations.mlps[block].fc1, c.annotations.mlps[block].fc2
    factor = np.ones(HIDDEN, np.float32)
    factor[OUTLIER] = 50
    fc1.weight.values = value(fc1.weight) * factor
    fc2.weight.values = value(fc2.weight) / factor[:, None]
    changes_of(c, "calibrate")
    return c


def test_the_outputs_stay_and_the_range_shrinks() -> None:
    c = stretched()
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    fc1, fc2 = c.annotations.mlps[0].fc1, c.annotations.mlps[0].fc2
    wide = float(c.table.statistics[fc2.input.name].high.max())
    assert SplitOutlierChannels().run(c) == 1
    assert difference(before, run_model(c.graph, feed)) <= TOLERANCE
    assert (fc1.out_features, fc2.in_features) == (HIDDEN - 1, HIDDEN - 1)
    assert value(fc1.weight).shape[1] == value(fc2.weight).shape[0] == HIDDEN - 1
    assert float(c.table.statistics[fc2.input.name].high.max()) < wide / 5


def test_what_is_split_off_stays_in_float_and_says_so() -> None:
    c = stretched()
    roles = [linear.role for linear in c.annotations.linears]
    SplitOutlierChannels().run(c)
    added = [linear for linear in c.annotations.linears if linear.name.endswith("/outliers")]
    assert [(linear.role, linear.in_features if linear.role == "fc2" else linear.out_features) for linear in added] == [
        ("fc1", 1),
        ("fc2", 1),
    ]
    assert len(c.annotations.linears) == len(roles) + 2
    assert not any(Edge(linear.name, 0) in c.specs for linear in added)
    assert [(row.role, row.parts) for row in linear_rows(c, {}) if row.role != "patch_embed"] == [
        (linear.role, (linear.name,)) for linear in c.annotations.linears if linear not in added
    ], "they are counted as no layers of their own, and as no parts"
    assert {note.where for note in c.notes if "outlier channels stay in float" in note.reason} == {linear.name for linear in added}


def test_the_layernorm_before_it_is_still_reparameterized() -> None:
    c = stretched()
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    SplitOutlierChannels().run(c)
    assert ReparameterizeLayernorm().run(c) == 2 * len(c.annotations.mlps)
    assert difference(before, run_model(c.graph, feed)) <= TOLERANCE


def test_the_integer_graph_is_better_for_it() -> None:
    errors: dict[tuple[str, ...], float] = {}
    for passes in ((), ("split-outlier-channels",)):
        c = stretched()
        feed = feed_of(c.graph)
        before = run_model(c.graph, feed)
        for name in (*passes, "reparameterize-layernorm", "compute-qparams", "insert-qdq", "legalize"):
            changes_of(c, name)
        errors[passes] = difference(before, run_model(c.graph, feed))
    assert errors[("split-outlier-channels",)] < errors[()]


def test_an_even_range_is_left_alone() -> None:
    even = ChannelStatistics(np.full(HIDDEN, -0.2, np.float32), np.linspace(1, 1.4, HIDDEN, dtype=np.float32), np.zeros(HIDDEN, np.float32))
    assert len(SplitOutlierChannels().outliers(even)) == 0


def test_the_largest_channels_are_chosen_in_order() -> None:
    high = np.ones(2 * HIDDEN, np.float32)
    high[[100, 3]] = 9, 8
    seen = ChannelStatistics(-high / 9, high, high)
    assert SplitOutlierChannels().outliers(seen).tolist() == [3, 100]
    assert len(SplitOutlierChannels(portion=1 / 1000).outliers(seen)) == 0


def test_a_hidden_layer_with_another_reader_is_refused() -> None:
    c = stretched()
    hidden = c.annotations.mlps[0].fc2.input
    c.graph.set_outputs([*c.graph.outputs, c.graph.insert("Relu", [hidden], name="tap", like=hidden)])
    assert SplitOutlierChannels().run(c) == 0
    assert any("the hidden layer has other readers" in note.reason for note in c.notes)


def test_built_in_images_do_not_decide_what_an_outlier_is() -> None:
    c = stretched()
    c.data.synthetic = True
    assert SplitOutlierChannels().run(c) == 0
    assert "built-in images" in c.notes[-1].reason


@pytest.mark.parametrize("options", [{"portion": 0.0}, {"portion": 1.0}, {"gain": 0.5}])
def test_impossible_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="portion must lie between 0 and 1"):
        SplitOutlierChannels(**options)
