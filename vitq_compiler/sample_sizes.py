"""The sizes of samples that are read or made here, where the model leaves its axes open.

Of pictures: what the user or a configuration file says, else what the model's positions are made for, else 224, as usual; of
texts: fewer tokens than there are positions. What several things speak for is tried out, the first that runs is taken, and
`SampleSizes.notes` says what it is and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice, product

from vitq_compiler.graph import Graph, InputSpec
from vitq_compiler.implied_sizes import channel_sizes, find_patchings, implied_lengths, implied_sides
from vitq_compiler.preprocess import Preprocess
from vitq_compiler.runtime import run, session
from vitq_compiler.sizes import Axis, Probe, Shapes, Sizes, is_open, open_axes, runs_with

TOKENS = 64  # of a made-up text, where there are positions for more
MOST_TRIALS = 12
Choice = tuple[tuple[int, ...], str]  # sizes, and why these


class SampleSizes:
    """Fills in the sizes of inputs, and says why these."""

    def __init__(self, graph: Graph, preprocess: Preprocess) -> None:
        self._graph, self._preprocess = graph, preprocess
        self._pictures = {picture.name: picture for picture in find_patchings(graph)}
        self.notes: list[str] = []

    def __call__(self, spec: InputSpec) -> InputSpec:
        """``spec`` with the sizes of samples; what nothing tells stays open, as does the batch."""
        return replace(spec, shape=tuple(self._sizes.get((spec.name, axis), size) for axis, size in enumerate(spec.shape)))

    @property
    def shapes(self) -> Shapes:
        """The shapes of all inputs; a size that nothing tells is `TOKENS`."""
        return self._shapes(self._sizes)

    def _shapes(self, sizes: Sizes) -> Shapes:
        open_batch = {(spec.name, 0): 0 for spec in self._graph.inputs if spec.batched}
        known = open_batch | dict(sizes)
        return {
            spec.name: tuple(known.get((spec.name, axis), TOKENS) if is_open(size) else int(size) for axis, size in enumerate(spec.shape))
            for spec in self._graph.inputs
        }

    @cached_property
    def _sizes(self) -> Sizes:
        """The open axes but that of the batch -> their sizes."""
        axes = [axis for group in open_axes(self._graph.inputs) for axis in group]
        sides = [(name, axis) for name, axis in axes if name in self._pictures and axis in self._pictures[name].sides]
        texts = {spec.name for spec in self._graph.inputs if spec.dtype.kind in "iub" and len(spec.shape) == 2}
        tokens = [axis for axis in axes if axis[0] in texts]
        none: list[Choice] = [((0,), "")]
        choices = list(islice(product(self._sides() if sides else none, self._lengths() if tokens else none), MOST_TRIALS))
        filled = [self._filled(axes, sides, tokens, picture, length) for (picture, _), (length, _) in choices]
        chosen = next((i for i, sizes in enumerate(filled) if self._runs(sizes)), 0) if len(filled) > 1 else 0
        for places, (_, reason) in zip((sides, tokens), choices[chosen], strict=True):
            if places and reason:
                size = "x".join(str(filled[chosen][axis]) for axis in places if axis[0] == places[0][0])
                self.notes.append(f"{places[0][0]} leaves its size open: samples are {size}, {reason}")
        return filled[chosen]

    def _filled(
        self, axes: Sequence[Axis], sides: Sequence[Axis], tokens: Sequence[Axis], picture: tuple[int, ...], length: tuple[int, ...]
    ) -> Sizes:
        sizes = {axis: count for axis, count in channel_sizes(self._pictures.values()).items() if axis in axes}
        for name, axis in sides:
            order = self._pictures[name].sides
            sizes[name, axis] = picture[order.index(axis) - len(order)]
        return sizes | dict.fromkeys(tokens, length[0])

    def _sides(self) -> Iterator[Choice]:
        """Heights and widths to try."""
        usual, assumed = self._preprocess.default_size(), self._preprocess.assumed
        advice = "for others pass --preprocess crop=HEIGHTxWIDTH"
        if not assumed:
            yield usual, ""
        for picture in self._pictures.values():
            for sides in implied_sides(self._graph, picture):
                yield sides, f"which its positions are made for; {advice if assumed else 'that of the preprocessing does not run'}"
        if assumed:
            yield usual, f"as nothing tells it; {advice}"

    def _lengths(self) -> Iterator[Choice]:
        """Numbers of tokens to try."""
        for rows in implied_lengths(self._graph):
            for length in dict.fromkeys((min(TOKENS, rows - rows // 4 - 1), rows // 2, rows)):
                yield (length,), f"as it has positions for {rows} tokens; for others pass a .npz"
        for length in (TOKENS, TOKENS // 2, TOKENS // 4):
            yield (length,), "as nothing tells it; for others pass a .npz"

    def _runs(self, sizes: Sizes) -> bool:
        return self._runner(Probe(1, self._shapes(sizes)))

    @cached_property
    def _runner(self) -> Callable[[Probe], bool]:
        return runs_with(partial(run, session(self._graph, brief=True)), self._graph.inputs)
