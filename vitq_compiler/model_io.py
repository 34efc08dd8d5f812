"""Model files: reading one with every check a user needs, and writing one so that it appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
from itertools import count
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, serialization, version_converter

from vitq_compiler.branches import inline_branches
from vitq_compiler.contrib import DOMAIN, UNFUSE
from vitq_compiler.errors import ModelError, OutputError
from vitq_compiler.graph import LARGE, proto_bytes
from vitq_compiler.mending import mend
from vitq_compiler.opset import STANDARD_DOMAINS, form_of, opset_of
from vitq_compiler.precision import HALF
from vitq_compiler.runtime import PROTOBUF_LIMIT, first_line
from vitq_compiler.tensors import is_external, numpy_type, stored_bytes, to_array

OLDEST_OPSET = 11
QUANTIZED_OPS = frozenset(
    {
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"),
        *("QGemm", "QAttention", "MatMulNBits", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
    }
)
WEIGHTED_OPS = frozenset({"MatMul", "Gemm", "Conv", "LayerNormalization", "BatchNormalization"})
MAPPED = frozenset({TensorProto.FLOAT, *HALF, TensorProto.INT64})  # types of weights that numpy reads as they lie in a file


def read_model(path: Path) -> onnx.ModelProto:
    """`read_mended` without what was wrong."""
    return read_mended(path)[0]


def read_mended(path: Path) -> tuple[onnx.ModelProto, list[str]]:
    """Read and check an ONNX model in float; local functions and branches that are always taken are inlined.

    Returns:
        The model, and what was wrong with it and has been put right, a sentence each; see `mending`.

    Raises:
        ModelError: the file is missing, not ONNX, incomplete, already quantized, of an unknown opset or operator domain, uses
            control flow, or holds weights that are not finite.
    """
    model = parse_model(path)
    try:
        mended = mend(model)
        if model.functions:
            model = inliner.inline_local_functions(model)
        inline_branches(model.graph)
    except ModelError as error:
        raise ModelError(f"model {path}: {error}") from None
    adopt_contrib_ops(model)
    check_model(model, path)
    weights = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in weights]  # until IR version 3 every weight was an input too
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return model, mended


def parse_model(path: Path) -> onnx.ModelProto:
    """The file as a ModelProto; large initializers in external files stay there, by absolute path, and all else is loaded.

    Raises:
        ModelError: as `open_model`, or its external data cannot be read.
    """
    model = open_model(path)
    folder = follow_links(model, path)
    try:
        left = [(tensor, file) for tensor in model.graph.initializer if (file := _mappable(tensor, folder)) is not None]
        for tensor, _ in left:
            tensor.ClearField("data_location")  # so that onnx does not load it
        outside = [tensor for tensor in model.graph.initializer if is_external(tensor)]
        onnx.load_external_data_for_model(model, str(folder))
        if short := next((tensor for tensor in outside if len(tensor.raw_data) < stored_bytes(tensor)), None):
            raise ValueError(f"it ends before tensor {short.name} does")
    except Exception as error:
        raise ModelError(f"model {path}: cannot read its external data ({first_line(error)}); export it again") from error
    for tensor in model.graph.initializer:
        tensor.ClearField("data_location")  # so that the output does not depend on where weights were stored
    for tensor, file in left:
        tensor.data_location = TensorProto.EXTERNAL
        next(entry for entry in tensor.external_data if entry.key == "location").value = str(file)
    return model


def follow_links(model: onnx.ModelProto, path: Path) -> Path:
    """The folder that holds the external data of a model from ``path``: its own, except in a download cache.

    There the model and its data are links into one folder of contents. onnx reads no links, as they may lead anywhere; these lead where
    the model itself lies, so its data goes by its name there, and that folder is returned.
    """
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    files = [path.parent / entry.value for entry in entries]
    contents = path.resolve().parent
    if not path.is_symlink() or not all(file.is_symlink() and file.resolve().parent == contents for file in files):
        return path.parent
    for entry, file in zip(entries, files, strict=True):
        entry.value = file.resolve().name
    return contents


def _mappable(tensor: TensorProto, folder: Path) -> Path | None:
    """The file in which a large tensor lies so that it can be used there; None leaves it, and what may be wrong, to onnx's loader."""
    if not is_external(tensor) or tensor.data_type not in MAPPED or np.prod(tensor.dims) < LARGE:
        return None
    where = {entry.key: entry.value for entry in tensor.external_data}
    item, size, offset = numpy_type(tensor.data_type).itemsize, stored_bytes(tensor), int(where.get("offset", 0))
    file = folder.resolve() / where.get("location", "")
    fits = file.resolve() == file and file.is_relative_to(folder.resolve()) and file.is_file() and 0 <= offset <= file.stat().st_size - size
    return file if fits and offset % item == 0 and int(where.get("length", size)) == size else None


