"""What a target is: a table of rules, two pipeline texts and a lowering."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from vitq_compiler.errors import RecipeError, TargetError
from vitq_compiler.graph import Graph, InputSpec
from vitq_compiler.lint.model import Model
from vitq_compiler.lint.rule import Finding, Platform, Rule, check
from vitq_compiler.opset import PORTABLE, lower_opset

if TYPE_CHECKING:
    from vitq_compiler.pipeline import Compilation
    from vitq_compiler.quant import QuantSpec


class Target(ABC):
    """A runtime or compiler that takes the integer graph.

    Attributes:
        name: as in ``--target``.
        opset: the newest one that the graph may have; it gets the lowest that its operators need.
        ir_version: IR version of the file, where no type needs a newer one.
        rewrites: passes that shape the float graph for this target, before calibration.
        lowering: passes from quantization parameters to the quantized graph, to which legalize then gives its form.
        rules: what a graph must satisfy, also one that another tool made; see `lint`.
        release: the release of ONNX Runtime that the graph is written for, of `releases.RELEASES`; empty where none is named.
        platform: the version and the GPU that the graph is for, where that matters.
        integer_kernels: op types of the runtime's optimized graph that compute on integers.
        runs_here: whether onnxruntime on this machine is what the graph is for; only then do its kernels and timings count.
        attention_choices: those of `recipe.ATTENTION` between which the user has to weigh speed and accuracy; the report prices each.
        packing: pass before legalize that stores weights of few bits in a type of their own; empty where the target runs no such weights.
        may_saturate: whether products of codes may saturate on CPUs that the graph is not meant for.
        replaces: pass of a recipe -> the passes that take its place (or none), where another way suits the target better.
    """

    name: ClassVar[str]
    opset: ClassVar[int] = PORTABLE
    ir_version: ClassVar[int] = 9
    rewrites: ClassVar[str]
    lowering: ClassVar[str]
    rules: ClassVar[tuple[Rule, ...]]
    release: ClassVar[str] = ""
    platform: Platform = Platform()
    integer_kernels: ClassVar[frozenset[str]]
    runs_here: ClassVar[bool] = True
    attention_choices: ClassVar[tuple[str, ...]] = ()
    packing: ClassVar[str] = ""
    may_saturate: bool = False
    replaces: ClassVar[Mapping[str, str]] = {}

    def fit(self, spec: QuantSpec) -> QuantSpec:
        """What the target makes of a recipe's intent for an activation.

        Raises:
            RecipeError: it has no such numbers.
        """
        if spec.format != "int":
            raise RecipeError(f"target {self.name} has no 8-bit floats: take int8, or --target tensorrt")
        return spec

    def fit_weight(self, weight: QuantSpec, activation: QuantSpec) -> QuantSpec:
        """What the target makes of a recipe's intent for a weight, beside the activation that it is multiplied with (see `fit`)."""
        return weight

    def attention_fault(self, head_dim: int, tokens: int, spec: QuantSpec) -> str:
        """Why the products of an attention block of these sizes should stay in float whatever the recipe says, or nothing."""
        return ""

    def kernels(self, graph: Graph) -> dict[str, str]:
        """Where the target does not run here: weight codes -> the kernel that its form leads to."""
        return {}

    def command(self, path: Path, inputs: list[InputSpec]) -> str:
        """The command that takes the written graph further, or nothing."""
        return ""

    def lower_opset(self, c: Compilation) -> int:
        """Write the graph in the words of the newest opset that the target takes; returns how many operators became others.

        Raises:
            TargetError: one has no form there.
        """
        return lower_opset(c.graph, self.opset)

    @abstractmethod
    def lower(self, c: Compilation) -> int:
        """Rewrite the quantized graph into the form this target runs fastest; returns the number of changes."""

    def check(self, graph: Graph) -> list[Finding]:
        """Hold the graph against the rules; returns what is legal but could be better.

        Raises:
            TargetError: the target would refuse the graph, or mean something else by it.
        """
        proto, weights = graph.without_weights()
        findings = check(Model(proto, weights=weights), self.rules, self.platform)
        for finding in findings:
            if finding.severity.fails:
                raise TargetError(f"target {self.name}: {finding}")
        return findings
