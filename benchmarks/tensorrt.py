"""What NVIDIA's compiler (TensorRT-RTX, on the CPU) and the rules of ``--check`` make of graphs for TensorRT.

attention   fused attention kernels, of the attention blocks there are
int8        matrix products of which both operands are int8, of all products
unscaled    products that are written in half precision before the scales of their channels are multiplied (see docs/tensorrt.md)
other       all other kernels
engine      size of the engine
findings    errors (and what means something else), and warnings, of ``--check``

fp16 is the exported model in half precision; vitq its graph for target tensorrt; s8s8 the same from onnxruntime.quantization, with
the options that TensorRT needs; ModelOpt that of NVIDIA's quantizer. Calibration is on built-in pictures: nothing here depends on
numbers. Kernels are not timed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.models import TIMM, obtain
from benchmarks.tables import Cell, Table, say

NAMES = ("vit_small", "vit_base", "deit_tiny", "swin_tiny")
SAMPLES = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--model", nargs="+", default=list(NAMES), metavar="NAME", help=f"{', '.join(TIMM)}, or ONNX files [{NAMES}]")
    parser.add_argument("--exporter", nargs="+", default=["dynamo", "torchscript"], choices=["dynamo", "torchscript"], help="[both]")
    parser.add_argument("--compute-capability", nargs="+", default=["8.0", "8.9"], metavar="X.Y", help="of the GPU [8.0 8.9]")
    parser.add_argument("--peers", action="store_true", help="the graphs of onnxruntime.quantization and ModelOpt too")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and pictures [0]")


def measure(options: argparse.Namespace) -> list[Table]:
    """One table."""
    rows: list[tuple[Cell, ...]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.model:
            for exporter in options.exporter if not name.endswith(".onnx") else ("file",):
                folder = Path(temporary) / f"{Path(name).stem}_{exporter}"
                folder.mkdir()
                model = obtain(name, exporter, folder, options.seed)
                for graph, path, attentions in make_graphs(model, folder, options):
                    rows += [(Path(name).stem, exporter, graph, *row) for row in verdicts(path, attentions, options.compute_capability)]
    columns = ("model", "exporter", "graph", "GPU", "attention fused", "int8 products", "unscaled", "other kernels", "all kernels")
    columns += ("engine, MB", "errors", "warnings")
    return [Table("Graphs for TensorRT through NVIDIA's compiler", columns, tuple(rows), formats={"engine, MB": ".1f"})]


def make_graphs(model: Path, folder: Path, options: argparse.Namespace) -> list[tuple[str, Path, int]]:
    """Name, file and number of attention blocks of each graph of a model."""
    from benchmarks.peers import calibration_feeds, quantize_all
    from vitq_compiler.compiler import compile

    say(f"{model.stem}: compile ...")
    report = compile(model, folder / "vitq.onnx", target="tensorrt", samples=SAMPLES, seed=options.seed)
    attentions = len({row.block for row in report.linears if row.block.startswith("attention ")})
    graphs = {"fp16": halve(model, folder / "fp16.onnx"), "vitq": folder / "vitq.onnx"}
    if options.peers:
        feeds = calibration_feeds(model, None, "imagenet", SAMPLES, options.seed)
        graphs |= quantize_all(model, folder, lambda: feeds, ["s8s8", "modelopt"])
    return [(name, path, attentions) for name, path in graphs.items()]


def halve(model: Path, output: Path) -> Path:
    """The model in half precision between float32 inputs and outputs, its structure as it was exported."""
    from vitq_compiler.data import open_data
    from vitq_compiler.model_io import write_model
    from vitq_compiler.opening import open_model
    from vitq_compiler.passes.canonicalize import Canonicalize
    from vitq_compiler.passes.narrow_floats import NarrowFloats
    from vitq_compiler.pipeline import Compilation
    from vitq_compiler.preprocess import resolve
    from vitq_compiler.recipe import load_recipe
    from vitq_compiler.targets.tensorrt import Tensorrt

    target = Tensorrt()
    graph = open_model(model, target).graph
    data = open_data(None, graph.inputs, resolve("imagenet", model), samples=SAMPLES, batch_size=SAMPLES)
    c = Compilation(graph, load_recipe("w8a8"), target, data)
    Canonicalize().run(c)
    NarrowFloats().run(c)
    write_model(graph.to_proto(), output)
    return output


def verdicts(path: Path, attentions: int, capabilities: list[str]) -> list[tuple[Any, ...]]:
    """A row for each GPU; those that do not differ are one."""
    from vitq_compiler.check import check
    from vitq_compiler.lint.rule import WARNING

    rows: dict[tuple[Any, ...], list[str]] = {}
    for capability in capabilities:
        report = check(path, "tensorrt", compute_capability=float(capability), with_judge=True)
        found = report.verdict
        if found is None:
            raise SystemExit(report.hint)
        counts = sum(f.severity.fails for f in report.findings), sum(f.severity is WARNING for f in report.findings)
        if found.built:
            products = f"{found.integer} of {sum(found.products.values())}"
            kernels = (products, found.unscaled, found.others, found.kernels, round(found.engine_bytes / 1e6, 1))
            row: tuple[Any, ...] = (f"{found.fused} of {attentions}", *kernels, *counts)
        else:
            say(f"{path.name}: {'; '.join(found.errors)}")
            row = ("refused" if not found.parsed else "not built", None, None, None, None, None, *counts)
        rows.setdefault(row, []).append(capability)
    return [(", ".join(names), *row) for row, names in rows.items()]