def open_model(path: Path) -> onnx.ModelProto:
    """The file as a ModelProto, external data left where it is.

    Raises:
        ModelError: it is missing, a directory, not ONNX, or its external data is missing.
    """
    if not path.exists():
        raise ModelError(f"model {path}: no such file")
    if path.is_dir():
        raise ModelError(f"model {path}: is a directory, give the .onnx file in it")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ModelError(f"model {path}: not a readable ONNX file ({first_line(error)}); export it again") from error
    if not model.HasField("graph") or not model.graph.node:
        raise ModelError(f"model {path}: not an ONNX model, or one without nodes; export it again")
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and not (path.parent / entry.value).is_file():
                raise ModelError(f"model {path}: its external data file {entry.value} is missing, put it beside the model")
    return model


def adopt_contrib_ops(model: onnx.ModelProto) -> None:
    """Move what onnxruntime's optimizers write into the standard domain, though it is not standard there, to their own."""
    adopted = False
    for node in model.graph.node:
        if node.domain in STANDARD_DOMAINS and node.op_type in UNFUSE and not form_of(node.op_type, opset_of(model)):
            node.domain, adopted = DOMAIN, True
    if adopted and not any(o.domain == DOMAIN for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def check_model(model: onnx.ModelProto, path: Path) -> None:
    """Refuse what the compiler cannot take, with the reason; see `read_model`."""
    graph = model.graph
    weights = {t.name for t in graph.initializer}
    inputs = [i for i in graph.input if i.name not in weights]
    if not inputs:
        raise ModelError(f"model {path}: has no inputs, so there is nothing to calibrate; export it with its image input")
    version = opset_of(model)
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= version <= newest:
        hint = f", or install a newer onnx than {onnx.__version__}" if version > newest else ""
        raise ModelError(f"model {path}: opset {version} is not supported, export with opset {OLDEST_OPSET} to {newest}{hint}")
    for node in graph.node:
        if node.op_type in QUANTIZED_OPS:
            raise ModelError(f"model {path}: already quantized ({node.op_type} node {node.name or '?'}); give the float32 model")
        if node.domain not in STANDARD_DOMAINS:
            if node.domain == DOMAIN and node.op_type in UNFUSE:
                continue
            advice = "give the model as it was before onnxruntime's optimizer" if node.domain.startswith(DOMAIN) else "export without it"
            raise ModelError(
                f"model {path}: operator {node.domain}.{node.op_type} (node {node.name or '?'}) is not standard ONNX; {advice}"
            )
        if not onnx.defs.has(node.op_type):
            raise ModelError(
                f"model {path}: operator {node.op_type} (node {node.name or '?'}) is not in ONNX; export with standard operators"
            )
    weighted = {name for n in graph.node if n.op_type in WEIGHTED_OPS for name in n.input}
    for tensor in graph.initializer:
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.DOUBLE, *HALF):
            values = to_array(tensor)
            if np.isnan(values).any() or (tensor.name in weighted and not np.isfinite(values).all()):
                raise ModelError(f"model {path}: weight {tensor.name} holds NaN or Inf; export a healthy checkpoint")


