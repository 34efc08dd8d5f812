"""Recipes: what to quantize, how, and by which passes. The only place where a recipe file is validated.

    weight = { bits = 4, signed = true }          what every weight becomes
    activation = { bits = 4 }                     what every Linear input becomes
    [roles.head]                                  differences for one role
    activation = { bits = 8 }
    [attention]                                   differences for operands of the attention products; absent ones stay in float
    probs = { bits = 8 }

Differences are laid over ``weight`` and ``activation``, so `Recipe.with_bits` reaches all that does not fix its own bits. What
repairs the errors of few bits can do harm where there are none: ``passes_at_8_bits`` says what is done there.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from vitq_compiler.blocks.attention import OPERANDS
from vitq_compiler.blocks.linear import ROLES
from vitq_compiler.errors import RecipeError
from vitq_compiler.quant import QuantSpec
from vitq_compiler.registry import names

Differences = Mapping[str, Any]  # fields of a QuantSpec
SIDES = ("weight", "activation")
STORAGES = ("container", "native")

# The operands of the attention products by one word; nothing: they stay in float.
ATTENTION: Mapping[str, Differences] = {"float": {}, "int8": {"bits": 8, "format": "int"}, "fp8": {"format": "e4m3"}}

# What published results call W4A4 differs in the ends of the network. The image is 8 bits wide to begin with.
DEFINITIONS: Mapping[str, Mapping[str, Mapping[str, Differences]]] = {
    "strict": {"patch_embed": {"activation": {"bits": 8}}},
    "deploy": {role: {side: {"bits": 8} for side in SIDES} for role in ("patch_embed", "head", "output")},
}


@dataclass(frozen=True)
class Recipe:
    """One recipe.

    Attributes:
        name: its file name without ending.
        description: one sentence for ``--list-recipes``.
        weight: how weights are quantized.
        activation: how the inputs of Linear layers and patch embeddings are quantized.
        passes: the pipeline between the target's rewrites and its lowering.
        passes_at_8_bits: the one instead where weights and activations both have 8 bits; empty where that is no different.
        float_roles: roles kept in float, of `ROLES`.
        roles: role -> ``weight`` or ``activation`` -> where its spec differs.
        attention: operand of the attention products, of `OPERANDS` -> where its spec differs from ``activation``.
        definition: which ends of the network get the recipe's bits: ``strict`` (every Linear, the weight of the patch embedding
            and the head too; the image has 8 bits), ``deploy`` (patch embedding and head at 8 bits), or empty where the recipe
            says it itself.
        exclude: regular expressions; a Linear or Conv whose name one of them finds stays in float.
        storage: where weights of few bits lie: in the int8 ``container``, or ``native`` in a type of their own, of `STORAGES`.
        samples: how many calibration samples it is made for.
    """

    name: str
    description: str
    weight: QuantSpec
    activation: QuantSpec
    passes: str
    float_roles: tuple[str, ...] = ()
    roles: Mapping[str, Mapping[str, Differences]] = field(default_factory=dict)
    attention: Mapping[str, Differences] = field(default_factory=dict)
    definition: str = ""
    exclude: tuple[str, ...] = ()
    storage: str = "container"
    samples: int = 32
    passes_at_8_bits: str = ""

    @property
    def pipeline(self) -> str:
        """The passes for the bits that are asked for."""
        wide = self.passes_at_8_bits and self.weight.bits == self.activation.bits == 8
        return self.passes_at_8_bits if wide else self.passes

    @property
    def bits(self) -> str:
        """Bits of weights and activations, as `with_bits` takes them."""
        return f"w{self.weight.bits}a{self.activation.bits}"

    def weight_spec(self, role: str) -> QuantSpec:
        """What the weight of a Linear of that role becomes."""
        return replace(self.weight, **self._differences(role, "weight"))

    def activation_spec(self, role: str) -> QuantSpec:
        """What the input of a Linear of that role becomes."""
        return replace(self.activation, **self._differences(role, "activation"))

    def attention_specs(self) -> dict[str, QuantSpec]:
        """What each quantized operand of the attention products becomes."""
        return {operand: replace(self.activation, **changed) for operand, changed in self.attention.items()}

    def excluding(self, patterns: tuple[str, ...]) -> Recipe:
        """The same recipe with more exclusions."""
        return replace(self, exclude=self.exclude + patterns)

    def with_bits(self, text: str | None) -> Recipe:
        """The same recipe at other bits, written ``w4a8``; None changes nothing.

        Raises:
            RecipeError: ``text`` is written otherwise, or asks for fewer than 2 or more than 8 bits.
        """
        if text is None:
            return self
        found = re.fullmatch(r"w([2-8])a([2-8])", text)
        if found is None:
            raise RecipeError(f"bits {text!r}: write w and a with 2 to 8 each, such as w4a4 or w4a8")
        return replace(self, weight=replace(self.weight, bits=int(found[1])), activation=replace(self.activation, bits=int(found[2])))

    def with_attention(self, kind: str | None) -> Recipe:
        """The same recipe with the operands of the attention products as one of `ATTENTION`; None changes nothing.

        Raises:
            RecipeError: ``kind`` is none of these.
        """
        if kind is None:
            return self
        if kind not in ATTENTION:
            raise RecipeError(f"attention {kind!r} is unknown: known are {', '.join(ATTENTION)}")
        return replace(self, attention=dict.fromkeys(OPERANDS, ATTENTION[kind]) if ATTENTION[kind] else {})

    def defined(self, definition: str | None) -> Recipe:
        """The same recipe under a definition, of `DEFINITIONS`; None changes nothing. It overrules roles kept in float."""
        if definition is None:
            return self
        if definition not in DEFINITIONS:
            raise RecipeError(f"definition {definition!r} is unknown: known are {', '.join(DEFINITIONS)}")
        return replace(self, definition=definition, float_roles=())

    def stored(self, storage: str | None) -> Recipe:
        """The same recipe with weights stored as one of `STORAGES` says; None changes nothing.

        Raises:
            RecipeError: ``storage`` is none of them.
        """
        if storage is None:
            return self
        if storage not in STORAGES:
            raise RecipeError(f"storage {storage!r} is unknown: known are {', '.join(STORAGES)}")
        return replace(self, storage=storage)

    def _differences(self, role: str, side: str) -> dict[str, Any]:
        sources = (self.roles, DEFINITIONS.get(self.definition, {}))
        return {key: item for source in sources for key, item in source.get(role, {}).get(side, {}).items()}


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
    """Check a recipe read from TOML; keys as in `Recipe`, specs and differences as tables of `QuantSpec` fields."""
    known = {f.name for f in fields(Recipe)} - {"name"}
    missing = {"description", "weight", "activation", "passes"} - table.keys()
    if unknown := sorted(table.keys() - known):
        raise RecipeError(f"recipe {name}: unknown key {unknown[0]!r}, known are {', '.join(sorted(known))}")
    if missing:
        raise RecipeError(f"recipe {name}: key {min(missing)!r} is missing")
    float_roles = _strings(name, "float_roles", table.get("float_roles", []))
    if wrong := [r for r in float_roles if r not in ROLES]:
        raise RecipeError(f"recipe {name}: float_roles holds {wrong[0]!r}, known roles are {', '.join(ROLES)}")
    definition = table.get("definition", "")
    if definition not in ("", *DEFINITIONS):
        raise RecipeError(f"recipe {name}: definition {definition!r} is unknown, known are {', '.join(DEFINITIONS)}")
    samples = table.get("samples", Recipe.samples)
    if type(samples) is not int or samples < 1:
        raise RecipeError(f"recipe {name}: samples is {samples!r}, it must be a whole number from 1")
    specs = {side: _spec(name, side, table[side]) for side in SIDES}
    return Recipe(
        name=name,
        description=str(table["description"]),
        weight=specs["weight"],
        activation=specs["activation"],
        passes=str(table["passes"]),
        float_roles=float_roles,
        roles=_roles(name, specs, table.get("roles", {})),
        attention=_attention(name, specs["activation"], table.get("attention", {})),
        definition=definition,
        exclude=_strings(name, "exclude", table.get("exclude", [])),
        passes_at_8_bits=str(table.get("passes_at_8_bits", "")),
        samples=samples,
    ).stored(table.get("storage"))


def _roles(name: str, specs: dict[str, QuantSpec], table: Any) -> dict[str, dict[str, Differences]]:
    for role, sides in _table(name, "roles", table, ROLES).items():
        for side, changed in _table(name, f"roles.{role}", sides, SIDES).items():
            _spec(name, f"roles.{role}.{side}", changed, specs[side])
    return dict(table)


def _attention(name: str, activation: QuantSpec, table: Any) -> dict[str, Differences]:
    for operand, changed in _table(name, "attention", table, OPERANDS).items():
        _spec(name, f"attention.{operand}", changed, activation)
    return dict(table)


def _table(name: str, key: str, table: Any, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise RecipeError(f"recipe {name}: {key} must be a table with some of {', '.join(known)}")
    if unknown := [k for k in table if k not in known]:
        raise RecipeError(f"recipe {name}: {key} has {unknown[0]!r}, known are {', '.join(known)}")
    return table


def _spec(name: str, key: str, table: Any, base: QuantSpec | None = None) -> QuantSpec:
    """``table`` laid over ``base``, checked."""
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
    if (quantizer := table.get("quantizer", "affine")) not in names("quantizers"):
        raise RecipeError(f"recipe {name}: {key}.quantizer {quantizer!r} is unknown, known are {', '.join(names('quantizers'))}")
    if key.endswith("weight") and quantizer != "affine":
        raise RecipeError(f"recipe {name}: {key}.quantizer must be affine: weights are stored as codes of integer kernels")
    try:
        return replace(base or QuantSpec(), **table)
    except ValueError as error:
        raise RecipeError(f"recipe {name}: {key}: {error}") from None


def _strings(name: str, key: str, items: Any) -> tuple[str, ...]:
    if not isinstance(items, list) or not all(isinstance(i, str) for i in items):
        raise RecipeError(f"recipe {name}: {key} must be a list of strings")
    return tuple(items)
