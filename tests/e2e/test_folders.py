"""The command on model folders: what goes in, the layout that comes out, and a model from the hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from tests.e2e.command import FAST, ROOT, contents, run, write_vit
from tests.hub_server import serving
from vitq_compiler import compile

STEPS = {"do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5], "image_std": [0.25]}
CONFIGS = {
    "config.json": {"model_type": "clip"},
    "processor_config.json": {"processor_class": "CLIPProcessor", "image_processor": {**STEPS, "size": {"shortest_edge": 8}}},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which ``repo`` is a model as the hub keeps it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repo" / "onnx").mkdir(parents=True)
    write_vit(tmp_path / "repo" / "onnx" / "model.onnx")
    (tmp_path / "repo" / "onnx" / "model_q4.onnx").write_bytes(b"not looked at")
    for name, content in CONFIGS.items():
        (tmp_path / "repo" / name).write_text(json.dumps(content))
    return tmp_path


def test_a_folder_in(folder: Path) -> None:
    before = contents(folder)
    result = run("repo", *FAST)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "repo/onnx/model.onnx -> repo/onnx/model_int8.onnx"
    assert lines[1] == "Model          onnx/model.onnx, by its name the whole model in full precision; left:"
    assert lines[2].strip() == "onnx/model_q4.onnx"
    assert "Preprocessing  processor_config.json one folder above the model (transformers)" in lines
    after = contents(folder)
    assert after.keys() - before.keys() == {"repo/onnx/model_int8.onnx"}
    assert {name: after[name] for name in before} == before


def test_a_folder_out(folder: Path) -> None:
    assert run("repo", *FAST, "-q", "-o", "alone.onnx").exit_code == 0
    result = run("repo/onnx/model.onnx", *FAST, "-q", "-o", "out/", "--report", "report.json", "--dump-after", "annotate")
    assert (result.exit_code, result.output) == (0, "")
    assert contents(folder / "out") == {
        **{name: json.dumps(content).encode() for name, content in CONFIGS.items()},
        "onnx": None,
        "onnx/model_int8.onnx": (folder / "alone.onnx").read_bytes(),
    }
    report = json.loads((folder / "report.json").read_text())
    assert (report["output"], report["chosen"]) == ("out/onnx/model_int8.onnx", "")
    assert {path.name for path in folder.iterdir()} == {"repo", "out", "out.after-annotate.onnx", "alone.onnx", "report.json"}


def test_from_python(folder: Path) -> None:
    report = compile("repo", "out/", samples=4, threads=1)
    assert (report.model, report.output) == ("repo/onnx/model.onnx", "out/onnx/model_int8.onnx")
    assert (folder / "out" / "config.json").is_file()


def test_a_model_of_links_into_a_cache(folder: Path) -> None:
    """As the hub's library keeps it: everything is a link, external data too."""
    model = onnx.load("repo/onnx/model.onnx")
    onnx.save(model, "repo/onnx/model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=100)
    for number, path in enumerate(sorted(Path("repo").rglob("*.*"))):
        (folder / "blobs").mkdir(exist_ok=True)
        path.rename(folder / "blobs" / str(number))
        path.symlink_to(folder / "blobs" / str(number))
    assert run("repo", *FAST, "-q", "-o", "out/").exit_code == 0
    assert not any(path.is_symlink() for path in Path("out").rglob("*")), "an output stands on its own"
    assert run("repo", "--check").exit_code == 0


def test_a_missed_gate_writes_no_folder(folder: Path) -> None:
    before = contents(folder)
    assert run("repo", *FAST, "-q", "-o", "out/", "--min-sqnr", "999", "--no-output-on-failure").exit_code == 3
    assert contents(folder) == before


@pytest.mark.parametrize("words", [("--inspect",), ("--check",), ("--diagnose", *FAST)])
def test_other_commands_take_folders(folder: Path, words: tuple[str, ...]) -> None:
    result = run("repo", *words)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("repo/onnx/model.onnx")


def test_a_folder_without_a_float_model(folder: Path) -> None:
    assert run("repo", *FAST, "-q", "-o", "out/").exit_code == 0
    for words in ((), ("-o", "again/")):
        result = run("out", *FAST, "-q", *words)
        assert result.exit_code == 2
        assert "model out/onnx/model_int8.onnx: already quantized" in result.stderr
    assert run("out", "--check").exit_code == 0


@pytest.mark.hub
def test_a_model_from_the_hub(folder: Path) -> None:
    """In a process of its own, as the library reads its settings when it is imported."""
    repository = {path.relative_to(folder / "repo").as_posix(): path.read_bytes() for path in (folder / "repo").rglob("*.*")}
    command = [sys.executable, "-m", "vitq_compiler", "hf:me/vit@v1", *FAST, "-q", "--report", "-"]
    with serving() as hub:
        commit = hub.add("me/vit", repository, "v1")
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["model"], report["output"]) == (f"hf:me/vit@{commit}/onnx/model.onnx", "vit_int8/onnx/model_int8.onnx")
    assert report["data"]["preprocess"] == "processor_config.json one folder above the model (transformers)"
    assert contents(folder / "vit_int8").keys() == {*CONFIGS, "onnx", "onnx/model_int8.onnx"}
    model = onnx.load(folder / "vit_int8" / "onnx" / "model_int8.onnx")
    assert ("source", report["model"]) in {(entry.key, entry.value) for entry in model.metadata_props}
