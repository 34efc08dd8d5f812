"""What may stand on the command line: the options and their help, checks of single values, and what the Tab key offers.

Imports nothing but click.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from vitq_compiler import registry

HELP = """Compile a vision transformer exported to ONNX into an int8 graph.

MODEL is an ONNX file in float32, float16 or bfloat16, a folder that holds one, or hf:owner/name[@revision] on the Hugging Face
hub; it is never changed. Its Linear layers and patch embedding become integer, and what came out is measured against the float
model on pictures that calibration did not see: accuracy, latency, and how many layers the runtime really computes on integers.
"""
EPILOG = """\b
Examples:
  vitq-compile vit.onnx                                  writes vit_int8.onnx; built-in pictures calibrate
  vitq-compile vit.onnx -o small.onnx --calibration photos/ --samples 128
  vitq-compile hf:owner/name -o name_int8/               from the hub; a folder with configs, as transformers.js loads it
  vitq-compile vit.onnx --exclude 'mlp/fc2' --min-sqnr 25 --report vit.json
  vitq-compile vit.onnx --explain 'attention 7'          why is this block what it is?
  vitq-compile --diagnose --sensitivity vit.onnx         where does the error come from, and what helps?
  vitq-compile --check int8.onnx --target tensorrt       what will TensorRT refuse, misread or run slowly?
  vitq-compile --print-pipeline                          to edit, and to give back with --passes

\b
Exit codes:
  0  compiled                 2    cannot compile, or a wrong option
  1  a bug in vitq-compile    3    a gate was missed, or --check found an error
                              130  interrupted

\b
Tab completion, once per shell (zsh_source, fish_source likewise):
  eval "$(_VITQ_COMPILE_COMPLETE=bash_source vitq-compile)"
"""


class Option(click.Option):
    """An option that knows its heading in ``--help``."""

    def __init__(self, group: str, *names: str, **attributes: Any) -> None:
        super().__init__(names, **attributes)
        self.group = group


def checked(check: Callable[[Any], str | None]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """A click callback: each value must pass ``check``, which returns what is wrong with it."""

    def callback(ctx: click.Context, param: click.Parameter, given: Any) -> Any:
        for value in given if isinstance(given, tuple) else () if given is None else (given,):
            if wrong := check(value):
                raise click.BadParameter(wrong, ctx, param)
        return given

    return callback


def regex_fault(text: str) -> str | None:
    """A regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        return f"{text!r} is not a regular expression: {error}"
    return None


def bits_fault(text: str) -> str | None:
    """Bits of weights and activations."""
    return None if re.fullmatch(r"w[2-8]a[2-8]", text) else f"{text!r} is not w and a with 2 to 8 each, such as w4a4"


def release_fault(text: str) -> str | None:
    """A version of onnxruntime."""
    return None if re.fullmatch(r"\d+\.\d+(\.\d+)?|newest", text) else f"{text!r} is no version such as 1.20, nor newest"


def name_fault(kind: str) -> Callable[[str], str | None]:
    """One of the passes or targets there are."""

    def fault(name: str) -> str | None:
        known = registry.names(kind)
        near = difflib.get_close_matches(name, known, 1)
        return (
            None if name in known else f"no {name!r} in {kind}; {f'did you mean {near[0]}? ' if near else ''}--list-{kind} prints them all"
        )

    return fault


def number_fault(value: float) -> str | None:
    """Neither NaN nor infinite: nothing would ever, or always, meet such a gate."""
    return None if math.isfinite(value) else f"{value} is not a number to compare with"


