"""Findings in order, and what the three formats say of them."""

import json
from typing import Any

import pytest

from tests.builders import model_of
from vitq_compiler.lint.model import Model
from vitq_compiler.lint.report import FORMATS, LintReport
from vitq_compiler.lint.rule import Fault, Platform, Rule, Severity, check


def finds(op: str) -> Any:
    """A check that complains of every node of an operator."""
    return lambda model, platform: (Fault(node, "is there") for node in reversed(list(model.find(op))))


RULES = (
    Rule("A01", Severity.INFORMATION, "sizes are static", "profiles", "give them", lambda m, p: [Fault(None, "dynamic")]),
    Rule("A02", Severity.WARNING, "no Relu", "it is slow", "drop it", finds("Relu")),
    Rule("A03", Severity.ERROR, "no Neg", "it is refused", "write Mul", finds("Neg"), severity_in={"2": Severity.SILENT}),
    Rule("A04", Severity.ERROR, "no Abs", "it is refused", "write Max", finds("Abs"), versions=("2",)),
    Rule("A05", Severity.ERROR, "a flag", "not in the graph", "give it", None),
)
TEXT = "g (float[4] x) => (float[4] y) {{ {0} y = Neg (t) }}"
MODEL = model_of(TEXT.format("[first] a = Relu (x) [second] b = Relu (a) t = Abs (b)"))


def report(version: str = "1", rules: tuple[Rule, ...] = RULES) -> LintReport:
    """A report on the model above."""
    platform = Platform(version)
    return LintReport("0.1", "folder/a b.onnx", "some", platform, rules, check(Model(MODEL), rules, platform))


def test_worst_first_then_table_then_nodes() -> None:
    found = [(f.rule.id, f.severity.value, f.node) for f in report().findings]
    assert found == [("A03", "error", "y"), ("A02", "warning", "first"), ("A02", "warning", "second"), ("A01", "information", "")]


def test_versions_decide() -> None:
    found = [(f.rule.id, f.severity.value) for f in report("2").findings]
    assert found == [("A04", "error"), ("A03", "silent"), ("A02", "warning"), ("A02", "warning"), ("A01", "information")]


@pytest.mark.parametrize(("rules", "passed"), [(RULES, False), (RULES[:2], True), (RULES[4:], True)])
def test_only_what_is_refused_or_misread_fails(rules: tuple[Rule, ...], passed: bool) -> None:
    assert report(rules=rules).passed is passed
    assert report("2", (RULES[2],)).passed is False


def test_text() -> None:
    assert report().to_text() == (
        "error A03: no Neg (1 place)\n"
        "  Neg node y: is there\n"
        "  why: it is refused\n"
        "  do: write Mul\n"
        "\n"
        "warning A02: no Relu (2 places)\n"
        "  Relu node first: is there\n"
        "  Relu node second: is there\n"
        "  why: it is slow\n"
        "  do: drop it\n"
        "\n"
        "information A01: sizes are static (1 place)\n"
        "  the graph: dynamic\n"
        "  why: profiles\n"
        "  do: give them\n"
        "\n"
        "folder/a b.onnx: 1 error, 2 warnings, 1 information; 3 rules of some 1 checked\n"
    )
    assert report(rules=RULES[4:]).to_text() == "folder/a b.onnx: nothing found; 0 rules of some 1 checked\n"


def test_text_shows_the_first_places_unless_all_are_asked_for() -> None:
    body = "t0 = Relu (x) " + " ".join(f"t{i + 1} = Relu (t{i})" for i in range(7)) + " t = Relu (t7)"
    findings = check(Model(model_of(TEXT.format(body))), RULES[1:2], Platform())
    long = LintReport("0.1", "m.onnx", "some", Platform(), RULES[1:2], findings)
    assert long.to_text().count("Relu node") == 5
    assert "  and 4 more; -v shows all\n" in long.to_text()
    assert long.to_text(every=True).count("Relu node") == 9


def test_names_that_cannot_be_printed_are_spelled_out() -> None:
    proto = model_of("g (float[4] x) => (float[4] y) { y = Neg (x) }")
    proto.graph.node[0].name = "a\x1b[2Jb\n"
    findings = check(Model(proto), RULES[2:3], Platform())
    assert "Neg node a\\x1b[2Jb\\n: is there" in LintReport("0.1", "m", "some", Platform(), RULES, findings).to_text()


def test_json() -> None:
    content = json.loads(report().to_json())
    assert (content["passed"], content["counts"]) == (False, {"error": 1, "silent": 0, "warning": 2, "information": 1})
    assert (content["checked"], content["not_checked"]) == (["A01", "A02", "A03"], ["A04", "A05"])
    assert content["findings"][0] == {
        "rule": "A03",
        "severity": "error",
        "title": "no Neg",
        "op": "Neg",
        "node": "y",
        "detail": "is there",
        "reason": "it is refused",
        "remedy": "write Mul",
    }


def test_sarif() -> None:
    """What section 3 of SARIF 2.1.0 requires, and that everything refers to something."""
    log = json.loads(report().to_sarif())
    assert (log["version"], log["$schema"]) == ("2.1.0", "https://json.schemastore.org/sarif-2.1.0.json")
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert run["tool"]["driver"]["name"] == "vitq"
    assert [rule["id"] for rule in rules] == ["A01", "A02", "A03"]
    assert all(set(rule) == {"id", "shortDescription", "fullDescription", "help", "defaultConfiguration", "properties"} for rule in rules)
    assert [(result["ruleId"], result["level"]) for result in run["results"]] == [
        ("A03", "error"),
        ("A02", "warning"),
        ("A02", "warning"),
        ("A01", "note"),
    ]
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["message"]["text"]
        (location,) = result["locations"]
        assert location["physicalLocation"]["artifactLocation"]["uri"] == "folder/a%20b.onnx"
    assert run["results"][0]["locations"][0]["logicalLocations"][0]["name"] == "y"
    assert "logicalLocations" not in run["results"][-1]["locations"][0]


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_every_time(name: str) -> None:
    assert FORMATS[name](report(), True) == FORMATS[name](report(), True)
