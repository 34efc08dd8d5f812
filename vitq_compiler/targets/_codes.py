"""Limits of fewer than 8 bits on codes rather than on floats, which are four times as large.

    Clip(x, low, high) -> Q -> DQ   ->   x -> Q -> Clip(., first code, last code) -> DQ

Rounding keeps order, so both give the same codes. With nothing before it QuantizeLinear also becomes part of the kernel whose
product it reads, and what only moves numbers moves codes.
"""

from __future__ import annotations

import numpy as np

from vitq_compiler.graph import Graph, Node, Tensor, is_constant, producer, readers, value

CLOSE = 1e-3  # of a step: how near a limit must be to a code


def clip_codes(graph: Graph) -> int:
    """Move the Clip before each QuantizeLinear (a Reshape may lie between) behind it; returns their number."""
    changes = 0
    for quantize in graph.find("QuantizeLinear"):
        reader, clip = quantize, producer(quantize.inputs[0])
        if clip is not None and clip.op == "Reshape":
            reader, clip = clip, producer(clip.inputs[0])
        if clip is None or clip.op != "Clip" or (limits := _limits(graph, clip, quantize)) is None:
            continue
        reader.inputs[0] = clip.inputs[0]
        codes = quantize.outputs[0]
        dequantizers = readers(codes)
        clipped = graph.insert("Clip", [codes, *limits], name=f"{quantize.name}/clip", like=codes)
        for node in dequantizers:
            node.inputs[0] = clipped
        changes += 1
    return changes


def _limits(graph: Graph, clip: Node, quantize: Node) -> list[Tensor] | None:
    """First and last code; None where the Clip does not end at codes."""
    scale, zero_point = (value(t) for t in quantize.inputs[1:3])
    ends = clip.inputs[1:]
    if scale.ndim or len(ends) != 2 or not all(map(is_constant, ends)):
        return None
    places = [float(value(end)) / float(scale) + int(zero_point) for end in ends]
    codes, kind = np.rint(places), np.iinfo(zero_point.dtype)
    if np.abs(places - codes).max() > CLOSE or codes[0] < kind.min or codes[1] > kind.max:
        return None
    names = ("first", "last")
    return [graph.constant(f"{quantize.name}/{n}", np.asarray(code, zero_point.dtype)) for n, code in zip(names, codes, strict=True)]
