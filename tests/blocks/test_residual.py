"""The residual stream: its writers and readers, and every kind of obstacle with its reason."""

from collections import Counter

import numpy as np
import pytest

from tests.builders import DIALECTS, Dialect, Sizes, compilation, feed_of, graph_of, run_passes, vit
from tests.swin import SwinSizes, swin
from vitq_compiler.blocks.linear import find_linears
from vitq_compiler.blocks.residual import Stream, find_streams, readers_of_norm
from vitq_compiler.graph import Graph, value
from vitq_compiler.pattern import MatchFailure

FRONT = "canonicalize,recover-layernorm,recover-gelu,separate-linears,fold-layer-scale,annotate"
ONES = {"g": np.ones(4, np.float32), "b": np.zeros(4, np.float32)}


def streams_of(graph: Graph) -> list[Stream]:
    return find_streams(graph, find_linears(graph))


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
@pytest.mark.parametrize("fuse", [False, True])
def test_a_vit_has_one_stream(dialect: Dialect, fuse: bool) -> None:
    c = compilation(vit(Sizes(depth=2, layer_scale=True), dialect))
    run_passes(c, FRONT + (",fuse-attention,linearize-patch-embedding" if fuse else ""))
    (stream,) = streams_of(c.graph)
    assert (stream.refusal, stream.width, len(stream.norms)) == ("", 8, 5)
    linears = {id(linear.weight): linear.role for linear in c.annotations.linears}
    roles = Counter(linears.get(id(port.tensor), "constant") for port in stream.writers)
    assert (roles["proj"], roles["fc2"]) == (2, 2)
    assert roles["constant"] == 4 + (3 if fuse else 4), "biases of proj and fc2; of the patch embedding; class token; position"
    readers = Counter(linears[id(port.tensor)] for port in stream.readers)
    assert (readers["fc1"], readers["head"], readers["qkv"]) == (2, 1, 6 if fuse or dialect.qkv == "separate" else 2)
    ports = [id(port.tensor) for port in (*stream.writers, *stream.readers)]
    assert len(ports) == len(set(ports)), "each constant once"
    assert all(value(port.tensor).shape[port.axis] == 8 for port in (*stream.writers, *stream.readers))


@pytest.mark.parametrize("merging", ["reshape", "slices"])
def test_stages_have_streams_of_their_own(merging: str) -> None:
    c = compilation(swin(SwinSizes(grid=4, merging=merging)))
    run_passes(c, FRONT)
    first, second = streams_of(c.graph)
    assert (first.width, second.width, first.refusal, second.refusal) == (8, 16, "", "")
    reduction = [port for port in first.readers if value(port.tensor).shape[0] == 32]
    assert len(reduction) == 1, "patch merging reads four tokens side by side"
    assert any(port.tensor is reduction[0].tensor and port.axis == 1 for port in second.writers)


