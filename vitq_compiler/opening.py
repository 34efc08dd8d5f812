"""A model file and calibration data, opened the way every command opens them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vitq_compiler.catalog import FRONT, find_pass
from vitq_compiler.data import Data, open_data
from vitq_compiler.errors import ModelError
from vitq_compiler.graph import Graph
from vitq_compiler.model_io import convert_opset, read_model
from vitq_compiler.opset import PORTABLE, lower_opset, lowest_opset
from vitq_compiler.pipeline import Compilation, Pipeline
from vitq_compiler.precision import half_type, widen
from vitq_compiler.preprocess import resolve
from vitq_compiler.recipe import Recipe
from vitq_compiler.releases import requirement
from vitq_compiler.runtime import INSTALLED
from vitq_compiler.target import Target
from vitq_compiler.token_ids import id_limits


@dataclass(frozen=True)
class Opened:
    """A model in float32.

    Attributes:
        graph: at opset `PORTABLE`, or a newer one that its operators need.
        half: the half precision that the file is in, or empty.
        boundary: the inputs and outputs that were of it, with their types; see `precision.narrow`.
        runs_here: whether the installed runtime has the operators of the file as they are there.
    """

    graph: Graph
    half: str
    boundary: dict[str, int]
    runs_here: bool


def open_model(model: Path, target: Target) -> Opened:
    """Read a model for a target.

    Raises:
        ModelError: it cannot be read, or not brought to opset `PORTABLE`.
    """
    source = read_model(model)
    runs_here = requirement(source).met_by(INSTALLED)
    half, boundary = half_type(source), widen(source)
    graph = Graph.from_proto(convert_opset(source, PORTABLE, model))
    lower_opset(graph, max(PORTABLE, lowest_opset(graph)))
    graph.ir_version = target.ir_version
    return Opened(graph, half, boundary, runs_here)


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
    return open_data(
        calibration,
        graph.inputs,
        resolve(preprocess, model),
        samples=count,
        augment=augment,
        validation_samples=max(16, count // 2),
        batch_size=batch_size,
        seed=seed,
        ids=id_limits(graph),
    )


def run_front(c: Compilation, model: Path) -> None:
    """Run the passes that a compile begins with: canonical form, and the blocks found.

    Raises:
        ModelError: no transformer is found; the message names the file.
    """
    try:
        Pipeline.parse(FRONT, find_pass).run(c)
    except ModelError as error:
        raise ModelError(f"model {model}: {error}") from error
