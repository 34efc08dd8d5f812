"""The file name is the registry: listing imports nothing, loading imports one module, a typo gets a suggestion."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.laws.sources import ROOT
from vitq_compiler import registry
from vitq_compiler.errors import RecipeError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of another distribution, with two quantizers; one cannot be imported."""
    folder = tmp_path / "acme" / "quantizers"
    folder.mkdir(parents=True)
    for name, text in {
        "__init__": "",
        "shifted_log": "class ShiftedLog: ...",
        "log2": "raise RuntimeError('imported')",
        "_shared": "raise RuntimeError('imported')",
    }.items():
        (folder / f"{name}.py").write_text(text)
    (folder.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "acme"]:
        monkeypatch.delitem(sys.modules, name)
    return "acme.quantizers"


def test_names_are_the_files(package: str) -> None:
    assert registry.names(package) == ("log2", "shifted-log")


def test_load_imports_only_what_is_asked(package: str) -> None:
    assert registry.load(package, "shifted-log").__name__ == "ShiftedLog"
    with pytest.raises(RuntimeError, match="imported"):
        registry.load(package, "log2")


@pytest.mark.parametrize("name", ["shifted_log", "ShiftedLog", "shiftd-log"])
def test_a_typo_gets_a_suggestion(package: str, name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        registry.load(package, name)
    message = str(caught.value)
    assert "\n" not in message
    assert f'no "{name}" in quantizers' in message
    assert 'did you mean "shifted-log"?' in message
    assert "--list-quantizers" in message


def test_a_wild_name_gets_the_list(package: str) -> None:
    with pytest.raises(RecipeError, match=r'no "\.\./x" in quantizers; `vitq-compile --list-quantizers`'):
        registry.load(package, "../x")


def test_no_package() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"vitq_compiler\.nowhere"):
        registry.names("nowhere")


@pytest.mark.parametrize(
    ("name", "expected"), [("insert-qdq", "InsertQdq"), ("log2", "Log2"), ("affine", "Affine"), ("add-low-rank", "AddLowRank")]
)
def test_class_name(name: str, expected: str) -> None:
    assert registry.class_name(name) == expected


@pytest.mark.parametrize("kind", ["passes", "targets"])
def test_messages_name_flags_that_exist(kind: str) -> None:
    done = subprocess.run([sys.executable, "-m", "vitq_compiler", "--help"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert f"--list-{kind}" in done.stdout
