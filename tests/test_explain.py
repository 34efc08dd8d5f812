"""`--explain`: every way to find a layer, what is said of it, and what is said when nothing is found."""

import pytest

from tests.sample_report import FLOAT_HEAD, NOT_INTEGER, sample_report
from vitq_compiler.errors import RecipeError
from vitq_compiler.explain import explain, read_pattern
from vitq_compiler.text import printable


@pytest.mark.parametrize(
    ("pattern", "found_by"),
    [("^blocks/0/qkv$", "name"), (r"^blocks\.0\.qkv", "scope"), ("attention 0", "block"), ("qkv", "name and scope and role")],
)
def test_every_field_finds(pattern: str, found_by: str) -> None:
    lines = explain(sample_report(), pattern)
    assert lines == [
        f"{pattern!r} finds 1 Linear layer",
        "blocks/0/qkv: qkv of attention 0, 192 x 576, from blocks.0.qkv",
        f"  found by its {found_by}",
        "  weight and activation are quantized, and QGemm computes on integers",
        "  reparameterize-layernorm says: its input has two readers",
    ]


def test_a_float_layer_says_why_once() -> None:
    lines = explain(sample_report(), "^head$")
    assert "outside the blocks" in lines[1]
    assert lines[-1] == f"  stays in float: {FLOAT_HEAD}"
    assert sum(FLOAT_HEAD in line for line in lines) == 1


def test_quantized_but_not_integer_says_why() -> None:
    assert explain(sample_report(), "fc2")[-1] == f"  weight and activation are quantized, but the runtime computes in float: {NOT_INTEGER}"


def test_order_is_that_of_the_graph() -> None:
    lines = explain(sample_report(), "mlp 0|head")
    assert lines[0] == "'mlp 0|head' finds 3 Linear layers"
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")][1:] == ["blocks/0/fc1", "blocks/0/fc2", "top[0]/linear"]


def test_notes_about_other_nodes() -> None:
    assert explain(sample_report(), "gelu") == [
        "'gelu' finds 0 Linear layers and 1 other place",
        "gelu_3: recover-gelu says: its constant is 0.7",
    ]


def test_nothing_found_lists_what_there_is() -> None:
    lines = explain(sample_report(), "nowhere")
    assert "finds nothing" in lines[0]
    assert lines[1:] == ["  the blocks are: attention 0, mlp 0", "  the roles are: qkv, fc1, fc2, head"]
    assert explain(sample_report(linears=()), "nowhere")[2] == "  the roles are: none"


@pytest.mark.parametrize("pattern", ["(", "[a", "*"])
def test_a_bad_pattern_is_one_line(pattern: str) -> None:
    with pytest.raises(RecipeError, match="is not a regular expression") as caught:
        explain(sample_report(), pattern)
    assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError):
        read_pattern(pattern)


def test_printable() -> None:
    assert printable("blocks/0 \x1b[31m\u202e\n") == r"blocks/0 \x1b[31m\u202e\n"
    assert printable("größe 層") == "größe 層"
