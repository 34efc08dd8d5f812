"""Weights of at most 4 bits stored as INT4, two codes to a byte.

    DQ(codes, int8)  ->  DQ(Cast(codes, int4))

The values are the same and the file is half as large. ONNX Runtime widens the codes once, when a session is made, and its integer
kernels see int8 as before. It has none for INT4 itself: straight behind a DequantizeLinear such weights become float at every run,
which takes longer than the float model. The same holds for UINT4 activations, which therefore stay in their 8-bit type; nothing
of them is stored. Codes of 2 and 3 bits are stored in 4 too, wider ones as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx

from vitq_compiler.graph import value
from vitq_compiler.opset import raise_opset
from vitq_compiler.pipeline import Compilation, Fact, Pass

INT4: np.dtype[np.generic] = np.dtype(ml_dtypes.int4)
OPSET, IR_VERSION = 21, 10  # that brought it
LEAST, MOST = -8, 7


@dataclass(frozen=True)
class PackWeights(Pass):
    """DQ(int8 codes of at most 4 bits) -> DQ(Cast(int4 codes))"""

    name = "pack-weights"
    requires = frozenset({Fact.QUANTIZED})

    def run(self, c: Compilation) -> int:
        changes = 0
        edges = {name: edge for edge, name in c.codes.items()}
        for codes in c.graph.constants():
            if codes.name not in edges or value(codes).dtype != np.int8:
                continue
            if value(codes).min() < LEAST or value(codes).max() > MOST:
                self.note(c, edges[codes.name].node, "its codes have more than 4 bits and stay int8")
                continue
            packed = c.graph.constant(f"{codes.name}/int4", value(codes).astype(INT4))
            wide = c.graph.insert("Cast", [packed], name=f"{codes.name}/widened", like=codes, to=onnx.TensorProto.INT8)
            c.graph.replace(codes, wide)
            c.codes[edges[codes.name]] = wide.name  # what the runtime calls the widened codes
            changes += 1
        c.graph.clean()
        if changes:
            raise_opset(c.graph, OPSET)
            c.graph.ir_version = max(c.graph.ir_version, IR_VERSION)
        else:
            c.warnings.append("native storage changes nothing: no weight has 4 bits or fewer")
        return changes
