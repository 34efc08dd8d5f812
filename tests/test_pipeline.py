"""Pipelines: text, what each pass requires, errors, hooks."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.builders import compilation, find_pass, graph_of
from vitq_compiler.errors import ModelError, PassError, RecipeError, VitqError
from vitq_compiler.pipeline import Compilation, Fact, Note, Pass, PassResult, Pipeline
from vitq_compiler.quant import Edge, QuantSpec


@dataclass(frozen=True)
class Start(Pass):
    """nothing -> a graph that is canonical"""

    name = "start"
    provides = frozenset({Fact.CANONICAL})

    def run(self, c: Compilation) -> int:
        return 3


@dataclass(frozen=True)
class Tune(Pass):
    """options of every type"""

    name = "tune"
    requires = frozenset({Fact.CANONICAL})
    provides = frozenset({Fact.CALIBRATED})
    loud: bool = False
    bits: int = 8
    strength: float = 0.5
    observer_kind: str = "minmax"

    def __post_init__(self) -> None:
        if self.bits > 100:
            raise ValueError("bits must be at most 100")

    def run(self, c: Compilation) -> int:
        return 0


@dataclass(frozen=True)
class Finish(Pass):
    """needs calibration"""

    name = "finish"
    requires = frozenset({Fact.CANONICAL, Fact.CALIBRATED})

    def run(self, c: Compilation) -> int:
        return 1


@dataclass(frozen=True)
class Disturb(Pass):
    """makes calibration stale"""

    name = "disturb"
    drops = frozenset({Fact.CALIBRATED})

    def run(self, c: Compilation) -> int:
        return 1


@dataclass(frozen=True)
class Fail(Pass):
    """fails, in the way given"""

    name = "fail"
    how: str = "bug"

    def check(self, c: Compilation) -> None:
        if self.how == "early":
            raise RecipeError("no such device")

    def run(self, c: Compilation) -> int:
        if self.how == "user":
            raise ModelError("no softmax")
        if self.how == "disk":
            raise OSError(28, "No space left on device")
        raise IndexError("list index out of range")


KINDS: dict[str, type[Pass]] = {kind.name: kind for kind in (Start, Tune, Finish, Disturb, Fail)}


def find(name: str) -> type[Pass]:
    if name not in KINDS:
        raise RecipeError(f"no {name}")
    return KINDS[name]


def parse(text: str) -> Pipeline:
    return Pipeline.parse(text, find)


tunes = st.builds(
    Tune,
    loud=st.booleans(),
    bits=st.integers(-(10**6), 100),
    strength=st.floats(allow_nan=False),
    observer_kind=st.text("abcXYZ019-_./=", min_size=1),
)
pipelines = st.lists(st.one_of(st.just(Start()), st.just(Disturb()), tunes), max_size=5).map(lambda passes: Pipeline((Start(), *passes)))


@given(pipelines)
def test_round_trip(pipeline: Pipeline) -> None:
    assert parse(str(pipeline)) == pipeline
    assert str(parse(str(pipeline))) == str(pipeline)


def test_text_shows_only_what_differs_from_the_default() -> None:
    assert str(Pipeline((Start(), Tune(), Tune(loud=True, observer_kind="mse")))) == "start,tune,tune{loud=true observer-kind=mse}"


@pytest.mark.parametrize(
    "text",
    [
        "start,tune{bits=4 strength=0.25}",
        " start , tune { bits=4   strength=0.25 } ",
        "start,\n  tune{\n  bits=4\n  strength=0.25\n}",
        "start,tune{strength=0.25 bits=4},",
        "start{},tune{bits=4 strength=.25}",
    ],
)
def test_layout_of_the_text_is_free(text: str) -> None:
    assert parse(text) == Pipeline((Start(), Tune(bits=4, strength=0.25)))


@pytest.mark.parametrize("loud", ["loud", "loud=true"])
def test_a_flag_needs_no_value(loud: str) -> None:
    assert parse(f"start,tune{{{loud}}}").passes[1] == Tune(loud=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ",",
        "start,,start",
        ",start",
        "start start",
        "start;start",
        "start,tune{bits=4",
        "start,tune bits=4}",
        "start,tune{bits=4}}",
        "start,tune{{bits=4}}",
        "start,tune{bits=4}{bits=5}",
        "{bits=4}",
        "start,{bits=4}",
        "start,tune{bits=4}start",
    ],
)
def test_bad_syntax(text: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the pipeline|no start;start"):
        parse(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("bots=4", r"pass tune has no option 'bots': it has loud, bits, strength, observer-kind"),
        ("bits=four", r"pass tune: option bits cannot be 'four', it needs type int"),
        ("bits=4,strength=1", r"option bits cannot be .4,strength=1., it needs type int"),
        ("bits=4.5", r"option bits cannot be '4.5'"),
        ("bits=", r"option bits cannot be ''"),
        ("bits", r"option bits cannot be ''"),
        ("strength=much", r"option strength cannot be 'much', it needs type float"),
        ("loud=maybe", r"option loud cannot be 'maybe', it needs type bool"),
        ("loud=1", r"option loud cannot be '1'"),
        ("bits=101", r"pass tune: bits must be at most 100"),
        ("name=other", r"pass tune has no option 'name'"),
        ("bits=4 bits=5", r"pass tune: option bits is given twice; keep one"),
        ("bits=4 bits=4", r"option bits is given twice"),
        ("loud loud=false", r"option loud is given twice"),
        ("observer-kind=a observer_kind=b", r"option observer_kind is given twice"),
    ],
)
def test_bad_options(options: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(f"start,tune{{{options}}}")


def test_options_of_a_pass_without_any() -> None:
    with pytest.raises(RecipeError, match="it has none"):
        parse("start{bits=4}")


def test_unknown_passes_are_refused_with_a_suggestion() -> None:
    with pytest.raises(RecipeError, match=r'no "insert-qqd" in passes; did you mean "insert-qdq"') as caught:
        Pipeline.parse("canonicalize,insert-qqd", find_pass)
    assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=r'no "zzz" in passes'):
        Pipeline.parse("zzz", find_pass)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tune", "pass tune needs what is canonical"),
        ("finish", "pass finish needs what is calibrated and canonical"),
        ("start,finish", "pass finish needs what is calibrated"),
        ("start,tune,disturb,finish", "pass finish needs what is calibrated"),
    ],
)
def test_a_missing_requirement_is_refused_when_built(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{message}: put a pass that provides this before it$"):
        parse(text)
    passes = tuple(find(name)() for name in text.split(","))
    with pytest.raises(RecipeError, match=message):
        Pipeline(passes)


def test_dropped_facts_can_be_provided_again() -> None:
    assert len(parse("start,tune,disturb,tune,finish").passes) == 5
    assert len(parse("disturb,start,tune,finish").passes) == 4


def test_fusing_after_calibration_is_refused() -> None:
    with pytest.raises(RecipeError, match="pass compute-qparams needs what is calibrated"):
        Pipeline.parse("canonicalize,annotate,calibrate,fuse-attention,compute-qparams", find_pass)


def test_specs_and_notes_follow_a_node_into_its_parts() -> None:
    c = tiny()
    activation, weight, other = QuantSpec(), QuantSpec(signed=True, symmetric=True), QuantSpec(bits=4)
    c.specs = {Edge("qkv", 0): activation, Edge("qkv", 1): weight, Edge("proj", 0): other}
    c.notes = [Note("annotate", "qkv", "a"), Note("annotate", "proj", "b"), Note("other", "qkv", "c")]
    c.move_specs("qkv", ["q", "k"])
    expected = {Edge(name, index): spec for name in "qk" for index, spec in enumerate((activation, weight))}
    assert c.specs == expected | {Edge("proj", 0): other}
    assert sorted((n.stage, n.where, n.reason) for n in c.notes) == [
        ("annotate", "k", "a"),
        ("annotate", "proj", "b"),
        ("annotate", "q", "a"),
        ("other", "k", "c"),
        ("other", "q", "c"),
    ]


def test_a_node_without_specs_moves_nothing() -> None:
    c = tiny()
    c.specs, c.notes = {Edge("proj", 0): QuantSpec()}, [Note("annotate", "proj", "b")]
    c.move_specs("qkv", ["q"])
    assert (c.specs, c.notes) == ({Edge("proj", 0): QuantSpec()}, [Note("annotate", "proj", "b")])


@dataclass
class Recorder:
    """A hook that writes down what it sees."""

    seen: list[Any] = field(default_factory=list)

    def before(self, p: Pass, c: Compilation) -> None:
        self.seen.append(("before", p.name))

    def after(self, p: Pass, c: Compilation, result: PassResult) -> None:
        self.seen.append(("after", p.name, result.spec, result.changes))


def tiny() -> Compilation:
    return compilation(graph_of("g (float[4] x) => (float[4] y) { y = Relu(x) }"))


def test_run_reports_changes_and_calls_hooks() -> None:
    recorder, c, steps = Recorder(), tiny(), []
    c.progress = lambda step, done, total: steps.append((step, done, total))
    results = parse("start,tune{bits=4}").run(c, (recorder,))
    assert [(r.spec, r.changes) for r in results] == [("start", 3), ("tune{bits=4}", 0)]
    assert all(r.seconds >= 0 for r in results)
    assert recorder.seen == [
        ("before", "start"),
        ("after", "start", "start", 3),
        ("before", "tune"),
        ("after", "tune", "tune{bits=4}", 0),
    ]
    assert steps == [("compiling", 0, 2), ("compiling", 1, 2), ("compiling", 2, 2)]


def test_a_bug_in_a_pass_becomes_a_pass_error() -> None:
    with pytest.raises(PassError, match=r"^pass fail failed after \[start, tune\]: IndexError: list index out of range$") as caught:
        parse("start,tune,fail").run(tiny())
    assert caught.value.name == "fail"
    assert caught.value.ran_before == ("start", "tune")
    assert isinstance(caught.value.__cause__, IndexError)
    assert not isinstance(caught.value, VitqError), "the user did not cause it"


def test_a_fault_of_the_user_or_of_the_system_keeps_its_type() -> None:
    with pytest.raises(ModelError, match=r"^no softmax$"):
        parse("start,fail{how=user}").run(tiny())
    with pytest.raises(OSError, match="No space left"):
        parse("start,fail{how=disk}").run(tiny())


def test_a_hook_can_stop_the_run() -> None:
    class Stop(Recorder):
        def after(self, p: Pass, c: Compilation, result: PassResult) -> None:
            super().after(p, c, result)
            raise ModelError("enough")

    hook = Stop()
    with pytest.raises(ModelError, match="enough"):
        parse("start,tune").run(tiny(), (hook,))
    assert [entry[:2] for entry in hook.seen] == [("before", "start"), ("after", "start")]


def test_what_a_pass_lacks_is_said_before_any_pass_runs() -> None:
    c, ran = compilation(graph_of("g (float[2] x) => (float[2] y) { y = Relu(x) }")), []
    c.progress = lambda *step: ran.append(step)
    with pytest.raises(RecipeError, match="no such device"):
        parse("start,fail{how=early}").run(c)
    assert ran == []
