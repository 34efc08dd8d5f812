"""The command line: every option reaches `compile`, every failure is one line and its exit code, and help is quick."""

import errno
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from tests.sample_report import MET, MISSED, sample_report
from vitq_compiler import catalog, compiler, registry
from vitq_compiler.cli import PROGRAM, main
from vitq_compiler.destination import Destination
from vitq_compiler.errors import InvariantError, ModelError, PassError, RecipeError
from vitq_compiler.model_source import ModelSource
from vitq_compiler.report import CompileReport

DEFAULTS = {
    "recipe": "w8a8",
    "bits": None,
    "definition": None,
    "validate_provider": "cpu",
    "target": "onnxruntime",
    "target_options": None,
    "attention": None,
    "storage": None,
    "calibration": None,
    "samples": None,
    "augment": 0,
    "batch_size": 8,
    "preprocess": None,
    "exclude": (),
    "passes": None,
    "min_sqnr": None,
    "min_agreement": None,
    "output_on_failure": True,
    "dump_after": (),
    "seed": 0,
    "threads": 0,
    "device": "auto",
    "work_dir": None,
}


class Compile:
    """Stands for `compiler.compile`: remembers how it was called; returns or raises what a test wants."""

    def __init__(self) -> None:
        self.result: CompileReport | BaseException = sample_report()
        self.before: Callable[[Path], None] = lambda output: None
        self.model, self.output = Path(), Path()
        self.given: dict[str, Any] = {}

    def __call__(self, model: ModelSource, output: Destination, **given: Any) -> CompileReport:
        given.pop("progress")("calibrating", 1, 1)
        self.model, self.output, self.given = model.file, output.file, given
        self.before(output.file)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@pytest.fixture
