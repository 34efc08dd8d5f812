"""The whole way through ONNX Runtime: from a file to an integer file, on tiny ViTs as several exporters write them."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests import builders
from tests.e2e.command import FAST, OLD, WIDE, contents, run, write_vit
from vitq_compiler import runtime
from vitq_compiler.builtin_images import dead_leaves
from vitq_compiler.compiler import compile
from vitq_compiler.explain import explain
from vitq_compiler.metrics import sqnr
from vitq_compiler.passes import fuse_attention
from vitq_compiler.report import CompileReport
from vitq_compiler.targets import onnxruntime

MIN_SQNR = 18.0  # of a two-block ViT with random weights, in dB


@pytest.fixture(scope="module")
def shared_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT that no test may change."""
    return write_vit(tmp_path_factory.mktemp("model") / "vit.onnx", WIDE)


@pytest.fixture
def folder(tmp_path: Path, shared_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a copy of the model."""
    shutil.copy(shared_model, tmp_path / "vit.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def quick(model: str | Path = "vit.onnx", output: str | None = "out.onnx", **options: Any) -> CompileReport:
    """Compile with few samples and one thread."""
    return compile(Path(model), Path(output) if output else None, **{"samples": 4, "threads": 1, **options})


def session(path: str | Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def images(count: int, side: int = 16) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, 3, side, side)).astype(np.float32)


def assert_integer(report: CompileReport, linears: int) -> None:
    """Everything but the head is computed on integers."""
    assert len(report.linears) == linears
    assert [row.name for row in report.linears if not (row.quantized and row.integer)] == [
        row.name for row in report.linears if row.role == "head"
    ]


# Dialects


@pytest.mark.parametrize(("version", "attention", "opset"), [("", "Softmax", 20), ("newest", "Attention", 23)], ids=["portable", "newest"])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("name", builders.DIALECTS)
def test_dialects(tmp_path: Path, name: str, dynamic: bool, version: str, attention: str, opset: int) -> None:
    dialect, sizes = builders.variant(builders.DIALECTS[name], dynamic=dynamic), builders.Sizes()
    model = write_vit(tmp_path / "vit.onnx", sizes, dialect)
    report = quick(model, str(tmp_path / "out.onnx"), target_options={"version": version})
    roles = [*builders.roles_of(sizes, dialect), "patch_embed"]
    assert_integer(report, len(roles))
    assert sorted(row.role for row in report.linears) == sorted(roles), "as given, though attention takes q, k and v apart"
    (output,) = report.validation.outputs
    assert output.sqnr_db > MIN_SQNR
    assert len(report.validation.blocks) == 2 * sizes.depth
    compiled = onnx.load(tmp_path / "out.onnx")
    assert {"Attention", "Softmax", "Gemm"} & {node.op_type for node in compiled.graph.node} == {attention, "Gemm"}
    assert (compiled.opset_import[0].version, compiled.ir_version) == (report.needs.opset, report.needs.ir_version) == (opset, 9)


@pytest.mark.parametrize(
    "sizes",
    [
        builders.Sizes(layer_scale=True),
        builders.Sizes(class_token=False),
        builders.Sizes(bias=False),
        builders.Sizes(gelu="tanh"),
        builders.Sizes(heads=1, depth=1),
    ],
    ids=["layer-scale", "pooled", "no-bias", "tanh-gelu", "one-head"],
)
def test_architectures(tmp_path: Path, sizes: builders.Sizes) -> None:
    # 32 samples as by default: of each, the last block sees the class token alone
    report = quick(write_vit(tmp_path / "vit.onnx", sizes), str(tmp_path / "out.onnx"), samples=32)
    assert_integer(report, 4 * sizes.depth + 2)
    assert report.validation.outputs[0].sqnr_db > MIN_SQNR + 4


@pytest.mark.parametrize("name", ["timm", "huggingface"])
def test_layers_are_counted_as_given_whatever_is_made_of_them(tmp_path: Path, name: str) -> None:
    model = write_vit(tmp_path / "vit.onnx", WIDE, builders.DIALECTS[name])
    options: list[dict[str, Any]] = [{}, {"target": "tensorrt"}, {"recipe": "repq-vit", "bits": "w4a4"}, {"definition": "strict"}]
    reports = [quick(model, None, **option) for option in [*options, {"exclude": ["Conv"]}]]
    wanted = sorted([*builders.roles_of(WIDE, builders.DIALECTS[name]), "patch_embed"])
    assert [sorted(row.role for row in report.linears) for report in reports] == [wanted] * len(reports)
    assert len({tuple((row.name, row.in_features, row.out_features) for row in report.linears) for report in reports}) == 1
    for report in reports[:-1]:
        assert report.integer == report.quantized >= len(wanted) - 1
    (convolution,) = (row for row in reports[-1].linears if not row.quantized and row.role == "patch_embed")
    assert convolution.reason == "excluded by 'Conv'"


def test_a_layer_that_is_taken_apart_is_explained_by_its_parts_too(folder: Path) -> None:
    report = quick(output=None)
    qkv = next(row for row in report.linears if row.role == "qkv")
    assert qkv.parts == tuple(f"{qkv.name}/{letter}" for letter in "qkv")
    assert (qkv.in_features, qkv.out_features) == (WIDE.width, 3 * WIDE.width)
    lines = explain(report, f"^{qkv.parts[1]}$")
    assert lines[1] == f"{qkv.name}: qkv of attention 0, 64 x 192"
    assert "  found by its parts" in lines
    assert f"  taken apart into {', '.join(qkv.parts)}" in lines


def test_any_batch(folder: Path) -> None:
    quick()
    floating, integer = session("vit.onnx"), session("out.onnx")
    for count in (1, 3, 8):
        expected, got = (s.run(None, {"image": images(count)})[0] for s in (floating, integer))
        assert got.shape == (count, 5)
        assert sqnr(expected, got) > MIN_SQNR
    assert [i.shape for i in integer.get_inputs()] == [i.shape for i in floating.get_inputs()]
    assert [o.name for o in integer.get_outputs()] == ["logits"]


def test_an_installed_runtime_that_is_older_than_the_one_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fuse_attention, onnxruntime, runtime):
        monkeypatch.setattr(module, "INSTALLED", "1.22")
    report = quick(target_options={"version": "newest"})
    assert_integer(report, 4 * builders.Sizes().depth + 2)
    (warning,) = [w for w in report.warnings if "has to run the result too" in w]
    assert warning == "the installed onnxruntime has to run the result too, so it is written for 1.22, not 1.32"
    assert "Softmax" in {node.op_type for node in onnx.load("out.onnx").graph.node}
    assert (report.needs.opset, report.needs.onnxruntime) == (20, "1.17")
    assert report.validation.outputs[0].sqnr_db > MIN_SQNR


# The file


def test_the_file_depends_on_the_seed_alone(folder: Path) -> None:
    before = Path("vit.onnx").read_bytes()
    for name, options in {"a": {}, "b": {"threads": 2}, "c": {"seed": 1}}.items():
        quick(output=f"{name}.onnx", **options)
    a, b, c = (Path(f"{name}.onnx").read_bytes() for name in "abc")
    assert a == b
    assert a != c, "other images give other ranges"
    assert Path("vit.onnx").read_bytes() == before
    assert len(a) < len(before) / 2
    assert contents(folder).keys() == {"vit.onnx", "a.onnx", "b.onnx", "c.onnx"}


def test_external_data(folder: Path) -> None:
    quick(output="plain.onnx")
    model = onnx.load("vit.onnx")
    onnx.save(model, "vit.onnx", save_as_external_data=True, location="weights.bin")
    report = quick(output="external.onnx")
    assert Path("plain.onnx").read_bytes() == Path("external.onnx").read_bytes()
    assert report.validation.float_bytes == sum(Path(name).stat().st_size for name in ("vit.onnx", "weights.bin"))


# Calibration


def save_pictures(folder: Path) -> Path:
    folder.mkdir()
    for index in range(8):
        Image.fromarray(dead_leaves(index, 40, 30)).save(folder / f"{index}.png")
    return folder


def save_arrays(path: Path) -> Path:
    np.savez(path, image=images(12))
    return path


def test_calibration_data(folder: Path) -> None:
    sources = {"built-in": None, "folder": save_pictures(folder / "photos"), "npz": save_arrays(folder / "arrays.npz")}
    described = {name: quick(output=f"{name}.onnx", calibration=source).data for name, source in sources.items()}
    assert [data.source.split(" from ")[0] for data in described.values()] == ["4 built-in images", "4 images", "4 samples"]
    assert described["npz"].preprocess.startswith("none")
    assert all(data.validation_samples > 0 for data in described.values())
    assert len({Path(f"{name}.onnx").read_bytes() for name in sources}) == 3, "every source gives its own ranges"


# Options


def test_exclude(folder: Path) -> None:
    names = [row.name for row in quick().linears if row.role == "fc2"]
    report = quick(exclude=(f"^{names[0]}$",))
    (left,) = [row for row in report.linears if row.role == "fc2" and not row.quantized]
    assert left.name == names[0]
    assert left.reason == f"excluded by '^{names[0]}$'"
    result = run("vit.onnx", *FAST, "-o", "out.onnx", "--exclude", f"^{names[0]}$", "--explain", f"^{names[0]}$")
    assert f"stays in float: excluded by '^{names[0]}$'" in result.stdout


def test_a_recipe_file(folder: Path) -> None:
    passes = "calibrate,compute-qparams"
    Path("mine.toml").write_text(
        f'description = "plain"\npasses = "{passes}"\nfloat_roles = ["head", "fc2"]\n'
        "weight = { bits = 8, signed = true, symmetric = true }\nactivation = { bits = 8 }\n"
    )
    report = quick(recipe="mine.toml")
    assert report.recipe == "mine"
    assert passes in report.pipeline
    assert {row.role for row in report.linears if not row.quantized} == {"head", "fc2"}
    assert report.integer == 2 * (1 + 1 + 1) + 1, "qkv, proj and fc1 of two blocks, and the patch embedding"


def test_the_printed_pipeline_gives_the_same_file(folder: Path) -> None:
    text = run("--print-pipeline").stdout.strip()
    assert quick(output="a.onnx").pipeline == text
    quick(output="b.onnx", passes=text)
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()


def test_dumps(folder: Path) -> None:
    result = run("vit.onnx", "-q", *FAST, "-o", "out.onnx", "--dump-after", "annotate", "--dump-after", "insert-qdq")
    assert result.exit_code == 0
    dumps = {name: onnx.load(f"out.after-{name}.onnx") for name in ("annotate", "insert-qdq")}
    for model in dumps.values():
        onnx.checker.check_model(model)
    kinds = {name: {node.op_type for node in model.graph.node} for name, model in dumps.items()}
    assert "QuantizeLinear" not in kinds["annotate"]
    assert "QuantizeLinear" in kinds["insert-qdq"]
    expected, got = (session(name).run(None, {"image": images(2)})[0] for name in ("vit.onnx", "out.after-annotate.onnx"))
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def test_python_returns_the_report_and_writes_nothing_unasked(folder: Path) -> None:
    before = contents(folder)
    report = quick(output=None)
    assert isinstance(report, CompileReport)
    assert report.output is None
    assert report.passed
    assert contents(folder) == before


def test_quiet_prints_nothing(folder: Path) -> None:
    result = run("vit.onnx", "-q", *FAST)
    assert (result.exit_code, result.output) == (0, "")
    assert Path("vit_int8.onnx").is_file()


def test_the_summary(folder: Path) -> None:
    result = run("vit.onnx", *FAST, "-v")
    assert result.exit_code == 0
    for words in (
        "10 found, 9 quantized, 9 of 10 in integer kernels",
        "attention 1",
        "Preprocessing",
        "warning: calibrated on built-in images",
    ):
        assert words in result.stdout


def test_an_order_of_scores_is_called_unstable(tmp_path: Path) -> None:
    model = builders.vit(WIDE)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([3]), "three"))
    model.graph.node.append(onnx.helper.make_node("TopK", ["logits", "three"], ["scores", "ids"], "best_three"))
    del model.graph.output[:]
    for name, kind in (("scores", onnx.TensorProto.FLOAT), ("ids", onnx.TensorProto.INT64)):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, ["batch", 3]))
    onnx.save(model, tmp_path / "vit.onnx")
    (told,) = (w for w in quick(tmp_path / "vit.onnx", None).warnings if "unstable" in w)
    assert told.startswith("scores, ids: sorted by score (node best_three), and that order is unstable")
    assert not any("unstable" in w for w in quick(write_vit(tmp_path / "plain.onnx", WIDE), None).warnings)


# Gates and report


def test_a_missed_gate(folder: Path) -> None:
    result = run("vit.onnx", "-q", *FAST, "-o", "out.onnx", "--min-sqnr", "90")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "min-sqnr missed" in result.stderr
    assert result.stderr.endswith("out.onnx is written all the same\n")
    assert session("out.onnx").run(None, {"image": images(1)})[0].shape == (1, 5)


@pytest.mark.parametrize("old", [None, OLD])
def test_a_missed_gate_without_output(folder: Path, old: bytes | None) -> None:
    if old is not None:
        Path("out.onnx").write_bytes(old)
    before = contents(folder)
    result = run("vit.onnx", "-q", *FAST, "-o", "out.onnx", "--min-sqnr", "90", "--no-output-on-failure")
    assert result.exit_code == 3
    assert result.stderr.endswith("out.onnx is not written\n")
    assert contents(folder) == before


def test_gates_that_are_met(folder: Path) -> None:
    result = run("vit.onnx", "-q", *FAST, "--min-sqnr", "10", "--min-agreement", "0.5", "--no-output-on-failure")
    assert (result.exit_code, result.output) == (0, "")
    assert Path("vit_int8.onnx").is_file()


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_the_report(folder: Path) -> None:
    assert run("vit.onnx", "-q", *FAST, "--report", "r.json", "--min-sqnr", "90").exit_code == 3
    report = json.loads(Path("r.json").read_text(), parse_constant=refuse_constant)
    assert report.keys() == {field.name for field in fields(CompileReport)} | {"totals"}
    assert report["totals"].keys() == {"linears", "quantized", "integer", "worst_block", "passed"}
    assert report["totals"]["integer"] == sum(row["integer"] for row in report["linears"]) == 9
    assert (report["model"], report["output"]) == ("vit.onnx", "vit_int8.onnx")
    assert report["gates"][0]["name"] == "min-sqnr"
    assert report["gates"][0]["measured"] == report["validation"]["outputs"][0]["sqnr_db"]
    assert report["validation"]["integer_bytes"] == Path("vit_int8.onnx").stat().st_size
    assert {row["threads"] for row in report["validation"]["latency"]} == {1}


def test_attention_products_on_integers_at_few_bits(folder: Path) -> None:
    recipe = folder / "everything.toml"
    recipe.write_text(
        'description = "d"\ndefinition = "strict"\npasses = "calibrate,compute-qparams"\n'
        'weight = { signed = true, symmetric = true, granularity = "per_channel" }\nactivation = { }\n'
        "[attention]\nq = { }\nk = { }\nprobs = { }\nv = { }\n"
    )
    eight, six = (quick(recipe=str(recipe), bits=bits, calibration=None, output=f"{bits}.onnx") for bits in ("w8a8", "w6a6"))
    assert (six.recipe, six.bits, six.definition) == ("everything", "w6a6", "strict")
    assert all(row.quantized for row in six.linears), "the head too"
    assert eight.validation.outputs[0].sqnr_db > six.validation.outputs[0].sqnr_db + 6
    ops = [node.op_type for node in onnx.load(folder / "w6a6.onnx").graph.node]
    assert "Attention" not in ops
    assert ops.count("Softmax") == 2
    per_block = 4 + 4  # the inputs of qkv, proj, fc1 and fc2, and the operands
    assert ops.count("Clip") == ops.count("QuantizeLinear") - 1 == 2 * per_block + 1, "all but the image's; and the head's"
