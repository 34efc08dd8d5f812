"""The checks between passes catch what they are there for, and name the culprit."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.builders import compilation, difference, feed_of, find_pass, random_feed, run_model, vit
from tests.open_vit import open_vit
from vitq_compiler.errors import InvariantError, PassError
from vitq_compiler.graph import value
from vitq_compiler.passes.annotate import Annotate
from vitq_compiler.passes.canonicalize import Canonicalize
from vitq_compiler.passes.recover_gelu import RecoverGelu
from vitq_compiler.pipeline import Compilation, Fact, Pass, Pipeline
from vitq_compiler.targets.onnxruntime import Onnxruntime
from vitq_compiler.verify import PairLimits, Parity, Structure


@dataclass(frozen=True)
class DoubleWeights(Pass):
    """W -> 2 W, which is not what ``exact`` promises"""

    name = "double-weights"
    exact = True

    def run(self, c: Compilation) -> int:
        node = c.graph.find("LayerNormalization")[0]
        node.inputs[1].values = 2 * value(node.inputs[1])
        return 1


@dataclass(frozen=True)
class CutInput(Pass):
    """MatMul(a, b) -> MatMul(a), which is not valid ONNX"""

    name = "cut-input"
    provides = frozenset({Fact.LEGAL})

    def run(self, c: Compilation) -> int:
        node = c.graph.find("MatMul")[0]
        node.inputs = node.inputs[:1]
        return 1


@dataclass(frozen=True)
class Broken(Pass):
    """x -> an exception that is no VitqError"""

    name = "broken"

    def run(self, c: Compilation) -> int:
        raise ZeroDivisionError("by zero")


def parity_of(c: Compilation) -> Parity:
    feed = feed_of(c.graph)
    return Parity(feed, run_model(c.graph, feed))


def test_exact_passes_that_keep_the_outputs_are_accepted() -> None:
    c = compilation(vit())
    parity = parity_of(c)
    Pipeline((Canonicalize(), RecoverGelu())).run(c, (parity,))
    parity.check()


def test_a_pass_that_changes_the_outputs_is_named() -> None:
    c = compilation(vit())
    parity = parity_of(c)
    Pipeline((Canonicalize(), DoubleWeights(), RecoverGelu())).run(c, (parity,))
    with pytest.raises(InvariantError, match="pass double-weights changed the float outputs"):
        parity.check()


@dataclass(frozen=True)
class Halve(Pass):
    """W -> W / 2, on purpose"""

    name = "halve"

    def run(self, c: Compilation) -> int:
        node = c.graph.find("LayerNormalization")[-1]
        node.inputs[1].values = value(node.inputs[1]) / 2
        return 1


@dataclass(frozen=True)
class FixSize(Pass):
    """Reshape to sizes that are computed -> to those of pictures of 16 by 16"""

    name = "fix-size"
    exact = True

    def run(self, c: Compilation) -> int:
        node = c.graph.find("Reshape")[0]
        node.inputs[1] = c.graph.constant("fixed", np.array([-1, 8, 16]))
        return 1


def test_other_sizes_are_held_to_the_original_too() -> None:
    c = compilation(open_vit())
    feeds = [random_feed(c.graph.inputs, size=size) for size in (16, 12)]
    first, second = (run_model(c.graph, feed) for feed in feeds)
    blind, seeing = Parity(feeds[0], first), Parity(feeds[0], first, others=[(feeds[1], second)])
    for parity in (blind, seeing):
        copy = compilation(open_vit())
        Pipeline((Canonicalize(), FixSize())).run(copy, (parity,))
    blind.check()
    with pytest.raises(InvariantError, match="pass fix-size changed the float outputs"):
        seeing.check()


def test_other_sizes_follow_what_a_pass_changes_on_purpose() -> None:
    c = compilation(open_vit())
    feeds = [random_feed(c.graph.inputs, size=size) for size in (16, 12)]
    first, second = (run_model(c.graph, feed) for feed in feeds)
    parity = Parity(feeds[0], first, others=[(feeds[1], second)])
    Pipeline((Canonicalize(), Annotate(), Halve(), Canonicalize())).run(c, (parity,))
    parity.check()
    assert difference(parity.others[0][1], run_model(c.graph, feeds[1])) <= 1e-5
    assert difference(parity.others[0][1], second) > 0.1


def test_it_is_noticed_before_a_pass_that_may_change_them() -> None:
    c = compilation(vit())
    with pytest.raises(InvariantError, match="double-weights"):
        Pipeline((Canonicalize(), DoubleWeights(), Broken())).run(c, (parity_of(c),))


@dataclass(frozen=True)
class Negate(Pass):
    """y -> -y, on purpose"""

    name = "negate"

    def run(self, c: Compilation) -> int:
        (output,) = c.graph.outputs
        c.graph.set_outputs([c.graph.insert("Neg", [output], name="negated", like=output)])
        return 1


def test_after_a_change_on_purpose_exact_passes_are_held_to_what_it_made() -> None:
    c = compilation(vit())
    parity = parity_of(c)
    Pipeline((Canonicalize(), Annotate(), Negate(), RecoverGelu())).run(c, (parity,))
    parity.check()
    with pytest.raises(InvariantError, match="double-weights changed"):
        Pipeline((DoubleWeights(), Broken())).run(c, (parity,))


def test_an_invalid_graph_is_refused() -> None:
    c = compilation(vit())
    with pytest.raises(InvariantError, match="pass cut-input left a graph that is not valid ONNX"):
        Pipeline((Canonicalize(), CutInput())).run(c, (Structure(),))


def test_an_unexpected_error_names_the_pass_and_what_ran_before() -> None:
    with pytest.raises(PassError, match=r"pass broken failed after \[canonicalize\]: ZeroDivisionError: by zero") as caught:
        Pipeline((Canonicalize(), Broken())).run(compilation(vit()))
    assert caught.value.ran_before == ("canonicalize",)


def lowered_with(text: str, passes: dict[str, type[Pass]], target: Onnxruntime | None = None) -> None:
    """Compile a small model through the pipeline ``text``, with the hook for pair limits."""
    front = "canonicalize,recover-gelu,separate-linears,annotate,calibrate,compute-qparams"
    c = compilation(vit(), target=target or Onnxruntime())
    Pipeline.parse(f"{front},{text}", lambda name: passes.get(name) or find_pass(name)).run(c, (PairLimits(),))


@dataclass(frozen=True)
class LoudCodes(Pass):
    """codes -> the largest ones"""

    name = "loud-codes"
    requires = frozenset({Fact.QPARAMS})

    def run(self, c: Compilation) -> int:
        if not c.codes:
            edge = next(edge for edge, spec in c.specs.items() if spec.pair_limit)
            c.rounding[edge] = np.full(c.graph.node(edge.node).inputs[1].shape, 127, np.int8)
        else:
            codes = next(t for t in c.graph.constants() if t.name in c.codes.values())
            codes.values = np.full(codes.shape, 127, np.int8)
        return 1


@dataclass(frozen=True)
class ForgetLimits(Pass):
    """QuantParams -> QuantParams without the limit of pairs"""

    name = "forget-limits"
    requires = frozenset({Fact.QPARAMS})

    def run(self, c: Compilation) -> int:
        for edge in c.params:
            c.params[edge] = replace(c.params[edge], pairs=None)
        return 1


MEDDLERS: dict[str, type[Pass]] = {"loud-codes": LoudCodes, "forget-limits": ForgetLimits}


@pytest.mark.parametrize("order", ["loud-codes,insert-qdq,legalize", "insert-qdq,loud-codes,legalize", "insert-qdq,legalize,loud-codes"])
def test_a_pass_that_makes_products_saturate_is_named(order: str) -> None:
    with pytest.raises(InvariantError, match=r"pass loud-codes left .* wrong on CPUs without VNNI: .* pairs"):
        lowered_with(order, MEDDLERS)


def test_a_pass_that_forgets_the_limit_is_named() -> None:
    with pytest.raises(InvariantError, match=r"pass forget-limits left .* has lost the limit"):
        lowered_with("forget-limits,insert-qdq,legalize", MEDDLERS)


def test_where_products_are_exact_every_code_goes() -> None:
    lowered_with("insert-qdq,loud-codes,legalize,loud-codes", MEDDLERS, Onnxruntime(cpu="vnni"))
