"""Random tiny vision transformers keep their outputs under every float-exact pass, and every Linear gets its role.

The tolerance is 3e-5 of the largest output, single precision's own noise over a few blocks of two or three channels, whose
LayerNormalization enlarges it.
"""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import (
    GELUS,
    LAYERNORMS,
    QKV,
    SCALES,
    Array,
    Dialect,
    Feed,
    Sizes,
    changes_of,
    compilation,
    difference,
    feed_of,
    find_pass,
    graph_of,
    ops,
    roles_of,
    run_model,
    vit,
)
from vitq_compiler.catalog import FRONT, pipeline_for
from vitq_compiler.pipeline import Compilation
from vitq_compiler.recipe import load_recipe
from vitq_compiler.registry import names
from vitq_compiler.targets.onnxruntime import Onnxruntime
from vitq_compiler.targets.tensorrt import Tensorrt

TOLERANCE = 3e-5
GELU_STEPS = {"erf": 4, "tanh": 8}  # operators more than one, where it is decomposed
WHOLE = [p.name for p in pipeline_for(load_recipe("w8a8"), Onnxruntime()).passes]
NEWEST = [p.name for p in pipeline_for(load_recipe("w8a8"), Onnxruntime("newest")).passes]
REWRITES = (
    "fold-layernorm-affine",
    "rotate-residual",
    "rotate-heads",
    "fold-attention-scale",
    "center-keys",
    "center-values",
    "equalize-heads",
)
FOR_TENSORRT = [p.name for p in pipeline_for(load_recipe("w8a8"), Tensorrt()).passes]
EXACT = [name for name in names("passes") if find_pass(name).exact]

sizes = st.builds(
    lambda heads, head_dim, **rest: Sizes(width=heads * head_dim, heads=heads, **rest),
    st.integers(1, 3),
    st.sampled_from([2, 3, 4]),
    image=st.sampled_from([4, 8]),
    patch=st.sampled_from([2, 4]),
    depth=st.integers(1, 2),
    hidden=st.integers(3, 10),
    classes=st.integers(2, 4),
    bias=st.booleans(),
    layer_scale=st.booleans(),
    class_token=st.booleans(),
    gelu=st.sampled_from(["erf", "tanh"]),
    seed=st.integers(0, 1000),
)
dialects = st.builds(
    Dialect,
    qkv=st.sampled_from(QKV),
    scale=st.sampled_from(SCALES),
    layernorm=st.sampled_from(["fused", *LAYERNORMS]),
    gelu=st.sampled_from(["fused", *GELUS]),
    head=st.sampled_from(["gemm", "matmul"]),
    bias_first=st.booleans(),
    dynamic=st.booleans(),
    noise=st.booleans(),
    share=st.booleans(),
    constants=st.booleans(),
)


def checked(c: Compilation, name: str, reference: list[Array], feed: Feed) -> list[Array]:
    """What the next pass is held to: the outputs before an exact pass, which has kept them, and those after any other that edits."""
    kind = find_pass(name)
    if kind.exact:
        assert difference(reference, run_model(c.graph, feed)) <= TOLERANCE, name
    return run_model(c.graph, feed) if kind.edits and not kind.exact else reference


