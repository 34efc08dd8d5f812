"""Other quantizers, as a user would call them after reading their documentation or their source.

Those of ``onnxruntime.quantization``:

static    QDQ, uint8 activations, int8 weights per channel; everything else as it comes
tuned     the same for MatMul and Gemm only, and none of their outputs quantized: the fastest setting known to us
s8s8      for TensorRT: everything int8 and symmetric, float biases, weights with a QuantizeLinear of their own
dynamic   int8 weights per channel; activations get their range at run time

They get the graph after ``quant_pre_process``. NVIDIA ModelOpt (``modelopt``), where it is installed, gets the exported one, and its
defaults: int8, entropy calibration, fp16. All calibrate on the images that vitq gets.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.tables import say
from vitq_compiler.data import open_data
from vitq_compiler.graph import Graph
from vitq_compiler.model_io import read_model
from vitq_compiler.preprocess import resolve
from vitq_compiler.runtime import Feed

BATCH = 8
PEERS = ("static", "tuned", "dynamic")


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self, feeds: Iterable[Feed]) -> None:
        self._feeds: Iterator[Feed] = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def calibration_feeds(model: Path, source: Path | None, preprocess: str | None, samples: int, seed: int) -> list[Feed]:
    """The batches on which vitq would calibrate when given the same arguments."""
    inputs = Graph.from_proto(read_model(model)).inputs
    return list(open_data(source, inputs, resolve(preprocess, model), samples=samples, batch_size=BATCH, seed=seed).calibration())


def prepare(model: Path, output: Path) -> Path:
    """``quant_pre_process``; without symbolic shapes where their inference fails, which leaves a file where it runs."""
    model, output = model.resolve(), output.resolve()
    with chdir(output.parent):
        try:
            quant_pre_process(model, output)
        except Exception as error:
            say(f"quant_pre_process: {str(error).splitlines()[0]}; again without symbolic shapes")
            quant_pre_process(model, output, skip_symbolic_shape=True)
    return output


def quantize(kind: str, prepared: Path, output: Path, feeds: Iterable[Feed]) -> Path:
    """Make one of `PEERS` from a prepared graph."""
    if kind == "dynamic":
        quantize_dynamic(prepared, output, per_channel=True, weight_type=QuantType.QInt8)
        return output
    if kind == "s8s8":
        symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False, "AddQDQPairToWeight": True}
        signed = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
        quantize_static(prepared, output, _Reader(feeds), per_channel=True, extra_options=symmetric, **signed)
        return output
    matmuls = ["MatMul", "Gemm"]
    only = {"op_types_to_quantize": matmuls, "extra_options": {"OpTypesToExcludeOutputQuantization": matmuls}} if kind == "tuned" else {}
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(prepared, output, _Reader(feeds), per_channel=True, **types, **only)
    return output


def quantize_as(activation: str, prepared: Path, output: Path, feeds: Iterable[Feed], **options: Any) -> Path:
    """``quantize_static`` with int8 weights per channel, a type of activations by name, and any other of its options."""
    types = {"activation_type": QuantType[activation], "weight_type": QuantType.QInt8}
    quantize_static(prepared, output, _Reader(feeds), per_channel=True, **types, **options)
    return output


def quantize_with_modelopt(model: Path, output: Path, feeds: Iterable[Feed]) -> Path:
    """``python -m modelopt.onnx.quantization`` with its defaults, on a copy: it writes into its input, and where it runs."""
    output = output.resolve()
    batches = list(feeds)
    arrays: dict[str, Any] = {name: np.concatenate([feed[name] for feed in batches]) for name in batches[0]}
    data, copy = output.with_suffix(".npz"), output.with_name(f"{output.stem}_input.onnx")
    np.savez(data, **arrays)
    shutil.copy(model, copy)
    paths = {"onnx_path": copy, "calibration_data_path": data, "output_path": output}
    words = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    command = [sys.executable, "-m", "modelopt.onnx.quantization", *words, "--quantize_mode", "int8", "--calibration_eps", "cpu"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=output.parent)
    if done.returncode or not output.is_file():
        raise RuntimeError((done.stderr.strip().splitlines() or ["it wrote nothing"])[-1])
    return output


def quantize_all(model: Path, folder: Path, feeds: Callable[[], Iterable[Feed]], kinds: Iterable[str] = PEERS) -> dict[str, Path]:
    """Name of a row -> graph, for each of ``kinds``; what fails is said and left out."""
    logging.getLogger().setLevel(logging.ERROR)  # its advice is for people who call it by hand
    prepared = prepare(model, folder / "prepared.onnx")
    graphs: dict[str, Path] = {}
    for kind in kinds:
        name, path = "ModelOpt" if kind == "modelopt" else f"onnxruntime {kind}", folder / f"{kind}.onnx"
        if kind == "modelopt" and importlib.util.find_spec("modelopt") is None:
            say("ModelOpt is not installed, and left out: pip install nvidia-modelopt[onnx]")
            continue
        say(f"{name} ...")
        try:
            graphs[name] = quantize_with_modelopt(model, path, feeds()) if kind == "modelopt" else quantize(kind, prepared, path, feeds())
        except Exception as error:
            say(f"{name} failed: {type(error).__name__}: {str(error).splitlines()[0]}")
    return graphs
