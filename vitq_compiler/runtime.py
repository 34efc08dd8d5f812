"""ONNX Runtime: sessions, probe runs, and what its optimizer made of a graph."""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from vitq_compiler.cpu import saturates_here
from vitq_compiler.errors import TargetError
from vitq_compiler.graph import LARGE_MODEL, Array, Graph, InputSpec, proto_bytes
from vitq_compiler.opset import PORTABLE, lower_opset
from vitq_compiler.quant import E4M3
from vitq_compiler.releases import known_release, requirement
from vitq_compiler.tensors import from_array

Feed = dict[str, Array]
PROTOBUF_LIMIT = 2**31 - 2**20  # bytes; a larger model must go through files with external data

FLOAT8 = frozenset({onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2})
QDQ_FUSION = "QDQSelectorActionTransformer"  # before 1.32 it makes integer kernels of 8-bit floats, which then do not load

INSTALLED = known_release(ort.__version__)
CPU = ("CPUExecutionProvider",)
PROVIDERS = {"cpu": CPU, "tensorrt": ("TensorrtExecutionProvider",), "nvtensorrtrtx": ("NvTensorRTRTXExecutionProvider",)}

ort.set_default_logger_severity(4)  # what goes wrong is raised and told once
ort.disable_telemetry_events()


def session(
    model: Graph | onnx.ModelProto | Path,
    *,
    threads: int = 0,
    brief: bool = False,
    takes_turns: bool = False,
    as_deployed: bool = False,
    optimized_path: Path | None = None,
    providers: Sequence[str] = CPU,
) -> ort.InferenceSession:
    """An ONNX Runtime session.

    Args:
        model: a graph, whose weights are then shared and not copied where they are large and in float, and of which operators that the
            runtime does not have yet are written in older ones; a ModelProto; or a file.
        threads: intra-op threads; 0 lets the runtime choose.
        brief: for one or two runs: skip what takes longer to prepare than it saves.
        takes_turns: with other work on the same cores: threads sleep between runs instead of waiting awake.
        as_deployed: with the kernels that a user of the graph gets on this CPU. Else products of codes are exact also where these
            kernels saturate, so that a compile gives the same on every CPU but for float rounding.
        optimized_path: also write the optimized graph here.
        providers: execution providers of the runtime, see `providers_of`.

    Raises:
        TargetError: the runtime cannot load the graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if brief:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not as_deployed and saturates_here():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if takes_turns:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
        if isinstance(model, Graph):  # may have more weights than one file takes
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{optimized_path.name}.data")
    try:
        if isinstance(model, Graph):
            light, weights = _runnable(model)
            integer = model.find("DequantizeLinear")  # whose weights must be initializers for integer kernels
            if not integer and sum(w.nbytes for w in weights.values()) > LARGE_MODEL:
                return _Fed(light, weights, options)
            if weights:
                options.add_external_initializers(list(weights), [_shared(w) for w in weights.values()])
            return _loaded(light, options, providers)
        if isinstance(model, Path):
            return ort.InferenceSession(str(model), options, providers=list(providers))
        return _loaded(model, options, providers)
    except Exception as error:  # onnxruntime raises several private exception types
        raise TargetError(f"onnxruntime {ort.__version__} cannot load the graph: {first_line(error)}") from error


def _loaded(model: onnx.ModelProto, options: ort.SessionOptions, providers: Sequence[str]) -> ort.InferenceSession:
    """The session of a ModelProto, through a file where it is too large for a message."""
    unfit = [QDQ_FUSION] if any(t.data_type in FLOAT8 for t in model.graph.initializer) else []
    given = {"providers": list(providers), "disabled_optimizers": unfit}
    if proto_bytes(model) < PROTOBUF_LIMIT:
        return ort.InferenceSession(model.SerializeToString(), options, **given)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path, save_as_external_data=True)
        return ort.InferenceSession(str(path), options, **given)


def _runnable(graph: Graph) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """`Graph.without_weights` of the graph, or of a copy in operators that the installed runtime has.

    It makes int8 quantizers uint8 ones, but leaves the type that they name from opset 21 on, and then refuses its own graph.
    """
    light, weights = graph.without_weights()
    signed = any(len(node.inputs) > 2 and node.inputs[2].dtype == np.int8 for node in graph.find("QuantizeLinear"))
    if requirement(light).met_by(INSTALLED) and not (signed and graph.opset > PORTABLE):
        return light, weights
    copy = graph.snapshot()
    lower_opset(copy, PORTABLE)
    return copy.without_weights()


def providers_of(name: str) -> tuple[str, ...]:
    """The execution providers behind a name of `PROVIDERS`; the CPU takes what another one leaves.

    Raises:
        TargetError: there is no such name, or the installed runtime was built without it.
    """
    if name not in PROVIDERS:
        raise TargetError(f"validation provider {name!r}: choose one of {', '.join(PROVIDERS)}")
    wanted = PROVIDERS[name]
    if missing := [provider for provider in wanted if provider not in ort.get_available_providers()]:
        raise TargetError(f"validation provider {name!r}: onnxruntime {ort.__version__} has no {missing[0]}; install a build that has it")
    return tuple(dict.fromkeys((*wanted, *CPU)))


class _Fed(ort.InferenceSession):  # type: ignore[misc]  # it has no types
    """A session of which the large weights are inputs: these alone it reads where they lie, initializers it copies and packs."""

    def __init__(self, light: onnx.ModelProto, weights: dict[str, Array], options: ort.SessionOptions) -> None:
        outside = [t for t in light.graph.initializer if t.name in weights]
        inside = [t for t in light.graph.initializer if t.name not in weights]
        del light.graph.initializer[:]
        light.graph.initializer.extend(inside)
        light.graph.input.extend(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in outside)
        super().__init__(light.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._weights = weights

    def run(self, output_names: list[str] | None, input_feed: Feed, run_options: ort.RunOptions | None = None) -> list[Array]:
        return super().run(output_names, {**input_feed, **self._weights}, run_options)  # type: ignore[no-any-return]


def release_memory() -> None:
    """Free graphs that nothing refers to, whose nodes and tensors refer to each other, and give the memory back (glibc keeps it)."""
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _shared(weight: Array) -> ort.OrtValue:
    """A weight that the runtime reads where it lies; numpy has no 8-bit floats of its own."""
    if weight.dtype == E4M3:
        if not hasattr(ort.OrtValue, "ortvalue_from_numpy_with_onnx_type"):
            raise TargetError("weights in 8-bit floats need onnxruntime 1.20 or newer")
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(weight.view(np.uint8), onnx.TensorProto.FLOAT8E4M3FN)
    return ort.OrtValue.ortvalue_from_numpy(weight)


def run(runtime: ort.InferenceSession, feed: Feed, outputs: Sequence[str] | None = None) -> list[Array]:
    """Run once; raises TargetError with the runtime's first line where it fails."""
    try:
        return runtime.run(list(outputs) if outputs is not None else None, narrowed(runtime, feed))  # type: ignore[no-any-return]
    except Exception as error:
        raise TargetError(f"onnxruntime {ort.__version__} cannot run the graph: {first_line(error)}") from error