@settings(max_examples=40)
@given(sizes, dialects, st.sampled_from(["", "1.16", "newest"]))
def test_every_exact_pass_keeps_the_outputs(size: Sizes, dialect: Dialect, version: str) -> None:
    model = vit(size, dialect)
    feed = feed_of(model)
    c = compilation(model, target=Onnxruntime(version))
    reference = run_model(model, feed)
    for name in NEWEST if version == "newest" else WHOLE:
        changes = changes_of(c, name)
        reference = checked(c, name, reference, feed)
        if name == "recover-layernorm":
            assert changes == (0 if dialect.layernorm == "fused" else 2 * size.depth + 1)
        if name == "recover-gelu":
            assert changes == (0 if dialect.gelu == "fused" else size.depth)
        if name == "fold-layer-scale":
            assert changes == (2 * size.depth if size.layer_scale else 0)
        if name == "annotate":
            assert [linear.role for linear in c.annotations.linears] == roles_of(size, dialect)
            assert {a.heads for a in c.annotations.attentions} == {size.heads}
        if name == ("fuse-attention" if version == "newest" else "separate-heads"):
            assert changes == size.depth
        if name == "lower-opset":
            assert changes == (size.depth if version == "1.16" else 0), "Gelu came with opset 20"
        if name == "linearize-patch-embedding":
            assert changes == 1
        if name == "reparameterize-layernorm":
            assert changes == 2 * size.depth
        if name == "equalize-values":
            assert changes == size.depth
        if name == "legalize":
            gemms, sums, on_rows = len(c.annotations.linears) - 1, 2 * size.depth + 1, 5 * size.depth
            on_rows += GELU_STEPS[size.gelu] * size.depth if version == "1.16" else 0
            merged = changes - gemms - sums - on_rows  # Reshapes of patches, q, k, v and merged heads, where nothing stands between
            assert 0 <= merged <= 1 + 4 * size.depth
    onnx.checker.check_model(c.graph.to_proto(), full_check=True)
    assert c.warnings == []
    assert c.graph.opset == {"": 20, "1.16": 17, "newest": 23}[version]
    assert np.isfinite(run_model(c.graph, feed)[0]).all()


@settings(max_examples=25)
@given(sizes, dialects, st.sampled_from(["8.6", "10"]))
def test_every_exact_pass_keeps_the_outputs_for_tensorrt(size: Sizes, dialect: Dialect, version: str) -> None:
    model = vit(size, dialect)
    feed = feed_of(model)
    target = Tensorrt(version)
    c = compilation(model, target=target)
    reference = run_model(model, feed)
    for name in (p.name for p in pipeline_for(load_recipe("w8a8"), target).passes):
        changes = changes_of(c, name)
        reference = checked(c, name, reference, feed)
        if name in ("stack-heads", "equalize-hidden"):
            assert changes == size.depth
    onnx.checker.check_model(c.graph.to_proto(), full_check=True)
    assert [w for w in c.warnings if not w.startswith(("S15", "S16"))] == []  # products and patches are tiny here
    assert c.graph.opset == (17 if version == "8.6" else 20)
    (logits,) = run_model(c.graph, feed)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()


@settings(max_examples=12)
@given(sizes, dialects)
def test_the_front_is_idempotent(size: Sizes, dialect: Dialect) -> None:
    c = compilation(vit(size, dialect))
    for name in FRONT.split(","):
        changes_of(c, name)
    text, nodes = c.graph.text(), ops(c.graph)
    for name in FRONT.split(","):
        if name != "annotate":
            assert changes_of(c, name) == 0, name
    assert ops(c.graph) == nodes
    assert c.graph.text() == text


def test_every_exact_pass_is_covered() -> None:
    assert set(EXACT) <= {*WHOLE, *NEWEST, *FOR_TENSORRT, *REWRITES}, "those outside the default pipelines have a property of their own"


@pytest.mark.parametrize("weights", ["fc1", "qkv"])
def test_blocks_that_share_their_weights(weights: str) -> None:
    """Weight sharing across blocks (as in ALBERT): folding into one block must not change the other."""
    model = vit(Sizes(depth=2, layer_scale=True))
    shape = {"fc1": [8, 12], "qkv": [8, 24]}[weights]
    shared = [t.name for t in model.graph.initializer if list(t.dims) == shape]
    assert len(shared) == 2
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == shared[1]:
                node.input[index] = shared[0]
    feed = feed_of(model)
    reference = run_model(model, feed)
    c = compilation(model)
    for name in WHOLE[: WHOLE.index("compute-qparams")]:
        changes_of(c, name)
    assert difference(reference, run_model(c.graph, feed)) <= TOLERANCE


def test_a_uniform_mask_that_widens_its_partner() -> None:
    """A row that is repeated along the batch may also be what gives a sum its width."""
    graph = graph_of(
        """g (float[B, 1] x) => (float[B, 4] y) {
            s = Shape <start = 0, end = 1> (x) t = Concat <axis = 0> (s, four) m = Expand(w, t) y = Add(x, m)
        }""",
        four=np.array([4]),
        w=np.full((1, 4), 3, np.float32),
    )
    feed = feed_of(graph)
    reference = run_model(graph, feed)
    c = compilation(graph)
    changes_of(c, "canonicalize")
    assert difference(reference, run_model(c.graph, feed)) == 0
