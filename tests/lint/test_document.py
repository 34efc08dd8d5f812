"""The page of rules is what the table says."""

from pathlib import Path

from vitq_compiler.lint import tensorrt
from vitq_compiler.lint.document import page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tensorrt-rules.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(tensorrt.RULES), "run python -m vitq_compiler.lint.document docs/tensorrt-rules.md"


def test_every_rule_says_everything() -> None:
    for rule in tensorrt.RULES:
        assert all((rule.title, rule.reason, rule.remedy, rule.sources)), rule.id
        assert f"### {rule.id}: {rule.title}\n" in page(tensorrt.RULES)
