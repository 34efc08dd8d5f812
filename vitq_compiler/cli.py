"""The command ``vitq-compile``: words in, a call of `compile`, a report out. No logic, and at import time nothing but click.

Everything else is imported inside the functions that need it: ``--help`` and tab completion answer at once.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitq_compiler.arguments import EPILOG, HELP, MODEL, OPTIONS
from vitq_compiler.dependencies import check_dependencies
from vitq_compiler.errors import InternalError, OutputError, VitqError
from vitq_compiler.explain import explain
from vitq_compiler.text import printable

if TYPE_CHECKING:
    from rich.console import Console

    from vitq_compiler.destination import Destination
    from vitq_compiler.model_source import ModelSource
    from vitq_compiler.report import CompileReport

PROGRAM = "vitq-compile"
OK, BUG, ERROR, GATE_MISSED, INTERRUPTED = 0, 1, 2, 3, 130
STDOUT = Path("-")

# The options that `compile` takes under the same name.
SAME_NAMES: tuple[str, ...] = ("recipe", "bits", "definition", "target", "calibration", "samples", "batch_size", "preprocess")
SAME_NAMES += (
    "attention",
    "storage",
    "exclude",
    "passes",
    "min_sqnr",
    "min_agreement",
    "dump_after",
    "seed",
    "threads",
    "device",
    "work_dir",
)
SAME_NAMES += ("validate_provider", "augment")

# Those that `diagnose` takes, and those that make no sense beside it, as it writes no graph.
DIAGNOSE_NAMES: tuple[str, ...] = ("recipe", "bits", "definition", "target", "attention", "calibration", "samples", "batch_size")
DIAGNOSE_NAMES += ("augment", "preprocess", "exclude", "seed", "threads")
COMPILE_ONLY = ("inspect", "check", "output", "explain", "passes", "dump_after", "min_sqnr", "min_agreement", "no_output_on_failure")

# Those that are fields of a target: its name, and that of the field.
TARGET_OPTIONS = {
    "onnxruntime": ("onnxruntime", "version"),
    "cpu": ("onnxruntime", "cpu"),
    "trt_version": ("tensorrt", "version"),
    "float_type": ("tensorrt", "float_type"),
    "compute_capability": ("tensorrt", "compute_capability"),
}


class _Command(click.Command):
    """A command with headings in its help, and one line for every error."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, heading by heading."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                groups.setdefault(getattr(param, "group", "Other"), []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run, and leave with the exit code of ``--help``."""
        for stream in (sys.stdout, sys.stderr):  # a name from the model must not fail where the locale cannot spell it
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except click.ClickException as error:
            code = _fail(f"{error.format_message().rstrip('.')}; see {PROGRAM} --help")
        except click.Abort:
            code = _fail("interrupted, nothing written", INTERRUPTED, label="")
        sys.exit(code if isinstance(code, int) else OK)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the callback; what it raises becomes one line and an exit code."""
        began = time.time()
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            return _fail(_interrupted(ctx, began), INTERRUPTED, label="")
        except Exception as error:
            if _is_interrupt(error):
                return _fail(_interrupted(ctx, began), INTERRUPTED, label="")
            if ctx.params["verbose"] and not isinstance(error, VitqError):
                import traceback

                click.echo(traceback.format_exc(), err=True, nl=False)
            if isinstance(error, VitqError):
                return _fail(str(error))
            if isinstance(error, OSError) and error.strerror:
                return _fail(f"{error.filename or 'the operating system'}: {error.strerror}")
            if isinstance(error, MemoryError):
                return _fail(f"out of memory: {str(error) or 'the model or its calibration needs more than there is'}; give it more")
            told = str(error) if isinstance(error, InternalError) else f"{type(error).__name__}: {error}".rstrip(": ")
            hint = "" if ctx.params["verbose"] else "; please report it with what the same command prints with -v"
            return _fail(f"{told}; this is a bug in {PROGRAM}{hint}", BUG, label="internal error: ")


def _fail(message: str, code: int = ERROR, label: str = "error: ") -> int:
    click.echo(f"{PROGRAM}: {label}{printable(' '.join(message.split()))}", err=True)
    return code


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind it: a compiled module that is interrupted while it loads says ImportError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _interrupted(ctx: click.Context, began: float) -> str:
    """What to say after Ctrl-C; the output appears whole, so its time tells whether it is there."""
    output: Path | None = ctx.obj
    if output and output.is_file() and output.stat().st_mtime >= began:
        return f"interrupted, {output} is already written"
    return "interrupted, no output written" if ctx.params["dump_after"] else "interrupted, nothing written"


def _print_version(ctx: click.Context, param: click.Parameter, given: bool) -> None:
    if given and not ctx.resilient_parsing:
        others = ", ".join(f"{name} {metadata.version(name)}" for name in ("onnx", "onnxruntime"))
        click.echo(f"{PROGRAM} {metadata.version('vitq-compiler')} ({others}, Python {platform.python_version()})")
        ctx.exit()


def _main(**given: Any) -> int:
    """Do what the words say; returns the exit code."""
    check_dependencies()
    if given["quiet"] and given["verbose"]:
        raise click.UsageError("-q and -v contradict each other")
    if (listing := _listing(given)) is not None:
        click.echo("\n".join(listing))
        return OK
    _check_diagnose(given)
    if given["model"] is None:
        raise click.UsageError("MODEL is missing")
    from vitq_compiler.destination import place_output
    from vitq_compiler.model_source import find_model

    source = find_model(given["model"], show_progress=not given["quiet"])
    if given["check"]:
        return _check(given, source)
    output = place_output(given["output"], source)
    if given["inspect"]:
        return _inspect(given, source, output.file)
    if given["diagnose"]:
        return _diagnose(given, source, output.file)
    _check_report(given["report"], output.file, source.file)
    click.get_current_context().obj = output.file  # for `_interrupted`
    return _compile(given, source, output)


def _listing(given: dict[str, Any]) -> list[str] | None:
    """The lines of an option that prints and stops, or None."""
    if not any(given[name] for name in ("list_passes", "list_recipes", "list_targets", "print_pipeline")):
        return None
    from vitq_compiler import catalog
    from vitq_compiler.recipe import load_recipe

    if given["list_targets"]:
        return list(catalog.list_targets())
    if given["print_pipeline"]:
        recipe = load_recipe(given["recipe"]).with_bits(given["bits"]).stored(given["storage"])
        return [str(catalog.pipeline_for(recipe, catalog.load_target(given["target"], _target_options(given)), given["passes"]))]
    rows = catalog.list_passes() if given["list_passes"] else catalog.list_recipes()
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {text}" for name, text in rows]


def _target_options(given: dict[str, Any]) -> dict[str, Any]:
    options = {}
    for name, (target, field) in TARGET_OPTIONS.items():
        if given[name] is not None:
            if given["target"] != target:
                raise click.UsageError(f"--{name.replace('_', '-')} is for target {target}, not {given['target']}: leave it out")
            options[field] = given[name]
    return options


def _check_report(report: Path | None, output: Path, model: Path, kind: str = "report") -> None:
    """Refuse a report or picture that cannot be written, before any work is done."""
    if report is None or (report == STDOUT and kind == "report"):
        return
    if report.is_dir():
        raise OutputError(f"{kind} {report}: is a directory; give a file name")
    if not report.parent.is_dir():
        raise OutputError(f"{kind} {report}: the folder {report.parent} does not exist; create it first")
    if not os.access(report.parent, os.W_OK):
        raise OutputError(f"{kind} {report}: the folder {report.parent} is not writable; check its permissions")
    if report.resolve() in (output.resolve(), model.resolve()):
        raise OutputError(f"{kind} {report}: is the model or the output; give another name")


def _compile(given: dict[str, Any], source: ModelSource, output: Destination) -> int:
    from vitq_compiler import compiler
    from vitq_compiler.model_io import write_text
    from vitq_compiler.terminal import console_for, progress_on, show

    json_only = given["report"] == STDOUT
    verbosity = 0 if given["quiet"] else 2 if given["verbose"] else 1
    with progress_on(console_for(sys.stderr), verbosity > 0) as progress:
        same = {name: given[name] for name in SAME_NAMES}
        options = _target_options(given)
        report = compiler.compile(
            source,
            output,
            **same,
            target_options=options or None,
            output_on_failure=not given["no_output_on_failure"],
            progress=progress,
        )
    if json_only:
        click.echo(report.to_json(), nl=False)
    elif given["report"]:
        write_text(report.to_json(), given["report"])
    show(report, console_for(sys.stderr if json_only else sys.stdout), verbosity, given["time_passes"])
    if given["explain"] is not None:
        lines = explain(report, given["explain"])
        click.echo("\n".join(map(printable, lines if given["quiet"] else ["", *lines])), err=json_only)
    return _judge(report, output.file)


def _inspect(given: dict[str, Any], source: ModelSource, output: Path) -> int:
    from vitq_compiler.inspection import inspect
    from vitq_compiler.terminal import show_structure

    _check_report(given["report"], output, source.file)
    same = ("recipe", "bits", "definition", "target", "exclude", "threads")
    structure = inspect(source, **{name: given[name] for name in same})
    return _tell(given, structure, show_structure)


def _tell(given: dict[str, Any], found: Any, show: Callable[[Any, Console, int], None]) -> int:
    """Write and show what was found of a model: as the JSON of its ``to_json``, and as ``show`` prints it."""
    from vitq_compiler.model_io import write_text
    from vitq_compiler.terminal import console_for

    if given["report"] == STDOUT:
        click.echo(found.to_json(), nl=False)
        return OK
    if given["report"]:
        write_text(found.to_json(), given["report"])
    if not given["quiet"]:
        show(found, console_for(sys.stdout), 2 if given["verbose"] else 1)
    return OK


def _check_diagnose(given: dict[str, Any]) -> None:
    """Refuse what does not go together with ``--diagnose``, or without it."""
    if alone := next((name for name in ("sensitivity", "plot") if given[name] and not given["diagnose"]), None):
        raise click.UsageError(f"--{alone} needs --diagnose")
    if given["diagnose"] and (
        other := next((name for name in COMPILE_ONLY if given[name] not in (None, ()) and given[name] is not False), None)
    ):
        raise click.UsageError(f"--diagnose compiles nothing: leave out --{other.replace('_', '-')}")


def _diagnose(given: dict[str, Any], source: ModelSource, output: Path) -> int:
    from vitq_compiler import diagnosis
    from vitq_compiler.plots import check_plots, draw
    from vitq_compiler.terminal import console_for, progress_on, show_diagnosis

    _check_report(given["report"], output, source.file)
    if given["plot"]:
        _check_report(given["plot"], output, source.file, "picture")
        check_plots(given["plot"])
    with progress_on(console_for(sys.stderr), not given["quiet"]) as progress:
        found = diagnosis.diagnose(
            source,
            **{name: given[name] for name in DIAGNOSE_NAMES},
            target_options=_target_options(given) or None,
            with_sensitivity=given["sensitivity"],
            progress=progress,
        )
    if given["plot"]:
        draw(found.pictures, given["plot"])
    return _tell(given, found, show_diagnosis)


def _check(given: dict[str, Any], source: ModelSource) -> int:
    from vitq_compiler.check import check
    from vitq_compiler.lint.report import FORMATS

    report = check(
        source,
        given["target"],
        trt_version=given["trt_version"] or "10",
        compute_capability=given["compute_capability"],
        cpu=given["cpu"] or "any",
        with_judge=not given["no_judge"],
    )
    click.echo(FORMATS[given["format"]](report, bool(given["verbose"])), nl=False)
    return OK if report.passed else GATE_MISSED


def _judge(report: CompileReport, output: Path) -> int:
    """Say which gates were missed; returns the exit code."""
    from vitq_compiler.terminal import gate_line

    if report.passed:
        return OK
    written = f"{output} is written all the same" if report.output else f"{output} is not written"
    return _fail(f"{'; '.join(gate_line(gate) for gate in report.gates if not gate.passed)}; {written}", GATE_MISSED, label="gate ")


_VERSION = click.Option(
    ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version, and stop."
)

main = _Command(
    PROGRAM,
    callback=_main,
    params=[MODEL, *OPTIONS, _VERSION],
    help=HELP,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)
