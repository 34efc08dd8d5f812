"""Operators, opsets and options of a build: what a TensorRT parser knows."""

from __future__ import annotations

from collections.abc import Iterator

from vitq_compiler.lint.model import Model
from vitq_compiler.lint.rule import ERROR, INFORMATION, SILENT, Fault, Platform, Rule

INTEGER_OPS = frozenset({"QLinearMatMul", "QLinearConv", "MatMulInteger", "ConvInteger", "DynamicQuantizeLinear"})
QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})  # found by name, whatever their domain
PLUGINS = frozenset({"trt", "trt.plugins"})
OPSETS = {"8.6": (7, 17), "10": (7, 24), "11": (7, 26)}
# What OnnxParser.supports_operator of TensorRT-RTX 1.7 says no to, less what T21 is about. Older parsers know less.
UNSUPPORTED = frozenset(
    {
        *("AffineGrid", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad"),
        *("Col2Im", "Compress", "ConcatFromSequence", "CumProd", "DFT", "DeformConv", "Det", "ImageDecoder", "MaxRoiPool", "MaxUnpool"),
        *("MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement", "OptionalHasElement"),
        *("RegexFullMatch", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength"),
        *("SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit"),
        *("TfIdfVectorizer", "Unique"),
    }
)


def _integer_ops(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in model.find(*INTEGER_OPS):
        yield Fault(node, "the parser does not know it")


def _domains(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in model.nodes:
        known = node.op in QUANTIZERS or node.domain in PLUGINS or (node.domain, node.op) in model.functions
        if node.domain != "" and not known:
            yield Fault(node, f"operator of the domain {node.domain}")


def _functions(model: Model, platform: Platform) -> Iterator[Fault]:
    if model.functions:
        yield Fault(None, f"{len(model.functions)} functions, {'.'.join(model.functions[0])} for one")


def _opset(model: Model, platform: Platform) -> Iterator[Fault]:
    oldest, newest = OPSETS.get(platform.version or "", OPSETS["11"])
    if not oldest <= model.opset <= newest:
        yield Fault(None, f"opset {model.opset}, {oldest} to {newest} documented")
    for node in model.find(*UNSUPPORTED):
        yield Fault(node, "the parser does not know it", ERROR)


def _normalizations(model: Model, platform: Platform) -> Iterator[Fault]:
    for node in model.find("LayerNormalization"):
        if any(value.readers or value.is_output for value in node.outputs[1:]):
            yield Fault(node, "more than its first output is read")
    if platform.version == "8.6":
        for node in model.find("Gelu"):
            yield Fault(node, "an operator of opset 20")


def _dynamic_shapes(model: Model, platform: Platform) -> Iterator[Fault]:
    for value in model.inputs:
        if value.shape is None or None in value.shape:
            yield Fault(None, f"input {value.name} has dynamic sizes")


RULES = (
    Rule(
        "T21",
        ERROR,
        "integer arithmetic is written as quantizers around float operators",
        "the parser knows no QLinearMatMul, QLinearConv, MatMulInteger, ConvInteger or DynamicQuantizeLinear",
        "quantize statically, in QDQ format",
        _integer_ops,
        "onnx-tensorrt operators.md; microsoft/onnxruntime#21169",
    ),
    Rule(
        "T22",
        ERROR,
        "every operator is of standard ONNX, a function of the file, or a plugin of TensorRT",
        "an operator of another domain is looked up as a plugin, and there is none",
        "export with standard operators, or load the plugin",
        _domains,
        "onnx-tensorrt ModelImporter",
    ),
    Rule(
        "T23",
        ERROR,
        "version 8.6 gets no functions",
        "parsers before 9.0 do not know functions of the file",
        "inline them",
        _functions,
        "onnx-tensorrt Changelog 9.0",
        versions=("8.6",),
    ),
    Rule(
        "T24",
        SILENT,
        "opset and operators are those that the parser knows",
        "the parser warns of another opset and reads operators as it knows them; it refuses those it does not know. "
        "Documented are opset 7 to 17 for 8.6, 9 to 20 for 10.0, up to 22 for 10.9 and 24 for 10.13",
        "export with an opset of that range, and without these operators",
        _opset,
        "onnx-tensorrt operators.md of 8.6 and 10.1; OnnxParser.supports_operator",
    ),
    Rule(
        "T25",
        ERROR,
        "only the first output of LayerNormalization is read, and 8.6 gets no Gelu",
        "the parser refuses mean and deviation as outputs; Gelu is newer than 8.6",
        "compute them apart; write Gelu as Div, Erf, Add, Mul",
        _normalizations,
        "onnx-tensorrt Changelog 8.6",
    ),
    Rule(
        "T27",
        INFORMATION,
        "the network is built strongly typed; 8.6 gets both --int8 and --fp16",
        "an option of the build, not of the graph: 11 knows no other way, 10.12 deprecates the flags, and without them 8.6 runs FP32",
        "build with --stronglyTyped",
        None,
        "TensorRT migration guide 10 to 11; microsoft/onnxruntime#13381",
    ),
    Rule(
        "S23",
        INFORMATION,
        "dynamic sizes need an optimization profile",
        "the build asks for the least, usual and largest size of each; fusion stays the same",
        "give --minShapes, --optShapes and --maxShapes",
        _dynamic_shapes,
        "TensorRT documentation, dynamic shapes",
    ),
    Rule(
        "S24",
        INFORMATION,
        "a large GPU gains nothing from INT8 at batch 1",
        "depends on the GPU and the batch, which the graph does not know",
        "measure with the batch that will be served",
        None,
        "FasterTransformer vit_guide and swin_guide",
    ),
)
