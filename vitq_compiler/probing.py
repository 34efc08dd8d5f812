"""The first runs of a model: whether it takes the data, and what to run it on to see its shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from vitq_compiler.batching import free_batch
from vitq_compiler.errors import ModelError, TargetError
from vitq_compiler.graph import Array, Graph
from vitq_compiler.implied_sizes import channel_sizes, find_patchings, side_steps
from vitq_compiler.preprocess import resolve
from vitq_compiler.runtime import Feed, run, sample_count, session
from vitq_compiler.sample_sizes import SampleSizes
from vitq_compiler.sizes import Probe, Shapes, open_axes, probes_of, runs_with, shapes_of

Runner = Callable[[Feed], list[Array]]


@dataclass(frozen=True)
class FirstRun:
    """A model, run on a batch for the first time.

    Attributes:
        model: what was run: what was given, or its graph where that had to be edited.
        runner: runs it again.
        outputs: what it gave.
        freed: nodes that a batch of one was written into, and is no more.
    """

    model: Path | Graph
    runner: Runner
    outputs: list[Array]
    freed: list[str]

    @property
    def warnings(self) -> list[str]:
        """What the user should know of it."""
        nodes = f"{len(self.freed)} nodes ({', '.join(self.freed[:3])})"
        return [f"a batch of one was written into {nodes}: these take any batch now"] if self.freed else []


def first_run(model: Path | Graph, graph: Graph, feed: Feed, threads: int) -> FirstRun:
    """Run a model on a batch; a batch of one that is written into its graph is freed there.

    Args:
        model: what to run.
        graph: its graph, edited where that helps.
        feed: a batch of the data.
        threads: as in `runtime.session`.

    Raises:
        ModelError: it does not run; the message says what to do.
    """
    runner = partial(run, session(model, threads=threads, brief=True))
    try:
        return FirstRun(model, runner, runner(feed), [])
    except TargetError as error:
        if not (freed := free_batch(graph, feed, threads)):
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
            advice = "give samples of a size it takes, by --preprocess crop=HEIGHTxWIDTH or in a .npz"
            raise ModelError(f"does not run on {shapes} ({error}); {advice}") from error
    model = graph.snapshot()
    runner = partial(run, session(model, threads=threads, brief=True))
    return FirstRun(model, runner, runner(feed), freed)


def find_probes(graph: Graph, feed: Feed, runner: Runner) -> list[Probe]:
    """What to run a graph on to see which sizes depend on which; see `sizes`.

    Args:
        graph: as it was opened.
        feed: a batch of the data.
        runner: runs the graph; used where it is not known beforehand which sizes it takes.
    """
    return _probes(graph, shapes_of(graph.inputs, feed), runner, alone=sample_count(graph.inputs, feed) == 1)


def usual_shapes(graph: Graph, model: Path) -> Shapes:
    """The shapes that samples for a graph from ``model`` have where nobody gives any."""
    return SampleSizes(graph, resolve(None, model)).shapes


def usual_probes(graph: Graph, model: Path) -> list[Probe]:
    """`find_probes` for samples of `usual_shapes`."""
    opened = cache(lambda: session(graph, brief=True))
    return _probes(graph, usual_shapes(graph, model), lambda feed: run(opened(), feed), alone=True)


def _probes(graph: Graph, shapes: Shapes, runner: Runner, *, alone: bool) -> list[Probe]:
    patchings = find_patchings(graph)
    settled = channel_sizes(patchings)
    alone = alone and any(spec.batched and not spec.fixed_batch for spec in graph.inputs)
    groups = [[axis for axis in group if axis not in settled] for group in open_axes(graph.inputs)]
    return probes_of([g for g in groups if g], shapes, side_steps(patchings), runs_with(runner, graph.inputs), alone=alone)
