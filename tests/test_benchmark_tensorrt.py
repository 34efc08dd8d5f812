"""Benchmarks of graphs for TensorRT: other tools, verdicts of several GPUs, and products imitated as halves."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks import halves, peers, tensorrt
from tests.builders import Sizes, vit
from vitq_compiler import check as checks
from vitq_compiler import runtime
from vitq_compiler.compiler import compile
from vitq_compiler.judge import Verdict
from vitq_compiler.lint.report import LintReport
from vitq_compiler.lint.rule import ERROR, WARNING, Finding, Platform, Rule

SIZES = Sizes(depth=2, width=32, heads=2, hidden=48, classes=16)


def feeds() -> list[dict[str, np.ndarray]]:
    return [{"image": np.full((2, 3, 8, 8), n, np.float32)} for n in range(2)]


def test_a_missing_modelopt_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(vit(SIZES), tmp_path / "vit.onnx")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.quantize_all(tmp_path / "vit.onnx", tmp_path, feeds, ["modelopt"]) == {}
    assert "ModelOpt is not installed, and left out: pip install nvidia-modelopt[onnx]" in capsys.readouterr().err


PROGRAM = """
import sys, numpy as np
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
images = np.load(given["--calibration_data_path"])["image"]
if images.shape != (4, 3, 8, 8) or given["--quantize_mode"] != "int8":
    sys.exit("wrong images")
if FAILS:
    sys.exit("no such thing")
open(given["--output_path"], "wb").write(open(given["--onnx_path"], "rb").read())
open(given["--onnx_path"], "wb").write(b"spoiled")
open("litter", "wb").close()
"""


@pytest.mark.parametrize("fails", [False, True])
def test_modelopt_gets_a_copy_and_all_images(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "site" / "modelopt" / "onnx" / "quantization"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "__main__.py").write_text(PROGRAM.replace("FAILS", str(fails)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "modelopt", raising=False)
    model = tmp_path / "vit.onnx"
    onnx.save(vit(SIZES), model)
    before = model.read_bytes()
    made = peers.quantize_all(model, tmp_path, feeds, ["modelopt"])
    assert model.read_bytes() == before
    assert list(made) == ([] if fails else ["ModelOpt"])
    assert (tmp_path / "litter").exists() != fails, "what it leaves where it runs stays in the folder"
    assert ("ModelOpt failed: RuntimeError: no such thing" in capsys.readouterr().err) == fails


def test_verdicts_that_do_not_differ_are_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Rule("X", WARNING, "", "", "", None)

    def check(path: Path, target: str, *, compute_capability: float, with_judge: bool) -> LintReport:
        engine = 2_000_000 + int(compute_capability) + (500_000 if compute_capability > 9 else 0)
        verdict = Verdict("c", str(compute_capability), True, True, (), (), {"Half": 2}, {"Int8 x Int8->Half": 8, "Half": 1}, 5, engine, 3)
        findings = [Finding(rule, severity, "", "", "") for severity in (ERROR, WARNING, WARNING)]
        return LintReport("", str(path), target, Platform(), (), findings, verdict)

    monkeypatch.setattr(checks, "check", check)
    assert tensorrt.verdicts(Path("a.onnx"), 2, ["8.0", "8.9", "12.0"]) == [
        ("8.0, 8.9", "2 of 2", "8 of 9", 3, 5, 16, 2.0, 1, 2),
        ("12.0", "2 of 2", "8 of 9", 3, 5, 16, 2.5, 1, 2),
    ]


def test_a_refused_graph_is_a_row_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    report: Any = LintReport("", "", "", Platform(), (), [], Verdict("c", "8.0", True, False, ("no kernel",)))
    monkeypatch.setattr(checks, "check", lambda *_, **__: report)
    assert tensorrt.verdicts(Path("a.onnx"), 2, ["8.0"]) == [("8.0", "not built", None, None, None, None, None, 0, 0)]
    assert "a.onnx: no kernel" in capsys.readouterr().err


def test_products_imitated_as_halves(tmp_path: Path) -> None:
    """Sums of a wide layer leave the halves; scaled before, they do not, and in float32 the imitation is the graph itself."""
    onnx.save(vit(Sizes(depth=1, width=64, heads=2, hidden=512, classes=16)), tmp_path / "vit.onnx")
    compile(tmp_path / "vit.onnx", tmp_path / "out.onnx", target="tensorrt", target_options={"float_type": "fp32"}, samples=4, threads=1)
    compiled = (tmp_path / "out.onnx").read_bytes()
    feed = {"image": np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)}
    reference = runtime.run(runtime.session(tmp_path / "out.onnx", threads=1), feed)[0]
    errors = {}
    for form in halves.FORMS:
        graph, sums = halves.imitate(compiled, form)
        found = runtime.run(runtime.session(graph, threads=1), feed)
        assert len(sums) == 4
        errors[form] = np.abs(found[0] - reference).max() / np.abs(reference).max()
        if form == "float32":
            assert max(float(x) for x in found[1:]) > halves.LARGEST
    assert errors["float32"] < 2e-2, "scales are rounded to halves"
    assert errors["common scale"] < 2e-2
    assert not errors["channel scales"] < 0.1
    assert errors["channel scales, cut"] > 2 * errors["common scale"]
