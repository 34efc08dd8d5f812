"""Tiny graphs: from ONNX text, and vision transformers in the dialects of several exporters, made without torch.

A `Dialect` is one way to write the same mathematics; `vit` draws weights from a seed, so two dialects with the same
sizes and seed compute the same function (see `Sizes`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper, parser

from vitq_compiler.cpu import saturates_here
from vitq_compiler.graph import Graph, InputSpec
from vitq_compiler.model_io import convert_opset
from vitq_compiler.opset import PORTABLE
from vitq_compiler.pipeline import Compilation, Pass, Pipeline
from vitq_compiler.recipe import Recipe, load_recipe
from vitq_compiler.registry import load
from vitq_compiler.runtime import run, session
from vitq_compiler.sizes import Probe, has_batch, is_open, open_axes, probes_of, runs_with
from vitq_compiler.target import Target
from vitq_compiler.targets.onnxruntime import Onnxruntime
from vitq_compiler.tensors import from_array

Array = NDArray[Any]
Feed = dict[str, Array]
OPSET = 23
IR_VERSION = 10


# Running


def run_model(model: onnx.ModelProto | Graph, feed: Feed, *, optimize: bool = False) -> list[Array]:
    """Outputs of ONNX Runtime, with one thread; its optimizer is off, as it would hide differences between graphs.

    Products of codes are exact on every CPU; tests/test_emulated_cpus.py is about those of CPUs that cut them off.
    """
    proto = model.to_proto() if isinstance(model, Graph) else model
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if saturates_here():
        options.add_session_config_entry("session.x64quantprecision", "1")
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


def feed_of(model: onnx.ModelProto | Graph, batch: int = 2, seed: int = 0) -> Feed:
    """Random values for every input; dynamic sizes other than the batch become 8."""
    graph = model if isinstance(model, Graph) else Graph.from_proto(model)
    return random_feed(graph.inputs, batch, seed=seed)


def random_feed(inputs: Sequence[InputSpec], batch: int = 2, size: int = 8, seed: int = 0) -> Feed:
    """Random values; dynamic sizes other than the batch become ``size``."""
    return Probe(batch, shapes_at(inputs, size)).feed(inputs, seed)


def shapes_at(inputs: Sequence[InputSpec], size: int = 8) -> dict[str, tuple[int, ...]]:
    """Shapes with 0 for an open batch, and ``size`` for what else is open."""
    return {
        spec.name: tuple((0 if has_batch(spec, axis) else size) if is_open(old) else int(old) for axis, old in enumerate(spec.shape))
        for spec in inputs
    }


def probes_at(graph: Graph, size: int = 8) -> list[Probe]:
    """What a compile runs the graph on, for data of ``size``."""
    runs = runs_with(lambda feed: run(session(graph, threads=1, brief=True), feed), graph.inputs)
    return probes_of(open_axes(graph.inputs), shapes_at(graph.inputs, size), {}, runs, alone=False)


def difference(before: Sequence[Array], after: Sequence[Array]) -> float:
    """Largest difference of any output, relative to the largest value of that output."""
    assert [a.shape for a in before] == [a.shape for a in after]
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        worst = max(worst, float(np.nanmax(np.abs(a - b)) / max(np.nanmax(np.abs(a)), 1e-30)))
    return worst


# Graphs from text


def graph_of(text: str, **weights: Array) -> Graph:
    """A graph in ONNX text syntax without its header; shapes are inferred.

    Those ``weights`` that the text names become initializers.

    ``g (float[B, 4] x) => (float[B, 4] y) { y = Relu(x) }``
    """
    return Graph.from_proto(model_of(text, **weights))


def model_of(text: str, *, opset: int = OPSET, imports: Mapping[str, int] | None = None, **weights: Array) -> onnx.ModelProto:
    """As `graph_of`, the ModelProto; ``imports`` are the opsets of other domains."""
    opsets = ", ".join(f'"{domain}" : {version}' for domain, version in {"": opset, **(imports or {})}.items())
    model = parser.parse_model(f"<ir_version: {IR_VERSION}, opset_import: [{opsets}]>\n{text}")
    words = set(re.findall(r"\w+", text))
    model.graph.initializer.extend(from_array(np.asarray(a), name) for name, a in weights.items() if name in words)
    for output in model.graph.output:
        if not output.type.tensor_type.shape.dim:
            output.type.tensor_type.ClearField("shape")  # ``float y`` leaves it to shape inference
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def ops(graph: Graph) -> list[str]:
    """Op types in graph order."""
    return [node.op for node in graph.nodes]


# Compilations


@dataclass
class Batches:
    """Random calibration data, as much of `vitq_compiler.data.Data` as passes use."""

    inputs: Sequence[InputSpec]
    batches: int = 2
    batch_size: int = 3
    spread: float = 1.0
    warnings: tuple[str, ...] = ()
    synthetic: bool = False
    copies: int = 1
    validation_count: int = 0

    @property
    def calibration_count(self) -> int:
        return self.batches * self.batch_size

    def calibration(self) -> Iterator[Feed]:
        for seed in range(self.batches):
            feed = random_feed(self.inputs, self.batch_size, seed=100 + seed)
            yield {name: array * array.dtype.type(self.spread) for name, array in feed.items()}


def compilation(graph: Graph | onnx.ModelProto, *, recipe: Recipe | None = None, target: Target | None = None) -> Compilation:
    """What a pass receives: the w8a8 recipe, the onnxruntime target, random data, one thread."""
    if isinstance(graph, onnx.ModelProto):
        graph = Graph.from_proto(convert_opset(graph, PORTABLE, None))  # type: ignore[arg-type]  # the path is for messages only
        graph.ir_version = (target or Onnxruntime()).ir_version
    data: Any = Batches(graph.inputs)
    return Compilation(graph, recipe or load_recipe("w8a8"), target or Onnxruntime(), data, probes_at(graph), threads=1)


def find_pass(name: str) -> type[Pass]:
    """The class of a pass by its name."""
    return load("passes", name)


def run_passes(c: Compilation, text: str) -> dict[str, int]:
    """Run a pipeline on ``c``; pass name -> number of changes."""
    results = Pipeline.parse(text, find_pass).run(c)
    return {result.spec.partition("{")[0]: result.changes for result in results}


def changes_of(c: Compilation, name: str) -> int:
    """Run one pass without checking what it requires; the number of changes."""
    return find_pass(name)().run(c)


# Vision transformers


@dataclass(frozen=True)
class Sizes:
    """The mathematics of a tiny ViT."""

    image: int = 8
    patch: int = 4
    width: int = 8
    heads: int = 2
    depth: int = 2
    hidden: int = 12
    classes: int = 5
    bias: bool = True
    layer_scale: bool = False
    class_token: bool = True
    gelu: str = "erf"  # or "tanh"
    norm: str = "layer"  # or "rms"
    queries: str = "plain"  # or, with the keys, "rotary": turned by their positions; "cosine": divided by their lengths
    seed: int = 0

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + self.class_token


@dataclass(frozen=True)
class Dialect:
    """How an exporter writes it; every choice computes the same function.

    Attributes:
        qkv: one Linear and "gather" (timm: reshape to 5-D, transpose, pick), "slice" (the same, Slice and Squeeze), "split5"
            (the same, Split and Squeeze), "split" (split features, then heads), "interleaved" (head by head: q, k, v of one
            head are neighbours), or "separate" Linears.
        scale: where 1/sqrt(head_dim) is applied: "q", "both", "scores", "div" (scores divided), "k".
        layernorm: "fused", or a letter per choice of `decomposed_layernorm`.
        gelu: "fused", or a number that picks an order of factors of `decomposed_gelu`.
        head: "gemm" or "matmul".
        bias_first: Add(bias, product) rather than Add(product, bias).
        dynamic: reshape targets computed from Shape; batch size left open.
        noise: Identity, Dropout and Cast here and there.
        share: equal constants are one initializer.
        constants: weights come from Constant nodes.
    """

    qkv: str = "gather"
    scale: str = "scores"
    layernorm: str = "fused"
    gelu: str = "0"
    head: str = "gemm"
    bias_first: bool = False
    dynamic: bool = True
    noise: bool = False
    share: bool = False
    constants: bool = False


QKV = ("gather", "slice", "split5", "split", "interleaved", "separate")
SCALES = ("q", "k", "both", "scores", "div")
LAYERNORMS = ("pow-sqrt-div", "mul-sqrt-div", "pow-pow-div", "pow-sqrt-reciprocal", "mul-pow-reciprocal")
GELUS = tuple(map(str, range(8)))

TIMM = Dialect()
HUGGINGFACE = Dialect(qkv="separate", scale="div", layernorm="fused", gelu="1", bias_first=True, noise=True)
OLD_TORCH = Dialect(qkv="slice", scale="q", layernorm="pow-sqrt-div", gelu="2", bias_first=True, share=True, noise=True)
DYNAMO = Dialect(qkv="split5", scale="both", layernorm="fused", gelu="fused", dynamic=False)
KERAS = Dialect(qkv="separate", scale="q", layernorm="mul-sqrt-div", gelu="3", head="matmul", constants=True)
DIALECTS = {"timm": TIMM, "huggingface": HUGGINGFACE, "old-torch": OLD_TORCH, "dynamo": DYNAMO, "keras": KERAS}


@dataclass
class Writer:
    """Appends nodes to a graph; tensors are names."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)
    share: bool = False
    constants: bool = False
    opset: int = OPSET
    _number: Iterator[int] = field(default_factory=count)

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; its output, or a tuple of several."""
        index = next(self._number)
        results = [f"t{index}"] if outputs == 1 else [f"t{index}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, results, f"{kind}_{index}", **attributes))
        return results[0] if outputs == 1 else tuple(results)

    def weight(self, name: str, array: Any) -> str:
        """Add a constant; ``name`` gets a number, or is shared where an equal one is there and ``share`` is set."""
        array = np.asarray(array)
        if self.share and array.size < 16:
            for known, other in self.weights.items():
                if other.dtype == array.dtype and np.array_equal(other, array) and other.shape == array.shape:
                    return known
        name = f"{name}_{next(self._number)}"
        if self.constants and array.dtype == np.float32:
            self.nodes.append(helper.make_node("Constant", [], [name], f"Constant_{name}", value=numpy_helper.from_array(array, name)))
            return name
        self.weights[name] = array
        return name

    def number(self, value: float) -> str:
        return self.weight("number", np.float32(value))

    def vector(self, *values: int) -> str:
        return self.weight("vector", np.array(values, np.int64))

    def mean(self, x: str) -> str:
        """Mean over the last axis, kept."""
        if self.opset < 18:
            return str(self.op("ReduceMean", x, axes=[-1], keepdims=1))
        return str(self.op("ReduceMean", x, self.vector(-1), keepdims=1))

    def model(self, inputs: dict[str, Sequence[Any]], outputs: dict[str, Sequence[Any]]) -> onnx.ModelProto:
        """Everything as a checked model, all inputs and outputs float."""
        kind = onnx.TensorProto.FLOAT
        infos = [[helper.make_tensor_value_info(n, kind, list(s)) for n, s in part.items()] for part in (inputs, outputs)]
        initializers = [numpy_helper.from_array(a, n) for n, a in self.weights.items()]
        graph = helper.make_graph(self.nodes, "g", *infos, initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        onnx.checker.check_model(model)
        return onnx.shape_inference.infer_shapes(model, data_prop=True)


def decomposed_layernorm(w: Writer, x: str, gamma: str, beta: str, variant: str, *, flipped: bool = False, epsilon: float = 1e-6) -> str:
    """``variant``: square-root-quotient, such as "pow-sqrt-div"; ``flipped`` puts constants first."""
    square, root, quotient = variant.split("-")

    def ordered(kind: str, tensor: str, constant: str) -> str:
        return str(w.op(kind, constant, tensor) if flipped else w.op(kind, tensor, constant))

    centered = w.op("Sub", x, w.mean(x))
    squared = w.op("Pow", centered, w.number(2)) if square == "pow" else w.op("Mul", centered, centered)
    variance = ordered("Add", w.mean(squared), w.number(epsilon))
    deviation = w.op("Sqrt", variance) if root == "sqrt" else w.op("Pow", variance, w.number(0.5))
    normal = w.op("Div", centered, deviation) if quotient == "div" else w.op("Mul", centered, w.op("Reciprocal", deviation))
    return ordered("Add", ordered("Mul", normal, gamma), beta)


def decomposed_gelu(w: Writer, x: str, order: int, kind: str = "erf") -> str:
    """0.5 x (1 + erf(x / sqrt 2)) or its tanh form, ``order`` 0 to 7 picking how factors are grouped and z is scaled."""
    half = w.number(0.5)
    if kind == "erf":
        scaled = w.op("Div", x, w.number(2**0.5)) if order % 2 == 0 else w.op("Mul", x, w.number(0.5**0.5))
        bent = w.op("Erf", scaled)
    else:
        cube = w.op("Pow", x, w.number(3)) if order % 2 == 0 else w.op("Mul", x, w.op("Mul", x, x))
        inner = w.op("Add", x, w.op("Mul", w.number(0.044715), cube))
        bent = w.op("Tanh", w.op("Mul", inner, w.number((2 / np.pi) ** 0.5)))
    gate = w.op("Add", bent, w.number(1)) if order % 4 < 2 else w.op("Add", w.number(1), bent)
    if order == 0:
        return str(w.op("Mul", w.op("Mul", x, gate), half))
    if order == 1:
        return str(w.op("Mul", half, w.op("Mul", gate, x)))
    if order == 2:
        return str(w.op("Mul", w.op("Mul", half, x), gate))
    if order == 3:
        return str(w.op("Mul", gate, w.op("Mul", x, half)))
    if order == 4:
        return str(w.op("Mul", x, w.op("Mul", half, gate)))
    if order == 5:
        return str(w.op("Mul", w.op("Mul", gate, half), x))
    if order == 6:
        return str(w.op("Div", w.op("Mul", x, gate), w.number(2)))
    return str(w.op("Mul", w.op("Div", x, w.number(2)), gate))


@dataclass
class _VitWriter:
    """Writes one ViT; weights are drawn in an order that no dialect changes."""

    sizes: Sizes
    dialect: Dialect
    w: Writer
    random: np.random.Generator

    def draw(self, *shape: int, around: float = 0.0) -> Array:
        return (around + self.random.standard_normal(shape) / np.sqrt(shape[0] if len(shape) > 1 else 4)).astype(np.float32)

    def size_of(self, x: str, axis: int) -> str:
        size = self.w.op("Gather", self.w.op("Shape", x), self.w.weight("index", np.int64(axis)), axis=0)
        return str(self.w.op("Unsqueeze", size, self.w.vector(0)))

    def reshape(self, x: str, like: str, *target: int) -> str:
        """``target`` without the batch; with the batch (and the tokens) of ``like``."""
        if not self.dialect.dynamic:
            return str(self.w.op("Reshape", x, self.w.vector(-1, *target)))
        parts = [self.size_of(like, 0)] + ([self.size_of(like, 1)] if target[0] == self.sizes.tokens else [self.w.vector(target[0])])
        return str(self.w.op("Reshape", x, self.w.op("Concat", *parts, self.w.vector(*target[1:]), axis=0)))

    def noise(self, x: str) -> str:
        if not self.dialect.noise:
            return x
        return str(self.w.op("Identity", self.w.op("Cast", self.w.op("Dropout", x), to=onnx.TensorProto.FLOAT)))

    def linear(self, x: str, weight: Array, bias: Array | None) -> str:
        product = self.w.op("MatMul", x, self.w.weight("weight", weight))
        if bias is None:
            return str(product)
        vector = self.w.weight("bias", bias)
        return str(self.w.op("Add", vector, product) if self.dialect.bias_first else self.w.op("Add", product, vector))

    def layernorm(self, x: str) -> str:
        gamma, beta = self.w.weight("gamma", self.draw(self.sizes.width, around=1)), self.w.weight("beta", self.draw(self.sizes.width))
        if self.sizes.norm == "rms":
            return self.rmsnorm(x, gamma)
        if self.dialect.layernorm == "fused":
            return str(self.w.op("LayerNormalization", x, gamma, beta, axis=-1, epsilon=1e-6))
        return decomposed_layernorm(self.w, x, gamma, beta, self.dialect.layernorm, flipped=self.dialect.bias_first)

    def rmsnorm(self, x: str, gamma: str) -> str:
        w = self.w
        if self.dialect.layernorm == "fused":
            return str(w.op("RMSNormalization", x, gamma, epsilon=1e-6))
        root = w.op("Sqrt", w.op("Add", w.mean(w.op("Mul", x, x)), w.number(1e-6)))
        return str(w.op("Mul", w.op("Div", x, root), gamma))

    def gelu(self, x: str) -> str:
        if self.dialect.gelu == "fused":
            return str(self.w.op("Gelu", x, approximate="none" if self.sizes.gelu == "erf" else "tanh"))
        return decomposed_gelu(self.w, x, int(self.dialect.gelu), self.sizes.gelu)

    def scaled(self, x: str) -> str:
        if not self.sizes.layer_scale:
            return x
        gamma = self.w.weight("layer_scale", self.draw(self.sizes.width))
        return str(self.w.op("Mul", gamma, x) if self.dialect.bias_first else self.w.op("Mul", x, gamma))

    def heads_of(self, x: str, weight: Array, bias: Array | None) -> tuple[str, str, str]:
        """q, k, v as [batch, heads, tokens, head_dim]; ``weight`` [width, 3 width] has q, k, v one after the other."""
        w, s = self.w, self.sizes
        dim = s.width // s.heads

        def split_heads(tensor: str) -> str:
            return str(w.op("Transpose", self.reshape(tensor, x, s.tokens, s.heads, dim), perm=[0, 2, 1, 3]))

        if self.dialect.qkv == "separate":
            biases = np.split(bias, 3) if bias is not None else [None] * 3
            q, k, v = (split_heads(self.linear(x, part, b)) for part, b in zip(np.split(weight, 3, axis=1), biases, strict=True))
            return q, k, v
        if self.dialect.qkv == "interleaved":
            order = np.arange(3 * s.width).reshape(3, s.heads, dim).transpose(1, 0, 2).reshape(-1)
            both = self.linear(x, weight[:, order], bias[order] if bias is not None else None)
            five = w.op("Transpose", self.reshape(both, x, s.tokens, s.heads, 3, dim), perm=[3, 0, 2, 1, 4])
            q, k, v = (w.op("Gather", five, w.weight("index", np.int64(i)), axis=0) for i in range(3))
            return q, k, v
        both = self.linear(x, weight, bias)
        if self.dialect.qkv == "split":
            parts = w.op("Split", both, w.vector(s.width, s.width, s.width), outputs=3, axis=-1)
            q, k, v = map(split_heads, parts)
            return q, k, v
        five = w.op("Transpose", self.reshape(both, x, s.tokens, 3, s.heads, dim), perm=[2, 0, 3, 1, 4])
        if self.dialect.qkv == "split5":
            parts = w.op("Split", five, w.vector(1, 1, 1), outputs=3, axis=0)
            q, k, v = (w.op("Squeeze", p, w.vector(0)) for p in parts)
        elif self.dialect.qkv == "slice":
            parts = [w.op("Slice", five, w.vector(i), w.vector(i + 1), w.vector(0)) for i in range(3)]
            q, k, v = (w.op("Squeeze", p, w.vector(0)) for p in parts)
        else:
            q, k, v = (w.op("Gather", five, w.weight("index", np.int64(i)), axis=0) for i in range(3))
        return q, k, v

    def placed(self, x: str) -> str:
        """Queries or keys [batch, heads, tokens, head_dim] as the sizes want them."""
        w, s = self.w, self.sizes
        if s.queries == "rotary":
            dim = s.width // s.heads
            angles = np.arange(s.tokens)[:, None] / (1 + np.arange(dim) % max(dim // 2, 1))
            cosine, sine = (w.weight("angles", turn(angles).astype(np.float32)) for turn in (np.cos, np.sin))
            first, second = (w.op("Slice", x, w.vector(a), w.vector(b), w.vector(3)) for a, b in ((0, dim // 2), (dim // 2, dim)))
            turned = w.op("Concat", w.op("Neg", second), first, axis=3)
            return str(w.op("Add", w.op("Mul", x, cosine), w.op("Mul", turned, sine)))
        if s.queries == "cosine":
            return str(w.op("Div", x, w.op("Sqrt", w.mean(w.op("Mul", x, x)))))
        return x

    def attention(self, x: str) -> str:
        w, s = self.w, self.sizes
        weight = self.draw(s.width, 3 * s.width)
        bias = self.draw(3 * s.width) if s.bias else None
        q, k, v = self.heads_of(x, weight, bias)
        q, k = self.placed(q), self.placed(k)
        scale = (s.width // s.heads) ** -0.5
        k = w.op("Transpose", k, perm=[0, 1, 3, 2])
        if self.dialect.scale in ("q", "both"):
            q = w.op("Mul", q, w.number(scale if self.dialect.scale == "q" else scale**0.5))
        if self.dialect.scale in ("k", "both"):
            k = w.op("Mul", k, w.number(scale if self.dialect.scale == "k" else scale**0.5))
        scores = w.op("MatMul", q, k)
        if self.dialect.scale == "scores":
            scores = w.op("Mul", scores, w.number(scale))
        if self.dialect.scale == "div":
            scores = w.op("Div", scores, w.number(1 / scale))
        context = w.op("MatMul", self.noise(w.op("Softmax", scores, axis=-1)), v)
        merged = self.reshape(w.op("Transpose", context, perm=[0, 2, 1, 3]), x, s.tokens, s.width)
        return self.linear(merged, self.draw(s.width, s.width), self.draw(s.width) if s.bias else None)

    def mlp(self, x: str) -> str:
        s = self.sizes
        hidden = self.gelu(self.linear(x, self.draw(s.width, s.hidden), self.draw(s.hidden) if s.bias else None))
        return self.linear(hidden, self.draw(s.hidden, s.width), self.draw(s.width) if s.bias else None)

    def embed(self) -> str:
        w, s = self.w, self.sizes
        grid = (s.image // s.patch) ** 2
        kernel = w.weight("patch_weight", self.draw(s.width, 3, s.patch, s.patch))
        cut = w.op("Conv", "image", kernel, w.weight("patch_bias", self.draw(s.width)), strides=[s.patch] * 2, kernel_shape=[s.patch] * 2)
        x = w.op("Transpose", w.op("Reshape", cut, w.vector(0, s.width, grid)), perm=[0, 2, 1])
        if s.class_token:
            token = w.weight("class_token", self.draw(1, 1, s.width))
            batch = self.size_of("image", 0) if self.dialect.dynamic else w.vector(2)
            x = w.op("Concat", w.op("Expand", token, w.op("Concat", batch, w.vector(1, s.width), axis=0)), x, axis=1)
        return str(w.op("Add", x, w.weight("position", self.draw(1, s.tokens, s.width))))

    def head(self, x: str) -> str:
        w, s = self.w, self.sizes
        first = w.op("Gather", x, w.weight("index", np.int64(0)), axis=1) if s.class_token else None
        pooled = first or (w.op("ReduceMean", x, axes=[1], keepdims=0) if w.opset < 18 else w.op("ReduceMean", x, w.vector(1), keepdims=0))
        weight, bias = self.draw(s.width, s.classes), self.draw(s.classes)
        if self.dialect.head == "gemm":
            return str(w.op("Gemm", pooled, w.weight("head_weight", weight.T.copy()), w.weight("head_bias", bias), transB=1))
        return self.linear(pooled, weight, bias)


def vit(sizes: Sizes | None = None, dialect: Dialect = TIMM) -> onnx.ModelProto:
    """A tiny ViT: input ``image`` [batch, 3, image, image], output ``logits`` [batch, classes].

    Static dialects have batch 2.
    """
    sizes = sizes or Sizes()
    opset = 23 if sizes.norm == "rms" and dialect.layernorm == "fused" else 20 if dialect.gelu == "fused" else 17
    w = Writer(share=dialect.share, constants=dialect.constants, opset=opset)
    writer = _VitWriter(sizes, dialect, w, np.random.default_rng(sizes.seed))
    x = writer.embed()
    for _ in range(sizes.depth):
        x = w.op("Add", x, writer.noise(writer.scaled(writer.attention(writer.layernorm(x)))))
        x = w.op("Add", writer.noise(writer.scaled(writer.mlp(writer.layernorm(x)))), x)
    logits = writer.head(writer.layernorm(x))
    w.nodes.append(helper.make_node("Identity", [logits], ["logits"], "name_logits"))
    batch = "batch" if dialect.dynamic else 2
    return w.model({"image": [batch, 3, sizes.image, sizes.image]}, {"logits": [batch, sizes.classes]})


def roles_of(sizes: Sizes, dialect: Dialect, *, fused: bool = False) -> list[str]:
    """The role of every Linear, in graph order; once ``fused``, q, k and v are Linears of their own in every dialect."""
    block = ["qkv"] * (3 if fused or dialect.qkv == "separate" else 1) + ["proj", "fc1", "fc2"]
    return block * sizes.depth + ["head"]


def with_text(model: onnx.ModelProto, edit: Callable[[onnx.GraphProto], None]) -> onnx.ModelProto:
    """A copy of ``model`` after ``edit`` of its graph."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    edit(copy.graph)
    return copy


def variant(dialect: Dialect, **choices: Any) -> Dialect:
    """``dialect`` with some choices changed."""
    return replace(dialect, **choices)


# Golden files


def assert_golden(graph: Graph, name: str, *, weights: bool = True) -> None:
    """``graph`` as text, with its small weights or without any, is that of ``golden/<name>.txt``.

    With VITQ_UPDATE_GOLDEN set, the file is written instead.
    """
    text = graph.text()
    text = text[text.index(">\n") + 2 :] + "\n"
    if not weights:
        text = text[: text.index("\n")] + "\n" + text[text.index("{\n") :]
    path = Path(__file__).parent / "golden" / f"{name}.txt"
    if os.environ.get("VITQ_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "run with VITQ_UPDATE_GOLDEN=1 and look at the difference"
