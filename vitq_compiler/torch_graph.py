"""A canonical ONNX graph as a differentiable torch function; torch is imported when one is made.

No model class is needed: nodes are computed one by one, each by the function of its op type in `_functions`. Any input of any
node can be sent through a function of the caller's, by its `Edge`: that is where quantizers and trained weights come in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vitq_compiler.errors import ModelError, RecipeError
from vitq_compiler.graph import Graph, Node, is_constant, value
from vitq_compiler.quant import Edge

Tensor = Any  # torch.Tensor
Taps = Mapping[Edge, Callable[[Any], Any]]
Operator = Callable[..., Any]


def require_torch(who: str) -> Any:
    """The module torch.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise RecipeError(f"{who} needs torch: pip install 'vitq-compiler[torch]', or take a recipe without gradients") from error
    return torch


class TorchGraph:
    """What computes the outputs of a graph from its inputs, in torch.

    Raises:
        ModelError: the graph has an operator that is not known here.
    """

    def __init__(self, graph: Graph, device: str = "cpu") -> None:
        self._torch = require_torch("a graph in torch")
        self._operators = _functions(self._torch)
        self._graph, self._device = graph, device
        self._nodes = list(graph.clean().nodes)
        for node in self._nodes:
            if node.op not in self._operators:
                raise ModelError(f"{node.op} node {node.name} cannot be trained through: leave out the passes that need torch")
        self._constants = {
            id(tensor): self._constant(value(tensor)) for node in self._nodes for tensor in node.inputs if is_constant(tensor)
        }

    def __call__(self, feed: Mapping[str, Tensor], taps: Taps | None = None) -> dict[str, Tensor]:
        """Outputs by name, for inputs by name; each input of a node at an edge of ``taps`` goes through its function first."""
        taps = taps or {}
        known: dict[int, Tensor] = dict(self._constants)
        for tensor in self._graph.input_tensors:
            known[id(tensor)] = feed[tensor.name]
        for node in self._nodes:
            inputs = [known[id(t)] if t.name or is_constant(t) else None for t in node.inputs]
            inputs = [taps[e](x) if (e := Edge(node.name, i)) in taps else x for i, x in enumerate(inputs)]
            results = self._operators[node.op](node, *inputs)
            for tensor, result in zip(node.outputs, results if isinstance(results, (tuple, list)) else (results,), strict=False):
                known[id(tensor)] = result
        return {tensor.name: known[id(tensor)] for tensor in self._graph.outputs}

    def _constant(self, array: np.ndarray) -> Any:
        """Whole numbers stay in numpy: they are shapes, axes and indices."""
        if array.dtype.kind != "f":
            return array
        return self._torch.from_numpy(np.array(array, np.float32)).to(self._device)


def _numbers(x: Any) -> list[int]:
    return [int(i) for i in np.asarray(x).reshape(-1)]


def _axes(node: Node, axes: Any) -> list[int] | None:
    """Axes from an input (new opsets) or an attribute (old ones)."""
    given = axes if axes is not None else node.attrs.get("axes")
    return None if given is None else _numbers(given)


