"""ReLU in place of GELU, in MLPs whose weights are trained to make up for it.

    gelu(x W1 + b1) W2 + b2  ->  relu(x W1' + b1') W2' + b2'

For 3 bits (GLF-Q; APHQ-ViT, arXiv 2504.02508): a hidden layer that is never negative leaves all of a few codes to what
matters, and costs less to compute. It changes what the float network computes, so it is in no recipe for 8 bits, and how much it
changes is said in the report. Every MLP is trained by itself on its float inputs (see `training.relu_mlp`); an eighth of the samples
is held back, and the state that serves these best is kept. Everything behind this pass, the repair of weights too, is held against
the network with ReLU; the report's figures are against the model as it was given.

Precondition: a GELU is all that lies between fc1 and fc2, and nothing else reads the hidden layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitq_compiler.blocks.linear import add_to_bias
from vitq_compiler.blocks.mlp import Mlp
from vitq_compiler.errors import DataError
from vitq_compiler.graph import Graph, value
from vitq_compiler.metrics import sqnr
from vitq_compiler.pattern import MatchFailure
from vitq_compiler.pipeline import Compilation, Fact, Pass
from vitq_compiler.prefix import Store
from vitq_compiler.runtime import run, session
from vitq_compiler.torch_graph import require_torch
from vitq_compiler.training.batches import split, temporary_store
from vitq_compiler.training.loop import Schedule, pick_device, torch_threads, train
from vitq_compiler.training.objective import store_outputs
from vitq_compiler.training.relu_mlp import GeluMlp, ReluMlp

LOOKED_AT = 4  # batches, for percentile and variance


@dataclass(frozen=True)
class RefitMlp(Pass):
    """gelu(x W1) W2 -> relu(x W1') W2', the weights trained"""

    name = "refit-mlp"
    requires = frozenset({Fact.ANNOTATED})
    drops = frozenset({Fact.CALIBRATED, Fact.QPARAMS})
    steps: int = 500
    rate: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.rate > 0:
            raise ValueError(f"steps and rate must be positive, got {self.steps} and {self.rate}")

    def check(self, c: Compilation) -> None:
        require_torch(f"pass {self.name}")
        pick_device(c.device)

    def run(self, c: Compilation) -> int:
        mlps = []
        for mlp in c.annotations.mlps:
            try:
                _require_gelu(c.graph, mlp)
                mlps.append(mlp)
            except MatchFailure as failure:
                self.note(c, mlp.fc2.name, f"the MLP keeps its activation: {failure.reason}")
        if mlps:
            before = c.graph.snapshot()
            with temporary_store(c) as inputs, torch_threads(c.threads):
                sources = tuple(spec.name for spec in c.graph.inputs)
                names = tuple(dict.fromkeys(mlp.fc1.input.name for mlp in mlps))
                batches = ((feed[name] for name in sources) for feed in c.data.calibration())
                count = store_outputs(c.graph, sources, names, batches, inputs, c.threads)
                if count < 2 * c.data.copies:
                    raise DataError(f"pass {self.name} holds samples back: give more of them, or a smaller --batch-size")
                for index, mlp in enumerate(mlps):
                    self._refit(c, mlp, inputs, count, (index, len(mlps)))
            c.warnings.append(
                f"refit-mlp changed the float network: ReLU in place of GELU in {len(mlps)} MLPs, after which its outputs are "
                f"{_likeness(c, before):.1f} dB from what they were"
            )
        return len(mlps)

    def _refit(self, c: Compilation, mlp: Mlp, inputs: Store, count: int, place: tuple[int, int]) -> None:
        fitted, held_back = split(count, c.data.copies)
        name = mlp.fc1.input.name
        tensors = {"W1": mlp.fc1.weight, "b1": mlp.fc1.bias, "W2": mlp.fc2.weight, "b2": mlp.fc2.bias}
        weights = {key: value(tensor).astype(np.float32) for key, tensor in tensors.items() if tensor is not None}
        teacher = GeluMlp(weights, mlp.activation.attrs.get("approximate", "none"))
        student = ReluMlp(teacher, [inputs.get(name, batch) for batch in fitted[:LOOKED_AT]], pick_device(c.device))
        index, total = place
        train(
            student,
            lambda batch, _: student.error(student.tensor(inputs.get(name, batch))),
            fitted,
            held_back,
            Schedule(self.steps, self.rate, 0.0, self.rate, seed=index),
            advance=lambda done, steps: c.progress("refitting", index * steps + done, total * steps),
        )
        for key, array in student.weights().items():
            tensor = tensors[key]
            assert tensor is not None  # `_require_gelu` gave both layers a bias
            tensor.values = array
        mlp.activation.op = "Relu"
        mlp.activation.attrs.clear()


def _require_gelu(graph: Graph, mlp: Mlp) -> None:
    """Give both layers a bias.

    Raises:
        MatchFailure: the MLP is not what can be refitted.
    """
    if mlp.gate is not None:
        raise MatchFailure("it is gated")
    if mlp.activation.op != "Gelu":
        raise MatchFailure(f"that is {mlp.activation.op}, not GELU")
    if not mlp.plain:
        raise MatchFailure("more than GELU lies between its layers")
    hidden = mlp.activation.outputs[0]
    if graph.is_output(hidden) or len(hidden.outputs) != 1:
        raise MatchFailure("more than fc2 reads the hidden layer")
    if graph.is_output(mlp.fc1.output) or len(mlp.fc1.output.outputs) != 1:
        raise MatchFailure("more than the activation reads fc1")
    for linear in (mlp.fc1, mlp.fc2):
        if linear.bias is None:
            add_to_bias(graph, linear, np.zeros(linear.out_features))


def _likeness(c: Compilation, before: Graph) -> float:
    """Least SQNR of the outputs, on samples that were not trained on where there are some."""
    feed = next(c.data.validation() if c.data.validation_count else c.data.calibration())
    pairs = zip(*(run(session(graph, threads=c.threads, brief=True), feed) for graph in (before, c.graph)), strict=True)
    return min((sqnr(a, b) for a, b in pairs if a.dtype.kind == "f"), default=float("inf"))
