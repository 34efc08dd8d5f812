"""Ctrl-C and kills, at any step: the older output keeps its bytes, and nothing half-made lies beside it."""

import signal
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.command import OLD, WIDE, contents, start, write_vit
from vitq_compiler.cli import PROGRAM

# A line of progress at every call, so that a test knows where the compile is; a pause before the output is renamed.
TELLING = """
import sys, time
from pathlib import Path
from vitq_compiler import terminal
from vitq_compiler.cli import main
def replace(staged, path):
    print("staged", file=sys.stderr, flush=True)
    time.sleep(60)
Path.replace = replace
terminal.LOG_SECONDS = terminal.LOG_FRACTION = 0.0
main()
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples for which calibration takes many steps."""
    path = tmp_path_factory.mktemp("source") / "many.npz"
    np.savez(path, image=np.random.default_rng(0).standard_normal((600, 3, 16, 16)).astype(np.float32))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and an older output."""
    write_vit(tmp_path / "vit.onnx", WIDE)
    (tmp_path / "out.onnx").write_bytes(OLD)
    return tmp_path


def stop(step: str, number: signal.Signals, folder: Path, temporary: Path, source: Path, output: str = "out.onnx") -> tuple[int, str]:
    """Start a compile, send it a signal at the first line that starts with ``step``; exit code, and the rest of stderr."""
    words = ("vit.onnx", "-o", output, "--calibration", source, "--samples", "500", "--batch-size", "1", "--threads", "1")
    process = start(*words, folder=folder, temporary=temporary, program=("-c", TELLING))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(step):
            process.send_signal(number)
            break
    out, rest = process.communicate(timeout=60)
    assert out == ""
    return process.returncode, rest


@pytest.mark.parametrize("step", ["reading", "calibrating: 2", "validating", "timing", "staged"])
def test_interrupt(folder: Path, source: Path, tmp_path_factory: pytest.TempPathFactory, step: str) -> None:
    before, temporary = contents(folder), tmp_path_factory.mktemp("temporary")
    code, rest = stop(step, signal.SIGINT, folder, temporary, source)
    assert code == 130
    assert rest.splitlines()[-1] == f"{PROGRAM}: interrupted, nothing written"
    assert "Traceback" not in rest
    assert contents(folder) == before
    assert [path for path in temporary.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("output", ["new/", "old/"])
def test_interrupt_while_a_folder_is_written(folder: Path, source: Path, tmp_path_factory: pytest.TempPathFactory, output: str) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "old").mkdir()
    (folder / "old" / "notes.txt").write_text("mine")
    before = contents(folder)
    code, rest = stop("staged", signal.SIGINT, folder, tmp_path_factory.mktemp("temporary"), source, output)
    assert (code, rest) == (130, f"{PROGRAM}: interrupted, nothing written\n")
    assert contents(folder) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("step", ["calibrating: 2", "staged"])
def test_kill(folder: Path, source: Path, tmp_path_factory: pytest.TempPathFactory, step: str, number: signal.Signals) -> None:
    before = contents(folder)
    code, _ = stop(step, number, folder, tmp_path_factory.mktemp("temporary"), source)
    assert code == -number
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    # Nobody can tidy up after a kill in the middle of the write; what is left is hidden and says whose it is.
    assert {name.partition("/")[0][:10] for name in after.keys() - before.keys()} == ({".out.onnx."} if step == "staged" else set())


def test_interrupt_while_a_compiled_module_loads(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Such a module turns KeyboardInterrupt into ImportError."""
    (broken := tmp_path_factory.mktemp("modules") / "onnxruntime.py").write_text(
        "try:\n    raise KeyboardInterrupt\nexcept KeyboardInterrupt as error:\n    raise ImportError('initialization failed') from error\n"
    )
    program = ("-c", f"import sys; sys.path.insert(0, {str(broken.parent)!r}); from vitq_compiler.cli import main; main()")
    process = start("vit.onnx", folder=folder, temporary=folder, program=program)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", f"{PROGRAM}: interrupted, nothing written\n")
