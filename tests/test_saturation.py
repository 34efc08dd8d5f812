"""What a graph gives on CPUs whose products saturate, on any CPU: against the kernel in numpy, in every form of a product."""

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.builders import graph_of, run_model
from vitq_compiler.pairs import saturating_product
from vitq_compiler.saturation import saturated, saturates

RANDOM = np.random.default_rng(0)
SCALE, ZERO = np.float32(0.05), np.uint8(120)
QUANTIZE = "q = QuantizeLinear(x, s, z) "
FORMS = {
    "MatMul": QUANTIZE + "a = DequantizeLinear(q, s, z) b = DequantizeLinear <axis = 1> (w, r, i) y = MatMul(a, b)",
    "Gemm": QUANTIZE + "a = DequantizeLinear(q, s, z) b = DequantizeLinear <axis = 1> (w, r, i) y = Gemm(a, b)",
    "transposed": QUANTIZE + "a = DequantizeLinear(q, s, z) b = DequantizeLinear <axis = 0> (t, r, i) y = Gemm <transB = 1> (a, b)",
    "MatMulInteger": QUANTIZE + "p = MatMulInteger(q, w, z) f = Cast <to = 1> (p) g = Mul(f, s) y = Mul(g, r)",
}


def pieces(inputs: int, outputs: int, least: int = -127) -> dict[str, NDArray[np.generic]]:
    w = RANDOM.integers(least, 128, (inputs, outputs)).astype(np.int8)
    r = RANDOM.uniform(0.5, 2, outputs).astype(np.float32)
    return {"w": w, "t": np.ascontiguousarray(w.T), "r": r, "i": np.zeros(outputs, np.int8), "s": SCALE, "z": ZERO}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (7, 3), (64, 20)])
def test_it_is_what_the_kernel_computes(form: str, inputs: int, outputs: int) -> None:
    held = pieces(inputs, outputs)
    graph = graph_of(f"g (float[B, {inputs}] x) => (float[B, {outputs}] y) {{ {FORMS[form]} }}", **held)
    graph.infer_shapes()
    x = RANDOM.uniform(-6, 6.7, (5, inputs)).astype(np.float32)
    codes = np.clip(np.rint(x / SCALE) + ZERO, 0, 255).astype(np.uint8)
    w, scale = held["w"].astype(np.int32), held["r"] * SCALE
    offset = int(ZERO) * w.sum(0)
    expected, right = ((products - offset) * scale for products in (saturating_product(codes, held["w"]), codes.astype(np.int32) @ w))
    np.testing.assert_allclose(run_model(saturated(graph), {"x": x})[0], expected, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(run_model(graph, {"x": x})[0], right, rtol=1e-4, atol=1e-2)
    assert saturates(graph) == bool(np.any(np.abs(np.pad(w, ((0, inputs % 2), (0, 0))).reshape(-1, 2, outputs).sum(1)) > 128))


def test_weights_within_the_limit_change_nothing() -> None:
    held = pieces(8, 4) | {"w": RANDOM.integers(-64, 65, (8, 4)).astype(np.int8)}
    graph = graph_of(f"g (float[B, 8] x) => (float[B, 4] y) {{ {FORMS['Gemm']} }}", **held)
    assert not saturates(graph)
    assert [node.op for node in saturated(graph).nodes] == [node.op for node in graph.nodes]
