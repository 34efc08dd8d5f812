"""round-with-feedback: codes on the grid and within limits, less error than the nearest ones, in any number of layers at a time."""

import numpy as np
import pytest

from tests.builders import compilation, find_pass, run_passes, vit
from tests.passes.test_compensate_weights import prepared, quality
from vitq_compiler.errors import RecipeError
from vitq_compiler.graph import value
from vitq_compiler.passes import round_with_feedback
from vitq_compiler.passes.round_with_feedback import GROUP
from vitq_compiler.pipeline import Compilation
from vitq_compiler.quant import Edge, quantize
from vitq_compiler.repair import repairable
from vitq_compiler.targets.onnxruntime import Onnxruntime

FRONT = "canonicalize,recover-gelu,separate-linears,annotate,linearize-patch-embedding,calibrate,compute-qparams"


def rounded(cpu: str = "any") -> Compilation:
    c = compilation(vit(), target=Onnxruntime(cpu=cpu))
    run_passes(c, f"{FRONT},round-with-feedback")
    return c


@pytest.mark.parametrize("cpu", ["any", "vnni"])
def test_codes_lie_on_the_grid_and_within_the_limit(cpu: str) -> None:
    c, moved = rounded(cpu), 0
    for linear in repairable(c):
        edge = Edge(linear.name, 1)
        params, codes = c.params[edge], c.rounding[edge]
        assert codes.shape == value(linear.weight).shape
        assert codes.dtype == np.int8
        assert codes.min() >= params.quant_min
        assert codes.max() <= params.quant_max
        assert (params.pairs is None) == (cpu == "vnni")
        assert params.pairs is None or params.pairs.violations(codes) == 0
        moved += int((codes != quantize(value(linear.weight), params)).sum())
    assert moved > 0


def test_it_helps_on_unseen_samples() -> None:
    c, nearest = prepared("w3a8"), prepared("w3a8")
    find_pass("round-with-feedback")().run(c)
    assert quality(c) > quality(nearest) + 0.5


def test_how_many_layers_go_together_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    together = rounded().rounding
    monkeypatch.setattr(round_with_feedback, "BYTES", 1)
    alone = rounded().rounding
    assert together.keys() == alone.keys()
    for edge, codes in together.items():
        np.testing.assert_array_equal(codes, alone[edge])


def test_groups_are_filled_with_zeros() -> None:
    rows = np.arange(2 * (GROUP + 3), dtype=np.float32).reshape(GROUP + 3, 2)
    groups = round_with_feedback._groups(rows)
    assert groups.shape == (2, GROUP, 2)
    np.testing.assert_array_equal(groups.reshape(-1, 2)[: len(rows)], rows)
    assert not groups.reshape(-1, 2)[len(rows) :].any()


def test_options_that_make_no_sense_are_refused() -> None:
    for text in ("rows=0", "damping=0"):
        with pytest.raises(RecipeError, match="rows must be at least 1 and damping positive"):
            run_passes(compilation(vit()), f"{FRONT},round-with-feedback{{{text}}}")
