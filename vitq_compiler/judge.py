"""NVIDIA's own compiler as judge of a graph: TensorRT-RTX parses it and builds an engine on the CPU, with no GPU and no driver.

Optional: its Python package is proprietary and never a dependency. What it says holds for TensorRT-RTX; TensorRT itself has
the same parser and the same fusions in most, not all, respects. It tells which kernels an engine is made of, not how long
they take, and it computes no outputs: accuracy is onnxruntime's to judge.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from vitq_compiler.errors import TargetError

PACKAGES = ("tensorrt_rtx", "tensorrt_rtx_bindings")
HINT = "pip install tensorrt-rtx-cu12-libs tensorrt-rtx-cu12-bindings (NVIDIA's licence), or do without it"
CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
DEFAULT_CAPABILITY = "8.0"
BATCHES = (1, 8, 32)  # least, usual and most, where the graph leaves the batch open
LATE_SCALE = r"Name: \w*folded_matmul\w*, [^{}]*Datatype: Half"  # a constant of the kernel behind a product
PRODUCTS = frozenset({"gemm", "runtime_fusion", "correlation", "fusion"})  # kinds of layers that multiply matrices


@dataclass(frozen=True)
class Verdict:
    """What the compiler made of one graph.

    Attributes:
        compiler: its name and version.
        capability: the compute capability it built for, such as ``8.0``.
        parsed: whether the parser took the graph.
        built: whether an engine came out.
        errors: why not.
        warnings: what the compiler warned of.
        attention: types of a fused attention kernel, such as ``Half/Half/Half->Half`` -> how many.
        products: types of a matrix product, such as ``Int8 x Int8->Half`` -> how many.
        others: number of all other generated kernels.
        engine_bytes: size of the engine.
        unscaled: number of products that are written in half precision before the scales of their channels are multiplied: the bare sums
            of codes, of which those beyond 65504 are lost.
    """

    compiler: str
    capability: str
    parsed: bool
    built: bool
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    attention: dict[str, int] = field(default_factory=dict)
    products: dict[str, int] = field(default_factory=dict)
    others: int = 0
    engine_bytes: int = 0
    unscaled: int = 0

    @property
    def fused(self) -> int:
        """Number of fused attention kernels."""
        return sum(self.attention.values())

    @property
    def integer(self) -> int:
        """Number of matrix products of which both operands are 8 bits wide."""
        return sum(count for types, count in self.products.items() if re.match(r"(Int8|FP8) x (Int8|FP8)->", types))

    @property
    def kernels(self) -> int:
        """All kernels."""
        return self.fused + self.others + sum(self.products.values())

    def __str__(self) -> str:
        built = f"{self.compiler} for compute capability {self.capability}"
        if not self.built:
            return f"{built}: refused"
        counted = [f"{count} fused attention ({types})" for types, count in self.attention.items()] or ["no fused attention"]
        counted += [f"{count} products {types}" for types, count in self.products.items()]
        counted += [f"{self.others} others", *([f"{self.unscaled} products written before they are scaled"] if self.unscaled else [])]
        return f"{built}: {self.kernels} kernels: {', '.join(counted)}; engine {self.engine_bytes / 1e6:.1f} MB"

    def as_dict(self) -> dict[str, Any]:
        """All of it as data."""
        return {**asdict(self), "fused": self.fused, "integer": self.integer, "kernels": self.kernels}


def available() -> bool:
    """Whether the compiler is installed."""
    try:
        _load()
    except TargetError:
        return False
    return True


def judge(path: Path, capability: str = DEFAULT_CAPABILITY, batches: tuple[int, int, int] = BATCHES) -> Verdict:
    """Parse and build a graph.

    Args:
        path: the ONNX file.
        capability: compute capability of the GPU to build for, of `CAPABILITIES`.
        batches: least, usual and largest size of every open dimension.

    Raises:
        TargetError: the compiler is not installed, or does not know the capability.
    """
    rtx = _load()
    code = getattr(rtx.ComputeCapability, f"SM{capability.replace('.', '')}", None)
    if code is None:
        raise TargetError(f"compute capability {capability!r}: TensorRT-RTX builds for {', '.join(CAPABILITIES)}")
    log = _log(rtx)
    builder = rtx.Builder(log)
    network = builder.create_network(0)
    parser = rtx.OnnxParser(network, log)
    name = f"TensorRT-RTX {rtx.__version__}"
    if not parser.parse_from_file(str(path)):
        return Verdict(name, capability, False, False, tuple(_one_line(parser.get_error(i).desc()) for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    config.profiling_verbosity = rtx.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(code, 0)
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if any(-1 in tuple(tensor.shape) for tensor in inputs):
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            profile.set_shape(tensor.name, *(tuple(size if d == -1 else d for d in tensor.shape) for size in batches))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    warnings = tuple(dict.fromkeys(text for severity, text in log.lines if severity == "WARNING"))
    if engine is None:
        errors = tuple(dict.fromkeys(text for severity, text in log.lines if severity in ("ERROR", "INTERNAL_ERROR")))
        return Verdict(name, capability, True, False, errors or ("no engine, and no reason given",), warnings)
    attention, products, others, unscaled = read_layers(text for _, text in log.lines)
    return Verdict(name, capability, True, True, (), warnings, attention, products, others, engine.nbytes, unscaled)


def read_layers(lines: Any) -> tuple[dict[str, int], dict[str, int], int, int]:
    """Fused attention kernels, matrix products, other kernels and products that are scaled too late, from the verbose log of a build."""
    attention: Counter[str] = Counter()
    products: Counter[str] = Counter()
    others = 0
    produced: set[str] = set()
    scaled: set[str] = set()
    for line in (line for text in lines for line in text.splitlines() if line.startswith("Name: ")):
        kind = re.search(r"LayerType: (\w+)", line)
        if kind is None:
            continue
        before, _, after = line.partition("Outputs:")
        activations, _, constants = before.partition("Constants:")
        written = "/".join(_types(after.partition("TacticName")[0]))
        if "_mha" in line.partition(",")[0]:
            attention[f"{'/'.join(_types(activations))}->{written}"] += 1
        elif kind[1] in PRODUCTS:
            operands = _types(activations)[:1] + (_types(constants)[:1] or _types(activations)[1:2])
            products[f"{' x '.join(operands)}->{written}"] += 1
            produced.update(_names(after))
        elif kind[1] == "kgen":
            others += 1
            if re.search(LATE_SCALE, constants):
                scaled.update(_names(activations))
    return dict(attention), dict(products), others, len(produced & scaled)


def _types(text: str) -> list[str]:
    return re.findall(r"Datatype: (\w+)", text)


def _names(text: str) -> list[str]:
    return re.findall(r"{ Name: ([^,]+),", text)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _log(rtx: ModuleType) -> Any:
    """A logger that keeps what it is told."""

    class Log(rtx.ILogger):  # type: ignore[misc, name-defined]  # only known where it is installed
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append((str(severity).rpartition(".")[2], message))

    return Log()


def _load() -> ModuleType:
    for name in PACKAGES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise TargetError(f"TensorRT-RTX is not installed: {HINT}")