def _functions(torch: Any) -> dict[str, Operator]:
    """Op type -> function of the node and its inputs."""
    F = torch.nn.functional

    def lift(x: Any, like: Any = None) -> Any:
        if torch.is_tensor(x):
            return x
        return torch.as_tensor(np.array(x), device=like.device if torch.is_tensor(like) else None)

    def quantize_linear(node: Node, x: Any, scale: Any, zero_point: Any) -> Any:
        """Codes as floats, with the gradient of what is rounded."""
        if zero_point.dtype.kind not in "iu":
            raise ModelError(f"QuantizeLinear node {node.name} has 8-bit floats, which cannot be trained through")
        ends = np.iinfo(zero_point.dtype)
        t = x / scale
        return (t + (t.round() - t).detach() + lift(zero_point, x)).clamp(ends.min, ends.max)

    def dequantize_linear(node: Node, codes: Any, scale: Any, zero_point: Any) -> Any:
        return (codes - lift(zero_point, codes)) * scale

    def binary(f: Callable[[Any, Any], Any]) -> Operator:
        return lambda node, a, b: f(a, b) if not (torch.is_tensor(a) or torch.is_tensor(b)) else f(lift(a, b), lift(b, a))

    def unary(f: Callable[[Any], Any]) -> Operator:
        return lambda node, x: f(x)

    def reshape(node: Node, x: Any, shape: Any) -> Any:
        sizes = _numbers(shape)
        return x.reshape([x.shape[i] if s == 0 and not node.attrs.get("allowzero", 0) else s for i, s in enumerate(sizes)])

    def reduce(f: Callable[..., Any]) -> Operator:
        def reduced(node: Node, x: Any, axes: Any = None) -> Any:
            chosen = _axes(node, axes)
            if chosen is None and node.attrs.get("noop_with_empty_axes", 0):
                return x
            return f(x, dim=chosen if chosen is not None else list(range(x.ndim)), keepdim=bool(node.attrs.get("keepdims", 1)))

        return reduced

    def softmax(node: Node, x: Any) -> Any:
        return torch.softmax(x, node.attrs.get("axis", -1))

    def layer_norm(node: Node, x: Any, gamma: Any, beta: Any = None) -> Any:
        axis = node.attrs.get("axis", -1) % x.ndim
        return F.layer_norm(x, x.shape[axis:], gamma, beta, node.attrs.get("epsilon", 1e-5))

    def rms_norm(node: Node, x: Any, gamma: Any) -> Any:
        axis = node.attrs.get("axis", -1) % x.ndim
        mean = x.square().mean(list(range(axis, x.ndim)), keepdim=True)
        return x * torch.rsqrt(mean + node.attrs.get("epsilon", 1e-5)) * gamma

    def squeeze(node: Node, x: Any, axes: Any = None) -> Any:
        chosen = _axes(node, axes)
        return x.squeeze() if chosen is None else x.squeeze(tuple(chosen))

    def unsqueeze(node: Node, x: Any, axes: Any = None) -> Any:
        chosen = _axes(node, axes) or []
        rank = x.ndim + len(chosen)
        for axis in sorted(a % rank for a in chosen):
            x = x[(slice(None),) * axis + (None,)]
        return x

    def split(node: Node, x: Any, sizes: Any = None) -> Any:
        axis = node.attrs.get("axis", 0)
        parts = _numbers(sizes) if sizes is not None else -(-x.shape[axis] // len(node.outputs))
        return torch.split(x, parts, axis)

    def slice_(node: Node, x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
        starts, ends = _numbers(starts), _numbers(ends)
        axes = _numbers(axes) if axes is not None else list(range(len(starts)))
        for start, end, axis, step in zip(starts, ends, axes, _numbers(steps) if steps is not None else [1] * len(starts), strict=True):
            where = np.arange(x.shape[axis])[slice(start, end if abs(end) < 2**31 - 1 else None, step)]
            x = take(x, where, axis)
        return x

    def take(x: Any, where: Any, axis: int) -> Any:
        if not torch.is_tensor(x):
            return np.take(x, where, axis)
        where = np.asarray(where)
        chosen = torch.index_select(x, axis, torch.as_tensor(np.mod(where.reshape(-1), x.shape[axis]), device=x.device))
        axis %= x.ndim
        return chosen.reshape((*x.shape[:axis], *where.shape, *x.shape[axis + 1 :]))

    def concat(node: Node, *parts: Any) -> Any:
        axis = node.attrs["axis"]
        if not any(torch.is_tensor(p) for p in parts):
            return np.concatenate([np.asarray(p) for p in parts], axis)
        like = next(p for p in parts if torch.is_tensor(p))
        return torch.cat([lift(p, like) for p in parts], axis)

    def expand(node: Node, x: Any, shape: Any) -> Any:
        x = lift(x)
        return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(_numbers(shape))))

    def tile(node: Node, x: Any, repeats: Any) -> Any:
        return x.repeat(_numbers(repeats)) if torch.is_tensor(x) else np.tile(x, _numbers(repeats))

    def clip(node: Node, x: Any, low: Any = None, high: Any = None) -> Any:
        return torch.clamp(x, None if low is None else lift(low, x), None if high is None else lift(high, x))

    def product(a: Any, b: Any) -> Any:
        """In float32 again where torch was told to compute it with less (autocast)."""
        y = torch.matmul(a, b)
        return y.float() if y.dtype == torch.bfloat16 else y

    def gemm(node: Node, a: Any, b: Any, c: Any = None) -> Any:
        a, b = a.mT if node.attrs.get("transA", 0) else a, b.mT if node.attrs.get("transB", 0) else b
        y = node.attrs.get("alpha", 1.0) * product(a, b)
        return y if c is None else y + node.attrs.get("beta", 1.0) * c

    def attention(node: Node, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        heads, groups = (node.attrs.get(n) for n in ("q_num_heads", "kv_num_heads"))
        flat = q.ndim == 3
        if flat:
            q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in ((q, heads), (k, groups), (v, groups)))
        y = F.scaled_dot_product_attention(q, k, v, None if mask is None else lift(mask, q), scale=node.attrs.get("scale"))
        return y.transpose(1, 2).flatten(2) if flat else y

    def conv(node: Node, x: Any, weight: Any, bias: Any = None) -> Any:
        spatial, pads = weight.ndim - 2, node.attrs.get("pads")
        if pads and pads[:spatial] != pads[spatial:]:
            x = F.pad(x, [p for i in reversed(range(spatial)) for p in (pads[i], pads[i + spatial])])
            pads = None
        options = {"stride": node.attrs.get("strides", 1), "dilation": node.attrs.get("dilations", 1), "groups": node.attrs.get("group", 1)}
        return getattr(F, f"conv{spatial}d")(x, weight, bias, padding=pads[:spatial] if pads else 0, **options)

    def total(node: Node, *parts: Any) -> Any:
        result = parts[0]
        for part in parts[1:]:
            result = result + part
        return result

    return {
        "MatMul": binary(product),
        "Gemm": gemm,
        "Add": binary(lambda a, b: a + b),
        "Sum": total,
        "Sub": binary(lambda a, b: a - b),
        "Mul": binary(lambda a, b: a * b),
        "Div": binary(lambda a, b: a / b),
        "Pow": binary(lambda a, b: a**b),
        "Max": binary(torch.maximum),
        "Min": binary(torch.minimum),
        "Sqrt": unary(torch.sqrt),
        "Reciprocal": unary(torch.reciprocal),
        "Neg": unary(lambda x: -x),
        "Exp": unary(torch.exp),
        "Log": unary(torch.log),
        "Tan": unary(torch.tan),
        "Atan": unary(torch.atan),
        "Erf": unary(torch.erf),
        "Tanh": unary(torch.tanh),
        "Sigmoid": unary(torch.sigmoid),
        "Relu": unary(torch.relu),
        "ThresholdedRelu": lambda node, x: x * (x > node.attrs.get("alpha", 1.0)),
        "LeakyRelu": lambda node, x: F.leaky_relu(x, node.attrs.get("alpha", 0.01)),
        "HardSwish": unary(F.hardswish),
        "Gelu": lambda node, x: F.gelu(x, approximate=node.attrs.get("approximate", "none")),
        "Softmax": softmax,
        "LayerNormalization": layer_norm,
        "RMSNormalization": rms_norm,
        "ReduceMean": reduce(torch.mean),
        "ReduceSum": reduce(torch.sum),
        "ReduceMax": reduce(torch.amax),
        "ReduceL2": reduce(torch.linalg.vector_norm),
        "GlobalAveragePool": lambda node, x: x.mean(list(range(2, x.ndim)), keepdim=True),
        "Reshape": reshape,
        "Flatten": lambda node, x: x.reshape(int(np.prod(x.shape[: node.attrs.get("axis", 1)])), -1),
        "Transpose": lambda node, x: x.permute(*node.attrs.get("perm", range(x.ndim)[::-1])),
        "Squeeze": squeeze,
        "Unsqueeze": unsqueeze,
        "Split": split,
        "Slice": slice_,
        "Gather": lambda node, x, where: take(x, where, node.attrs.get("axis", 0)),
        "Concat": concat,
        "Expand": expand,
        "Shape": lambda node, x: np.array(x.shape, np.int64)[slice(node.attrs.get("start", 0), node.attrs.get("end"))],
        "Range": lambda node, *ends: np.arange(*(np.asarray(e).item() for e in ends)),
        "Tile": tile,
        "Identity": unary(lambda x: x),
        "Clip": clip,
        "Attention": attention,
        "Conv": conv,
        "QuantizeLinear": quantize_linear,
        "DequantizeLinear": dequantize_linear,
    }
