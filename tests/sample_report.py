"""A report as a compile makes it, small and with something of everything."""

import math
from dataclasses import replace
from typing import Any

from vitq_compiler.report import (
    BlockRow,
    CompileReport,
    DataRow,
    GateRow,
    LatencyRow,
    LinearRow,
    NeedsRow,
    NoteRow,
    OutputRow,
    PassRow,
    Validation,
)

FLOAT_HEAD = "role head stays in float in recipe w8a8"
NOT_INTEGER = "the runtime computes it with MatMul"
MET = GateRow("min-sqnr", 20.0, 31.4159, True)
MISSED = GateRow("min-agreement", 0.99, 0.984375, False)


def linear(name: str, role: str, block: str, *, quantized: bool = True, integer: bool = True, reason: str = "") -> LinearRow:
    """One row; its scope is made of its name."""
    kernel = "QGemm" if integer else "MatMul"
    return LinearRow(name, name.replace("/", "."), role, block, 192, 576, quantized, kernel, integer, reason)


def sample_report(**changes: Any) -> CompileReport:
    """Four Linear layers: two integer, one that the runtime computes in float, and the head, kept in float."""
    report = CompileReport(
        version="0.1.0",
        model="vit.onnx",
        output="vit_int8.onnx",
        recipe="w8a8",
        bits="w8a8",
        definition="",
        target="onnxruntime",
        pipeline="canonicalize,annotate,calibrate,insert-qdq",
        seconds=3.14159,
        data=DataRow("32 images from photos", "imagenet (default)", 32, 64, (("broken.jpg", "truncated"),)),
        passes=(PassRow("canonicalize", 7, 0.5), PassRow("calibrate{observer=minmax}", 3, 1.5)),
        linears=(
            linear("blocks/0/qkv", "qkv", "attention 0"),
            linear("blocks/0/fc1", "fc1", "mlp 0"),
            linear("blocks/0/fc2", "fc2", "mlp 0", integer=False, reason=NOT_INTEGER),
            linear("top[0]/linear", "head", "", quantized=False, integer=False, reason=FLOAT_HEAD),
        ),
        notes=(
            NoteRow("annotate", "top[0]/linear", FLOAT_HEAD),
            NoteRow("reparameterize-layernorm", "blocks/0/qkv", "its input has two readers"),
            NoteRow("recover-gelu", "gelu_3", "its constant is 0.7"),
        ),
        validation=Validation(
            "onnxruntime 1.2.3",
            (OutputRow("logits", 31.4159, 0.9998765, 0.984375), OutputRow("tokens", math.inf, 1.0, None)),
            (BlockRow("attention 0", 36.9), BlockRow("mlp 0", 22.5)),
            (LatencyRow(1, 1, 3.77, 1.9, 0.5), LatencyRow(2, 8, 10.0, 12.5, 1.25)),
            10_960_000,
            3_000_000,
        ),
        needs=NeedsRow(20, 9, "1.17", "Gelu is of opset 20"),
        gates=(),
        warnings=("calibrated on [few] images",),
    )
    return replace(report, **changes)
