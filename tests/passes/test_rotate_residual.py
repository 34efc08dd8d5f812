"""fold-layernorm-affine and rotate-residual: outputs kept, outliers spread, refusals, and any sequence of exact passes."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import (
    DIALECTS,
    Dialect,
    Sizes,
    changes_of,
    compilation,
    difference,
    feed_of,
    find_pass,
    graph_of,
    run_model,
    run_passes,
    vit,
)
from tests.swin import SwinSizes, swin
from tests.test_parity import REWRITES, TOLERANCE, dialects, sizes
from vitq_compiler.annotations import understand
from vitq_compiler.blocks.residual import only_normalizes
from vitq_compiler.graph import Graph, value
from vitq_compiler.pipeline import Compilation, _build

FRONT = "canonicalize,recover-layernorm,recover-gelu,separate-linears,fold-layer-scale,annotate"


def prepared(model: onnx.ModelProto) -> Compilation:
    c = compilation(model)
    run_passes(c, FRONT)
    return c


def rewritten(c: Compilation, name: str) -> int:
    """The changes; outputs are kept to 1e-5."""
    feed = feed_of(c.graph, seed=9)
    before = run_model(c.graph, feed)
    changes = changes_of(c, name)
    assert difference(before, run_model(c.graph, feed)) <= TOLERANCE
    return changes


def stream_spread(c: Compilation) -> float:
    """Largest value of the first LayerNormalization's input by the median over channels of their largest."""
    copy: Graph = c.graph.snapshot()
    copy.set_outputs([copy.find("LayerNormalization")[0].inputs[0]])
    reach = np.abs(run_model(copy, feed_of(copy, batch=4))[0]).max((0, 1))
    return float(reach.max() / np.median(reach))


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_a_vit_in_every_dialect(dialect: Dialect) -> None:
    c = prepared(vit(Sizes(depth=2, layer_scale=True), dialect))
    assert rewritten(c, "fold-layernorm-affine") == 5
    assert all((value(n.inputs[1]) == 1).all() and not value(n.inputs[2]).any() for n in c.graph.find("LayerNormalization"))
    assert rewritten(c, "fold-layernorm-affine") == 0
    before = [node.op for node in c.graph.nodes]
    assert rewritten(c, "rotate-residual") == 1
    assert [node.op for node in c.graph.nodes] == before, "no node comes or goes"


def test_an_outlier_channel_is_spread() -> None:
    c = prepared(vit(Sizes(depth=1, width=16, heads=2)))
    convolution = c.graph.find("Conv")[0]
    kernel = value(convolution.inputs[1]).copy()
    kernel[5] *= 100
    convolution.inputs[1].values = kernel
    rewritten(c, "fold-layernorm-affine")
    assert stream_spread(c) > 20
    rewritten(c, "rotate-residual")
    assert stream_spread(c) < 3


def test_a_seed_gives_another_basis() -> None:
    weights = []
    for seed in (0, 0, 1):
        c = prepared(vit())
        changes_of(c, "fold-layernorm-affine")
        find_pass("rotate-residual")(seed=seed).run(c)  # type: ignore[call-arg]
        weights.append(value(c.annotations.attentions[0].proj.weight))
    np.testing.assert_array_equal(weights[0], weights[1])
    assert not np.allclose(weights[0], weights[2])


def test_affines_are_folded_on_the_way() -> None:
    c = prepared(vit())
    assert not any(map(only_normalizes, c.graph.find("LayerNormalization")))
    assert rewritten(c, "rotate-residual") == 1
    assert all(map(only_normalizes, c.graph.find("LayerNormalization")))


def test_an_affine_that_must_stay_forbids_it() -> None:
    """The LayerNormalization of patches writes the stream: that stage stays as it is, affines and all."""
    c = prepared(swin(SwinSizes(grid=8, embed_norm=True)))
    assert rewritten(c, "rotate-residual") == 1
    first, *others = c.graph.find("LayerNormalization")
    (note,) = [note for note in c.notes if note.stage == "rotate-residual"]
    assert note.where == first.name
    assert note.reason.startswith(f"the residual stream of width 8 is not rotated: LayerNormalization {first.name} scales or shifts")
    assert note.reason.endswith(" reads it")
    assert [only_normalizes(norm) for norm in others] == [value(norm.inputs[1]).size == 16 for norm in others]


