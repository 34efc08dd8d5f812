"""Which integer instructions this CPU has, and whether the runtime's products of codes saturate on it.

Saturation is not read from a list but tried: the runtime multiplies two pairs of the largest codes.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import onnx

from vitq_compiler.tensors import from_array

# Flag of /proc/cpuinfo -> what it means for products of uint8 by int8 codes; the first that a CPU has counts.
X86: Mapping[str, str] = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512bw": "AVX-512 without VNNI",
    "avx2": "AVX2 without VNNI",
}
ARM: Mapping[str, str] = {"i8mm": "i8mm", "asimddp": "dot product", "asimd": "ARM without dot product"}
CPUINFO = Path("/proc/cpuinfo")
HALF_RATE = "int8 products run at half the rate"


def integer_unit(cpuinfo: str | None = None, machine: str | None = None) -> str:
    """The integer instructions in words, such as "AVX-512 VNNI"; on x86 without VNNI with what that means.

    Args:
        cpuinfo: the text of /proc/cpuinfo; None reads it. Without such a file, the runtime is asked whether its products saturate.
        machine: as `platform.machine`.
    """
    machine = machine or platform.machine()
    if cpuinfo is None:
        cpuinfo = CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.is_file() else ""
    table = X86 if machine.lower() in ("x86_64", "amd64", "i686") else ARM
    found = next((name for flag, name in table.items() if flag in cpuinfo.split()), "")
    if not found and table is X86:
        found = "x86 without VNNI" if saturates_here() else "x86 whose products do not saturate"
    return f"{found}: {HALF_RATE}" if "without VNNI" in found else found or machine


@cache
def saturates_here() -> bool:
    """Whether the installed runtime cuts sums of two products off on this CPU."""
    import onnxruntime as ort  # here, so that reading flags needs no runtime

    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("MatMulInteger", ["a", "w"], ["y"])
    weight = from_array(np.full((2, 1), 127, np.int8), "w")
    graph = onnx.helper.make_graph(
        [node], "probe", [value("a", onnx.TensorProto.UINT8, [1, 2])], [value("y", onnx.TensorProto.INT32, [1, 1])], [weight]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"a": np.full((1, 2), 255, np.uint8)})
    return int(product[0, 0]) != 2 * 255 * 127
