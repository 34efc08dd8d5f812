"""--check with NVIDIA's compiler: what each format says of its verdict, what a refusal does, and a hint where it is missing."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import run, write_vit
from vitq_compiler import judge as judges
from vitq_compiler.judge import HINT, Verdict

BUILT = Verdict("Compiler 1", "8.9", True, True, (), (), {"Half->Half": 2}, {"Int8 x Int8->Half": 8}, 5, 2_500_000)
REFUSED = Verdict("Compiler 1", "8.0", True, False, ("no kernel for it",))


def checked(path: Path, *words: str) -> Any:
    """The command on a tiny float ViT."""
    return run("--check", write_vit(path / "vit.onnx"), "--target", "tensorrt", *words)


def answer(monkeypatch: pytest.MonkeyPatch, verdict: Verdict) -> list[str]:
    """Let the compiler say that; returns the capabilities it is asked for."""
    asked: list[str] = []
    monkeypatch.setattr(judges, "judge", lambda path, capability: asked.append(capability) or verdict)
    return asked


def test_a_verdict_in_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, BUILT)
    text = checked(tmp_path, "--compute-capability", "8.9").stdout
    line = "15 kernels: 2 fused attention (Half->Half), 8 products Int8 x Int8->Half, 5 others; engine 2.5 MB\n"
    assert f"Compiler 1 for compute capability 8.9: {line}" in text
    found = json.loads(checked(tmp_path, "--format", "json").stdout)["compiler"]
    assert (found["fused"], found["integer"], found["kernels"], found["engine_bytes"]) == (2, 8, 15, 2_500_000)
    assert json.loads(checked(tmp_path, "--format", "sarif").stdout)["runs"][0]["properties"]["compiler"] == found
    assert asked == ["8.9", "8.0", "8.0"]


def test_a_refusal_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, REFUSED)
    result = checked(tmp_path)
    assert result.exit_code == 3
    assert "error J01: NVIDIA's compiler takes the graph (1 place)\n" in result.stdout
    assert "no kernel for it" in result.stdout
    results = json.loads(checked(tmp_path, "--format", "sarif").stdout)["runs"][0]["results"]
    assert [r["level"] for r in results if r["ruleId"] == "J01"] == ["error"]


def test_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, REFUSED)
    assert "Compiler 1" not in checked(tmp_path, "--no-judge").stdout
    assert "Compiler 1" not in checked(tmp_path, "--trt-version", "8.6").stdout
    assert asked == []


def test_a_missing_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = checked(tmp_path, "--no-judge")
    monkeypatch.setattr(judges, "PACKAGES", ("no_such_compiler",))
    result = checked(tmp_path)
    hint = f"not judged: TensorRT-RTX is not installed: {HINT}\n"
    assert hint in result.stdout
    assert (result.stdout.replace(hint, ""), result.exit_code) == (without.stdout, without.exit_code)
    assert "compiler" not in json.loads(checked(tmp_path, "--format", "json").stdout)


@pytest.mark.skipif(not judges.available(), reason="TensorRT-RTX is not installed")
def test_the_real_one(tmp_path: Path) -> None:
    found = json.loads(checked(tmp_path, "--format", "json").stdout)["compiler"]
    assert found["built"], found["errors"]
    assert found["kernels"] > 0
