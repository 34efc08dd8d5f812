"""The environments that the project names: lowest versions, those of the tests, and what runs only beside the extras."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.laws.sources import ROOT, python_files, relative, syntax
from vitq_compiler.dependencies import release

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Package of an extra -> the marker of the tests that need it.
MARKERS = {"torch": "torch", "onnxscript": "torch", "transformers": "torch", "huggingface_hub": "hub", "matplotlib": "plots"}
TESTS = [path for path in python_files() if relative(path).startswith("tests/")]


def normal(name: str) -> str:
    """The name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    """The exact versions of a constraints file, by package."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines) if version}


def bounds(requirements: list[str]) -> dict[str, str]:
    """The lowest version of each requirement, by package; every one has just that."""
    found = [re.fullmatch(r"([\w.-]+)>=([\d.]+)", text) for text in requirements]
    assert all(found), requirements
    return {normal(match[1]): match[2] for match in found if match}


def test_the_oldest_environment_has_the_lowest_versions_that_are_declared() -> None:
    declared, oldest = bounds(PROJECT["dependencies"]), pins("constraints-oldest.txt")
    assert {name: oldest.get(name) for name in declared} == declared


@pytest.mark.parametrize("extra", [None, *PROJECT["optional-dependencies"]])
def test_the_tests_run_with_versions_that_are_declared(extra: str | None) -> None:
    declared = bounds(PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"])
    pinned = pins("constraints.txt")
    assert {name for name, least in declared.items() if name not in pinned or release(pinned[name]) < release(least)} == set()


def unmarked(tree: ast.Module, markers: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Each place that imports a package of an extra, or skips for want of it, without the mark of that extra: its line, and the package."""
    of_file = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
    for top in tree.body:
        marks = [*of_file, *map(ast.unparse, top.decorator_list)] if isinstance(top, ast.FunctionDef) else of_file
        for node in ast.walk(top):
            match node:
                case ast.Call(func=ast.Attribute(attr="importorskip" | "find_spec"), args=[ast.Constant(value=str(name)), *_]):
                    names = [name]
                case ast.Import(names=aliases):
                    names = [alias.name for alias in aliases]
                case ast.ImportFrom(module=str(name)):
                    names = [name]
                case _:
                    continue
            for package in {name.partition(".")[0] for name in names} & markers.keys():
                if not any(f"mark.{markers[package]}" in mark for mark in marks):
                    yield node.lineno, package


def test_every_package_of_an_extra_has_a_marker() -> None:
    extras = [requirements for extra, requirements in PROJECT["optional-dependencies"].items() if extra != "dev"]
    assert {normal(name) for name in MARKERS} == {name for requirements in extras for name in bounds(requirements)}


@pytest.mark.parametrize("path", TESTS, ids=relative)
def test_what_needs_an_extra_is_marked(path: Path) -> None:
    """So that `make test-torch` runs it."""
    assert list(unmarked(syntax(path), MARKERS)) == []


def test_the_check_sees_violations() -> None:
    text = (
        "def test_a():\n    pytest.importorskip('torch.nn')\n@pytest.mark.torch\ndef test_b():\n    import torch, matplotlib\nimport numpy"
    )
    markers = {"torch": "torch", "matplotlib": "plots"}
    assert list(unmarked(ast.parse(text), markers)) == [(2, "torch"), (5, "matplotlib")]
    assert list(unmarked(ast.parse("pytestmark = [pytest.mark.torch]\nimport torch"), markers)) == []
