"""Tab completion: names, files, pipelines, and quick enough for a key."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete

from vitq_compiler.cli import PROGRAM, main


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        (["--recipe"], "w", ["w8a8", "works.toml"]),
        (["--recipe"], "folder/", ["folder/"]),
        (["--target"], "onnx", ["onnxruntime"]),
        (["--dump-after"], "recover", ["recover-gelu", "recover-layernorm", "recover-rmsnorm"]),
        (["--passes"], "canonicalize,recover-g", ["canonicalize,recover-gelu"]),
        ([], "--min", ["--min-sqnr", "--min-agreement"]),
    ],
)
def test_tab_completion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], incomplete: str, expected: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "works.toml").touch()
    found = BashComplete(main, {}, PROGRAM, "_VITQ_COMPILE_COMPLETE").get_completions(words, incomplete)
    assert [item.value for item in found] == expected


@pytest.mark.parametrize(("words", "kind"), [(["--calibration"], "file"), (["--recipe"], "file"), (["--report"], "file"), ([], "file")])
def test_paths_are_completed_by_the_shell(words: list[str], kind: str) -> None:
    found = BashComplete(main, {}, PROGRAM, "_VITQ_COMPILE_COMPLETE").get_completions(words, "some/fold")
    assert [item.type for item in found] == [kind]


def test_completion_imports_nothing_heavy() -> None:
    environment = os.environ | {
        "_VITQ_COMPILE_COMPLETE": "bash_complete",
        "COMP_WORDS": "vitq-compile --recipe w8",
        "COMP_CWORD": "2",
        "PYTHONPROFILEIMPORTTIME": "1",
    }
    done = subprocess.run([sys.executable, "-m", "vitq_compiler"], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "plain,w8a8"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not {"numpy", "onnx", "rich"} & imported
