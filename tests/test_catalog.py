"""What there is to choose from fits together."""

import pytest

from vitq_compiler.catalog import list_passes, list_recipes, list_targets, load_target, pipeline_for
from vitq_compiler.errors import RecipeError
from vitq_compiler.pipeline import Pipeline
from vitq_compiler.recipe import load_recipe


@pytest.mark.parametrize("target", list_targets())
@pytest.mark.parametrize("recipe", [name for name, _ in list_recipes()])
def test_every_recipe_makes_a_pipeline_for_every_target(recipe: str, target: str) -> None:
    pipeline = pipeline_for(load_recipe(recipe), load_target(target))
    assert isinstance(pipeline, Pipeline)
    assert [p.name for p in pipeline.passes[:2]] == ["unfuse-contrib-ops", "canonicalize"]
    assert pipeline_for(load_recipe(recipe), load_target(target), str(pipeline)) == pipeline


def test_every_pass_of_the_catalog_says_what_it_does() -> None:
    assert all("->" in rewrite for _, rewrite in list_passes())
    assert {name for name, _ in list_passes()} >= {"canonicalize", "calibrate", "insert-qdq"}


def test_unknown_target() -> None:
    with pytest.raises(RecipeError, match="target 'tpu' is unknown: known are onnxruntime"):
        load_target("tpu")
