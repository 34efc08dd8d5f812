"""Imports point downwards: a module may import what stands on its own line or below, never above.

Imports inside functions count. Imports for annotations only (``if TYPE_CHECKING:``) do not: a pass and the compilation it
is given name each other.
"""

import ast
import graphlib
from collections.abc import Iterable

import pytest

from tests.laws.sources import PACKAGE, imports, package_files, relative, syntax

# Top to bottom. A folder stands for all its files. "" is vitq_compiler/__init__.py.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("",),
    ("arguments", "check", "compiler", "diagnosis", "inspection", "terminal"),
    ("opening", "passes", "provenance", "sensitivity", "verdict"),
    ("annotations", "catalog", "explain", "plots", "preprocess_in_graph", "recipe", "repair", "report", "training", "validation", "verify"),
    ("prefix", "probing"),
    ("saturation",),
    ("blocks", "quantizers", "targets"),
    (
        "batching",
        "calibration",
        "clipping",
        "data",
        "implied_sizes",
        "lint",
        "moments",
        "qdq",
        "rounding",
        "sample_sizes",
        "sampling",
        "search",
        "target",
        "token_ids",
        "torch_graph",
        "views",
        "weight_scales",
    ),
    ("quantizer",),
    ("destination",),
    ("model_source",),
    ("hub",),
    ("branches", "builtin_images", "contrib", "model_io", "pipeline", "precision", "registry", "sizes", "statics"),
    ("runtime",),
    (
        "arrays",
        "augmentation",
        "cpu",
        "decompositions",
        "graph",
        "judge",
        "mending",
        "metrics",
        "opset",
        "orthogonal",
        "outliers",
        "pattern",
        "preprocess",
        "progress",
        "quant",
        "releases",
    ),
    ("dependencies", "model_folder", "processor_config", "tensors"),
    ("errors", "pairs", "recipes", "text"),
)
HEIGHT = {module: len(LAYERS) - row for row, layer in enumerate(LAYERS) for module in layer}


def place(module: str) -> str:
    """The entry of LAYERS a dotted module belongs to."""
    return module.removeprefix(PACKAGE).lstrip(".").partition(".")[0]


def own_imports(tree: ast.AST, modules: Iterable[str]) -> list[tuple[int, str]]:
    """The modules of the package that a syntax tree imports, with their lines."""
    known = set(modules)
    found = []
    for line, module, name in imports(tree, typing=False):
        if module == PACKAGE or module.startswith(f"{PACKAGE}."):
            full = f"{module}.{name}"
            found.append((line, full if full in known or place(full) in HEIGHT.keys() - {"", place(module)} else module))
    return found


def upward(module: str, tree: ast.AST, modules: Iterable[str]) -> list[str]:
    """The imports of a module that point up, as messages."""
    return [
        f"line {line}: {module} (layer {HEIGHT[place(module)]}) imports {target} (layer {HEIGHT[place(target)]})"
        for line, target in own_imports(tree, modules)
        if place(target) in HEIGHT and HEIGHT[place(target)] > HEIGHT[place(module)]
    ]


@pytest.mark.parametrize("module", package_files())
def test_every_module_has_a_layer(module: str) -> None:
    path = package_files()[module]
    assert place(module) in HEIGHT, f"{relative(path)} has no layer: add {place(module)!r} to LAYERS in tests/laws/test_layering.py"


@pytest.mark.parametrize("module", [module for module in package_files() if place(module) in HEIGHT])
def test_imports_point_downwards(module: str) -> None:
    assert upward(module, syntax(package_files()[module]), package_files()) == []


def test_no_import_cycles() -> None:
    files = package_files()
    edges = {module: {target for _, target in own_imports(syntax(path), files) if target != module} for module, path in files.items()}
    graphlib.TopologicalSorter(edges).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize(
    "statement",
    [
        "from vitq_compiler.passes.annotate import Annotate",
        "from vitq_compiler import cli",
        "from vitq_compiler import compile",
        "import vitq_compiler.compiler",
        "def f():\n    from vitq_compiler.blocks import mlp",
    ],
)
def test_an_upward_import_is_seen(statement: str) -> None:
    assert upward("vitq_compiler.graph", ast.parse(statement), package_files()) != []


@pytest.mark.parametrize(
    "statement",
    [
        "from vitq_compiler.errors import ModelError",
        "from vitq_compiler import errors",
        "import numpy",
        "if TYPE_CHECKING:\n    import vitq_compiler.cli",
    ],
)
def test_a_downward_import_is_not(statement: str) -> None:
    assert upward("vitq_compiler.graph", ast.parse(statement), package_files()) == []
