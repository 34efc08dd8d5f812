"""Who may import what, who may print, and what `--help` costs."""

import ast
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.laws.sources import ROOT, imports, package_files, relative, syntax

GRAPHSURGEON = {"vitq_compiler/graph.py"}
TENSORS = {"vitq_compiler/tensors.py"}
CONVERSIONS = {"numpy_helper", "np_dtype_to_tensor_dtype", "tensor_dtype_to_np_dtype"}  # of onnx; older releases lack types
PRINTERS = {"vitq_compiler/cli.py", "vitq_compiler/__main__.py"}
OPTIONAL = {"huggingface_hub", "torch", "torchvision", "onnxscript", "timm"}  # must work when absent
SLOW = {"onnx", "onnxruntime", "onnx_graphsurgeon", "numpy", "scipy", "PIL"} | OPTIONAL
HELP_SECONDS = 0.5

FILES = list(package_files().values())
HELP = """
import json, runpy, sys
sys.argv = ["vitq-compile", "--help"]
try:
    runpy.run_module("vitq_compiler", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert stop.code in (0, None), stop.code
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


def roots(tree: ast.AST) -> set[str]:
    """The top-level packages a syntax tree imports."""
    return {module.partition(".")[0] for _, module, _ in imports(tree)}


def eager_roots(tree: ast.AST) -> set[str]:
    """The same, without what only a function or a type checker imports."""
    return {module.partition(".")[0] for _, module, _ in imports(tree, late=False, typing=False)}


def names(tree: ast.AST) -> set[str]:
    """Every name and attribute that a syntax tree reads or imports."""
    read = {
        node.attr if isinstance(node, ast.Attribute) else node.id for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)
    }
    return read | {name for _, _, name in imports(tree) if name}


def prints(tree: ast.AST) -> list[int]:
    """Lines that write to the terminal."""
    writers = {"print", "click.echo", "click.secho", "rich.print", "sys.stdout.write", "sys.stderr.write"}
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in writers]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_graphsurgeon_has_one_door(path: Path) -> None:
    assert "onnx_graphsurgeon" not in roots(syntax(path)) or relative(path) in GRAPHSURGEON


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_types_of_numbers_have_one_door(path: Path) -> None:
    assert names(syntax(path)) & CONVERSIONS == set() or relative(path) in TENSORS


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_the_command_line_prints(path: Path) -> None:
    assert prints(syntax(path)) == [] or relative(path) in PRINTERS


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_optional_libraries_are_imported_late(path: Path) -> None:
    assert eager_roots(syntax(path)) & OPTIONAL == set()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_are_absolute(path: Path) -> None:
    assert [line for line, module, _ in imports(syntax(path)) if module.startswith(".")] == []


def test_the_checks_see_violations() -> None:
    assert "onnx_graphsurgeon" in roots(ast.parse("def f():\n    import onnx_graphsurgeon.ir as gs"))
    assert eager_roots(ast.parse("try:\n    import torch\nexcept ImportError:\n    torch = None")) == {"torch"}
    assert eager_roots(ast.parse("def f():\n    import torch\nif TYPE_CHECKING:\n    import torch")) == set()
    assert names(ast.parse("from onnx import helper, numpy_helper as n\nhelper.x(a)")) == {"helper", "numpy_helper", "x", "a"}
    assert prints(ast.parse("def f():\n    print(1)\n    click.echo(2)")) == [2, 3]


def test_importing_the_package_loads_nothing_optional() -> None:
    code = "import json, sys, vitq_compiler; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True).stdout)
    assert "vitq_compiler" in loaded
    assert OPTIONAL & set(loaded) == set()


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, check=False, capture_output=True, text=True)
        seconds.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout
        assert SLOW & set(json.loads(done.stderr.splitlines()[-1])) == set()
    assert min(seconds) < HELP_SECONDS, f"user CPU seconds: {seconds}"
