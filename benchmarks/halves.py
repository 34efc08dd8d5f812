"""What becomes of a graph for TensorRT when its integer products are written as halves, as NVIDIA's compiler does, imitated in onnxruntime.

float32        products that are written in float32: what the numbers of the graph mean
channel scales one scale for each channel of a weight: sums of codes become halves, and are then multiplied by halves of the scales
common scale   one scale for a weight, multiplied in float32 before the result becomes a half, and by the channels' ratio after that:
               the form that pass split-weight-scales gives a graph

Everything else stays in float32, so that only this differs. TensorRT-RTX 1.7 computes so: its listing of layers has the scales as
constants of the kernel behind a product, and the source of that kernel, which is a part of the engine, multiplies halves. How a GPU
turns a sum beyond the halves into one has not been seen here: it becomes infinite, or (``cut``) the largest half. Models, images and
calibration are those of `python -m benchmarks accuracy`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy import BATCH, NAMES
from benchmarks.tables import Cell, Table, say

if TYPE_CHECKING:
    from benchmarks.tasks import Task
    from vitq_compiler.graph import Graph, Tensor

FORMS = ("float32", "channel scales", "channel scales, cut", "common scale")
LARGEST = 65504.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--model", nargs="+", default=["shipped"], choices=NAMES, help="[shipped]")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of images and models [VITQ_DATA, else .data/real]")
    parser.add_argument("--images", type=int, default=256, metavar="N", help="test images [256]")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="calibration samples [32]")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples [0]")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the runtime; 0 for all cores [0]")


def measure(options: argparse.Namespace) -> list[Table]:
    """One table for each model."""
    from benchmarks.tasks import TASKS

    return [_table(TASKS[name], options) for name in options.model]


def _table(task: Task, options: argparse.Namespace) -> Table:
    import numpy as np

    from benchmarks.tasks import data_folder, existing, write_calibration
    from vitq_compiler import metrics, runtime
    from vitq_compiler.compiler import compile

    folder = options.data or data_folder()
    model = existing(task.model(folder))
    with np.load(existing(folder / task.images)) as stored:
        train, tests = stored["x_train"], stored["x_test"]
    floating = runtime.session(model, threads=options.threads)
    name = floating.get_inputs()[0].name
    with tempfile.TemporaryDirectory() as temporary:
        source, output = Path(temporary) / "calibration.npz", Path(temporary) / "out.onnx"
        write_calibration(task, train, name, options.samples, options.seed, source)
        say(f"{task.name}: compile ...")
        same: dict[str, Any] = {"samples": options.samples, "seed": options.seed, "threads": options.threads, "preprocess": task.preprocess}
        compile(model, output, target="tensorrt", target_options={"float_type": "fp32"}, calibration=source, **same)
        compiled = output.read_bytes()
    order = (task.order() if task.order else np.arange(len(tests)))[: options.images]
    batches = [task.prepare(tests[order[start : start + BATCH]]) for start in range(0, len(order), BATCH)]
    wanted = [task.compared, task.answered]
    reference = [floating.run(wanted, {name: batch}) for batch in batches]
    rows: list[tuple[Cell, ...]] = []
    notes: list[str] = []
    for form in FORMS:
        say(f"{task.name}: {form} ...")
        graph, sums = imitate(compiled, form)
        session = runtime.session(graph, threads=options.threads)
        results = [runtime.run(session, {name: batch}, [*wanted, *sums]) for batch in batches]
        largest = np.max([result[len(wanted) :] for result in results], axis=0)
        pair = (np.concatenate([r[0] for r in reference]), np.concatenate([r[0] for r in results]))
        answers = [[a for r in side for a in task.answer(r[1])] for side in (reference, results)]
        agreement = float(np.mean([a == b for a, b in zip(*answers, strict=True)]))
        sqnr = metrics.sqnr(*pair)
        rows.append((form, "not finite" if sqnr == -np.inf else f"{sqnr:.1f}", agreement))
        if form == FORMS[0]:
            beyond = f"{int((largest > LARGEST).sum())} of {len(sums)} layers"
            notes.append(f"The largest sum of codes is {largest.max():.0f}; {beyond} have sums beyond {LARGEST:.0f}, where halves end.")
    columns = ("products", f"SQNR of {task.compared}, dB", "agreement")
    title = f"Integer products of {task.name} written as halves, {len(order)} test images"
    return Table(title, columns, tuple(rows), tuple(notes), {"agreement": ".4f"})


def imitate(compiled: bytes, form: str) -> tuple[Graph, list[str]]:
    """A graph with a float32 remainder, its integer MatMuls as ``form``; and outputs that hold the largest sum of codes of each."""
    import onnx

    from vitq_compiler.graph import Graph, is_constant, producer

    graph = Graph.from_proto(onnx.load_from_string(compiled))
    outputs, largest = list(graph.outputs), []
    for node in graph.find("MatMul"):
        left, right = (producer(t) for t in node.inputs)
        quantized = left is not None and right is not None and left.op == right.op == "DequantizeLinear"
        if not quantized or not is_constant(right.inputs[0]):  # type: ignore[union-attr]
            continue
        sums, result = _product(graph, node, form)
        graph.replace(node.outputs[0], result)
        magnitude = graph.add("Abs", [sums], name=f"{node.name}/magnitude")
        largest.append(graph.add("ReduceMax", [magnitude], name=f"{node.name}/largest", keepdims=0))
        largest[-1].dtype, largest[-1].shape = sums.dtype, []
    graph.set_outputs([*outputs, *largest])
    return graph, [tensor.name for tensor in largest]


def _product(graph: Graph, node: Any, form: str) -> tuple[Tensor, Tensor]:
    """The sum of codes of a MatMul, and its result."""
    import numpy as np
    from onnx import TensorProto

    from vitq_compiler.graph import value
    from vitq_compiler.passes.split_weight_scales import common_scale

    def constant(array: Any) -> Tensor:
        return graph.constant(f"{node.name}/number", np.asarray(array, np.float32))

    def apply(op: str, *inputs: Tensor, **attributes: Any) -> Tensor:
        return graph.insert(op, inputs, name=f"{node.name}/{op.lower()}", like=node.outputs[0], **attributes)

    def half(tensor: Tensor) -> Tensor:
        narrow = apply("Cast", tensor, to=TensorProto.FLOAT16)
        narrow.dtype = np.dtype(np.float16)
        return apply("Cast", narrow, to=TensorProto.FLOAT)

    def as_half(array: Any) -> Any:
        return np.asarray(array, np.float16).astype(np.float32)

    left, right = (tensor.inputs[0] for tensor in node.inputs)
    codes = apply("Cast", left.inputs[0], to=TensorProto.FLOAT)
    sums = apply("MatMul", codes, constant(value(right.inputs[0]).astype(np.float32)))
    step, scale = as_half(value(left.inputs[1])), as_half(value(right.inputs[1]))
    if form == "float32":
        return sums, apply("Mul", sums, constant(step * scale))
    if form == "common scale":
        common = common_scale(scale)
        return sums, half(apply("Mul", half(apply("Mul", sums, constant(step * common))), constant(as_half(scale / common))))
    written = apply("Clip", sums, constant(-LARGEST), constant(LARGEST)) if form.endswith("cut") else sums
    return sums, half(apply("Mul", half(written), constant(as_half(step * scale))))
