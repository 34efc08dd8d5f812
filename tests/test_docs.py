"""The commands of docs/tensorrt.md: those that can run here are run, of the others the words are checked."""

import ast
import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from benchmarks import __main__ as benchmarks
from tests.builders import Sizes, vit
from tests.e2e.command import ROOT, run
from vitq_compiler.arguments import OPTIONS
from vitq_compiler.judge import HINT

TEXT = (ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
LINES = [line for kind, block in BLOCKS if not kind for line in block.splitlines()]
COMMANDS = [shlex.split(line)[1:] for line in LINES if line.startswith("vitq-compile ")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page takes for granted: a model, pictures of its size, and a graph of another tool."""
    onnx.save(vit(Sizes(depth=1, width=32, heads=2, hidden=48, classes=16)), tmp_path / "vit.onnx")
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "photos" / f"{index}.png")
    shutil.copy(tmp_path / "vit.onnx", tmp_path / "other_tools_graph.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_in_their_order(folder: Path) -> None:
    assert len(COMMANDS) == 3
    for words in COMMANDS:
        if "--check" in words and find_spec("tensorrt_rtx_bindings") is None:
            words = [*words, "--no-judge"]
        result = run(*words, *(() if "--check" in words else ("--threads", 1)))
        assert result.exit_code == 0, result.output
    assert (folder / "vit_int8.onnx").is_file()


def test_the_engine_is_built_with_what_the_compiler_prints(folder: Path) -> None:
    """The page leaves the sizes out; everything else is the printed line."""
    (line,) = [line for line in LINES if line.startswith("trtexec ")]
    printed = run(*COMMANDS[0], "--threads", 1).stdout
    (told,) = [text.removeprefix("Next: ") for text in printed.splitlines() if text.startswith("Next: ")]
    assert re.sub(r"(Shapes)=\S+", r"\1=...", told) == line


def test_the_table_of_prices_is_as_printed(folder: Path) -> None:
    printed = run(*COMMANDS[0], "--threads", 1).stdout.splitlines()
    start = next(i for i, line in enumerate(printed) if line.startswith("Attention |"))
    shown = next(block for kind, block in BLOCKS if block.startswith("Attention |")).splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in (*printed[start : start + 5], *shown)]
    assert cells[0] == cells[5]
    assert [row[:2] for row in cells[2:5]] == [row[:2] for row in cells[7:]]


def test_options_that_the_page_names_exist() -> None:
    known = {name for option in OPTIONS for name in option.opts}
    own = re.sub(r"trtexec.*|`--(int8|fp16|stronglyTyped)[^`]*`", "", TEXT)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", own)) - {"--peers"}
    assert named <= known, named - known
    assert {"--attention", "--validate-provider", "--float-type", "--trt-version"} <= named
    choices = {name: option.type.choices for option in OPTIONS for name in option.opts if hasattr(option.type, "choices")}
    assert set(choices["--attention"]) == {"float", "int8", "fp8"}
    for choice in choices["--attention"]:
        assert f"`--attention {choice}" in TEXT


def test_python_parses_and_exports_as_the_benchmarks_do() -> None:
    (code,) = [block for kind, block in BLOCKS if kind == "python"]
    calls = [node.func for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert [ast.unparse(call) for call in calls if isinstance(call, ast.Attribute) and call.attr == "export"] == ["torch.onnx.export"]


def test_installing_the_judge_is_said_alike_everywhere() -> None:
    (line,) = [line for line in LINES if line.startswith("pip ")]
    assert HINT.startswith(line)


def test_the_benchmark_takes_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    words = re.search(r"`python -m benchmarks (tensorrt[^`]*)`", TEXT)
    assert words is not None
    with pytest.raises(SystemExit) as stopped:
        benchmarks.main([*words[1].split(), "--help"])
    assert stopped.value.code == 0
    assert "--peers" in capsys.readouterr().out
