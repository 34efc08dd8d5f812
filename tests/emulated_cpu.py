"""Scripts and models on an emulated CPU: ONNX Runtime's own kernels for a processor that this machine is not.

QEMU's user emulation (``apt-get install qemu-user``) runs a Linux program, instruction by instruction, as the named processor would;
what asks the processor for its instructions gets that processor's answer, so ONNX Runtime takes the kernels it would take there. An
x86 processor is emulated with this interpreter and its packages. QEMU has no VNNI.

An ARM processor needs an interpreter of its own: ``VITQ_AARCH64`` names a folder with ``usr/bin/python3*`` and the libraries it
loads, as unpacked from packages of a Linux distribution for arm64, and in ``site`` numpy and onnxruntime for it
(``pip install --target site --platform manylinux_2_28_aarch64 --only-binary :all: numpy onnxruntime``).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest

from tests.builders import Array, Feed

TIMEOUT = 600  # seconds
OLDEST_QEMU = (7, 2)  # the first with AVX2

BEFORE = """
import sys
import numpy as np
with np.load(sys.argv[1]) as file:
    arrays = dict(file)
results = {}
"""
AFTER = """
np.savez(sys.argv[2], **results)
"""
SESSIONS = """
import onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
for key, entry in arrays.items():
    kind, _, name = key.partition(" ")
    if kind == "config":
        options.add_session_config_entry(name, str(entry))
for key, model in arrays.items():
    kind, _, index = key.partition(" ")
    if kind == "model":
        session = ort.InferenceSession(model.tobytes(), options, providers=["CPUExecutionProvider"])
        (results[index], *_) = session.run(None, {value.name: arrays[f"feed {index} {value.name}"] for value in session.get_inputs()})
"""


@dataclass(frozen=True)
class Cpu:
    """A processor, in QEMU's words: the machine it stands for, ``x86_64`` or ``aarch64``, and its model."""

    machine: str
    model: str


NEHALEM = Cpu("x86_64", "Nehalem,check=off")  # SSE 4.2, no AVX
HASWELL = Cpu("x86_64", "Haswell,check=off")  # AVX2
CORTEX_A53 = Cpu("aarch64", "cortex-a53")  # no dot product
CORTEX_A76 = Cpu("aarch64", "cortex-a76")  # dot product
ARM_MAX = Cpu("aarch64", "max")  # i8mm, SVE


def run_emulated(script: str, arrays: Mapping[str, Array], cpu: Cpu = HASWELL) -> dict[str, Array]:
    """What ``script`` leaves in ``results`` on an emulated ``cpu``: arrays by name.

    The script finds ``arrays`` and ``np`` and may import onnxruntime. Skips the test where the emulator, or the interpreter it
    needs, is missing; fails with the script's own words when the script fails.
    """
    command, environment = _interpreter(cpu)
    with TemporaryDirectory() as folder:
        program, given, found = (Path(folder) / name for name in ("program.py", "given.npz", "found.npz"))
        program.write_text(BEFORE + script + AFTER, encoding="utf-8")
        np.savez(given, **arrays)
        words = [*command, str(program), str(given), str(found)]
        done = subprocess.run(words, env=os.environ | environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        assert done.returncode == 0, done.stderr
        with np.load(found) as file:
            return dict(file)


def run_models(
    models: Sequence[onnx.ModelProto], feeds: Sequence[Feed], cpu: Cpu = HASWELL, config: Mapping[str, str] | None = None
) -> list[Array]:
    """The first output of each model, by ONNX Runtime with one thread on an emulated ``cpu``; ``config`` are entries of the sessions."""
    arrays: Feed = {f"config {name}": np.array(entry) for name, entry in (config or {}).items()}
    for index, (model, feed) in enumerate(zip(models, feeds, strict=True)):
        arrays[f"model {index}"] = np.frombuffer(model.SerializeToString(), np.uint8)
        arrays |= {f"feed {index} {name}": array for name, array in feed.items()}
    results = run_emulated(SESSIONS, arrays, cpu)
    return [results[str(index)] for index in range(len(models))]


def _interpreter(cpu: Cpu) -> tuple[list[str], dict[str, str]]:
    """The words that start Python on ``cpu``, and the variables it needs; skips when there is none."""
    emulator = shutil.which(f"qemu-{cpu.machine}")
    if emulator is None:
        pytest.skip(f"no qemu-{cpu.machine}: install qemu-user")
    version = subprocess.run([emulator, "--version"], capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"version (\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_QEMU:
        pytest.skip(f"{version.splitlines()[0]} is too old: AVX2 needs QEMU 7.2")
    if cpu.machine == platform.machine():
        return [emulator, "-cpu", cpu.model, sys.executable], {}
    if cpu.machine == "x86_64":
        pytest.skip(f"this Python is built for {platform.machine()}, not for x86_64")
    if (folder := os.environ.get("VITQ_AARCH64")) is None:
        pytest.skip("no Python for aarch64: set VITQ_AARCH64 to its folder")
    root = Path(folder)
    python = next(root.glob("usr/bin/python3*"), None)
    assert python is not None, f"VITQ_AARCH64: no usr/bin/python3 in {root}"
    return [emulator, "-cpu", cpu.model, "-L", str(root), str(python)], {"PYTHONHOME": str(root / "usr"), "PYTHONPATH": str(root / "site")}
