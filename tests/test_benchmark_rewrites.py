"""`python -m benchmarks rewrites` and `parity`: rows are pipelines, tables have a cell for each of them."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import parity, rewrites
from benchmarks.tasks import TASKS
from vitq_compiler.catalog import FRONT, find_pass
from vitq_compiler.pipeline import Pipeline


@pytest.mark.parametrize("name", rewrites.REWRITES)
def test_rows_are_pipelines(name: str) -> None:
    before, after = rewrites.REWRITES[name]
    Pipeline.parse(",".join(part for part in (FRONT, before, "calibrate", after, "compute-qparams") if part), find_pass)


def parsed(command: Any, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    return parser.parse_args(words)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A few random pictures in place of CIFAR-10."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (64, 32, 32, 3), np.uint8)
    labels = random.integers(0, 10, 64)
    np.savez(tmp_path / "cifar10.npz", x_train=images, y_train=labels, x_test=images[:4], y_test=labels[:4])
    return tmp_path


def test_a_table_of_the_shipped_model(data: Path) -> None:
    words = ["--data", str(data), "--images", "4", "--samples", "4", "--rewrites", "none", "rotations", "--symmetric", "no"]
    table = rewrites.measure_task(TASKS["shipped"], parsed(rewrites, *words, "--threads", "1", "--bits", "w8a8", "w4a8"))
    assert table.columns == ("rewrites", "W8A8 top-1", "W8A8 dB", "W4A8 top-1", "W4A8 dB")
    assert [row[0] for row in table.rows] == ["float", "none", "rotations"]
    for row in table.rows[1:]:
        assert isinstance(row[2], float)
        assert isinstance(row[4], float)
        assert row[2] > 15, "eight bits are close to float on any image"
        assert row[2] > row[4]
        assert len(row) == len(table.columns)


def test_what_is_measured_is_kept(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = data / "results.jsonl"
    words = ["--data", str(data), "--images", "4", "--samples", "4", "--threads", "1", "--bits", "w8a8", "--results", str(file)]
    first = rewrites.measure_task(TASKS["shipped"], parsed(rewrites, *words, "--rewrites", "none", "--symmetric", "no", "yes"))
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3, "float, and one line for each graph"

    def quantized(*arguments: object) -> None:
        raise AssertionError("it has been measured")

    monkeypatch.setattr(rewrites, "quantized", quantized)
    again = rewrites.measure_task(TASKS["shipped"], parsed(rewrites, *words, "--rewrites", "none", "--symmetric", "yes"))
    assert again.rows[1][1:] == first.rows[1][3:]
    assert file.read_text(encoding="utf-8").splitlines() == lines
    with pytest.raises(AssertionError, match="it has been measured"):
        rewrites.measure_task(TASKS["shipped"], parsed(rewrites, *words, "--rewrites", "none", "--symmetric", "yes", "--seed", "1"))


def test_parity_of_a_folder(tmp_path: Path) -> None:
    for name in ("eva02", "swinv2"):
        shutil.copy(Path(__file__).parent / "data" / "zoo" / f"{name}.onnx", tmp_path)
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    rewrites_, reasons, models = parity.measure(parsed(parity, str(tmp_path), "--threads", "1"))
    changed = {row[0]: row[1] for row in rewrites_.rows}
    assert tuple(changed) == parity.PASSES
    assert (changed["center-values"], changed["center-keys"]) == (2, 0)
    assert all(row[3] is None or float(row[3]) < 1e-4 for row in rewrites_.rows)
    assert ("queries and keys are divided by their lengths", 1) in [row[:2] for row in reasons.rows]
    assert [row[0] for row in models.rows] == ["broken", "eva02", "swinv2"]
    assert models.rows[0][1] is None
    assert "center-keys" in str(models.rows[1][3])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SystemExit, match=r"no \.onnx file in"):
        parity.measure(parsed(parity, str(tmp_path / "nothing"), "--threads", "1"))


def test_reasons_are_told_once() -> None:
    told = "keys are not centred: queries and keys are rotated by their positions; an operand comes from Concat, not from a Linear"
    assert parity.in_general(told) == "queries and keys are rotated by their positions"
    assert parity.in_general("LayerNormalization keeps its ranges: Add /blocks.0/Add_1 reads it") == "Add reads it"


def test_the_layers_of_a_recipe() -> None:
    assert rewrites.study(True, parsed(rewrites, "--recipe", "w8a8")).attention == {}
    own = rewrites.study(True, parsed(rewrites, "--probs", "5"))
    assert (own.definition, own.attention_specs()["probs"].bits, own.attention_specs()["q"].symmetric) == ("strict", 5, True)
