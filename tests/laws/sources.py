"""How the laws read the repository: files, syntax trees, imports. Nothing of the package is imported."""

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "vitq_compiler"


def package_files() -> dict[str, Path]:
    """Python files of the package by dotted module name; passes/ under the name it is imported by."""
    files: dict[str, Path] = {}
    for folder, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / "passes", f"{PACKAGE}.passes")):
        for path in _walk(folder):
            if path.suffix == ".py":
                parts = path.relative_to(folder).with_suffix("").parts
                files[".".join([prefix, *(part for part in parts if part != "__init__")])] = path
    return files


def python_files() -> list[Path]:
    """Every Python file of the project."""
    folders = ("benchmarks", "models", "passes", "tests", PACKAGE)
    return [path for folder in folders for path in _walk(ROOT / folder) if path.suffix == ".py"]


def package_data() -> list[Path]:
    """Every file below the package and passes/ that git does not ignore by its kind."""
    return [*_walk(ROOT / PACKAGE), *_walk(ROOT / "passes")]


@cache
def git_files() -> list[Path]:
    """Every file git tracks or would track; skips the test outside a checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listing.decode().split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


@cache
def syntax(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.AST, *, late: bool = True, typing: bool = True) -> Iterator[tuple[int, str, str | None]]:
    """Every import as (line, module, name); ``import a.b`` has no name.

    Args:
        tree: what to search.
        late: also what a function imports when it is called.
        typing: also what only a type checker imports.
    """
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, module, alias.name) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.body * typing + node.orelse
        elif late or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)


def relative(path: Path) -> str:
    """The path as it is written in messages."""
    return path.relative_to(ROOT).as_posix()


def _walk(folder: Path) -> list[Path]:
    """Files below a folder, sorted; links are not followed, caches are left out."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_symlink() or path.name == "__pycache__" or path.name.startswith("."):
            continue
        found += _walk(path) if path.is_dir() else [path]
    return found
