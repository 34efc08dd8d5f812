"""Simulations: copies of the graph in which some edges are quantized."""

from dataclasses import replace

import numpy as np

from tests.builders import changes_of, compilation, difference, feed_of, graph_of, ops, run_model, run_passes, vit
from vitq_compiler.graph import value
from vitq_compiler.passes.compute_qparams import weight_params
from vitq_compiler.pipeline import Compilation
from vitq_compiler.qdq import quantized_weight, simulate
from vitq_compiler.quant import Edge, QuantSpec, dequantize, fake_quantize, quantize
from vitq_compiler.recipe import load_recipe

ATTENTION = {"q": {}, "k": {}, "probs": {}, "v": {}}
FRONT = "canonicalize,recover-gelu,separate-linears,annotate,calibrate,compute-qparams"


def quantizable() -> Compilation:
    c = compilation(vit(), recipe=replace(load_recipe("w8a8"), attention=ATTENTION))
    run_passes(c, FRONT)
    return c


def test_a_simulation_is_the_output_and_leaves_the_graph_alone() -> None:
    c = quantizable()
    feed = feed_of(c.graph)
    before, simulated = run_model(c.graph, feed), run_model(simulate(c), feed)
    assert difference(before, run_model(c.graph, feed)) == 0
    assert difference(before, simulated) > 1e-4
    changes_of(c, "insert-qdq")
    assert difference(run_model(c.graph, feed), simulated) == 0


def test_some_edges_alone() -> None:
    c = quantizable()
    attention = c.annotations.attentions[0]
    some = {edge: c.params[edge] for edge in attention.edges.values()}
    copy = simulate(c, some)
    assert ops(copy).count("QuantizeLinear") == 4
    nodes = {node.name: node for node in copy.nodes}
    assert all(nodes[edge.node].inputs[edge.index].inputs[0].op == "DequantizeLinear" for edge in some)
    assert simulate(c, {}).text() == c.graph.snapshot().clean().text()


def test_codes_chosen_by_a_pass_take_the_place_of_the_nearest() -> None:
    w = np.array([[1, -2, 0.5], [-3, 4, 0.25]], np.float32)
    c = compilation(graph_of("g (float[B, 2] x) => (float[B, 3] y) { y = MatMul(x, w) }", w=w))
    edge = Edge(c.graph.nodes[0].name, 1)
    c.params = {edge: weight_params(c.graph.nodes[0], QuantSpec(4, signed=True, symmetric=True))}
    assert np.array_equal(quantized_weight(c, edge, w), fake_quantize(w, c.params[edge]))
    c.rounding[edge] = np.maximum(quantize(w, c.params[edge]) - 1, -7).astype(np.int8)
    expected = dequantize(c.rounding[edge], c.params[edge])
    assert np.array_equal(quantized_weight(c, edge, w), expected)
    x = np.eye(2, dtype=np.float32)
    np.testing.assert_array_equal(run_model(simulate(c), {"x": x})[0], expected)
    changes_of(c, "insert-qdq")
    np.testing.assert_array_equal(value(c.graph.tensor(c.codes[edge])), c.rounding[edge])
