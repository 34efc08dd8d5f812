"""What is installed is what is in the tree, under one name."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.laws.sources import PACKAGE, ROOT, package_data, relative

BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a wheel or an sdist with the build backend, offline."""
    out.mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD, f"build_{kind}", str(out)], cwd=source, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def installed_name(path: Path) -> str:
    """Where a file of the tree lies once installed."""
    name = relative(path)
    return f"{PACKAGE}/{name}" if name.startswith("passes/") else name


def contents(wheel: Path) -> set[str]:
    """The files of a wheel, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that the build leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("passes", PACKAGE):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def test_the_wheel_is_the_tree(source: Path, tmp_path: Path) -> None:
    found = contents(build("wheel", source, tmp_path / "wheel"))
    assert found == {installed_name(path) for path in package_data()}
    assert f"{PACKAGE}/py.typed" in found
    assert f"{PACKAGE}/passes/__init__.py" in found
    assert {name.partition("/")[0] for name in found} == {PACKAGE}


def test_the_sdist_builds_the_same_wheel(source: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", source, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("vitq_compiler-*")
    assert contents(build("wheel", unpacked, tmp_path / "wheel")) == {installed_name(path) for path in package_data()}


@pytest.mark.parametrize(("statement", "works"), [("import vitq_compiler.passes", True), ("import passes", False)])
def test_passes_have_one_name(statement: str, works: bool) -> None:
    done = subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.returncode == 0) == works, done.stderr
    if not works:
        assert "ImportError: this package is vitq_compiler.passes" in done.stderr


def test_the_link_leads_to_the_passes() -> None:
    link = ROOT / PACKAGE / "passes"
    if not link.is_symlink():
        pytest.skip("this checkout has no links; builds do not need it")
    assert link.readlink() == Path("../passes")
