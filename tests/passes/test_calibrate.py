"""calibrate: which tensors are observed, and along which axis."""

from dataclasses import replace

import numpy as np

from tests.builders import Dialect, Sizes, changes_of, compilation, run_model, run_passes, vit
from vitq_compiler.passes.calibrate import Calibrate
from vitq_compiler.pipeline import Compilation
from vitq_compiler.quant import Edge
from vitq_compiler.recipe import load_recipe
from vitq_compiler.targets.tensorrt import Tensorrt

FRONT = "canonicalize,recover-gelu,separate-linears,annotate"


def calibrated(dialect: Dialect) -> tuple[Compilation, int]:
    c = compilation(vit(Sizes(depth=1), dialect))
    run_passes(c, FRONT)
    return c, changes_of(c, "calibrate")


def test_every_quantized_activation_once() -> None:
    c, changes = calibrated(Dialect(qkv="separate"))
    wanted = {c.graph.node(edge.node).inputs[0].name for edge in c.specs if edge.index == 0}
    assert set(c.table.statistics) == wanted
    assert changes == len(wanted) == 5, "image, one tensor for q, k and v, proj, fc1, fc2"
    assert c.table.samples == c.data.calibration_count == 6


def test_channels_lie_last_but_for_images() -> None:
    c, _ = calibrated(Dialect())
    sizes = {c.graph.node(e.node).op: c.table.statistics[c.graph.node(e.node).inputs[0].name].low.size for e in c.specs if e.index == 0}
    assert sizes["Conv"] == 3
    for linear in c.annotations.linears:
        if Edge(linear.name, 0) in c.specs:
            assert c.table.statistics[linear.input.name].low.size == linear.in_features


def test_operands_of_attention_by_head_channel() -> None:
    sizes = Sizes(depth=1)
    c = compilation(vit(sizes), recipe=replace(load_recipe("w8a8"), attention={"q": {}, "k": {}, "probs": {}, "v": {}}))
    run_passes(c, f"{FRONT},calibrate")
    (attention,) = c.annotations.attentions
    channels = {
        operand: c.table.statistics[c.graph.node(edge.node).inputs[edge.index].name].low.size for operand, edge in attention.edges.items()
    }
    head = attention.proj.in_features // attention.heads
    tokens = attention.scores.outputs[0].shape[-1]
    assert channels == {"q": head, "k": head, "probs": tokens, "v": attention.proj.in_features}, "values head by head"


def test_operands_are_observed_where_the_target_prices_them() -> None:
    c = compilation(vit(Sizes(depth=1)), target=Tensorrt())
    run_passes(c, f"{FRONT},calibrate")
    (attention,) = c.annotations.attentions
    operands = {c.graph.node(edge.node).inputs[edge.index].name for edge in attention.edges.values()}
    assert operands <= c.table.statistics.keys()
    assert not any(edge in c.specs for edge in attention.edges.values())


def test_ranges_are_those_of_the_data() -> None:
    c, _ = calibrated(Dialect())
    linear = next(linear for linear in c.annotations.linears if linear.role == "fc2")
    probe = c.graph.snapshot()
    probe.set_outputs([probe.tensor(linear.input.name)])
    seen = np.concatenate([run_model(probe, feed)[0] for feed in c.data.calibration()])
    np.testing.assert_allclose(c.table.statistics[linear.input.name].low, seen.min((0, 1)), atol=1e-6)
    np.testing.assert_allclose(c.table.statistics[linear.input.name].high, seen.max((0, 1)), atol=1e-6)
    np.testing.assert_allclose(c.table.statistics[linear.input.name].mean, seen.mean((0, 1)), atol=1e-6)


def test_progress_is_told() -> None:
    c = compilation(vit(Sizes(depth=1)))
    run_passes(c, FRONT)
    told: list[tuple[str, int, int]] = []
    c.progress = lambda *step: told.append(step)
    changes_of(c, "calibrate")
    assert told == [("calibrating", 3, 6), ("calibrating", 6, 6)]


def test_ranges_from_built_in_images_are_widened() -> None:
    tables = {}
    for synthetic in (False, True):
        c = compilation(vit())
        run_passes(c, FRONT)
        c.data = replace(c.data, synthetic=synthetic)
        assert Calibrate(synthetic_margin=2.0).run(c) > 0
        tables[synthetic] = c.table.statistics
    for name, seen in tables[False].items():
        # Both ends move outwards by their distance from zero, but not further than the range is wide.
        width = seen.high - seen.low
        np.testing.assert_allclose(tables[True][name].high, seen.high + np.minimum(abs(seen.high), width))
        np.testing.assert_allclose(tables[True][name].low, seen.low - np.minimum(abs(seen.low), width))
        np.testing.assert_array_equal(tables[True][name].mean, seen.mean)