@pytest.mark.parametrize("merging", ["reshape", "slices"])
@pytest.mark.parametrize("embed_norm", [False, True])
def test_stages(merging: str, embed_norm: bool) -> None:
    """A LayerNormalization that writes the stream keeps its affine, and that stage its basis; the next one is rotated."""
    c = prepared(swin(SwinSizes(grid=8, merging=merging, embed_norm=embed_norm)))
    assert rewritten(c, "fold-layernorm-affine") == len(c.graph.find("LayerNormalization")) - embed_norm
    assert rewritten(c, "rotate-residual") == 2 - embed_norm
    reasons = [note.reason for note in c.notes if note.stage == "rotate-residual"]
    assert len(reasons) == embed_norm
    assert all("of width 8 is not rotated" in reason for reason in reasons)


def test_root_mean_squares() -> None:
    """RMSNormalization, which has no shift and keeps the mean, and a LayerNormalization of the same stream."""
    random = np.random.default_rng(5)
    weights = {name: random.normal(size=size).astype(np.float32) for name, size in {"e": (6, 8), "w": (8, 8), "h": (8, 3)}.items()}
    graph = graph_of(
        """g (float[B, 5, 6] x) => (float y) {
            u = MatMul(x, e) a = RMSNormalization <epsilon = 0.01> (u, g) f = MatMul(a, w) r = Add(u, f)
            b = LayerNormalization(r, g2, s) y = MatMul(b, h)
        }""",
        g=random.normal(1, 1, 8).astype(np.float32),
        g2=random.normal(1, 1, 8).astype(np.float32),
        s=random.normal(size=8).astype(np.float32),
        **weights,
    )
    c = compilation(graph)
    c.graph.infer_shapes()
    c.annotations = understand(c.graph)
    assert rewritten(c, "fold-layernorm-affine") == 2
    assert len(c.graph.find("RMSNormalization")[0].inputs) == 2
    before = value(c.annotations.linears[0].weight)
    assert rewritten(c, "rotate-residual") == 1
    assert not np.allclose(before, value(c.annotations.linears[0].weight))
    assert c.notes == []


def test_a_feature_output_forbids_both() -> None:
    model = vit(Sizes(depth=1))
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    model.graph.output.append(onnx.helper.make_tensor_value_info(norm.output[0], 1, ["batch", 5, 8]))
    c = prepared(onnx.shape_inference.infer_shapes(model))
    assert rewritten(c, "fold-layernorm-affine") == 2
    assert f"{norm.output[0]} is a graph output" in c.notes[-1].reason
    assert rewritten(c, "rotate-residual") == 0
    assert f"{norm.output[0]} is a graph output" in c.notes[-1].reason


CALIBRATED = (
    "equalize-values{strength=1}",
    "equalize-hidden{strength=1}",
    "reparameterize-layernorm{strength=1}",
    "reparameterize-layernorm{strength=1 common=median}",
    "reparameterize-layernorm{strength=1 limit=3}",
    "reparameterize-layernorm{center=false}",
)

QUERIES = ("plain", "rotary", "cosine")
swins = st.builds(
    SwinSizes,
    grid=st.sampled_from([4, 8]),
    width=st.sampled_from([4, 6]),
    shift=st.booleans(),
    embed_norm=st.booleans(),
    merging=st.sampled_from(["reshape", "slices"]),
    separate=st.booleans(),
    seed=st.integers(0, 1000),
)


@settings(max_examples=25)
@given(
    st.one_of(st.builds(vit, st.builds(replace, sizes, queries=st.sampled_from(QUERIES)), dialects), st.builds(swin, swins)),
    st.lists(st.sampled_from([*REWRITES, *CALIBRATED]), min_size=1, max_size=5),
    st.booleans(),
)
def test_any_sequence_keeps_the_outputs(model: onnx.ModelProto, sequence: list[str], fuse: bool) -> None:
    c = prepared(model)
    if fuse:
        changes_of(c, "fuse-attention")
    feed = feed_of(c.graph, seed=1)
    reference = run_model(c.graph, feed)
    for text in sequence:
        if text in CALIBRATED:
            changes_of(c, "calibrate")
        name, _, options = text.partition("{")
        _build(find_pass(name), options.rstrip("}")).run(c)
        assert difference(reference, run_model(c.graph, feed)) <= TOLERANCE, text
    onnx.checker.check_model(c.graph.to_proto(), full_check=True)
