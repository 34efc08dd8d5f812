"""The summary and progress: what is said at which verbosity and width, and nothing but text in a log."""

import io
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from tests.sample_report import FLOAT_HEAD, MET, MISSED, NOT_INTEGER, linear, sample_report
from vitq_compiler.report import AttentionRow, CompileReport, LatencyRow, TrainingRow, Validation
from vitq_compiler.terminal import LOG_COLUMNS, console_for, gate_line, progress_on, show

SUMMARY = """\
vit.onnx -> vit_int8.onnx
Linear layers  4 found, 3 quantized, 2 of 4 in integer kernels (onnxruntime 1.2.3)
Worst block    mlp 0, SQNR 22.50 dB
Size           10.96 MB -> 3.00 MB, 3.65x smaller
Calibration    32 images from photos; validated on 64 others
Skipped        broken.jpg (truncated)
Preprocessing  imagenet (default)
Runs on        onnxruntime 1.17 and later: opset 20, IR version 9 (Gelu is of opset 20)
Recipe         w8a8 for onnxruntime, compiled in 3.1 s

Output |     SQNR |   cosine | agreement
-------+----------+----------+----------
logits | 31.42 dB | 0.999876 |   98.44 %
tokens |    exact | 1.000000 |         -

Threads | batch | float ms | int8 ms | ratio |
--------+-------+----------+---------+-------+-------------
      1 |     1 |    3.770 |   1.900 | 0.500 | 2.00x faster
      2 |     8 |   10.000 |  12.500 | 1.250 | 1.25x slower

gate min-sqnr met: 31.42 dB measured, 20.00 dB required
gate min-agreement missed: 98.44 % measured, 99.00 % required

Not quantized, 1 of 4: top[0]/linear (role head stays in float in recipe w8a8)
Quantized but computed in float, 1 of 4: blocks/0/fc2 (the runtime computes it with MatMul)

warning: calibrated on [few] images
"""


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def printed(report: CompileReport, verbosity: int = 1, time_passes: bool = False, columns: int | None = None) -> str:
    """What `show` writes into a log, or onto a terminal of that many columns."""
    stream = Terminal() if columns else io.StringIO()
    console = Console(file=stream, width=columns, force_terminal=True, color_system=None) if columns else console_for(stream)
    show(report, console, verbosity, time_passes)
    return stream.getvalue()


def test_the_summary_in_a_log() -> None:
    assert printed(sample_report(gates=(MET, MISSED))) == SUMMARY


@pytest.mark.parametrize("columns", [60, 200])
@pytest.mark.parametrize("verbosity", [1, 2])
def test_the_width_is_the_terminals(columns: int, verbosity: int) -> None:
    report = sample_report(
        gates=(MISSED,), linears=tuple(linear(f"model/blocks/{i}/attention/query_key_value", "qkv", "x") for i in range(3))
    )
    text = printed(report, verbosity, columns=columns)
    assert max(map(len, text.splitlines())) <= columns
    assert "3.770" in text
    assert "calibrated on [few] images" in " ".join(text.split())


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE", "COLUMNS"])
def test_a_log_is_plain_text_whatever_the_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "40")
    assert printed(sample_report(gates=(MET, MISSED))) == SUMMARY
    everything = printed(sample_report(), 2)
    assert all(sign.isprintable() or sign == "\n" for sign in everything)
    assert everything.isascii()


def test_colour_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    show(sample_report(gates=(MISSED,)), console_for(stream))
    assert "\x1b[" in stream.getvalue()


def test_control_characters_of_a_model_are_spelled_out() -> None:
    text = printed(sample_report(linears=(linear("evil\x1b[2J", "fc1", "", quantized=False, reason="[red]"),)), 2)
    assert "\x1b" not in text
    assert r"evil\x1b[2J" in text
    assert "[red]" in text


def test_verbosity() -> None:
    report = sample_report()
    quiet, default, verbose = (printed(report, verbosity) for verbosity in (0, 1, 2))
    assert quiet == ""
    assert verbose.startswith(default.partition("warning")[0])
    for only_verbose in (
        "its input has two readers",
        "calibrate{observer=minmax}",
        "attention 0 | 36.90 dB",
        f"pipeline: {report.pipeline}",
    ):
        assert only_verbose not in default
        assert only_verbose in verbose


def test_the_price_of_attention() -> None:
    table = """
Attention | in blocks | SQNR on 4 |
----------+-----------+-----------+----------------------------------------
float     | -         |  31.20 dB | chosen
int8      | 10 of 12  |  24.60 dB | there is no fused kernel
fp8       | 0 of 12   |         - | compute capability 8.0 has no such kind
"""
    rows = (
        AttentionRow("float", True, 0, 12, 31.2, 4),
        AttentionRow("int8", False, 10, 12, 24.6, 4, "there is no fused kernel"),
        AttentionRow("fp8", False, 0, 12, None, 4, "compute capability 8.0 has no such kind"),
    )
    assert table in printed(sample_report(attention=rows))
    assert sample_report(attention=rows).to_dict()["attention"][1]["sqnr_db"] == 24.6


