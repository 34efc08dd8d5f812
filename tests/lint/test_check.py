"""vitq-compile --check on files: exit codes, formats, and one line for what cannot be read."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.builders import model_of
from tests.e2e.command import SHIPPED, run, write_vit
from vitq_compiler.check import check

INT8 = "g (float[B, 8] x) => (float y) { q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z) }"


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A file with an int8 activation."""
    onnx.save(model_of(INT8, s=np.float32(0.1), z=np.int8(0)), tmp_path / "slow.onnx")
    return tmp_path / "slow.onnx"


def test_a_warning_is_no_failure(slow: Path) -> None:
    result = run(slow, "--check")
    assert result.exit_code == 0
    assert "warning R02: activations are UINT8 (1 place)\n  QuantizeLinear node q: quantizes an activation to INT8\n" in result.stdout
    assert result.stdout.endswith("slow.onnx: 1 warning; 7 rules of onnxruntime checked\n")


def test_nothing_else_is_printed_or_written(slow: Path) -> None:
    before = sorted(slow.parent.iterdir())
    for name in ("json", "sarif"):
        result = run(slow, "--check", "--format", name)
        assert (result.exit_code, result.stderr) == (0, "")
        json.loads(result.stdout)
    assert sorted(slow.parent.iterdir()) == before


def test_a_float_model_breaks_no_rule_of_onnxruntime() -> None:
    assert check(SHIPPED).findings == []


def test_what_vitq_compiles_breaks_no_rule(tmp_path: Path) -> None:
    model = write_vit(tmp_path / "vit.onnx")
    assert run(model, "--samples", "4", "--threads", "1", "-q").exit_code == 0
    assert check(tmp_path / "vit_int8.onnx").findings == []


def test_what_saturation_costs_is_told(tmp_path: Path) -> None:
    """A graph whose weights are free to saturate: how far its results lie from exact ones, in text and as data."""
    model = write_vit(tmp_path / "vit.onnx")
    assert run(model, "--samples", "4", "--threads", "1", "-q", "--cpu", "vnni").exit_code == 0
    result = run(tmp_path / "vit_int8.onnx", "--check")
    assert result.exit_code == 3
    assert "silent R05: no two products saturate" in result.stdout
    told = check(tmp_path / "vit_int8.onnx")
    assert told.saturated_db is not None
    assert 3 < told.saturated_db < 60
    assert f"the results lie {told.saturated_db:.1f} dB from those of other CPUs" in result.stdout
    assert json.loads(told.to_json())["saturated_db"] == told.saturated_db
    assert run(tmp_path / "vit_int8.onnx", "--check", "--cpu", "vnni").exit_code == 0


def test_external_data_is_not_needed_to_be_read(tmp_path: Path) -> None:
    proto = model_of("g (float[2048] x) => (float[2048] y) { y = Add (x, w) }", w=np.zeros(2048, np.float32))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data")
    assert run(tmp_path / "m.onnx", "--check").exit_code == 0


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("none.onnx",), "no such file"),
        (("empty",), "no .onnx file in this folder"),
        (("text.onnx",), "not a readable ONNX file"),
        (("slow.onnx", "--target", "nothing"), "no 'nothing' in targets"),
        (("slow.onnx", "--trt-version", "9"), "'9' is not one of '8.6', '10', '11'"),
        (("slow.onnx", "--format", "xml"), "'xml' is not one of"),
        (("slow.onnx", "--compute-capability", "nan"), "nan is not a number"),
        ((), "MODEL is missing"),
    ],
)
def test_bad_input_is_one_line(slow: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], fault: str) -> None:
    monkeypatch.chdir(slow.parent)
    Path("text.onnx").write_text("no model")
    Path("empty").mkdir()
    result = run("--check", *words)
    assert result.exit_code == 2
    assert fault in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
