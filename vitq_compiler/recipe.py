"""Recipes: what to quantize, how, and by which passes. The only place where a recipe file is validated."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from vitq_compiler.blocks.linear import ROLES
from vitq_compiler.errors import RecipeError
from vitq_compiler.quant import QuantSpec


@dataclass(frozen=True)
class Recipe:
    """One recipe.

    Attributes:
        name: its file name without ending.
        description: one sentence for ``--list-recipes``.
        weight: how weights are quantized.
        activation: how the inputs of Linear layers and patch embeddings are quantized.
        float_roles: roles kept in float, of `ROLES`.
        passes: the pipeline between the target's rewrites and its lowering.
        exclude: regular expressions; a Linear or Conv whose name one of them finds stays in float.
    """

    name: str
    description: str
    weight: QuantSpec
    activation: QuantSpec
    float_roles: tuple[str, ...]
    passes: str
    exclude: tuple[str, ...] = ()

    def excluding(self, patterns: tuple[str, ...]) -> Recipe:
        """The same recipe with more exclusions."""
        return replace(self, exclude=self.exclude + patterns)


def recipe_names() -> tuple[str, ...]:
    """The recipes that come with the package."""
    return tuple(
        sorted(f.name.removesuffix(".toml") for f in resources.files("vitq_compiler.recipes").iterdir() if f.name.endswith(".toml"))
    )


def load_recipe(name: str) -> Recipe:
    """A recipe of the package by name, or one from a ``.toml`` file.

    Raises:
        RecipeError: no such recipe, unreadable TOML, an unknown key or a value that makes no sense.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise RecipeError(f"recipe {name}: no such file")
        text, label = path.read_text(encoding="utf-8", errors="replace"), path.stem
    elif name in recipe_names():
        text, label = resources.files("vitq_compiler.recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8"), name
    else:
        near = difflib.get_close_matches(name, recipe_names(), 1)
        raise RecipeError(
            f"recipe {name!r} is unknown{f', did you mean {near[0]}' if near else ''}: see --list-recipes, or give a .toml file"
        )
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {name}: not valid TOML: {error}") from None
    return parse_recipe(label, table)


def parse_recipe(name: str, table: dict[str, Any]) -> Recipe:
    """Check a recipe read from TOML; keys as in `Recipe`, ``weight`` and ``activation`` as tables of `QuantSpec` fields."""
    known = {f.name for f in fields(Recipe)} - {"name"}
    missing = {"description", "weight", "activation", "passes"} - table.keys()
    if unknown := sorted(table.keys() - known):
        raise RecipeError(f"recipe {name}: unknown key {unknown[0]!r}, known are {', '.join(sorted(known))}")
    if missing:
        raise RecipeError(f"recipe {name}: key {min(missing)!r} is missing")
    float_roles = _strings(name, "float_roles", table.get("float_roles", []))
    if wrong := [r for r in float_roles if r not in ROLES]:
        raise RecipeError(f"recipe {name}: float_roles holds {wrong[0]!r}, known roles are {', '.join(ROLES)}")
    return Recipe(
        name=name,
        description=str(table["description"]),
        weight=_spec(name, "weight", table["weight"]),
        activation=_spec(name, "activation", table["activation"]),
        float_roles=float_roles,
        passes=str(table["passes"]),
        exclude=_strings(name, "exclude", table.get("exclude", [])),
    )


def _spec(name: str, key: str, table: Any) -> QuantSpec:
    if not isinstance(table, dict):
        raise RecipeError(f"recipe {name}: {key} must be a table such as {{ bits = 8 }}")
    known = {f.name: f for f in fields(QuantSpec)}
    for option, value in table.items():
        if option not in known:
            raise RecipeError(f"recipe {name}: {key} has no option {option!r}, known are {', '.join(known)}")
        if type(value) is not type(known[option].default):
            raise RecipeError(f"recipe {name}: {key}.{option} cannot be {value!r}, it needs type {type(known[option].default).__name__}")
    if table.get("granularity", "per_tensor") not in ("per_tensor", "per_channel"):
        raise RecipeError(f"recipe {name}: {key}.granularity must be per_tensor or per_channel")
    try:
        return QuantSpec(**table)
    except ValueError as error:
        raise RecipeError(f"recipe {name}: {key}: {error}") from None


def _strings(name: str, key: str, items: Any) -> tuple[str, ...]:
    if not isinstance(items, list) or not all(isinstance(i, str) for i in items):
        raise RecipeError(f"recipe {name}: {key} must be a list of strings")
    return tuple(items)
