"""Open axes, any of them under any names: as many layers on integers, the same blocks and as few operators as with the batch alone."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.builders import run_model
from tests.e2e.command import run
from tests.open_vit import IMAGES, KEYS, LENGTH, POSITIONS, SIDE, WORDS, open_text, open_vit
from vitq_compiler.compiler import compile
from vitq_compiler.metrics import sqnr
from vitq_compiler.report import CompileReport

MIN_SQNR = 20.0
LAYERS = Counter({"qkv": 6, "proj": 2, "fc1": 2, "fc2": 2, "patch_embed": 1, "head": 1})
SIZES = "Shape", "Gather", "Slice", "Concat", "Div", "Mul", "Expand", "Resize", "Reshape", "Transpose"  # what open sizes may need more of
IN_FRONT = 24  # operators that the positions and patches of open pictures need, once for all blocks


def compiled(folder: Path, model: onnx.ModelProto, name: str = "vit", **options: object) -> tuple[CompileReport, onnx.ModelProto]:
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    report = compile(path, path.with_suffix(".int8.onnx"), samples=8, threads=1, **options)  # type: ignore[arg-type]
    return report, onnx.load(path.with_suffix(".int8.onnx"))


def layers(report: CompileReport) -> list[tuple[str, str, bool, str]]:
    return [(row.role, row.block, row.integer, row.kernel) for row in report.linears]


def picture(image: str, height: int, width: int, count: int = 3) -> dict[str, np.ndarray]:
    array = np.random.default_rng(height).standard_normal((count, 3, height, width)).astype(np.float32)
    return {"image": array.transpose(0, 2, 3, 1) if image in ("B, H, W, 3", "n, a, b, c") else array}


@pytest.fixture(scope="module", params=KEYS)
def fixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, CompileReport, onnx.ModelProto]:
    """What becomes of the model where the batch alone is open."""
    report, result = compiled(tmp_path_factory.mktemp("fixed"), open_vit("B, 3, 16, 16", "table", request.param))
    assert Counter(row.role for row in report.linears) == LAYERS
    assert {row.role for row in report.linears if not row.integer} == {"head"}
    return request.param, report, result


@pytest.mark.parametrize("image", [image for image in IMAGES if image != "B, 3, 16, 16"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_pictures(tmp_path: Path, fixed: tuple[str, CompileReport, onnx.ModelProto], image: str, positions: str) -> None:
    keys, alone, expected = fixed
    model = open_vit(image, positions, keys)
    report, result = compiled(tmp_path, model)
    assert layers(report) == layers(alone)
    assert len(report.validation.blocks) == len(alone.validation.blocks)
    assert report.validation.outputs[0].sqnr_db > MIN_SQNR
    assert any(f"image leaves its size open: samples are {SIDE}x{SIDE}, which its positions are made for" in w for w in report.warnings)
    counts, before = (Counter(node.op_type for node in m.graph.node) for m in (result, expected))
    more = {op: n - before[op] for op, n in counts.items() if n > before[op]}
    assert set(more) <= set(SIZES)
    assert sum(more.values()) <= (IN_FRONT if positions == "resized" else 1 if image.endswith(("3", "c")) else 0)
    assert [d.dim_param for d in result.graph.input[0].type.tensor_type.shape.dim] == [
        d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim
    ], "the axes keep their names"
    for height, width in ((16, 16), (20, 28), (33, 18), (12, 8)) if positions == "resized" else ((16, 16),):
        feed = picture(image, height, width)
        assert sqnr(run_model(model, feed)[0], run_model(result, feed, optimize=True)[0]) > MIN_SQNR


def test_sizes_that_the_positions_do_not_take_are_said(tmp_path: Path) -> None:
    report, _ = compiled(tmp_path, open_vit("B, 3, H, W", "table"))
    (note,) = [note.reason for note in report.notes if note.stage == "canonicalize"]
    assert note == "sizes image[2], image[3] are open, but no others than image[N, 3, 16, 16] run, nor do they in the result"
    report, _ = compiled(tmp_path, open_vit("B, 3, H, W", "resized"))
    (note,) = [note.reason for note in report.notes if note.stage == "canonicalize"]
    assert note == "sizes image[2], image[3] are open: what depends on them is computed when the graph runs"


@pytest.mark.parametrize("options", [{"preprocess": "imagenet,resize=24,crop=24"}, {"config": True}], ids=["option", "configuration"])
@pytest.mark.parametrize(("positions", "side"), [("resized", 24), ("table", SIDE)])
def test_who_decides_on_the_size(tmp_path: Path, options: dict[str, object], positions: str, side: int) -> None:
    """What the user or a configuration says, where the model takes it."""
    if options.pop("config", None):
        text = '{"do_resize": true, "size": {"height": 24, "width": 24}, "image_mean": [0.5], "image_std": [0.5], "do_normalize": true}'
        (tmp_path / "preprocessor_config.json").write_text(text)
    model = open_vit("B, 3, H, W", positions)
    onnx.save(model, tmp_path / "vit.onnx")
    pictures = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), np.uint8)
    np.savez(tmp_path / "pictures.npz", image=pictures)
    report = compile(tmp_path / "vit.onnx", calibration=tmp_path / "pictures.npz", samples=8, threads=1, **options)  # type: ignore[arg-type]
    said = [warning for warning in report.warnings if "leaves its size open" in warning]
    assert bool(said) == (side == SIDE)
    assert report.validation.outputs[0].sqnr_db > MIN_SQNR


def test_calibration_data_decide_on_everything(tmp_path: Path) -> None:
    model = open_vit("batch, num_channels, height, width", "resized")
    np.savez(tmp_path / "data.npz", **picture("B, 3, H, W", 28, 12, count=12))
    report, result = compiled(tmp_path, model, calibration=tmp_path / "data.npz")
    assert not any("leaves its size open" in warning for warning in report.warnings)
    feed = picture("B, 3, H, W", 28, 12)
    assert sqnr(run_model(model, feed)[0], run_model(result, feed, optimize=True)[0]) > MIN_SQNR


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("data", [True, False], ids=["data", "nothing"])
def test_texts(tmp_path: Path, keys: str, data: bool) -> None:
    random = np.random.default_rng(0)
    np.savez(tmp_path / "ids.npz", ids=random.integers(0, WORDS, (12, LENGTH)))
    model = open_text(keys=keys)
    report, result = compiled(tmp_path, model, calibration=tmp_path / "ids.npz" if data else None)
    assert {row.kernel for row in report.linears if row.integer} == {"QGemm"}
    assert Counter(row.role for row in report.linears if row.integer) == LAYERS - Counter({"patch_embed": 1, "head": 1})
    said = [warning for warning in report.warnings if "leaves its size open" in warning]
    reason = f"samples are 8, as it has positions for {LENGTH} tokens; for others pass a .npz"
    assert said == ([] if data else [f"ids leaves its size open: {reason}"])
    for length in (1, 5, LENGTH):
        feed = {"ids": random.integers(0, WORDS, (3, length))}
        assert sqnr(run_model(model, feed)[0], run_model(result, feed, optimize=True)[0]) > MIN_SQNR


def test_what_does_not_run_is_said_in_one_line(tmp_path: Path) -> None:
    onnx.save(open_vit("B, 3, H, W", "table"), tmp_path / "vit.onnx")
    np.savez(tmp_path / "data.npz", image=np.random.default_rng(0).standard_normal((12, 3, 24, 24)).astype(np.float32))
    done = run(tmp_path / "vit.onnx", "--calibration", tmp_path / "data.npz", "-o", tmp_path / "out.onnx")
    assert done.exit_code == 2
    (line,) = [text for text in done.stderr.splitlines() if "error" in text]
    assert "vit.onnx: does not run on image [2, 3, 24, 24] (" in line, "the first words of the runtime's message follow"
    assert "give samples of a size it takes, by --preprocess crop=HEIGHTxWIDTH or in a .npz" in line
