"""clip-ranges: narrower ranges, never wider ones, and less error of the tensor."""

import numpy as np
import pytest

from tests.builders import Sizes, compilation, run_passes, vit
from vitq_compiler.graph import value
from vitq_compiler.passes.clip_ranges import ClipRanges, by_channel
from vitq_compiler.progress import silent
from vitq_compiler.quant import QuantSpec, fake_quantize, from_range
from vitq_compiler.recipe import load_recipe
from vitq_compiler.sampling import sample_rows

SPEC = QuantSpec(4)


def heavy(rows: int = 4000) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((rows, 3)).astype(np.float32) * np.array([1, 5, 0.1], np.float32)
    x[0] *= 40  # an outlier in every channel
    return x


@pytest.mark.parametrize("by", ["percentile", "mse"])
def test_an_outlier_loses_its_say(by: str) -> None:
    x = heavy()
    low, high = ClipRanges(by=by)._by_tensor(x, SPEC)
    narrow, wide = from_range(low, high, SPEC), from_range(x.min(), x.max(), SPEC)
    assert x.min() < low < 0 < high < x.max()
    assert np.square(fake_quantize(x[1:], narrow) - x[1:]).mean() < 0.5 * np.square(fake_quantize(x[1:], wide) - x[1:]).mean()


def test_each_channel_has_its_own_range() -> None:
    x = heavy()
    low, high = by_channel(x, SPEC)
    assert low.shape == high.shape == (3,)
    width = high - low
    assert width[2] < width[0] < width[1]
    np.testing.assert_allclose(low[:1], by_channel(x[:, :1], SPEC)[0], err_msg="channels do not see each other")


@pytest.mark.parametrize(
    "clip", [ClipRanges(), ClipRanges(by="mse"), ClipRanges(channels=True), ClipRanges(channels=True, learned=True)], ids=str
)
def test_ranges_only_shrink(clip: ClipRanges) -> None:
    c = compilation(vit(Sizes(depth=1)), recipe=load_recipe("repq-vit"))
    run_passes(c, "canonicalize,recover-layernorm,recover-gelu,separate-linears,annotate,calibrate")
    before = dict(c.table.statistics)
    assert clip.run(c) > 0
    for name, seen in c.table.statistics.items():
        assert (seen.low >= before[name].low).all()
        assert (seen.high <= before[name].high).all()
        np.testing.assert_array_equal(seen.mean, before[name].mean)


@pytest.mark.parametrize("options", [{"by": "entropy"}, {"rows": 0}, {"learned": True}])
def test_options_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        ClipRanges(**options)  # type: ignore[arg-type]


def test_learned_ranges_serve_the_layers_that_read_them() -> None:
    """Of a channel that no Linear listens to the range is free; the others are quantized with less error of the output."""
    errors = {}
    for learned in (False, True):
        c = compilation(vit(Sizes(depth=1)), recipe=load_recipe("repquant"))
        run_passes(c, "canonicalize,recover-layernorm,recover-gelu,separate-linears,annotate,calibrate")
        linear = next(linear for linear in c.annotations.linears if linear.role == "fc1")
        rows = sample_rows(c.graph, [linear.input.name], c.data.calibration(), 6, rows=1024, threads=1, progress=silent)[linear.input.name]
        ClipRanges(channels=True, learned=learned).run(c)
        seen = c.table.statistics[linear.input.name]
        params = from_range(seen.low, seen.high, SPEC, axis=1)
        errors[learned] = float(np.square((fake_quantize(rows, params) - rows) @ value(linear.weight)).sum())
    assert errors[True] < errors[False]