def complete_names(kind: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Names of passes or targets."""
    return lambda ctx, param, incomplete: [name for name in registry.names(kind) if name.startswith(incomplete)]


def complete_recipe(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of recipes, recipe files here, else any file."""
    # Not recipe.recipe_names(): that module loads numpy and onnx, and a Tab key must answer at once.
    shipped = [
        file.name.removesuffix(".toml") for file in resources.files("vitq_compiler.recipes").iterdir() if file.name.endswith(".toml")
    ]
    found = sorted(name for name in [*shipped, *map(str, Path().glob("*.toml"))] if name.startswith(incomplete))
    return [CompletionItem(name) for name in found] or [CompletionItem(incomplete, type="file")]


def complete_passes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The last name of a pipeline."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in registry.names("passes") if name.startswith(last)]


PATH = click.Path(path_type=Path)
COUNT, NATURAL = click.IntRange(min=1), click.IntRange(min=0)
OUTPUT, DATA, WHAT, GATES = "Output", "Calibration", "What to quantize, for which target", "Gates"
CHECK, PASSES = "Check", "Pipeline"
COMMON_BITS = ("w8a8", "w6a6", "w4a8", "w4a4", "w3a3")
FLAG: dict[str, Any] = {"is_flag": True}
SHOWN: dict[str, Any] = {"show_default": True}

MODEL = click.Argument(["model"], metavar="MODEL", type=PATH, required=False)
OPTIONS = [
    Option(
        OUTPUT,
        "-o",
        "--output",
        type=click.Path(),  # as text: a slash in the end says that it is a folder
        metavar="OUT.onnx|OUT/",
        help="The integer graph, or a folder for it and the model's configs.  [default: MODEL_int8.onnx beside the model]",
    ),
    Option(OUTPUT, "--report", type=PATH, metavar="FILE.json", help="Write all that is known of the compile; - is standard output."),
    Option(OUTPUT, "--inspect", **FLAG, help="Print the blocks found and what would become integer, and stop; --report then writes that."),
    Option(OUTPUT, "--diagnose", **FLAG, help="Print outliers, idle heads and which exact rewrites help, and stop; --report as above."),
    Option(OUTPUT, "--sensitivity", **FLAG, help="With --diagnose: quantize each role and block alone too, and print the error it makes."),
    Option(OUTPUT, "--plot", type=PATH, metavar="FILE.png", help="With --diagnose: draw channel ranges before and after rewrites too."),
    Option(
        OUTPUT,
        "--explain",
        metavar="REGEX",
        callback=checked(regex_fault),
        help="Say of each node whose name, operator, module, block or role matches what became of it, and why it is integer or not.",
    ),
    Option(OUTPUT, "-q", "--quiet", **FLAG, help="Print only errors, missed gates, and what is asked for by name."),
    Option(OUTPUT, "-v", "--verbose", **FLAG, help="Print every pass, layer and note too, and the traceback of a bug."),
    Option(DATA, "--calibration", type=PATH, metavar="PATH", help="Folder of pictures, or .npz or .npy.  [default: built-in pictures]"),
    Option(
        DATA,
        "--samples",
        type=COUNT,
        metavar="N",
        help="Samples that calibrate; others are kept back to validate.  [default: the recipe's, 32 without training]",
    ),
    Option(
        DATA,
        "--augment",
        type=NATURAL,
        default=0,
        **SHOWN,
        metavar="N",
        help="Calibrate on N altered copies of each picture too, mirrored and moved; not for text or signs.",
    ),
    Option(DATA, "--batch-size", type=COUNT, default=8, **SHOWN, metavar="N", help="Samples per run, where the model leaves it open."),
    Option(
        DATA,
        "--preprocess",
        metavar="TEXT",
        help="imagenet, inception, clip, none, or settings such as mean=0.5,std=0.5,resize=256,crop=224.  "
        "[default: from the model's config, else imagenet]",
    ),
    Option(DATA, "--seed", type=NATURAL, default=0, **SHOWN, metavar="N", help="Of the choice of samples and of built-in pictures."),
    Option(
        WHAT,
        "--recipe",
        default="w8a8",
        **SHOWN,
        metavar="NAME|FILE.toml",
        shell_complete=complete_recipe,
        help="What becomes integer, how, and by which passes.",
    ),
    Option(
        WHAT,
        "--bits",
        metavar="wNaM",
        callback=checked(bits_fault),
        shell_complete=lambda ctx, param, incomplete: [bits for bits in COMMON_BITS if bits.startswith(incomplete)],
        help="Bits of weights and activations, such as w4a4, 2 to 8 each.  [default: the recipe's]",
    ),
    Option(
        WHAT,
        "--definition",
        type=click.Choice(["strict", "deploy"]),
        help="strict: patch embedding and head get these bits too (the image 8), as published results count; deploy: they get 8.  "
        "[default: the recipe's]",
    ),
    Option(
        WHAT,
        "--target",
        default="onnxruntime",
        **SHOWN,
        metavar="NAME",
        callback=checked(name_fault("targets")),
        shell_complete=complete_names("targets"),
        help="The runtime that will run the graph.",
    ),
    Option(
        WHAT,
        "--onnxruntime",
        metavar="X.Y|newest",
        callback=checked(release_fault),
        help="For target onnxruntime: the version that will run the graph.  [default: 1.17 and later, in operators that others know too]",
    ),
    Option(
        WHAT,
        "--attention",
        type=click.Choice(["float", "int8", "fp8"]),
        help="What the operands of the attention products become; the report for tensorrt tells the price of each.  "
        "[default: the recipe's choice, float]",
    ),
    Option(
        WHAT,
        "--storage",
        type=click.Choice(["container", "native"]),
        help="Where weights of at most 4 bits lie: native is INT4, half the file at the same speed.  [default: container, int8]",
    ),
    Option(
        WHAT,
        "--float-type",
        type=click.Choice(["fp32", "fp16", "bf16"]),
        help="For target tensorrt: what is not quantized.  [default: fp16, for 8.6 fp32]",
    ),
    Option(
        WHAT,
        "--exclude",
        multiple=True,
        metavar="REGEX",
        callback=checked(regex_fault),
        help="Keep layers in float whose node or module matches; repeatable.",
    ),
    Option(
        WHAT,
        "--trt-version",
        type=click.Choice(["8.6", "10", "11"]),
        help="For target tensorrt: its version.  [default: 10]",
    ),
    Option(
        WHAT,
        "--compute-capability",
        type=float,
        metavar="X.Y",
        callback=checked(number_fault),
        help="For target tensorrt: of the GPU, such as 8.9; what depends on it is left open without.",
    ),
    Option(
        WHAT,
        "--cpu",
        type=click.Choice(["any", "vnni"]),
        help="For target onnxruntime: which CPUs the graph must be right on. Without VNNI, x86 CPUs cut off sums of two products; any "
        "keeps weights from reaching that, vnni does not, for fleets known to have it.  [default: any]",
    ),
    Option(WHAT, "--threads", type=NATURAL, default=0, show_default="0: all cores", metavar="N", help="Threads of the runtime."),
    Option(
        WHAT,
        "--validate-provider",
        type=click.Choice(["cpu", "tensorrt", "nvtensorrtrtx"]),
        default="cpu",
        **SHOWN,
        help="Execution provider of onnxruntime that runs the result for the accuracy in the report.",
    ),
    Option(
        WHAT,
        "--device",
        default="auto",
        metavar="NAME",
        show_default="auto: a GPU where torch has one",
        help="Device of recipes that train, as torch names it.",
    ),
    Option(
        WHAT,
        "--work-dir",
        type=PATH,
        metavar="DIR",
        help="Keep activations of recipes that fit weights there and not in memory, and resume interrupted training from there.",
    ),
    Option(
        GATES,
        "--min-sqnr",
        type=float,
        metavar="DB",
        callback=checked(number_fault),
        help="Least signal to quantization noise of any output.",
    ),
    Option(
        GATES,
        "--min-agreement",
        type=click.FloatRange(0, 1),
        metavar="FRACTION",
        callback=checked(number_fault),
        help="Least part of samples whose top-1 class stays the same.",
    ),
    Option(GATES, "--no-output-on-failure", **FLAG, help="Write no output when a gate is missed."),
    Option(CHECK, "--check", **FLAG, help="Compile nothing: hold MODEL, made by any tool, against the rules of the target."),
    Option(CHECK, "--format", type=click.Choice(["text", "json", "sarif"]), default="text", **SHOWN, help="Of what --check prints."),
    Option(CHECK, "--no-judge", **FLAG, help="With --check --target tensorrt: do not ask NVIDIA's compiler where it is installed."),
    Option(PASSES, "--passes", metavar="TEXT", shell_complete=complete_passes, help="Run this pipeline: pass,pass{option=value},pass"),
    Option(PASSES, "--print-pipeline", **FLAG, help="Print the pipeline that these options make, and stop."),
    Option(
        PASSES,
        "--dump-after",
        multiple=True,
        metavar="PASS",
        callback=checked(name_fault("passes")),
        shell_complete=complete_names("passes"),
        help="Write OUT.after-PASS.onnx too; repeatable.",
    ),
    Option(PASSES, "--time-passes", **FLAG, help="Print what each pass changed, and its seconds."),
    Option(PASSES, "--list-passes", **FLAG, help="Print all passes, and stop."),
    Option(PASSES, "--list-recipes", **FLAG, help="Print all recipes, and stop."),
    Option(PASSES, "--list-targets", **FLAG, help="Print all targets, and stop."),
]
