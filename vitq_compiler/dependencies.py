"""The packages that the compiler is built on: whether each is as new as the compiler's own metadata asks."""

from __future__ import annotations

import re
from importlib import metadata

from vitq_compiler.errors import InstallError

PACKAGE = "vitq-compiler"
BOUND = re.compile(r"([\w.-]+) *>= *([\d.]+)")  # a requirement of pyproject.toml; those of extras have a condition behind it
NUMPY_2 = "1.19"  # the first onnxruntime that is built for numpy 2; none says so in its metadata


def check_dependencies() -> None:
    """Refuse packages that are older than declared, or of which one is not built for another.

    One that is installed under another name, as onnxruntime-gpu provides onnxruntime, is left to its user.

    Raises:
        InstallError: a package is too old or does not load beside another, or the compiler itself is not installed.
    """
    try:
        requirements = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise InstallError(f"{PACKAGE} is not installed, only its files are here: run `pip install .` beside its pyproject.toml") from None
    bounds = [match.groups() for requirement in requirements if (match := BOUND.fullmatch(requirement))]
    installed = {name: version for name, _ in bounds if (version := _installed(name))}
    old = [(name, least) for name, least in bounds if name in installed and release(installed[name]) < release(least)]
    if old:
        told = ", ".join(f"{name} {installed[name]} is older than {least}" for name, least in old)
        wanted = " ".join(f'"{name}>={least}"' for name, least in old)
        raise InstallError(f"{told}, the oldest that works here: pip install {wanted}")
    runtime, numpy = installed.get("onnxruntime", NUMPY_2), installed.get("numpy", "1")
    if release(runtime) < release(NUMPY_2) and release(numpy) >= (2,):
        remedy = f'pip install "numpy<2" or "onnxruntime>={NUMPY_2}"'
        raise InstallError(f"onnxruntime {runtime} is built for numpy 1 and does not load beside {numpy}: {remedy}")


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version such as 1.20.1, without zeros at the end, in the order of versions."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, re.sub(r"(\.0+)+$", "", numbers[0]).split("."))) if numbers else ()


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