def run_all(runtime: ort.InferenceSession, feeds: Iterable[Feed], outputs: Sequence[str] | None = None) -> list[Array]:
    """Each output on all batches together; those without a batch become one entry for each."""
    batches = [run(runtime, feed, outputs) for feed in feeds]
    return [np.concatenate([np.atleast_1d(part) for part in parts]) for parts in zip(*batches, strict=True)]


def narrowed(runtime: ort.InferenceSession, feed: Feed) -> Feed:
    """``feed`` with float16 numbers for the inputs that take them."""
    half = {i.name for i in runtime.get_inputs() if i.type == "tensor(float16)"}
    return {name: array.astype(np.float16) if name in half and array.dtype == np.float32 else array for name, array in feed.items()}


def probe(graph: Graph, tensors: Iterable[str], feeds: Sequence[Feed], *, threads: int = 0) -> list[dict[str, Array]]:
    """Values of intermediate tensors, one dictionary per feed."""
    names = list(dict.fromkeys(tensors))
    copy = graph.snapshot()
    copy.set_outputs(copy.tensor(name) for name in names)
    runtime = session(copy, threads=threads, brief=True)
    return [dict(zip(names, run(runtime, feed), strict=True)) for feed in feeds]


def sample_count(inputs: Sequence[InputSpec], feed: Feed) -> int:
    """How many samples a batch holds: one where no input has a batch axis."""
    return next((len(feed[spec.name]) for spec in inputs if spec.batched), 1)


def some_samples(inputs: Sequence[InputSpec], feed: Feed, first: int, last: int) -> Feed:
    """The samples from number ``first`` to before ``last`` of a batch; all of them where the model fixes its batch."""
    open_batch = {spec.name for spec in inputs if spec.batched}
    if not open_batch or any(spec.fixed_batch for spec in inputs):
        return feed
    return {name: array[first:last] if name in open_batch else array for name, array in feed.items()}


def first_samples(inputs: Sequence[InputSpec], feed: Feed, count: int) -> Feed:
    """The first ``count`` of `some_samples`."""
    return some_samples(inputs, feed, 0, count)


def limited(inputs: Sequence[InputSpec], batches: Iterable[Feed], count: int) -> Iterator[Feed]:
    """Batches of the first ``count`` samples of ``batches``; more only where the model fixes its batch."""
    left = count
    for feed in batches:
        if left <= 0:
            break
        yield (part := first_samples(inputs, feed, left))
        left -= sample_count(inputs, part)


def optimized(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph as the runtime's optimizer leaves it (weights included)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(model, optimized_path=path)
        return onnx.load(path)


@cache
def rounds_half() -> bool:
    """Whether QuantizeLinear rounds float16 to the nearest code; before 1.30 the runtime drops the fraction."""
    value, half = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT16
    node = onnx.helper.make_node("QuantizeLinear", ["x", "scale"], ["y"])
    scale = from_array(np.array(1, np.float16), "scale")
    graph = onnx.helper.make_graph([node], "probe", [value("x", half, [1])], [value("y", onnx.TensorProto.UINT8, [1])], [scale])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    return int(run(session(model), {"x": np.array([0.75], np.float16)})[0][0]) == 1


def first_line(error: BaseException) -> str:
    """The first line of a runtime's message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