def test_what_training_was_worth() -> None:
    one, other = TrainingRow("attention 0", 3.0, 2.25), TrainingRow("mlp 0", 3.0, 3.0)
    assert "Training       loss on samples held back 3.000 -> 2.250, 25.00 % less" in printed(sample_report(training=(one,)))
    assert "held back 12.50 % less on average, in 1 of 2 parts" in printed(sample_report(training=(one, other)))
    assert sample_report(training=(one,)).to_dict()["training"] == [{"where": "attention 0", "before": 3.0, "after": 2.25}]
    assert "Training" not in printed(sample_report())
    assert TrainingRow("mlp 0", 0.0, 0.0).gain == 0


def test_time_passes() -> None:
    table = """\

Pass                       | changes | seconds | share
---------------------------+---------+---------+------
canonicalize               |       7 |   0.500 |  25 %
calibrate{observer=minmax} |       3 |   1.500 |  75 %
all passes                 |      10 |   2.000 |
"""
    assert printed(sample_report(), 0, time_passes=True) == table
    assert table in printed(sample_report(), 1, time_passes=True)


def test_reasons_are_grouped_and_names_shortened() -> None:
    rows = [linear(f"n{i}", "fc1", "", quantized=False, integer=False, reason=FLOAT_HEAD) for i in range(7)]
    rows += [linear("m0", "fc1", "", integer=False, reason=NOT_INTEGER), linear("m1", "fc1", "", quantized=False, integer=False)]
    report = sample_report(linears=tuple(rows))
    assert f"Not quantized, 7 of 9: n0, n1, n2, n3, n4 and 2 more (-v shows all) ({FLOAT_HEAD})" in printed(report)
    assert "Not quantized, 1 of 9: m1 (no reason given)" in printed(report)
    assert f"n0, n1, n2, n3, n4, n5, n6 ({FLOAT_HEAD})" in printed(report, 2)
    assert "Not quantized" not in printed(sample_report(linears=(linear("a", "fc1", ""),)))


def test_undefined_numbers_and_absent_parts() -> None:
    nan = float("nan")
    nothing = Validation("onnxruntime 1.2.3", (), (), (LatencyRow(0, 1, 0.0, 0.0, nan),), 0, 999)
    data = replace(sample_report().data, validation_samples=0, skipped=())
    text = printed(sample_report(validation=nothing, output=None, data=data))
    assert text.startswith("vit.onnx (no output written)\n")
    assert "undefined | no ratio" in text
    assert "0 bytes -> 999 bytes, no ratio" in text
    assert "Calibration    32 images from photos\n" in text
    assert "Worst block" not in text
    assert "Skipped" not in text


def test_gate_lines() -> None:
    assert gate_line(replace(MET, measured=float("nan"), passed=False)) == "min-sqnr missed: undefined measured, 20.00 dB required"
    assert gate_line(replace(MET, name="max-size", measured=3.0)) == "max-size met: 3.00 measured, 20.00 required"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the time of the progress."""
    now = [0.0]
    monkeypatch.setattr("vitq_compiler.terminal.time.monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_progress_in_a_log(clock: Callable[[float], None]) -> None:
    stream = io.StringIO()
    with progress_on(console_for(stream)) as progress:
        progress("reading", 0, 1)
        progress("reading", 1, 1)
        for second in range(129):
            clock(second)
            progress("calibrating", second, 128)
        progress("calibrating", 128, 128)
        for done in (0, 5, 10):
            progress("compiling", done, 10)
        progress("compiling", 10, 10)
        progress("empty", 0, 0)
    lines = stream.getvalue().splitlines()
    assert lines == ["reading", *(f"calibrating: {done} of 128" for done in (*range(13, 128, 13), 128)), "compiling: 10 of 10", "empty"]
    assert max(map(len, lines)) < LOG_COLUMNS


def test_progress_waits_between_lines(clock: Callable[[float], None]) -> None:
    stream = io.StringIO()
    with progress_on(console_for(stream)) as progress:
        for tenth in range(201):
            clock(tenth / 10)
            progress("calibrating", tenth, 200)
        clock(21)
        progress("calibrating", 1, 2)  # again
        progress("calibrating", 2, 2)
    assert stream.getvalue().splitlines() == [*(f"calibrating: {done} of 200" for done in (50, 100, 150, 200)), "calibrating: 2 of 2"]


def test_progress_on_a_terminal_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with progress_on(Console(file=stream, width=80, force_terminal=True)) as progress:
        for done in range(3):
            progress("calibrating", done, 2)
        progress("timing", 0, 1)
    text = stream.getvalue()
    assert "calibrating" in text
    assert "timing" in text
    assert "\x1b[?25h" in text, "the cursor is shown again"
    assert text.endswith("\x1b[2K"), "the last thing done is to erase the line"


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with progress_on(console_for(stream)) as progress:
        progress("reading", 0, 1)
    assert stream.getvalue() == "reading\n"


def test_no_progress() -> None:
    stream = io.StringIO()
    with progress_on(console_for(stream), visible=False) as progress:
        progress("reading", 0, 1)
    assert stream.getvalue() == ""
