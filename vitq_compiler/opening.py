"""A model file and calibration data, opened the way every command opens them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from vitq_compiler.blocks.picture import find_pictures
from vitq_compiler.catalog import FRONT, find_pass
from vitq_compiler.data import Data, open_data
from vitq_compiler.errors import ModelError
from vitq_compiler.graph import Graph
from vitq_compiler.model_io import convert_opset, read_mended
from vitq_compiler.opset import PORTABLE, lower_opset, lowest_opset
from vitq_compiler.pipeline import Compilation, Pipeline
from vitq_compiler.precision import HalfPrecision, find_half, widen
from vitq_compiler.preprocess import Preprocess, resolve
from vitq_compiler.preprocess_in_graph import leave_out
from vitq_compiler.probing import usual_probes
from vitq_compiler.recipe import Recipe
from vitq_compiler.releases import requirement
from vitq_compiler.runtime import INSTALLED
from vitq_compiler.sample_sizes import SampleSizes
from vitq_compiler.target import Target
from vitq_compiler.token_ids import id_limits


@dataclass(frozen=True)
class Opened:
    """A model in float32.

    Attributes:
        graph: at opset `PORTABLE`, or a newer one that its operators need.
        half: what half precision the file has.
        boundary: the inputs and outputs that were of it, with their types; see `precision.narrow`.
        runs_here: whether the installed runtime has the operators of the file as they are there.
        mended: what was wrong with the file and is not with the graph, a sentence each.
    """

    graph: Graph
    half: HalfPrecision
    boundary: dict[str, int]
    runs_here: bool
    mended: list[str]


def open_model(model: Path, target: Target) -> Opened:
    """Read a model for a target.

    Raises:
        ModelError: it cannot be read, or not brought to opset `PORTABLE`.
    """
    source, mended = read_mended(model)
    runs_here = requirement(source).met_by(INSTALLED)
    half, boundary = find_half(source), widen(source)
    graph = Graph.from_proto(convert_opset(source, PORTABLE, model))
    lower_opset(graph, max(PORTABLE, lowest_opset(graph)))
    graph.ir_version = target.ir_version
    graph.layouts = {picture.name: picture.layout for picture in find_pictures(graph) if picture.layout is not None}
    return Opened(graph, half, boundary, runs_here, mended)


def open_samples(
    graph: Graph,
    model: Path,
    recipe: Recipe,
    calibration: Path | None,
    *,
    samples: int | None,
    augment: int,
    batch_size: int,
    preprocess: str | None,
    seed: int,
) -> Data:
    """The calibration data of a graph from ``model``, and half as many samples, 16 at least, held back; see `compiler.compile`.

    Raises:
        DataError: the data cannot be read, or do not fit the model.
    """
    count = samples or recipe.samples
    chosen, warnings = _preprocess(graph, model, preprocess)
    sizes = SampleSizes(graph, chosen)
    data = open_data(
        calibration,
        graph.inputs,
        chosen,
        samples=count,
        augment=augment,
        validation_samples=max(16, count // 2),
        batch_size=batch_size,
        seed=seed,
        ids=id_limits(graph),
        sized=sizes,
    )
    if data.preprocess is not None:
        data.warnings.extend(warnings)
    data.warnings += sizes.notes
    return data


def _preprocess(graph: Graph, model: Path, text: str | None) -> tuple[Preprocess, list[str]]:
    """What is to be done to pictures before the graph, and warnings; its inputs that are pictures are treated alike."""
    wanted = resolve(text, model)
    inputs = {spec.name: spec for spec in graph.inputs}
    found = [leave_out(wanted, picture, inputs[picture.name], told=text is not None) for picture in find_pictures(graph)]
    if not found:
        return wanted, []
    first, warnings = found[0]
    if any(replace(other, source="") != replace(first, source="") for other, _ in found):
        warnings = [
            *warnings,
            "the graph takes its pictures in unlike forms, and all are preprocessed as the first: pass arrays in a .npz",
        ]
    return first, warnings


def run_front(c: Compilation, model: Path) -> None:
    """Run the passes that a compile begins with: canonical form, and the blocks found.

    Raises:
        ModelError: no transformer is found; the message names the file.
    """
    if not c.probes:
        c.probes = usual_probes(c.graph, model)
    try:
        Pipeline.parse(FRONT, find_pass).run(c)
    except ModelError as error:
        raise ModelError(f"model {model}: {error}") from error
