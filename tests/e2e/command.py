"""Shared by the end-to-end tests: a model file, the command in this process and in its own, and what a folder holds."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import onnx
from click.testing import CliRunner, Result

from tests import builders
from vitq_compiler.cli import PROGRAM, main

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "models" / "vit_tiny_cifar10.onnx"
OLD = b"an older output"
FAST = ("--samples", "4", "--threads", "1")
WIDE = builders.Sizes(image=16, width=64, heads=4, hidden=256)  # wide enough for weights to outweigh everything else


def write_vit(path: Path, sizes: builders.Sizes | None = None, dialect: builders.Dialect = builders.TIMM) -> Path:
    """A tiny ViT of two blocks as a file."""
    onnx.save(builders.vit(sizes, dialect), path)
    return path


def run(*words: object) -> Result:
    """The command in this process."""
    return CliRunner().invoke(main, [str(word) for word in words], prog_name=PROGRAM, catch_exceptions=False)


def start(*words: object, folder: Path, temporary: Path, program: tuple[str, ...] = ("-m", "vitq_compiler")) -> subprocess.Popen[str]:
    """The command in its own process, started in ``folder``; ``temporary`` is where its temporary files go."""
    command = [sys.executable, *program, *map(str, words)]
    environment = {**os.environ, "TMPDIR": str(temporary)}

    def listen() -> None:  # a shell starts background jobs deaf to Ctrl-C, and children inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes, text=True, preexec_fn=listen)  # noqa: PLW1509


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: the bytes of files, None for folders."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}
