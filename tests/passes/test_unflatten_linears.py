"""unflatten-linears: graphs as optimizers leave them, and what must stay on rows."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.builders import DIALECTS, Dialect, Sizes, changes_of, compilation, difference, feed_of, graph_of, ops, run_model, vit
from vitq_compiler.compiler import compile
from vitq_compiler.graph import Graph
from vitq_compiler.pipeline import Compilation

WEIGHTS = {
    "rows": np.array([-1, 4]),
    "wide_rows": np.array([-1, 8]),
    "three": np.array([-1, 3, 8]),
    "heads": np.array([-1, 3, 2, 4]),
    "flat": np.array([-1, 12]),
    "w": np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32),
    "v": np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32),
    "u": np.random.default_rng(2).standard_normal((12, 8)).astype(np.float32),
    "c": np.arange(8, dtype=np.float32),
    "matrix": np.ones((6, 8), np.float32),
}


def moved(text: str) -> tuple[Compilation, int]:
    """The result and the number of changes; outputs are kept and a second run does nothing."""
    c = compilation(graph_of(f"g (float[B, 3, 4] x) => (float y) {{ {text} }}", **WEIGHTS))
    c.graph.infer_shapes()
    feed = feed_of(c.graph)
    before = run_model(c.graph, feed)
    changes = changes_of(c, "unflatten-linears")
    assert difference(before, run_model(c.graph, feed)) <= 1e-6
    assert changes_of(c, "unflatten-linears") == 0
    return c, changes


def test_a_linear_between_reshapes() -> None:
    c, changes = moved("r = Reshape(x, rows) m = MatMul(r, w) a = Add(m, c) t = Reshape(a, three) y = Relu(t)")
    assert changes == 2
    assert ops(c.graph) == ["MatMul", "Add", "Relu"]
    assert list(c.graph.tensor("a").shape) == ["B", 3, 8]


def test_reshapes_merged_with_those_of_heads() -> None:
    c, _ = moved("r = Reshape(x, rows) m = MatMul(r, w) h = Reshape(m, heads) y = Transpose <perm = [0, 2, 1, 3]> (h)")
    assert ops(c.graph) == ["MatMul", "Reshape", "Transpose"]
    c, _ = moved(
        "e = MatMul(x, w) h = Reshape(e, heads) t = Transpose <perm = [0, 2, 1, 3]> (h) s = Transpose <perm = [0, 2, 1, 3]> (t) "
        "r = Reshape(s, wide_rows) m = MatMul(r, v) y = Reshape(m, three)"
    )
    assert [list(n.outputs[0].shape)[1:] for n in c.graph.find("MatMul")] == [[3, 8], [3, 8]]


def test_everything_between_two_linears() -> None:
    c, changes = moved(
        "r = Reshape(x, rows) m = MatMul(r, w) b = Add(m, c) a = Gelu(b) n = MatMul(a, v) s = Add(n, b) y = Reshape(s, three)"
    )
    assert changes == 5
    assert ops(c.graph) == ["MatMul", "Add", "Gelu", "MatMul", "Add", "Reshape"]


@pytest.mark.parametrize(
    "text",
    [
        "r = Reshape(x, flat) y = MatMul(r, u)",
        "r = Reshape(x, rows) s = Softmax <axis = 0> (r) y = MatMul(s, w)",
        "m = MatMul(x, w) y = Reshape(m, wide_rows)",
    ],
    ids=["one row a sample", "not row by row", "nothing behind it"],
)
def test_what_stays(text: str) -> None:
    assert moved(text)[1] == 0


def test_a_matrix_added_to_rows_stays() -> None:
    c, changes = moved("r = Reshape(x, rows) m = MatMul(r, w) y = Add(m, matrix)")
    assert changes == 1
    assert ops(c.graph) == ["MatMul", "Reshape", "Add"]


def as_optimizers_do(model: onnx.ModelProto) -> Graph:
    """Every MatMul and Add with constants on rows as a Gemm between Reshapes, which are merged with those around it."""
    c = compilation(model)
    for name in ("canonicalize", "recover-layernorm", "recover-gelu", "separate-linears"):
        changes_of(c, name)
    graph = c.graph
    graph.infer_shapes()
    for node in graph.find("MatMul"):
        add = node.outputs[0].outputs[0]
        shape = list(node.inputs[0].shape)
        if add.op != "Add" or len(shape) != 3 or node.inputs[1].inputs:
            continue
        rows = graph.add("Reshape", [node.inputs[0], graph.constant("rows", np.array([-1, shape[-1]]))], name="rows")
        product = graph.add("Gemm", [rows, node.inputs[1], add.inputs[1]], name="gemm")
        width = add.outputs[0].shape[-1]
        back = graph.insert(
            "Reshape", [product, graph.constant("back", np.array([-1, *shape[1:-1], width]))], name="back", like=add.outputs[0]
        )
        graph.replace(add.outputs[0], back)
    for node in graph.clean().find("Reshape"):
        inner = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
        if inner is not None and inner.op == "Reshape":
            node.inputs[0] = inner.inputs[0]
    return graph.clean()


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_whole_models_compile(dialect: Dialect, tmp_path: Path) -> None:
    graph = as_optimizers_do(vit(Sizes(image=16, width=32, heads=2, hidden=64), dialect))
    assert len(graph.find("Gemm")) >= 8
    assert_compiled(graph.to_proto(), tmp_path)


def assert_compiled(model: onnx.ModelProto, folder: Path) -> None:
    onnx.save(model, folder / "vit.onnx")
    report = compile(folder / "vit.onnx", None, samples=8, threads=1)
    assert {row.role for row in report.linears if not row.integer} == {"head"}
    assert len({row.block for row in report.linears if row.block}) == 4
    assert report.validation.outputs[0].sqnr_db > 25


@pytest.mark.parametrize("fixed", [False, True], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("name", ["timm", "huggingface", "dynamo"])
@pytest.mark.parametrize("tool", ["onnxsim", "onnxslim"])
def test_models_of_simplifiers_compile(tool: str, name: str, fixed: bool, tmp_path: Path) -> None:
    """As they are installed; the tests above do without."""
    simplifier = pytest.importorskip(tool)
    model = vit(Sizes(image=16, width=32, heads=2, hidden=64), DIALECTS[name])
    if tool == "onnxsim":
        simplified, _ = simplifier.simplify(model, overwrite_input_shapes={"image": [2, 3, 16, 16]} if fixed else None)
    else:
        onnx.save(model, tmp_path / "in.onnx")
        simplified = simplifier.slim(str(tmp_path / "in.onnx"), input_shapes=["image:2,3,16,16"] if fixed else None)
    assert_compiled(simplified, tmp_path)