def compile_(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compile:
    """The stub in place of the compiler, in an empty folder."""
    stub = Compile()
    monkeypatch.setattr(compiler, "compile", stub)
    monkeypatch.chdir(tmp_path)
    return stub


def run(*args: str) -> Result:
    """Run the command as a shell does."""
    return CliRunner().invoke(main, args, prog_name=PROGRAM, catch_exceptions=False)


def one_line(result: Result, code: int) -> str:
    """The only line on stderr, with nothing on stdout."""
    assert (result.exit_code, result.stdout) == (code, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{PROGRAM}: ")
    return line


def test_defaults(compile_: Compile) -> None:
    result = run("folder/vit.tiny.onnx", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert (compile_.model, compile_.output) == (Path("folder/vit.tiny.onnx"), Path("folder/vit.tiny_int8.onnx"))
    assert compile_.given == DEFAULTS


def test_the_stub_is_called_as_the_compiler_is() -> None:
    parameters = dict(inspect.signature(compiler.compile).parameters)
    assert set(parameters) == {*DEFAULTS, "model", "output", "progress"}
    assert {name: parameters[name].default for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--recipe mine.toml", {"recipe": "mine.toml"}),
        ("--bits w4a8", {"bits": "w4a8"}),
        ("--definition strict", {"definition": "strict"}),
        ("--validate-provider tensorrt", {"validate_provider": "tensorrt"}),
        ("--target onnxruntime", {"target": "onnxruntime"}),
        ("--storage native", {"storage": "native"}),
        ("--calibration photos", {"calibration": Path("photos")}),
        ("--samples 5", {"samples": 5}),
        ("--augment 3", {"augment": 3}),
        ("--batch-size 2", {"batch_size": 2}),
        ("--preprocess clip", {"preprocess": "clip"}),
        ("--exclude fc2 --exclude ^head", {"exclude": ("fc2", "^head")}),
        ("--passes canonicalize,annotate", {"passes": "canonicalize,annotate"}),
        ("--min-sqnr 25.5", {"min_sqnr": 25.5}),
        ("--min-agreement 0.99", {"min_agreement": 0.99}),
        ("--no-output-on-failure", {"output_on_failure": False}),
        ("--dump-after annotate --dump-after canonicalize", {"dump_after": ("annotate", "canonicalize")}),
        ("--seed 7", {"seed": 7}),
        ("--threads 3", {"threads": 3}),
        ("--device cuda:1", {"device": "cuda:1"}),
        ("--work-dir w", {"work_dir": Path("w")}),
    ],
)
def test_every_option_arrives(compile_: Compile, words: str, expected: dict[str, Any]) -> None:
    result = run("vit.onnx", "-o", "out.onnx", *words.split())
    assert result.exit_code == 0
    assert compile_.output == Path("out.onnx")
    assert compile_.given == DEFAULTS | expected


def test_the_summary_goes_to_stdout_and_progress_to_stderr(compile_: Compile) -> None:
    result = run("vit.onnx")
    assert result.stdout.startswith("vit.onnx -> vit_int8.onnx\n")
    assert "pipeline:" not in result.stdout
    assert "calibrating" not in result.stdout
    assert "\x1b" not in result.output
    assert "pipeline:" in run("vit.onnx", "-v").stdout


def test_quiet_prints_only_what_is_asked_for(compile_: Compile) -> None:
    assert run("vit.onnx", "-q", "--explain", "gelu").stdout.startswith("'gelu' finds")
    assert run("vit.onnx", "-q", "--time-passes").stdout.startswith("\nPass ")
    assert "contradict" in one_line(run("vit.onnx", "-q", "-v"), 2)


def test_explain_follows_the_summary(compile_: Compile) -> None:
    lines = run("vit.onnx", "--explain", "nowhere").stdout.splitlines()
    assert lines[0].startswith("vit.onnx ->")
    assert lines[-1] == "  the roles are: qkv, fc1, fc2, head"


def test_report_to_a_file(compile_: Compile, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("old")
    assert run("vit.onnx", "--report", "r.json").exit_code == 0
    assert json.loads((tmp_path / "r.json").read_text())["totals"]["quantized"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"], "nothing is left of writing it"


def test_report_to_stdout_is_json_alone(compile_: Compile) -> None:
    compile_.result = sample_report(gates=(MISSED,))
    result = run("vit.onnx", "--report", "-", "--explain", "qkv", "--time-passes")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["gates"][0]["passed"] is False
    assert "vit.onnx -> vit_int8.onnx" in result.stderr
    assert "'qkv' finds" in result.stderr


@pytest.mark.parametrize(("report", "fault"), [("none/r.json", "does not exist"), (".", "is a directory"), ("vit_int8.onnx", "the output")])
def test_a_report_that_cannot_be_written_stops_before_the_work(compile_: Compile, report: str, fault: str) -> None:
    assert fault in one_line(run("vit.onnx", "--report", report), 2)
    assert compile_.given == {}


def test_gates(compile_: Compile) -> None:
    compile_.result = sample_report(gates=(MET,))
    assert run("vit.onnx", "-q").output == ""
    compile_.result = sample_report(gates=(MET, MISSED))
    line = one_line(run("vit.onnx", "-q"), 3)
    assert line == f"{PROGRAM}: gate min-agreement missed: 98.44 % measured, 99.00 % required; vit_int8.onnx is written all the same"
    compile_.result = sample_report(gates=(MISSED,), output=None)
    assert one_line(run("vit.onnx", "-q", "--no-output-on-failure"), 3).endswith("; vit_int8.onnx is not written")
    assert run("vit.onnx").exit_code == 3


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("", "MODEL is missing"),
        ("vit.onnx --target onnxruntim", "did you mean onnxruntime? --list-targets"),
        ("vit.onnx --dump-after canonicalise", "did you mean canonicalize? --list-passes"),
        ("vit.onnx --exclude (", "not a regular expression"),
        ("vit.onnx --explain [", "not a regular expression"),
        ("vit.onnx --samples 0", "--samples"),
        ("vit.onnx --batch-size x", "--batch-size"),
        ("vit.onnx --min-sqnr nan", "--min-sqnr"),
        ("vit.onnx --min-agreement 95", "--min-agreement"),
        ("vit.onnx --min-agreement nan", "--min-agreement"),
        ("vit.onnx --sample 3", "--samples"),
        ("vit.onnx other.onnx", "other.onnx"),
        ("--print-pipeline --recipe w8a9", "did you mean w8a8"),
        ("--print-pipeline --passes legalize", "legalize needs"),
    ],
)
def test_usage_errors(compile_: Compile, words: str, fault: str) -> None:
    assert fault in one_line(run(*words.split()), 2)
    assert compile_.given == {}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ModelError("model vit.onnx: no such file"), "error: model vit.onnx: no such file"),
        (RecipeError("two\nlines \x1b[2J"), r"error: two lines \x1b[2J"),
        (OSError(errno.ENOSPC, "No space left on device", "x.onnx"), "error: x.onnx: No space left on device"),
        (MemoryError("Unable to allocate 9 EiB"), "error: out of memory: Unable to allocate 9 EiB; give it more"),
    ],
)
@pytest.mark.parametrize("flag", ["-q", "-v"])
def test_errors_are_one_line(compile_: Compile, error: Exception, line: str, flag: str) -> None:
    compile_.result = error
    result = run("vit.onnx", flag)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == f"{PROGRAM}: {line}"
    assert ("Traceback" in result.stderr) == (flag == "-v" and isinstance(error, OSError | MemoryError))


