"""A batch of one that is written into a graph although its batch axis is open, as scripts do that only rename the axis.

    Reshape(x, [1, 197, 384])             ->  Reshape(x, [-1, 197, 384])       what has no rest yet gets one
    Reshape(x, [1, -1, 384])              ->  Reshape(x, [0, -1, 384])         or copies the batch
    Concat(token[1, 1, D], x[B, N, D])    ->  Concat(Expand(token, [B, 1, 1]), x)

What is written so is not known to mean the batch: the graph is tried out, and has to give for several samples what it gave for each.
"""

from __future__ import annotations

import numpy as np

from vitq_compiler.errors import ModelError, TargetError
from vitq_compiler.graph import Array, Graph, Node, constant_of, producer, unique
from vitq_compiler.metrics import max_relative_error
from vitq_compiler.runtime import Feed, run, session

TOLERANCE = 1e-5  # of the largest output


def free_batch(graph: Graph, feed: Feed, threads: int) -> list[str]:
    """Let a graph that takes one sample take several; edited where that is safe.

    Args:
        graph: one with an open batch axis.
        feed: several samples, which the graph does not take.
        threads: as in `runtime.session`.

    Returns:
        The names of the nodes that a batch of one was written into; nothing where the graph does not take one sample either.

    Raises:
        ModelError: it takes one, and cannot be made to take more.
    """
    count = len(next(iter(feed.values())))
    if any(not spec.batched or spec.fixed_batch for spec in graph.inputs) or count < 2:
        return []
    try:
        runner = session(graph, threads=threads, brief=True)
        alone = [run(runner, {name: array[i : i + 1] for name, array in feed.items()}) for i in range(count)]
    except TargetError:
        return []
    copy = graph.snapshot()
    changed = _rewrite(copy)
    try:
        together = run(session(copy, threads=threads, brief=True), feed)
        same = all(map(_agree, zip(*alone, strict=True), together))
        fault = "" if same else "what it gives for several samples is not what it gives for each"
    except TargetError as error:
        fault = str(error)
    if fault:
        where = f"a batch of one is written into its nodes ({', '.join(changed[:3])})" if changed else "it takes one sample only"
        raise ModelError(f"{where} although its batch axis is open ({fault}); pass --batch-size 1, or export it with a free batch")
    _rewrite(graph)
    return changed


def _agree(parts: tuple[Array, ...], whole: Array) -> bool:
    return bool(parts[0].ndim) and max_relative_error(np.concatenate(parts), whole) <= TOLERANCE


def _rewrite(graph: Graph) -> list[str]:
    graph.infer_shapes()
    batched = _batched(graph)
    nodes = [n for n in graph.clean().nodes if id(n) in batched]
    for tensor in (t for n in nodes for t in n.outputs):  # what was inferred of a batch of one
        tensor.shape = [graph.inputs[0].shape[0], *tensor.shape[1:]] if tensor.shape and graph.is_output(tensor) else None
    changed: list[Node] = []
    for node in nodes:
        if node.op == "Reshape" and (target := constant_of(node.inputs[1])) is not None and target.size and target[0] > 0:
            rest = -1 if -1 not in target else 0 if target[0] == 1 else None
            if rest is None or node.attrs.get("allowzero", 0):
                continue
            node.inputs[1] = graph.constant(f"{node.name}/free", np.array([rest, *target[1:]], np.int64))
            changed.append(node)
        elif node.op == "Concat" and node.attrs["axis"] != 0:
            changed += [node] * sum(_spread(graph, node, place, batched) for place in range(len(node.inputs)))
    return [node.name for node in unique(changed)]


def _batched(graph: Graph) -> set[int]:
    """Ids of the nodes that compute something of the samples' numbers, not of their sizes alone."""
    tensors = {t.name for t, spec in zip(graph.input_tensors, graph.inputs, strict=True) if spec.batched}
    nodes: set[int] = set()
    for node in graph.clean().nodes:
        if node.op not in ("Shape", "Size") and any(t.name in tensors for t in node.inputs):
            tensors |= {t.name for t in node.outputs}
            nodes.add(id(node))
    return nodes


def _spread(graph: Graph, node: Node, place: int, batched: set[int]) -> int:
    """Repeat one input of a Concat for every sample where it is there once."""
    tensor = node.inputs[place]
    other = next((t for t in node.inputs if (above := producer(t)) is not None and id(above) in batched), None)
    above, array = producer(tensor), constant_of(tensor)
    sizes = list(array.shape) if array is not None else list(tensor.shape or [])
    if other is None or not sizes or sizes[0] != 1 or (above is not None and id(above) in batched):
        return 0
    batch = graph.add("Shape", [other], name=f"{node.name}/batch", start=0, end=1)
    ones = graph.constant(f"{node.name}/ones", np.ones(len(sizes) - 1, np.int64))
    target = graph.add("Concat", [batch, ones], name=f"{node.name}/samples", axis=0)
    node.inputs[place] = graph.insert("Expand", [tensor, target], name=f"{node.name}/spread", like=tensor)
    node.inputs[place].shape = [None, *sizes[1:]]
    return 1
