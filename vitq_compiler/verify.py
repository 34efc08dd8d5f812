"""The hooks that run around passes: structure, parity of float-exact passes, dumps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import onnx

from vitq_compiler.errors import InvariantError, TargetError
from vitq_compiler.graph import Array, Graph, proto_bytes
from vitq_compiler.lint.model import Model
from vitq_compiler.lint.products import products
from vitq_compiler.metrics import max_relative_error
from vitq_compiler.pipeline import Compilation, Fact, Pass, PassResult
from vitq_compiler.quant import Edge
from vitq_compiler.runtime import Feed, first_line, release_memory, run, session
from vitq_compiler.validation import probe_blocks

TOLERANCE = 1e-4  # of the largest output: what float32 rounding may add up to over a deep network


@dataclass
class Parity:
    """Holds every run of float-exact passes to the outputs of the original model on a probe batch.

    Where a pass has changed these on purpose, those after it are held to what they were before them. One check serves a run of
    exact passes; where it fails, the graph after each of them is checked to name the culprit. Where memory is what counts, each is
    checked at once, so that weights it replaced need not be kept.

    Attributes:
        feed: the probe batch.
        reference: outputs on it that count, in the order of the graph's: those of the original model, until a pass changes them.
        others: batches of other sizes, which the model leaves open, and the outputs on each.
        thrifty: whether memory counts for more than time.
        blocks: what each block gives on the probe batch before all but exact rewrites, with the edge that carries it; see `validation`.
    """

    feed: Feed
    reference: Sequence[Array]
    threads: int = 0
    thrifty: bool = False
    others: Sequence[tuple[Feed, Sequence[Array]]] = ()
    blocks: dict[str, tuple[Edge, Array]] = field(default_factory=dict)
    _pending: list[tuple[str, Graph]] = field(default_factory=list)
    _changed: bool = False

    def before(self, p: Pass, c: Compilation) -> None:
        """Check what has been done before a pass changes the float outputs, and keep what the blocks give."""
        if p.exact and self._changed:
            runner = session(c.graph, threads=self.threads, brief=True)
            self.reference, self.others = run(runner, self.feed), [(feed, run(runner, feed)) for feed, _ in self.others]
            self._changed = False
        if p.edits and not p.exact:
            self.check()
            if not self.blocks:
                self.blocks = probe_blocks(c.graph, c.annotations.block_edges, self.feed, self.threads, brief=True)

    def after(self, p: Pass, c: Compilation, result: PassResult) -> None:
        """Remember the graph after an exact pass that changed something, and that another has."""
        self._changed |= p.edits and not p.exact and bool(result.changes)
        if p.exact and result.changes:
            self._pending.append((p.name, c.graph.snapshot()))
            self.blocks = {}  # a rewrite may change what a block adds to the stream
            if self.thrifty:
                self.check()

    def check(self) -> None:
        """Compare now.

        Raises:
            InvariantError: a pass that promised to keep the outputs did not.
        """
        pending, self._pending = self._pending, []
        if not pending or self._fault(pending[-1][1]) is None:
            return
        for name, graph in pending:
            if (fault := self._fault(graph)) is not None:
                raise InvariantError(f"pass {name} changed the float outputs ({fault}); leave it out with --passes")

    def _fault(self, graph: Graph) -> str | None:
        worst = 0.0
        try:
            runner = session(graph, threads=self.threads, brief=True)
            for feed, reference in ((self.feed, self.reference), *self.others):
                outputs = run(runner, feed)
                errors = [max_relative_error(a, b) for a, b in zip(reference, outputs, strict=True) if a.dtype.kind == "f"]
                worst = max(worst, *errors) if errors else worst
        except TargetError as error:
            return str(error)
        return f"largest difference {worst:.1e} of the largest output, allowed {TOLERANCE:.0e}" if worst > TOLERANCE else None


@dataclass
class Thrift:
    """Frees what each pass has left behind."""

    def before(self, p: Pass, c: Compilation) -> None:
        """Nothing to do."""

    def after(self, p: Pass, c: Compilation, result: PassResult) -> None:
        """Free it now."""
        release_memory()


@dataclass
class Structure:
    """Holds the final graph to the ONNX checker."""

    def before(self, p: Pass, c: Compilation) -> None:
        """Nothing to do."""

    def after(self, p: Pass, c: Compilation, result: PassResult) -> None:
        """Check the lowered graph.

        Raises:
            InvariantError: it is not valid ONNX.
        """
        if Fact.LEGAL not in p.provides:
            return
        model = c.graph.to_proto()
        try:
            if proto_bytes(model) < onnx.checker.MAXIMUM_PROTOBUF:
                onnx.checker.check_model(model)
        except onnx.checker.ValidationError as error:
            raise InvariantError(f"pass {p.name} left a graph that is not valid ONNX: {first_line(error)}") from error


@dataclass
class PairLimits:
    """Holds what passes make of weights to their pair limits, from codes in the tables to products in the lowered graph; see `pairs`."""

    _seen: dict[Edge, Array] = field(default_factory=dict)

    def before(self, p: Pass, c: Compilation) -> None:
        """Nothing to do."""

    def after(self, p: Pass, c: Compilation, result: PassResult) -> None:
        """Check what is new.

        Raises:
            InvariantError: a pass has put codes beside each other whose products can saturate.
        """
        for edge, spec in c.specs.items():
            if not spec.pair_limit or edge not in c.params:
                continue
            pairs, codes = c.params[edge].pairs, c.rounding.get(edge)
            if pairs is None or pairs.limit > spec.pair_limit:
                raise self._broken(p, edge.node, "its quantizer has lost the limit of its specification")
            if codes is not None and self._seen.get(edge) is not codes:
                self._seen[edge] = codes
                if count := pairs.violations(codes):
                    raise self._broken(p, edge.node, f"{count} pairs of codes sum to more than {pairs.limit}")
        if c.codes and p.edits and c.target.runs_here and not c.target.may_saturate:
            proto, weights = c.graph.without_weights()
            for product in products(Model(proto, weights=weights)):
                if count := product.overflowing[0].size:
                    raise self._broken(p, product.node.label, f"{count} pairs of its weights can saturate")

    def _broken(self, p: Pass, where: str, what: str) -> InvariantError:
        return InvariantError(f"pass {p.name} left {where} wrong on CPUs without VNNI: {what}; leave it out, or compile with --cpu vnni")


@dataclass
class Dump:
    """Writes the graph after the named passes."""

    names: Sequence[str]
    write: Callable[[str, onnx.ModelProto], None]

    def before(self, p: Pass, c: Compilation) -> None:
        """Nothing to do."""

    def after(self, p: Pass, c: Compilation, result: PassResult) -> None:
        """Write if the pass is named."""
        if p.name in self.names:
            self.write(p.name, c.graph.to_proto())