def test_a_bug_asks_for_a_report(compile_: Compile) -> None:
    compile_.result = KeyError("tensor_7")
    assert "internal error: KeyError: 'tensor_7'; this is a bug in vitq-compile; please report it" in one_line(run("vit.onnx", "-q"), 1)
    verbose = run("vit.onnx", "-v")
    assert verbose.exit_code == 1
    assert "Traceback" in verbose.stderr


@pytest.mark.parametrize(
    "error", [PassError("legalize", ("annotate",), "KeyError: 'x'"), InvariantError("pass legalize changed the outputs")]
)
def test_a_bug_that_a_pipeline_wraps_is_one_too(compile_: Compile, error: Exception) -> None:
    compile_.result = error
    assert f"internal error: {error}; this is a bug in vitq-compile; please report it" in one_line(run("vit.onnx", "-q"), 1)
    verbose = run("vit.onnx", "-v")
    assert (verbose.exit_code, "Traceback" in verbose.stderr) == (1, True)


def test_interrupts(compile_: Compile) -> None:
    compile_.result = KeyboardInterrupt()
    assert one_line(run("vit.onnx", "-q"), 130) == f"{PROGRAM}: interrupted, nothing written"
    assert one_line(run("vit.onnx", "-q", "--dump-after", "annotate"), 130) == f"{PROGRAM}: interrupted, no output written"
    old = Path("vit_int8.onnx")
    old.touch()
    os.utime(old, (1, 1))
    assert "nothing written" in one_line(run("vit.onnx", "-q"), 130)
    compile_.before = lambda output: os.utime(output, (2e9, 2e9))
    assert one_line(run("vit.onnx", "-q"), 130) == f"{PROGRAM}: interrupted, vit_int8.onnx is already written"


def test_listings_need_no_model() -> None:
    passes, recipes, targets = (run(f"--list-{kind}") for kind in ("passes", "recipes", "targets"))
    assert [line.split()[0] for line in passes.stdout.splitlines()] == list(registry.names("passes"))
    assert all("->" in line for line in passes.stdout.splitlines())
    assert "\nw8a8 " in recipes.stdout
    assert targets.stdout.split() == list(catalog.list_targets())


def test_the_printed_pipeline_can_be_given_back() -> None:
    pipeline = run("--print-pipeline").stdout.strip()
    assert run("--print-pipeline", "--passes", pipeline).stdout.strip() == pipeline
    assert "canonicalize," in pipeline


def test_the_pipeline_is_that_of_all_options() -> None:
    few, eight = (run("--print-pipeline", "--recipe", "best", "--bits", bits).stdout for bits in ("w4a4", "w8a8"))
    assert "search-ranges" in few
    assert "search-ranges" not in eight
    assert run("--print-pipeline", "--bits", "w4a4", "--storage", "native").stdout.strip().endswith(",pack-weights,legalize")


def test_version() -> None:
    assert run("--version").stdout.startswith(f"{PROGRAM} 0.")


def test_help_teaches() -> None:
    text = run("--help").stdout
    assert run("-h").stdout == text
    for heading in ("Calibration:", "Gates:", "Pipeline:", "Output:", "Examples:", "Exit codes:", "Tab completion"):
        assert heading in text
    assert "_VITQ_COMPILE_COMPLETE=bash_source vitq-compile" in text
    for param in main.params:
        assert all(name in text for name in param.opts), param.name
        assert not isinstance(param, click.Option) or param.help


def test_help_imports_nothing_heavy() -> None:
    heavy = ["onnx", "onnxruntime", "numpy", "rich", "scipy", "PIL", "onnx_graphsurgeon", "vitq_compiler.compiler", "vitq_compiler.recipe"]
    show = "print(sorted(set(sys.modules) & set(sys.argv[1:])), file=sys.stderr)"
    code = f"import sys\nfrom vitq_compiler.cli import main\ntry: main(['--help'])\nfinally: {show}"
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert "Usage:" in done.stdout
    assert done.stderr == "[]\n"


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "vitq_compiler"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{PROGRAM}: error: MODEL is missing; see {PROGRAM} --help\n"
