"""ONNX Runtime: sessions, probe runs, and what its optimizer made of a graph."""

from __future__ import annotations

import ctypes
import gc
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from vitq_compiler.errors import TargetError
from vitq_compiler.graph import LARGE_MODEL, Array, Graph, InputSpec, proto_bytes
from vitq_compiler.opset import PORTABLE, lower_opset
from vitq_compiler.quant import E4M3
from vitq_compiler.releases import known_release, requirement

Feed = dict[str, Array]
PROTOBUF_LIMIT = 2**31 - 2**20  # bytes; a larger model must go through files with external data

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
            return ort.InferenceSession(light.SerializeToString(), options, providers=list(providers))
        if isinstance(model, Path):
            return ort.InferenceSession(str(model), options, providers=list(providers))
        if proto_bytes(model) < PROTOBUF_LIMIT:
            return ort.InferenceSession(model.SerializeToString(), options, providers=list(providers))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(model, path, save_as_external_data=True)
            return ort.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime raises several private exception types
        raise TargetError(f"onnxruntime {ort.__version__} cannot load the graph: {first_line(error)}") from error


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


def probe_feed(inputs: Sequence[InputSpec], batch: int, image_size: int = 224, seed: int = 0) -> Feed:
    """Seeded random values of the right types and shapes; dynamic sizes become ``batch`` (first axis) and ``image_size``."""
    random = np.random.default_rng(seed)
    feed: Feed = {}
    for spec in inputs:
        shape = [d if isinstance(d, int) and d > 0 else (batch if i == 0 else image_size) for i, d in enumerate(spec.shape)]
        values = random.standard_normal(shape) if spec.dtype.kind == "f" else random.integers(0, 2, shape)
        feed[spec.name] = values.astype(spec.dtype)
    return feed


def first_samples(inputs: Sequence[InputSpec], feed: Feed, count: int) -> Feed:
    """The first samples of a batch; all of them where the model fixes its batch."""
    fixed = any(spec.shape and isinstance(spec.shape[0], int) and spec.shape[0] > 0 for spec in inputs)
    return feed if fixed else {name: array[:count] for name, array in feed.items()}


def optimized(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph as the runtime's optimizer leaves it (weights included)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(model, optimized_path=path)
        return onnx.load(path)


def first_line(error: BaseException) -> str:
    """The first line of a runtime's message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
