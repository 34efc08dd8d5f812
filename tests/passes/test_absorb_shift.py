"""absorb-shift: the same numbers with the shift in the bias of the stored weight."""

import numpy as np
import pytest

from tests.builders import changes_of, compilation, graph_of, run_model
from vitq_compiler.annotations import understand
from vitq_compiler.calibration import CalibrationTable, ChannelStatistics
from vitq_compiler.pipeline import Compilation
from vitq_compiler.quant import Edge, QuantSpec

RANDOM = np.random.default_rng(0)
W, BIAS = RANDOM.normal(size=(6, 4)).astype(np.float32), RANDOM.normal(size=4).astype(np.float32)
X = RANDOM.normal(size=(200, 6)).astype(np.float32)


def prepared(quantizer: str, *, bias: bool = True) -> Compilation:
    text = "h = Gelu(x) m = MatMul(h, w) " + ("y = Add(m, c)" if bias else "y = Relu(m)")
    c = compilation(graph_of(f"g (float[B, 6] x) => (float[B, 4] y) {{ {text} }}", w=W, **({"c": BIAS} if bias else {})))
    c.annotations = understand(c.graph)
    name = c.annotations.linears[0].name
    activation = QuantSpec(4, quantizer=quantizer, shift=0.17 if quantizer == "shifted-log" else 0.0)
    c.specs = {Edge(name, 0): activation, Edge(name, 1): QuantSpec(4, signed=True, symmetric=True, granularity="per_channel")}
    c.table = CalibrationTable({"h": ChannelStatistics(*(np.full(6, n, np.float32) for n in (-0.17, 3, 0.3)))}, 200)
    changes_of(c, "compute-qparams")
    return c


@pytest.mark.parametrize("bias", [True, False])
def test_the_output_stays(bias: bool) -> None:
    plain, absorbed = prepared("shifted-log", bias=bias), prepared("shifted-log", bias=bias)
    assert changes_of(absorbed, "absorb-shift") == 1
    assert changes_of(absorbed, "absorb-shift") == 0, "once is enough"
    for c in (plain, absorbed):
        changes_of(c, "insert-qdq")
    (a,), (b,) = (run_model(c.graph, {"x": X}) for c in (plain, absorbed))
    np.testing.assert_allclose(a, b, atol=1e-5)
    counts = [[node.op for node in c.graph.nodes].count("Sub") for c in (plain, absorbed)]
    assert counts == [1, 0]


@pytest.mark.parametrize("quantizer", ["affine", "twin-range"])
def test_others_are_left_alone(quantizer: str) -> None:
    assert changes_of(prepared(quantizer), "absorb-shift") == 0
