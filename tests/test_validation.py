"""The verdict of ONNX Runtime, on graphs whose answer is known."""

import numpy as np
import onnxruntime as ort
import pytest
from onnx import parser

from tests.builders import Feed
from vitq_compiler.report import OutputRow
from vitq_compiler.runtime import session
from vitq_compiler.validation import compare_outputs, kernels, outputs, time_pair

TEXT = """<ir_version: 10, opset_import: ["": 20]>
g (float[n, 4] x) => (float[n, 4] y, int64[n] ids) {{
    factor = Constant <value = float {{{factor}}}> ()
    y = Mul(x, factor)
    ids = ArgMax <axis = 1, keepdims = 0> (y)
}}"""


def batches() -> list[Feed]:
    random = np.random.default_rng(0)
    return [{"x": random.standard_normal((n, 4)).astype(np.float32)} for n in (3, 5)]


def compared(one: ort.InferenceSession, other: ort.InferenceSession, classes: frozenset[str]) -> tuple[OutputRow, ...]:
    return compare_outputs(["y", "ids"], outputs(one, batches()), outputs(other, batches()), classes)


def test_outputs_are_compared_over_all_batches() -> None:
    one, scaled = (session(parser.parse_model(TEXT.format(factor=f))) for f in ("1.0", "0.9"))
    y, ids = compared(one, scaled, frozenset({"y"}))
    assert (y.name, y.agreement, ids.agreement) == ("y", 1.0, 1.0)
    assert y.sqnr_db == pytest.approx(20.0, abs=1e-3)
    assert y.cosine == pytest.approx(1.0)
    assert np.isnan(ids.sqnr_db)


def test_features_have_no_agreement_and_opposite_logits_have_none_in_common() -> None:
    one, negated = (session(parser.parse_model(TEXT.format(factor=f))) for f in ("1.0", "-1.0"))
    assert compared(one, negated, frozenset())[0].agreement is None
    assert compared(one, negated, frozenset({"y"}))[0].agreement == 0.0


def test_outputs_of_single_pictures_are_rows() -> None:
    parts = [[np.array([[1.0, 2.0]]), np.ones((2, n, 1), np.float32)] for n in (3, 4)]
    other = [[np.array([[3.0, 2.0]]), part[1]] for part in parts]
    logits, dense = compare_outputs(["logits", "dense"], parts, other, frozenset({"logits"}), batched=False)
    assert (logits.agreement, dense.agreement, dense.sqnr_db) == (0.0, None, np.inf)


def test_outputs_that_never_vary_are_found() -> None:
    still, moving = np.ones((3, 2), np.float32), np.arange(6, dtype=np.float32).reshape(3, 2)
    rows = compare_outputs(["still", "moving"], [[still, moving]], [[still, moving]], frozenset())
    assert [row.varies for row in rows] == [False, True]


def test_timing_is_paired() -> None:
    one, other = (session(parser.parse_model(TEXT.format(factor="1.0")), threads=1) for _ in range(2))
    row = time_pair(one, other, batches()[0], 1, 3)
    assert (row.threads, row.batch) == (1, 3)
    assert row.float_ms > 0
    assert 0.2 < row.ratio < 5


def test_kernels_are_found_by_the_weight_they_read() -> None:
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20]>
        g (float[n, 2] x) => (float[n, 2] y, float[n, 2] z)
        <float[2, 2] w = {1, 0, 0, 1}, int8[2, 2] q = {1, 0, 0, 1}, float s = {0.5}, int8 o = {0}> {
            y = MatMul(x, w)
            d = DequantizeLinear(q, s, o)
            z = Gemm(x, d)
        }"""
    )
    assert kernels(model)["w"] == "MatMul"
    assert kernels(model)["q"] == "Gemm"
