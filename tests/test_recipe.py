"""Recipes: every mistake in a file is one line that says what and where."""

from pathlib import Path
from typing import Any

import pytest

from tests.builders import find_pass
from vitq_compiler.blocks.attention import OPERANDS
from vitq_compiler.catalog import FRONT
from vitq_compiler.errors import RecipeError
from vitq_compiler.pipeline import Pipeline
from vitq_compiler.quant import QuantSpec
from vitq_compiler.recipe import ATTENTION, load_recipe, parse_recipe, recipe_names

GOOD = """
description = "four bits"
weight = { bits = 4, signed = true, symmetric = true, granularity = "per_channel" }
activation = { bits = 6 }
float_roles = ["head", "patch_embed"]
passes = "calibrate,compute-qparams"
exclude = ["blocks.0"]
"""
TABLE: dict[str, Any] = {"description": "d", "weight": {}, "activation": {}, "passes": "calibrate"}


@pytest.mark.parametrize("name", recipe_names())
def test_the_recipes_of_the_package(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    for passes in filter(None, (recipe.passes, recipe.passes_at_8_bits)):
        Pipeline.parse(f"{FRONT},{passes}", find_pass)


def test_the_default_recipe() -> None:
    recipe = load_recipe("w8a8")
    assert recipe.weight == QuantSpec(8, signed=True, symmetric=True, granularity="per_channel")
    assert recipe.activation == QuantSpec(8)
    assert "head" in recipe.float_roles


def test_a_recipe_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.description, recipe.passes) == ("mine", "four bits", "calibrate,compute-qparams")
    assert recipe.weight == QuantSpec(4, signed=True, symmetric=True, granularity="per_channel")
    assert recipe.activation.bits == 6
    assert recipe.float_roles == ("head", "patch_embed")
    assert recipe.exclude == ("blocks.0",)


@pytest.mark.parametrize(("bits", "passes"), [(None, "few"), ("w4a4", "few"), ("w4a8", "few"), ("w8a7", "few"), ("w8a8", "many")])
def test_another_pipeline_at_8_bits(bits: str | None, passes: str) -> None:
    table = TABLE | {"weight": {"bits": 4}, "activation": {"bits": 4}, "passes": "few", "passes_at_8_bits": "many"}
    assert parse_recipe("r", table).with_bits(bits).pipeline == passes


def test_the_same_pipeline_at_8_bits() -> None:
    assert parse_recipe("r", TABLE).with_bits("w8a8").pipeline == "calibrate"


def test_more_exclusions() -> None:
    recipe = parse_recipe("r", TABLE | {"exclude": ["a"]}).excluding(("b", "c"))
    assert recipe.exclude == ("a", "b", "c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wieght": {}}, r"recipe r: unknown key 'wieght', known are activation, attention, definition, "),
        ({"name": "x"}, r"unknown key 'name'"),
        ({"weight": 8}, r"weight must be a table"),
        ({"weight": {"bots": 8}}, r"weight has no option 'bots', known are bits, signed, symmetric, granularity"),
        ({"weight": {"bits": "8"}}, r"weight\.bits cannot be '8', it needs type int"),
        ({"weight": {"bits": 8.0}}, r"weight\.bits cannot be 8\.0"),
        ({"weight": {"bits": True}}, r"weight\.bits cannot be True"),
        ({"weight": {"signed": 1}}, r"weight\.signed cannot be 1, it needs type bool"),
        ({"weight": {"bits": 1}}, r"recipe r: weight: bits must be 2 to 8, got 1"),
        ({"activation": {"bits": 16}}, r"activation: bits must be 2 to 8, got 16"),
        ({"weight": {"granularity": "per_group"}}, r"weight\.granularity must be per_tensor or per_channel"),
        ({"float_roles": ["haed"]}, r"float_roles holds 'haed', known roles are qkv, "),
        ({"float_roles": "head"}, r"float_roles must be a list of strings"),
        ({"exclude": [1]}, r"exclude must be a list of strings"),
        ({"roles": {"haed": {}}}, r"roles has 'haed', known are qkv, "),
        ({"roles": {"head": {"input": {}}}}, r"roles\.head has 'input', known are weight, activation"),
        ({"roles": {"head": {"weight": {"bits": 9}}}}, r"roles\.head\.weight: bits must be 2 to 8, got 9"),
        ({"roles": 3}, r"roles must be a table with some of qkv"),
        ({"attention": {"p": {}}}, r"attention has 'p', known are q, k, probs, v"),
        ({"attention": {"q": {"bots": 4}}}, r"attention\.q has no option 'bots'"),
        ({"definition": "paper"}, r"definition 'paper' is unknown, known are strict, deploy"),
    ],
)
def test_mistakes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe("r", TABLE | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["description", "weight", "activation", "passes"])
def test_missing_keys(key: str) -> None:
    with pytest.raises(RecipeError, match=f"key '{key}' is missing"):
        parse_recipe("r", {k: v for k, v in TABLE.items() if k != key})


