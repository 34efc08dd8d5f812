"""--validate-provider: what is handed to the runtime, and one line where the runtime was built without it."""

from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from tests.e2e.command import FAST, contents, run, write_vit
from vitq_compiler import runtime
from vitq_compiler.errors import TargetError

RTX = "NvTensorRTRTXExecutionProvider"


def test_a_runtime_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    model = write_vit(tmp_path / "vit.onnx")
    before = contents(tmp_path)
    result = run(model, *FAST, "--validate-provider", "tensorrt")
    assert result.exit_code == 2
    assert "has no TensorrtExecutionProvider; install a build that has it" in result.stderr
    assert result.stderr.count("\n") == 1
    assert contents(tmp_path) == before


def test_an_unknown_name() -> None:
    with pytest.raises(TargetError, match="choose one of cpu, tensorrt, nvtensorrtrtx"):
        runtime.providers_of("gpu")


def test_only_the_compiled_graph_is_run_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [RTX, "CPUExecutionProvider"])
    real, asked = ort.InferenceSession, []

    def start(model: Any, options: Any = None, *, providers: list[str], **more: Any) -> Any:
        asked.append(providers)
        return real(model, options, providers=["CPUExecutionProvider"], **more)

    monkeypatch.setattr(ort, "InferenceSession", start)
    assert run(write_vit(tmp_path / "vit.onnx"), *FAST, "-q", "--validate-provider", "nvtensorrtrtx").exit_code == 0
    assert asked.count([RTX, "CPUExecutionProvider"]) == 1
    assert asked.count(["CPUExecutionProvider"]) == len(asked) - 1
