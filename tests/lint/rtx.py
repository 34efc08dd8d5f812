"""NVIDIA's own parser and builder: TensorRT-RTX, which needs no GPU. Importing it fails where it is not installed."""

from typing import Any

import onnx
import tensorrt_rtx_bindings as trt


class Quiet(trt.ILogger):  # type: ignore[misc]
    """A logger that says nothing."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity: Any, message: str) -> None:
        """Drop it."""


def judge(model: onnx.ModelProto, compute_capability: float = 8.9) -> str:
    """``parse`` or ``build`` where that step fails, else ``ok``."""
    logger = Quiet()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        return "parse"
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{round(compute_capability * 10)}"), 0)
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    if any(-1 in tuple(tensor.shape) for tensor in inputs):
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            profile.set_shape(tensor.name, *[tuple(batch if size == -1 else size for size in tensor.shape) for batch in (1, 2, 4)])
        config.add_optimization_profile(profile)
    return "ok" if builder.build_serialized_network(network, config) is not None else "build"