def test_an_unknown_name_is_refused_with_a_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"recipe 'w8a7' is unknown, did you mean w8a8"):
        load_recipe("w8a7")
    with pytest.raises(RecipeError, match=r"recipe 'zzzzz' is unknown: see --list-recipes"):
        load_recipe("zzzzz")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml: no such file"):
        load_recipe(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("text", ["weight = {", "= 3", "\x00", "weight = 1\nweight = 2"])
def test_broken_toml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="not valid TOML") as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "bytes.toml"
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(str(path))


DIFFERENT: dict[str, Any] = TABLE | {
    "weight": {"bits": 4, "signed": True},
    "roles": {"fc2": {"activation": {"bits": 5}}, "qkv": {"weight": {"symmetric": True}}},
    "attention": {"probs": {"bits": 6}, "q": {}},
}


def test_roles_and_operands_differ_where_they_say_so() -> None:
    recipe = parse_recipe("r", DIFFERENT)
    assert recipe.activation_spec("fc2") == QuantSpec(5)
    assert recipe.activation_spec("fc1") == QuantSpec(8)
    assert recipe.weight_spec("qkv") == QuantSpec(4, signed=True, symmetric=True)
    assert recipe.weight_spec("fc2") == QuantSpec(4, signed=True)
    assert recipe.attention_specs() == {"probs": QuantSpec(6), "q": QuantSpec(8)}


def test_other_bits_reach_all_that_does_not_fix_its_own() -> None:
    recipe = parse_recipe("r", DIFFERENT).with_bits("w3a4")
    assert recipe.bits == "w3a4"
    assert (recipe.weight_spec("fc1").bits, recipe.activation_spec("fc1").bits, recipe.activation_spec("fc2").bits) == (3, 4, 5)
    assert {operand: spec.bits for operand, spec in recipe.attention_specs().items()} == {"probs": 6, "q": 4}
    assert recipe.with_bits(None) is recipe


@pytest.mark.parametrize("recipe", ["w8a8", "fp8", "best"])
def test_attention_by_one_word(recipe: str) -> None:
    specs = {kind: load_recipe(recipe).with_attention(kind).attention_specs() for kind in ATTENTION}
    assert specs["float"] == {}
    assert {operand: (spec.format, spec.bits) for operand, spec in specs["int8"].items()} == dict.fromkeys(OPERANDS, ("int", 8))
    assert {operand: spec.format for operand, spec in specs["fp8"].items()} == dict.fromkeys(OPERANDS, "e4m3")
    assert load_recipe(recipe).with_attention(None) == load_recipe(recipe)


@pytest.mark.parametrize("text", ["w4", "4", "w1a4", "w4a9", "w4a4 ", "W4A4"])
def test_bits_written_otherwise(text: str) -> None:
    with pytest.raises(RecipeError, match="write w and a with 2 to 8 each"):
        load_recipe("w8a8").with_bits(text)


def test_the_two_definitions() -> None:
    recipe = load_recipe("w8a8").with_bits("w4a4")
    strict, deploy = recipe.defined("strict"), recipe.defined("deploy")
    assert strict.float_roles == deploy.float_roles == ()
    ends = [(r.weight_spec(role).bits, r.activation_spec(role).bits) for r in (strict, deploy) for role in ("patch_embed", "head", "fc1")]
    assert ends == [(4, 8), (4, 4), (4, 4), (8, 8), (8, 8), (4, 4)]
    assert recipe.defined(None) is recipe
    with pytest.raises(RecipeError, match="definition 'paper' is unknown"):
        recipe.defined("paper")


def test_a_recipe_says_how_many_samples_it_is_made_for() -> None:
    table = {"description": "mine", "weight": {}, "activation": {}, "passes": "calibrate"}
    assert parse_recipe("mine", table).samples == 32
    assert parse_recipe("mine", table | {"samples": 512}).samples == 512
    for wrong in (0, "many", True, 2.5):
        with pytest.raises(RecipeError, match=r"recipe mine: samples is .*, it must be a whole number from 1"):
            parse_recipe("mine", table | {"samples": wrong})
