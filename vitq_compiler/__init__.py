"""vitq: compiles a vision transformer exported to ONNX into an integer graph.

from vitq_compiler import compile
report = compile("model.onnx", "model_int8.onnx", calibration="images/")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitq_compiler.compiler import compile as compile
    from vitq_compiler.pipeline import Pipeline as Pipeline
    from vitq_compiler.quant import QuantSpec as QuantSpec
    from vitq_compiler.recipe import Recipe as Recipe
    from vitq_compiler.report import CompileReport as CompileReport

_HOMES = {
    "compile": "compiler",
    "Pipeline": "pipeline",
    "QuantSpec": "quant",
    "Recipe": "recipe",
    "CompileReport": "report",
}
__all__ = ["CompileReport", "Pipeline", "QuantSpec", "Recipe", "compile"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``--help`` loads nothing heavy."""
    import importlib

    from vitq_compiler.dependencies import check_dependencies

    if name not in _HOMES:
        raise AttributeError(f"module 'vitq_compiler' has no attribute {name!r}")
    check_dependencies()
    return getattr(importlib.import_module(f"vitq_compiler.{_HOMES[name]}"), name)
