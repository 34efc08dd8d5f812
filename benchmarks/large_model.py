"""A vision transformer of any size, made without torch: its weights go straight to one external file, so memory stays small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PATCH, SIDE = 14, 56


class _Writer:
    def __init__(self, path: Path) -> None:
        self.data = path.with_suffix(".data")
        self.file = self.data.open("wb")
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def op(self, kind: str, *inputs: str, **attributes: object) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}/out"], name, **attributes))
        return f"{name}/out"

    def weight(self, *shape: int, scale: float = 0.02, around: float = 0.0) -> str:
        """A random weight in the external file."""
        array = self.random.standard_normal(shape, dtype=np.float32) * np.float32(scale) + np.float32(around)
        tensor = TensorProto(name=f"w{len(self.tensors)}", data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.data.name), ("offset", self.file.tell()), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.file.write(array.tobytes())
        self.tensors.append(tensor)
        return tensor.name

    def ints(self, *values: int) -> str:
        self.tensors.append(numpy_helper.from_array(np.array(values, np.int64), f"w{len(self.tensors)}"))
        return self.tensors[-1].name

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        return self.op("Add", self.op("MatMul", x, self.weight(inputs, outputs)), self.weight(outputs))

    def norm(self, x: str, width: int) -> str:
        return self.op("LayerNormalization", x, self.weight(width, around=1.0), self.weight(width), axis=-1, epsilon=1e-6)


def write_vit(path: Path, width: int, depth: int, heads: int) -> int:
    """Write a pre-norm ViT of random weights for images of 56 x 56 pixels; returns its number of parameters."""
    w = _Writer(path)
    tokens, dim = (SIDE // PATCH) ** 2, width // heads
    x = w.op("Conv", "image", w.weight(width, 3, PATCH, PATCH), w.weight(width), strides=[PATCH] * 2, kernel_shape=[PATCH] * 2)
    x = w.op("Transpose", w.op("Reshape", x, w.ints(0, width, tokens)), perm=[0, 2, 1])
    x = w.op("Add", x, w.weight(1, tokens, width))
    for _ in range(depth):
        normal = w.norm(x, width)
        q, k, v = (w.op("Reshape", w.linear(normal, width, width), w.ints(0, tokens, heads, dim)) for _ in range(3))
        q, v = (w.op("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, v))
        scores = w.op("MatMul", q, w.op("Transpose", k, perm=[0, 2, 3, 1]))
        scale = w.weight(scale=0.0, around=dim**-0.5)
        context = w.op("MatMul", w.op("Softmax", w.op("Mul", scores, scale), axis=-1), v)
        merged = w.op("Reshape", w.op("Transpose", context, perm=[0, 2, 1, 3]), w.ints(0, tokens, width))
        x = w.op("Add", x, w.linear(merged, width, width))
        x = w.op("Add", x, w.linear(w.op("Gelu", w.linear(w.norm(x, width), width, 4 * width)), 4 * width, width))
    logits = w.linear(w.op("ReduceMean", w.norm(x, width), w.ints(1), keepdims=0), width, 1000)
    w.nodes.append(helper.make_node("Identity", [logits], ["logits"], "name_logits"))
    w.file.close()
    infos = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape)]
        for n, shape in (("image", ["batch", 3, SIDE, SIDE]), ("logits", ["batch", 1000]))
    ]
    graph = helper.make_graph(w.nodes, "vit", *infos, w.tensors)
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString())
    return sum(int(np.prod(t.dims)) for t in w.tensors if t.data_type == TensorProto.FLOAT)
