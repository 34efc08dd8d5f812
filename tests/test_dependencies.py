"""What is installed against what is declared: one line for who has less, in the command and in Python."""

from importlib import metadata

import pytest

import vitq_compiler
from tests.e2e.command import run
from vitq_compiler.dependencies import PACKAGE, check_dependencies, release
from vitq_compiler.errors import InstallError


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions to pretend, by package; an empty one is missing. Three are declared, and one of an extra."""
    pretended: dict[str, str] = {}
    real = metadata.version

    def version(name: str) -> str:
        if pretended.get(name, "real") == "":
            raise metadata.PackageNotFoundError(name)
        return pretended.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    declared = ["numpy>=1.26", "onnx>=1.16.0", "onnxruntime >= 1.18", 'pytest>=9999; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    return pretended


def test_what_the_tests_run_with_is_new_enough() -> None:
    check_dependencies()


def test_one_line_for_who_has_less(installed: dict[str, str]) -> None:
    installed |= {"onnxruntime": "1.9.1", "onnx": "1.15.0"}
    with pytest.raises(InstallError) as caught:
        _ = vitq_compiler.compile
    message = str(caught.value)
    assert "onnx 1.15.0 is older than 1.16.0, onnxruntime 1.9.1 is older than 1.18, the oldest" in message
    assert message.endswith('pip install "onnx>=1.16.0" "onnxruntime>=1.18"')
    result = run("model.onnx")
    assert (result.exit_code, result.stderr) == (2, f"vitq-compile: error: {message}\n")
    assert run("--help").exit_code == 0


def test_a_development_version_and_a_package_of_another_name_pass(installed: dict[str, str]) -> None:
    installed |= {"onnx": "1.16.dev20260101", "onnxruntime": ""}
    check_dependencies()


@pytest.mark.parametrize(("runtime", "numpy", "fits"), [("1.18.1", "1.26.4", True), ("1.18.1", "2.0.0", False), ("1.19.0", "2.4.6", True)])
def test_an_onnxruntime_of_numpy_1(runtime: str, numpy: str, fits: bool, installed: dict[str, str]) -> None:
    installed |= {"onnxruntime": runtime, "numpy": numpy}
    if fits:
        check_dependencies()
    else:
        with pytest.raises(InstallError, match=r'^onnxruntime 1\.18\.1 is built for numpy 1 .* beside 2\.0\.0: .* "numpy<2"'):
            check_dependencies()


def test_files_without_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    with pytest.raises(InstallError, match=rf"^{PACKAGE} is not installed, only its files are here: run `pip install \.`"):
        check_dependencies()


def test_versions_compare_by_number() -> None:
    found = sorted(["10", "1.0.1", "2.0.0", "1.10", "1", "0.9", "1.2rc1"], key=release)
    assert found == ["0.9", "1", "1.0.1", "1.2rc1", "1.10", "2.0.0", "10"]
    assert [release(v) for v in ("8.1", "8.1.0", "10.0.0", "1.32.0.dev1", "")] == [(8, 1), (8, 1), (10,), (1, 32), ()]
