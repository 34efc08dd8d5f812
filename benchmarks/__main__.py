"""The command line of the benchmarks.

    python -m benchmarks latency        how fast the integer graph is: paired, in one process, against the float graph and
                                        what onnxruntime.quantization makes of it
    python -m benchmarks runtimes       which releases of onnxruntime load the integer graph, and how fast it is in each
    python -m benchmarks accuracy       how much of a trained model's accuracy is left, on labelled test images
    python -m benchmarks cpus           which CPUs an integer graph is right on, beside other tools' graphs, and what that costs
    python -m benchmarks tensorrt       what NVIDIA's compiler makes of graphs for it: fused attention, integer products, kernels
    python -m benchmarks halves         what is lost where a compiler writes integer products as halves, and in which form it is not
    python -m benchmarks compile-time   what a compile costs: seconds, memory, and each pass
    python -m benchmarks large          what a model over 2 GB costs: peak memory of a compile
    python -m benchmarks zoo            every architecture through the compiler: what is found, quantized and refused
    python -m benchmarks repair         what each step of weight repair is worth at 4 and 3 bits, and what it costs
    python -m benchmarks training       ways of training at 4 and 3 bits side by side: losses, units, rounding, few images
    python -m benchmarks rewrites       what each exact rewrite of the float graph is worth at 8, 6 and 4 bits
    python -m benchmarks parity         whether exact rewrites apply to models, how exactly, and why not
    python -m benchmarks lint           what --check finds in graphs of other tools, and whether NVIDIA's parser agrees

Each prints Markdown to standard output and how far it is to standard error; ``--json FILE`` writes the same as JSON.
Run from the root of the repository, on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import (
    accuracy,
    compile_time,
    cpus,
    halves,
    large,
    latency,
    lint,
    parity,
    repair,
    rewrites,
    runtimes,
    tensorrt,
    training,
    zoo,
)
from benchmarks.tables import Report

COMMANDS = {
    "latency": latency,
    "runtimes": runtimes,
    "accuracy": accuracy,
    "cpus": cpus,
    "tensorrt": tensorrt,
    "halves": halves,
    "compile-time": compile_time,
    "large": large,
    "zoo": zoo,
    "repair": repair,
    "training": training,
    "rewrites": rewrites,
    "parity": parity,
    "lint": lint,
}


def main(arguments: Sequence[str]) -> int:
    """Run one benchmark; without a name, say which there are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="{" + ",".join(COMMANDS) + "}")
    for name, module in COMMANDS.items():
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(name, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_options(command)
        command.add_argument("--json", type=Path, metavar="FILE", help="write the tables as JSON too")
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    report = Report(f"python -m benchmarks {shlex.join(arguments)}", COMMANDS[options.command].measure(options))
    print(report.to_markdown())
    if options.json is not None:
        options.json.write_text(report.to_json(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
