"""Names and sizes: what a file is called says what is in it, and it fits in the head."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from tests.laws.sources import package_files, python_files, relative, syntax
from vitq_compiler import registry

KINDS = sorted({module.split(".")[1] for module in package_files() if module.count(".") == 2})
NAMED = [kind for kind in KINDS if kind not in ("blocks", "lint", "training")]  # what recipes and the command line call by name
MAX_LINES = 600
NAMELESS = {"common", "helpers", "misc", "util", "utils"}
SYNONYMS = {"bw", "bitwidth", "bit_width", "ch_axis", "encodings", "qscheme", "zp"}  # zero_point, bits, axis, QuantParams, symmetric
REGISTERED = [(kind, name) for kind in NAMED for name in registry.names(kind)]


def undocumented(tree: ast.Module) -> list[str]:
    """Public functions and classes of a module that have no docstring."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node)]


def identifiers(tree: ast.AST) -> set[str]:
    """Every name a syntax tree binds or reads."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                found.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
    return found


def test_kinds_are_packages() -> None:
    assert {"blocks", "passes", "targets"} <= set(KINDS)
    assert [kind for kind in KINDS if f"vitq_compiler.{kind}" not in package_files()] == [], "no __init__.py"


@pytest.mark.parametrize(("kind", "name"), REGISTERED)
def test_file_class_and_name_are_one(kind: str, name: str) -> None:
    found = registry.load(kind, name)
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name)
    assert isinstance(found, type)
    assert found.__name__ == registry.class_name(name)
    assert found.__module__ == f"vitq_compiler.{kind}.{name.replace('-', '_')}"
    assert found.name == name
    assert importlib.import_module(found.__module__).__doc__


@pytest.mark.parametrize("name", registry.names("passes"))
def test_a_pass_says_what_it_rewrites(name: str) -> None:
    first, *_ = (registry.load("passes", name).__doc__ or "").strip().splitlines() or [""]
    assert "->" in first, f'the docstring of {name} starts with "before -> after", not {first!r}'


@pytest.mark.parametrize("path", python_files(), ids=relative)
def test_files_are_small_and_named(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    assert path.stem not in NAMELESS


@pytest.mark.parametrize("path", package_files().values(), ids=relative)
def test_public_things_are_documented(path: Path) -> None:
    assert ast.get_docstring(syntax(path)), "no module docstring"
    assert undocumented(syntax(path)) == []


@pytest.mark.parametrize("path", package_files().values(), ids=relative)
def test_one_word_per_thing(path: Path) -> None:
    assert identifiers(syntax(path)) & SYNONYMS == set()


def test_the_checks_see_violations() -> None:
    assert undocumented(ast.parse("def f(): ...\ndef _g(): ...\nclass C: ...\ndef h():\n    'x'")) == ["f", "C"]
    assert identifiers(ast.parse("def f(zp): return f(x.qscheme, bw=1)")) & SYNONYMS == {"zp", "qscheme", "bw"}