REFUSED = {
    "another reader": ("n = LayerNormalization(u, g, b) y = MatMul(n, w) r = Relu(u)", "Relu node_2 reads it"),
    "a gate": ("n = LayerNormalization(u, g, b) m = MatMul(n, w) y = Mul(m, u)", "Mul node_2 scales each channel in its own way"),
    "a scale per channel": (
        "v = Mul(u, four) n = LayerNormalization(v, g, b) y = MatMul(n, w)",
        "Mul node_0 scales each channel in its own way",
    ),
    "a convolution channel by channel": (
        "n = LayerNormalization(u, g, b) t = Transpose <perm = [0, 2, 1]> (u) d = Conv <group = 4> (t, k) y = MatMul(n, w)",
        "Conv node_2 reads it channel by channel",
    ),
    "a convolution that writes channel by channel": (
        """t = Transpose <perm = [0, 2, 1]> (u) d = Conv <group = 4> (t, k) v = Transpose <perm = [0, 2, 1]> (d)
        n = LayerNormalization(v, g, b) y = MatMul(n, w)""",
        "Conv node_1 writes it channel by channel",
    ),
    "channels taken apart": (
        "n = LayerNormalization(u, g, b) s = Reshape(u, two) y = MatMul(n, w)",
        "Reshape node_1 takes its channels apart",
    ),
    "a selection of channels": (
        "n = LayerNormalization(u, g, b) s = Gather <axis = 2> (u, i) y = MatMul(n, w)",
        "Gather node_1 runs over its channels",
    ),
    "another product": (
        "n = LayerNormalization(u, g, b) t = Transpose <perm = [0, 2, 1]> (u) m = MatMul(n, t) y = MatMul(m, five)",
        "MatMul node_2 reads it",
    ),
    "the image itself": ("n = LayerNormalization(x, g, b) y = MatMul(n, w)", "it holds the graph input x"),
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.values(), ids=REFUSED)
def test_obstacles(text: str, reason: str) -> None:
    extra = {
        "w": np.eye(4, dtype=np.float32),
        "five": np.eye(5, dtype=np.float32),
        "four": np.arange(4, dtype=np.float32),
        "k": np.ones((4, 1, 1), np.float32),
        "two": np.array([0, 5, 2, 2]),
        "i": np.array([0, 1]),
    }
    graph = graph_of(f"g (float[B, 5, 4] x) => (float y) {{ u = MatMul(x, e) {text} }}", e=np.eye(4, dtype=np.float32), **ONES, **extra)
    for index, node in enumerate(n for n in graph.nodes if n.name != graph.nodes[0].name):
        node.name = f"node_{index}"
    stream = streams_of(graph)[0]
    assert stream.refusal == reason


def test_a_graph_output_is_an_obstacle() -> None:
    graph = graph_of(
        "g (float[B, 5, 4] x) => (float[B, 5, 4] u, float y) { u = MatMul(x, w) n = LayerNormalization(u, g, b) y = MatMul(n, w2) }",
        w=np.eye(4, dtype=np.float32),
        w2=np.eye(4, dtype=np.float32),
        **ONES,
    )
    assert streams_of(graph)[0].refusal == "u is a graph output"


def test_a_shape_is_no_obstacle() -> None:
    graph = graph_of(
        "g (float[B, 5, 4] x) => (float y, int64[3] s) { u = MatMul(x, w) s = Shape(u) n = LayerNormalization(u, g, b) y = MatMul(n, w2) }",
        w=np.eye(4, dtype=np.float32),
        w2=np.eye(4, dtype=np.float32),
        **ONES,
    )
    assert streams_of(graph)[0].refusal == ""


def test_means_and_copies_are_followed_to_the_reader() -> None:
    """The head of a DINOv2 classifier: the class token beside the mean of the patches."""
    graph = graph_of(
        """g (float[B, 5, 4] x) => (float y) {
            u = MatMul(x, e) n = LayerNormalization(u, g, b) c = Gather <axis = 1> (n, zero)
            p = Slice(n, one, end, one) m = ReduceMean <keepdims = 0> (p, one) h = Concat <axis = -1> (c, m) y = MatMul(h, w)
        }""",
        e=np.eye(4, dtype=np.float32),
        w=np.ones((8, 3), np.float32),
        zero=np.array(0),
        one=np.array([1]),
        end=np.array([5]),
        **ONES,
    )
    assert feed_of(graph)
    (linear,) = readers_of_norm(graph, graph.find("LayerNormalization")[0], find_linears(graph))
    assert (linear.in_features, linear.out_features) == (8, 3)
    (stream,) = streams_of(graph)
    assert (stream.refusal, len(stream.readers)) == ("", 1)


def test_an_affine_of_a_sum_cannot_move() -> None:
    graph = graph_of(
        "g (float[B, 5, 4] x) => (float y) { n = LayerNormalization(x, g, b) p = Concat <axis = 1> (n, t) y = MatMul(p, w) }",
        w=np.eye(4, dtype=np.float32),
        t=np.ones((2, 1, 4), np.float32),
        **ONES,
    )
    with pytest.raises(MatchFailure, match=r"Concat .* adds to its output"):
        readers_of_norm(graph, graph.find("LayerNormalization")[0], find_linears(graph))
