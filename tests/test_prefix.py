"""The walk: both graphs stage by stage give what each gives as a whole, and what is changed on the way is seen later."""

from pathlib import Path

import numpy as np
import pytest

from tests.builders import DIALECTS, Dialect, Sizes, compilation, feed_of, run_model, run_passes, vit
from vitq_compiler import runtime
from vitq_compiler.graph import Graph, value
from vitq_compiler.pipeline import Compilation
from vitq_compiler.prefix import Stage, Store, merge, stages, walk

FRONT = "canonicalize,recover-layernorm,recover-gelu,separate-linears,annotate"


def prepared(dialect: Dialect = DIALECTS["timm"], depth: int = 2) -> Compilation:
    c = compilation(vit(Sizes(depth=depth), dialect))
    run_passes(c, FRONT)
    return c


@pytest.mark.parametrize("dialect", DIALECTS)
def test_stages_partition_the_layers_in_order(dialect: str) -> None:
    c = prepared(DIALECTS[dialect])
    cut = stages(c.graph, c.annotations.linears)
    groups = [[linear.role for linear in stage.linears] for stage in cut]
    block = [["qkv"] * len(c.annotations.attentions[0].linears), ["proj"], ["fc1"], ["fc2"]]
    assert groups == [[], *block, *block, ["head"]]
    assert cut[0].sources == ("image",)
    assert cut[-1].results == ("logits",)
    for stage in cut:
        assert {linear.input.name for linear in stage.linears} <= set(stage.sources)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("on_disk", [False, True])
def test_inputs_are_those_of_the_whole_graph(dialect: str, on_disk: bool, tmp_path: Path) -> None:
    c = prepared(DIALECTS[dialect])
    linears = c.annotations.linears
    feeds = [feed_of(c.graph, seed=s) for s in (1, 2)]
    expected = runtime.probe(c.graph, [linear.input.name for linear in linears], feeds, threads=1)
    seen = 0
    work_dir = tmp_path / "work" if on_disk else None
    for stage, inputs in walk(c.graph, stages(c.graph, linears), feeds, lambda s: whole(c.graph, s), threads=1, work_dir=work_dir):
        for linear in stage.linears:
            for (x, other), values in zip(inputs.pairs(linear.input.name), expected, strict=True):
                np.testing.assert_allclose(x, values[linear.input.name], rtol=1e-5, atol=1e-6)
                np.testing.assert_array_equal(x, other)
            seen += 1
    assert seen == len(linears)
    assert work_dir is None or list(work_dir.iterdir()) == []


@pytest.mark.parametrize("sizes", [(10,), (4, 4, 2), (3, 7), (1,) * 10, (8, 2)])
def test_parts_do_not_depend_on_batches(sizes: tuple[int, ...]) -> None:
    c = prepared(depth=1)
    every = np.random.default_rng(0).standard_normal((10, 3, 8, 8)).astype(np.float32)
    feeds = [{"image": part} for part in np.split(every, np.cumsum(sizes)[:-1])]
    name = c.annotations.linears[0].input.name
    expected = runtime.probe(c.graph, [name], [{"image": every}], threads=1)[0][name]
    _, inputs = next(walk(c.graph, stages(c.graph, c.annotations.linears), feeds, lambda s: whole(c.graph, s), threads=1))
    parts = [x.reshape(-1, x.shape[-1]) for x, _ in inputs.parts(name, 8)]
    rows = expected.reshape(-1, expected.shape[-1])
    assert [len(part) for part in parts] == [8 * len(rows) // 10, 2 * len(rows) // 10]
    np.testing.assert_allclose(np.concatenate(parts), rows, rtol=1e-5, atol=1e-6)
    assert (inputs.count, inputs.samples) == (len(sizes), sizes)


def whole(graph: Graph, stage: Stage) -> Graph:
    return graph.part(stage.sources, stage.results)


def test_later_layers_see_what_earlier_ones_have_become() -> None:
    c = prepared()
    floating, feed = c.graph.snapshot(), feed_of(c.graph)
    fc1 = next(linear for linear in c.annotations.linears if linear.role == "fc1")
    for stage, inputs in walk(floating, stages(c.graph, c.annotations.linears), [feed], lambda s: whole(c.graph, s), threads=1):
        if any(linear is fc1 for linear in stage.linears):
            fc1.weight.values = value(fc1.weight) * 0
        elif fc1.weight is not None and any(linear.role == "fc2" for linear in stage.linears):
            ((x, other),) = inputs.pairs(stage.linears[0].input.name)
            assert np.ptp(x, axis=1).max() > 0.1
            assert np.ptp(other, axis=1).max() < 1e-6, "every token is the activation of the bias"
            break


def test_a_part_of_a_graph_computes_what_it_did_there() -> None:
    c = prepared()
    feed = feed_of(c.graph)
    first, last = c.annotations.mlps[0].fc1.input.name, c.annotations.mlps[1].fc2.output.name
    cut = stages(c.graph, c.annotations.linears)
    rest = merge(cut, next(i for i, stage in enumerate(cut) if first in stage.sources), len(cut))
    assert rest.results == ("logits",)
    values = runtime.probe(c.graph, [*rest.sources, last], [feed])[0]
    part = c.graph.part(rest.sources, [last, first])
    assert part.output_names[0] == last
    outputs = run_model(part, {name: values[name] for name in rest.sources})
    np.testing.assert_allclose(outputs[0], values[last], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(outputs[1], values[first])
    assert len(run_model(c.graph, feed)) == 1, "the graph itself is as it was"


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_store_keeps_and_drops(on_disk: bool, tmp_path: Path) -> None:
    store = Store(tmp_path if on_disk else None)
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    store.put("a/b:0", 0, array)
    np.testing.assert_array_equal(store.get("a/b:0", 0), array)
    store.drop("a/b:0", 1)
    with pytest.raises(KeyError):
        store.get("a/b:0", 0)
    assert list(tmp_path.iterdir()) == []
