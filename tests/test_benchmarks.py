"""The benchmarks: their arithmetic, their tables, and one small run of each command."""

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks import __main__ as program
from benchmarks import compile_time, latency, repair, tasks, training
from benchmarks.accuracy import Graphs, Score, evaluate, plainness, summarize
from benchmarks.models import obtain
from benchmarks.tables import Report, Table, cpu_model, shown, versions
from tests.builders import Sizes, vit
from vitq_compiler import runtime
from vitq_compiler.catalog import FRONT, find_pass
from vitq_compiler.data import open_data
from vitq_compiler.graph import InputSpec
from vitq_compiler.metrics import sqnr
from vitq_compiler.pipeline import Pipeline
from vitq_compiler.preprocess import resolve
from vitq_compiler.recipe import load_recipe


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A ViT that compiles in a moment, as a file."""
    path = tmp_path / "tiny.onnx"
    onnx.save(vit(Sizes(image=8, width=16, hidden=32)), path)
    return path


# Tables


def test_markdown_aligns_numbers_right() -> None:
    table = Table("Speed", ("graph", "ms"), (("float", 12.345), ("a|b", None)), ("A note.",))
    assert table.to_markdown().splitlines() == [
        "### Speed",
        "",
        "| graph |   ms |",
        "| ----- | ---: |",
        "| float | 12.3 |",
        "| a\\|b  |    - |",
        "",
        "A note.",
    ]


@pytest.mark.parametrize(
    ("cell", "text"),
    [(0.98765, "0.988"), (1.0, "1.00"), (-12.34, "-12.3"), (7, "7"), (float("inf"), "inf"), (float("nan"), "-"), ("x", "x")],
)
def test_cells(cell: str | int | float, text: str) -> None:
    assert shown(cell) == text


def test_formats_are_by_column() -> None:
    table = Table("t", ("a", "b"), ((0.12345, 0.12345),), formats={"b": ".4f"})
    assert "| 0.123 | 0.1235 |" in table.to_markdown()


def test_report_says_where_it_comes_from() -> None:
    report = Report("python -m benchmarks x", [Table("t", ("a",), ((float("inf"),), (1.23456,)))])
    text, data = report.to_markdown(), json.loads(report.to_json())
    assert "`python -m benchmarks x`" in text
    assert report.date in text
    assert cpu_model() in text
    assert f"onnxruntime {data['versions']['onnxruntime']}" in text
    assert data["tables"][0]["rows"] == [[None], [1.23456]]
    assert versions(["no-such-package"]).keys() == {"Python"}


# Latency


def test_rounds_start_with_another_graph_each_time() -> None:
    orders = [latency.rotated(["a", "b", "c"], step) for step in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_every_round_runs_each_once() -> None:
    called: list[str] = []
    times = latency.time_paired({name: lambda name=name: called.append(name) for name in "ab"}, rounds=3)  # type: ignore[misc]
    assert "".join(called) == "ab" * 2 + "ab" + "ba" + "ab"
    assert {name: len(own) for name, own in times.items()} == {"a": 3, "b": 3}


def test_ratios_are_paired() -> None:
    times = {"float": [1.0, 2.0, 4.0], "int": [0.5, 1.0, 1.0]}
    first, second = latency.ratios(times, "float")
    assert (first.median_ms, first.ratio, first.minima) == (2000, 1, 1)
    assert (second.name, second.median_ms, second.ratio, second.minima) == ("int", 1000, 0.5, 0.5)
    assert [r.ratio for r in latency.ratios(times, "int")] == [2, 1]


# Tasks


def test_ctc_collapses_then_drops_blanks() -> None:
    ids = np.array([[0, 0, 6, 6, 0, 0], [2, 2, 0, 2, 3, 3], [0, 0, 0, 0, 0, 0], [10, 0, 0, 1, 1, 40]])
    assert tasks.read_digits(ids) == [(5,), (1, 1, 2), (), (9, 0, 39)]


def test_digits_become_text_lines() -> None:
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, :, 13] = 255
    line = tasks.text_line(image)
    assert line.shape == (1, 3, 64, 256)
    assert line.dtype == np.float32
    assert line[0, :, :, 64:].min() == 255
    assert line[0, :, 32, :64].argmin() in range(29, 34)
    assert (line[0, 0] == line[0, 2]).all()


def test_cifar_is_normalized() -> None:
    grey = np.full((2, 32, 32, 3), 255, np.uint8)
    x = tasks.cifar(32)(grey)
    assert x.shape == (2, 3, 32, 32)
    np.testing.assert_allclose(x[0, :, 0, 0], [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], rtol=1e-5)


@pytest.mark.torch
def test_resized_cifar_stays_in_range() -> None:
    noise = np.random.default_rng(0).integers(0, 2, (1, 32, 32, 3), np.uint8) * np.uint8(255)  # bicubic overshoots here
    x = tasks.cifar(48)(noise) * tasks.STD + tasks.MEAN
    assert x.shape == (1, 3, 48, 48)
    assert x.min() >= -1e-5
    assert x.max() <= 1 + 1e-5


def test_unseen_images_are_two_thousand() -> None:
    order = tasks.unseen_order()
    assert len(set(order.tolist())) == 2000
    assert order.max() < 10000


@pytest.mark.parametrize("seed", [0, 3])
def test_vitq_calibrates_on_the_first_images_drawn(tmp_path: Path, seed: int) -> None:
    images = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    path = tmp_path / "calibration.npz"
    task = tasks.TASKS["shipped"]
    tasks.write_calibration(task, images, "x", 8, seed, path)
    data = open_data(path, [InputSpec("x", np.dtype(np.float32), ("N", 3, 32, 32))], resolve("none", None), samples=8, seed=seed)
    expected = task.prepare(images[np.random.default_rng(seed).permutation(100)[:8]])
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in data.calibration()]), expected)
    assert data.validation_count == tasks.HELD_BACK


# Accuracy


def test_scores() -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 6, 4))
    score = Score()
    for part in (slice(0, 4), slice(4, 6)):
        score.add(
            [(1,), (2,), (3,), ()][: len(a[part])],
            [(1,), (0,), (3,), ()][: len(a[part])],
            np.array([1, 2, 0, 0])[: len(a[part])],
            b[part],
            a[part],
        )
    assert (score.images, score.right, score.agreeing) == (6, 4, 4)
    assert score.sqnr == pytest.approx(sqnr(a, b))
    assert Score().sqnr == float("inf")


def test_evaluation_is_in_batches_and_in_order(tiny: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    task = tasks.Task("t", lambda data: tiny, "none", lambda images: tasks.cifar(32)(images)[:, :, ::4, ::4])
    session = runtime.session(tiny, threads=1)
    order = np.random.default_rng(1).permutation(40)[:20]
    labels = np.zeros(40, np.uint8)
    (logits,) = session.run(["logits"], {"image": task.prepare(images)})
    labels[order[:5]] = logits.argmax(1)[order[:5]]
    labels[order[5:]] = (logits.argmax(1)[order[5:]] + 1) % 5
    scores = evaluate(task, {"float": session, "same": session}, images, labels, order)
    assert (scores["same"].images, scores["same"].right, scores["same"].agreeing) == (20, 5, 20)
    assert scores["same"].sqnr == float("inf")


def test_rows_are_means_over_seeds_with_the_spread_of_top_1() -> None:
    scores = {
        ("float", 0): Score(10, 9, 10, 1.0, 0.0),
        ("vitq", 0): Score(10, 8, 9, 100.0, 1.0),
        ("vitq", 1): Score(10, 5, 6, 1000.0, 1.0),
    }
    rows = summarize(scores, Graphs({}, {}, {"vitq": "yes"}), {key: 1.0 + key[1] for key in scores})
    assert rows[0] == ("float", 0.9, None, 1.0, None, "", 1.0, None)
    assert rows[1] == ("vitq", pytest.approx(0.65), pytest.approx(0.3), pytest.approx(0.75), pytest.approx(25), "yes", 1.5, None)


@pytest.mark.parametrize(
    ("recipe", "told"), [("w8a8", "yes"), ("best", "yes"), ("repq-vit", "but probs"), ("adalog", "but fc2, probs"), ("fp8", "yes")]
)
def test_what_is_no_plain_qdq_is_told(recipe: str, told: str) -> None:
    assert plainness(load_recipe(recipe)) == told


# The command line


def test_without_a_command_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in program.COMMANDS)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"cifar10\.npz is missing: CIFAR-10"):
        tasks.existing(tmp_path / "cifar10.npz")
    with pytest.raises(SystemExit, match="there is no such file"):
        obtain("no.onnx", "dynamo", tmp_path)
    with pytest.raises(SystemExit, match="unknown"):
        obtain("resnet", "dynamo", tmp_path)
    with pytest.raises(SystemExit, match="exit 1"):
        compile_time.job("obtain", "no.onnx", "dynamo", tmp_path, 0)


def test_latency_of_a_tiny_model(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "latency.json"
    words = ["latency", "--models", str(tiny), "--batches", "1", "2", "--rounds", "3", "--samples", "4", "--json", str(saved)]
    assert program.main(words) == 0
    (table,) = json.loads(saved.read_text(encoding="utf-8"))["tables"]
    graphs = ["float", "vitq", "onnxruntime static", "onnxruntime tuned", "onnxruntime dynamic"]
    assert [row[:2] for row in table["rows"]] == [[batch, graph] for batch in (1, 2) for graph in graphs]
    assert all(0 < value < 1000 for row in table["rows"] for value in row[2:])
    assert "9 of 10 Linear layers" in capsys.readouterr().out


def test_recipes_are_paired_with_the_first(tiny: Path) -> None:
    parser = argparse.ArgumentParser()
    latency.add_options(parser)
    words = [
        "--models",
        str(tiny),
        "--batches",
        "1",
        "--rounds",
        "3",
        "--samples",
        "4",
        "--recipe",
        "w8a8",
        "fq-vit:w3a3:native",
        "--no-compare",
    ]
    (table,) = latency.measure(parser.parse_args(words))
    assert table.columns[-1] == "ratio to vitq w8a8"
    assert [row[1] for row in table.rows] == ["float", "vitq w8a8", "vitq fq-vit:w3a3:native"]
    assert table.rows[1][-1] == 1
    assert [note.partition(":")[0] for note in table.notes] == ["vitq w8a8", "vitq fq-vit"]


def test_compile_time_of_a_tiny_model(tiny: Path) -> None:
    parser = argparse.ArgumentParser()
    compile_time.add_options(parser)
    whole, passes = compile_time.measure(parser.parse_args(["--model", str(tiny), "--samples", "4", "--rounds", "1", "--no-compare"]))
    (row,) = whole.rows
    seconds, peak = row[1], row[-1]
    assert row[0] == "vitq-compile"
    assert row[3] in ("yes", "no")
    assert isinstance(seconds, float)
    assert isinstance(peak, float)
    assert seconds > 0.1
    assert 20 < peak < 2000
    assert "calibrate" in [cells[0] for cells in passes.rows]


# Weight repair


def test_the_steps_of_a_pipeline_begin_where_weights_are_fitted() -> None:
    assert repair.steps("calibrate,compute-qparams,compensate-weights,round-weights{method=gptq}") == [
        "calibrate,compute-qparams",
        "calibrate,compute-qparams,compensate-weights",
        "calibrate,compute-qparams,compensate-weights,round-weights{method=gptq}",
    ]
    assert repair.steps("calibrate,compute-qparams") == ["calibrate,compute-qparams"]


def test_a_compile_alone_says_what_it_took(tiny: Path, tmp_path: Path) -> None:
    passes = "calibrate,compute-qparams,compensate-weights"
    seconds, megabytes = repair.compile_alone(tiny, tmp_path / "out.onnx", passes, {"recipe": "fast-w4a4", "samples": 4, "threads": 1})
    assert 0 < seconds < 60
    assert 50 < megabytes < 20_000
    assert onnx.load(tmp_path / "out.onnx").graph.node


# Ways of training


def test_every_way_of_training_is_a_pipeline() -> None:
    texts = {name: training.pipeline("best-w4a4", "w3a3", way, 80) for name, way in training.WAYS.items()}
    for text in texts.values():
        Pipeline.parse(f"{FRONT},{text}", find_pass)
    assert "reconstruct-blocks" not in texts["no training"]
    assert texts["unit=block"].endswith("reconstruct-blocks{steps=10 code-rate=0.006 unit=block}")
    assert texts["code-rate=0"].endswith("reconstruct-blocks{steps=80 code-rate=0.0}")
    assert texts["refit-mlp before it"].startswith("refit-mlp,")
    assert texts["recipe adaquant"].count("reconstruct-blocks") == 2