def convert_opset(model: onnx.ModelProto, opset: int, path: Path) -> onnx.ModelProto:
    """The model at ``opset`` or newer, by ONNX's own converter; weights do not pass through it.

    Raises:
        ModelError: an operator has no conversion.
    """
    version = opset_of(model)
    if version >= opset:
        return model
    scopes = {n.name: list(n.metadata_props) for n in model.graph.node if n.name}
    weights = [t for t in model.graph.initializer if np.prod(t.dims) >= LARGE]
    light = onnx.ModelProto(ir_version=max(model.ir_version, 4), opset_import=model.opset_import)
    light.graph.MergeFrom(onnx.GraphProto(name=model.graph.name, node=model.graph.node, input=model.graph.input, output=model.graph.output))
    names = {t.name for t in weights}
    light.graph.initializer.extend(t for t in model.graph.initializer if t.name not in names)
    light.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in weights)
    try:
        converted = version_converter.convert_version(light, opset)
    except Exception as error:
        raise ModelError(
            f"model {path}: cannot convert opset {version} to {opset} ({first_line(error)}); export with opset {opset}"
        ) from error
    kept = [i for i in converted.graph.input if i.name not in names]
    del converted.graph.input[:]
    converted.graph.input.extend(kept)
    converted.graph.initializer.extend(weights)
    for node in converted.graph.node:
        node.metadata_props.extend(scopes.get(node.name, []))
    return converted


def model_files(path: Path) -> list[Path]:
    """A model file and the files of its external data; only the file itself where it cannot be read."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:  # what is wrong with it is said by `read_model`
        return [path]
    return [path, *sorted({path.parent / e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"})]


def file_bytes(path: Path) -> int:
    """Size of a model file and of its external data."""
    return sum(file.stat().st_size for file in model_files(path))


def check_output(path: Path, model: Path) -> None:
    """Refuse an output that cannot be written, or not be read by its name, before any work is done.

    Raises:
        OutputError: it is the input or its data, a directory, in a folder that is missing or read-only, or named as a file of another
            format, which onnxruntime and onnx tell by the name alone.
    """
    if path.suffix.lower() == ".ort":
        convert = "python -m onnxruntime.tools.convert_onnx_models_to_ort"
        raise OutputError(f"output {path}: .ort is onnxruntime's own format; give a name in .onnx, and convert the file with {convert}")
    if (kind := serialization.registry.get_format_from_file_extension(path.suffix)) not in (None, "protobuf"):
        raise OutputError(f"output {path}: onnx reads {path.suffix} as {kind}, not as a binary model; give a name in .onnx")
    if path.exists() and any(file.exists() and path.samefile(file) for file in model_files(model)):
        raise OutputError(f"output {path}: is the input model or its data; give another name")
    if path.is_dir():
        raise OutputError(f"output {path}: is a directory; give a file name with -o")
    if not path.parent.is_dir():
        raise OutputError(f"output {path}: the folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise OutputError(f"output {path}: not writable; check its permissions")


def make_work_folder(path: Path) -> None:
    """Make a folder for what a compile leaves behind, where there is none yet.

    Raises:
        OutputError: it is a file, or cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"work directory {path}: {error.strerror or error}; give another one") from error
    if not os.access(path, os.W_OK):
        raise OutputError(f"work directory {path}: not writable; check its permissions")


def write_model(model: onnx.ModelProto, path: Path) -> None:
    """Write ``model`` so that ``path`` holds either what it held before or the whole new file.

    A model over 2 GB puts its weights into a data file beside it, of a new name, so that an old model keeps its own.

    Raises:
        OutputError: the disk refuses.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            staged = Path(folder) / path.name
            if proto_bytes(model) < PROTOBUF_LIMIT:
                staged.write_bytes(model.SerializeToString(deterministic=True))
            else:
                data = next(name for n in count() if not (path.parent / (name := f"{path.name}.{n}.data")).exists())
                onnx.save(model, staged, save_as_external_data=True, location=data)
                (Path(folder) / data).replace(path.parent / data)
            staged.replace(path)
    except OSError as error:
        raise OutputError(f"output {path}: cannot be written ({error.strerror or error})") from error


def write_text(text: str, path: Path) -> None:
    """Write a report as `write_model` writes a model; raises OutputError where the disk refuses."""
    write_bytes(text.encode(), path)


def write_bytes(content: bytes, path: Path) -> None:
    """Write a file as `write_model` writes a model.

    Raises:
        OutputError: the disk refuses.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            staged = Path(folder) / path.name
            staged.write_bytes(content)
            staged.replace(path)
    except OSError as error:
        raise OutputError(f"output {path}: cannot be written ({error.strerror or error})") from error
