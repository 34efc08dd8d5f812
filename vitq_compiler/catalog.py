"""What there is to choose from: passes, recipes and targets by name, and the pipeline that a choice makes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from vitq_compiler.errors import RecipeError
from vitq_compiler.pipeline import Pass, Pipeline
from vitq_compiler.recipe import Recipe, load_recipe, recipe_names
from vitq_compiler.registry import load, names
from vitq_compiler.target import Target

FRONT = (
    "unfuse-contrib-ops,canonicalize,recover-layernorm,recover-rmsnorm,recover-gelu,"
    "separate-linears,fold-batch-norm,linearize-pointwise,unflatten-linears,fold-layer-scale,annotate"
)


def find_pass(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        RecipeError: there is none of that name.
    """
    found: type[Any] = load("passes", name)
    return found


def pipeline_for(recipe: Recipe, target: Target, passes: str | None = None) -> Pipeline:
    """The default pipeline of a recipe and a target, or the one written in ``passes``.

    Raises:
        RecipeError: ``passes`` cannot be read, a pass does not find what it needs, or the target cannot store weights so.
    """
    packing = target.packing if recipe.storage == "native" else ""
    if recipe.storage == "native" and not packing:
        from vitq_compiler.releases import order
        from vitq_compiler.runtime import INSTALLED  # here, as listing passes needs no runtime

        release = f" of {min(target.release or INSTALLED, INSTALLED, key=order)}" if target.runs_here else ""
        raise RecipeError(f"target {target.name}{release} runs no INT4 weights beside quantized activations: leave out --storage native")
    if passes is None:
        chosen = recipe.pipeline
        for name, others in target.replaces.items():
            chosen = re.sub(rf"(?<![\w-]){name}(\{{[^}}]*\}})?(?![\w-])", others, chosen)
        parts = (FRONT, target.rewrites, chosen, target.lowering, packing, "legalize")
        passes = ",".join(name for text in parts for name in text.split(",") if name)
    return Pipeline.parse(passes, find_pass)


def load_target(name: str, options: Mapping[str, Any] | None = None) -> Target:
    """A target by name, with those of its fields that ``options`` names.

    Raises:
        RecipeError: there is none of that name, or it has no such option, or not of that value.
    """
    if name not in list_targets():
        raise RecipeError(f"target {name!r} is unknown: known are {', '.join(list_targets())}")
    kind: type[Target] = load("targets", name)
    known: set[str] = {f.name for f in fields(kind)} if is_dataclass(kind) else set()
    if unknown := [option for option in options or {} if option not in known]:
        raise RecipeError(f"target {name} has no option {unknown[0].replace('_', ' ')}: leave it out, or give another target")
    return kind(**(options or {}))


def list_targets() -> tuple[str, ...]:
    """Names of all targets."""
    return names("targets")


def list_recipes() -> list[tuple[str, str]]:
    """Name and description of every recipe of the package."""
    return [(name, load_recipe(name).description) for name in recipe_names()]


def list_passes() -> list[tuple[str, str]]:
    """Name and rewrite, ``before -> after``, of every pass."""
    return [(name, (find_pass(name).__doc__ or "").strip().splitlines()[0]) for name in names("passes")]
