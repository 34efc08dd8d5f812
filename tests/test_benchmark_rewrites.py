"""`python -m benchmarks rewrites`: its rows are pipelines, and its table has a cell for each of them."""

import argparse
from pathlib import Path

import numpy as np
import pytest

from benchmarks import rewrites
from benchmarks.tasks import TASKS
from vitq_compiler.catalog import FRONT, find_pass
from vitq_compiler.pipeline import Pipeline


@pytest.mark.parametrize("name", rewrites.REWRITES)
def test_rows_are_pipelines(name: str) -> None:
    before, after = rewrites.REWRITES[name]
    Pipeline.parse(",".join(part for part in (FRONT, before, "calibrate", after, "compute-qparams") if part), find_pass)


def test_a_table_of_the_shipped_model(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (64, 32, 32, 3), np.uint8)
    labels = random.integers(0, 10, 64)
    np.savez(tmp_path / "cifar10.npz", x_train=images, y_train=labels, x_test=images[:4], y_test=labels[:4])
    parser = argparse.ArgumentParser()
    rewrites.add_options(parser)
    words = ["--data", str(tmp_path), "--images", "4", "--samples", "4", "--rewrites", "none", "rotations", "--symmetric", "no"]
    (table,) = rewrites.measure_task(TASKS["shipped"], parser.parse_args([*words, "--threads", "1", "--bits", "w8a8"]))
    assert [row[0] for row in table.rows] == ["float", "none", "rotations"]
    for row in table.rows[1:]:
        assert isinstance(row[2], float)
        assert row[2] > 15, "eight bits are close to float on any image"
        assert len(row) == len(table.columns) == 3


def test_the_layers_of_a_recipe() -> None:
    parser = argparse.ArgumentParser()
    rewrites.add_options(parser)
    assert rewrites.study(True, parser.parse_args(["--recipe", "w8a8"])).attention == {}
    own = rewrites.study(True, parser.parse_args(["--probs", "5"]))
    assert (own.definition, own.attention_specs()["probs"].bits, own.attention_specs()["q"].symmetric) == ("strict", 5, True)
