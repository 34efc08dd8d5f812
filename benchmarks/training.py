"""Ways of training a quantized network side by side: losses, units, rounding, and what may go before or beside them.

Every row compiles the model with the pipeline of one recipe, in which something is changed, from the same calibration images. What is
trained a part at a time gets fewer steps for each part, so that rows cost about the same; seconds are of the whole compile.

top-1, agreement, SQNR   on labelled images that calibration did not see: test images, or training images with --held-out
SQNR seen                the same on the calibration images: where it is much higher, images were learned by heart
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.accuracy import NAMES, evaluate
from benchmarks.repair import compile_alone
from benchmarks.tables import Cell, Table, say

TRAINED = "reconstruct-blocks"


@dataclass(frozen=True)
class Way:
    """One way of training.

    Attributes:
        options: of reconstruct-blocks, beside or instead of the recipe's; None leaves it out.
        parts: into how many a tiny ViT is cut for it: steps are divided by that.
        before: a pass for the head of the pipeline.
        part_of_samples: how many of the images it may see.
        augment: altered copies of each.
        recipe: another one instead of that of the command, as it is.
    """

    options: str | None = ""
    parts: int = 1
    before: str = ""
    part_of_samples: float = 1.0
    augment: int = 0
    recipe: str = ""


WAYS = {
    "no training": Way(None),
    "as the recipe trains": Way(),
    "loss=output": Way("loss=output"),
    "loss=mse": Way("loss=mse"),
    "loss=fisher": Way("loss=fisher"),
    "loss=hessian": Way("loss=hessian"),
    "loss=low-rank": Way("loss=low-rank"),
    "unit=block": Way("unit=block", 8),
    "unit=block prefix=float": Way("unit=block prefix=float", 8),
    "unit=block loss=mse (BRECQ without its metric)": Way("unit=block loss=mse", 8),
    "unit=block loss=fisher round=adaround drop=0.5 (QDrop)": Way("unit=block loss=fisher round=adaround drop=0.5 margin=0.49", 8),
    "unit=layer loss=mse": Way("unit=layer loss=mse", 16),
    "round=adaround": Way("round=adaround"),
    "margin=0.49": Way("margin=0.49"),
    "drop=0.5": Way("drop=0.5"),
    "code-rate=0": Way("code-rate=0.0"),
    "scale-rate=0": Way("scale-rate=0.0"),
    "refit-mlp before it": Way(before="refit-mlp"),
    "a quarter of the images": Way(part_of_samples=0.25),
    "a quarter, augment 1": Way(part_of_samples=0.25, augment=1),
    "a quarter, augment 3": Way(part_of_samples=0.25, augment=3),
    "recipe adaquant": Way(recipe="adaquant"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    parser.add_argument("--model", default="shipped", choices=NAMES, help="[shipped]")
    parser.add_argument("--recipe", default="best-w4a4", help="whose pipeline is changed [best-w4a4]")
    parser.add_argument("--bits", help="such as w3a3 [the recipe's]")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="NAME", help="rows [all]")
    parser.add_argument("--steps", type=int, default=600, metavar="N", help="of training the whole network [600]")
    parser.add_argument("--samples", type=int, default=512, metavar="N", help="calibration samples [512]")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="of calibration and training [8]")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="images to judge by [2000]")
    parser.add_argument("--held-out", action="store_true", help="training images that calibration did not see, not test images")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples [0]")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the runtime and of torch [1]")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of images and models [VITQ_DATA, else .data/real]")


def pipeline(recipe: str, bits: str | None, way: Way, steps: int) -> str:
    """The passes of a recipe with what ``way`` changes."""
    from vitq_compiler.recipe import load_recipe

    passes = load_recipe(way.recipe or recipe).with_bits(bits).pipeline
    if way.recipe:
        return passes
    before, _, options = passes.partition(TRAINED)
    head = f"{way.before}," if way.before else ""
    if way.options is None:
        return head + before.rstrip(",")
    words = f"{options.strip('{}')} steps={max(1, steps // way.parts)} {way.options}".split()
    chosen = dict(word.split("=") for word in words)  # the last of each counts
    return f"{head}{before}{TRAINED}{{{' '.join(map('='.join, chosen.items()))}}}"


def measure(options: argparse.Namespace) -> list[Table]:
    """One table."""
    import numpy as np

    from benchmarks.tasks import TASKS, data_folder, existing, write_calibration
    from vitq_compiler import runtime
    from vitq_compiler.recipe import load_recipe

    task = TASKS[options.model]
    folder = options.data or data_folder()
    model = existing(task.model(folder))
    with np.load(existing(folder / task.images)) as stored:
        train, known, tests, labels = (stored[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    shuffled = np.random.default_rng(options.seed).permutation(len(train))
    seen = shuffled[: options.samples]
    if options.held_out:
        tests, labels, order = train, known, shuffled[-options.images :]
    else:
        order = (task.order() if task.order else np.arange(len(tests)))[: options.images]
    floating = runtime.session(model, threads=options.threads)
    rows: list[tuple[Cell, ...]] = []
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "vitq.onnx"
        for name in options.ways:
            way = WAYS[name]
            say(f"{task.name}: {name} ...")
            samples = int(options.samples * way.part_of_samples)
            source = Path(temporary) / f"{samples}.npz"
            write_calibration(task, train, floating.get_inputs()[0].name, samples, options.seed, source)
            given: dict[str, Any] = {"recipe": way.recipe or options.recipe, "bits": options.bits, "calibration": source}
            given |= {"preprocess": task.preprocess, "samples": samples, "augment": way.augment}
            given |= {key: getattr(options, key) for key in ("batch_size", "seed", "threads")}
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                passes = pipeline(options.recipe, options.bits, way, options.steps)
                seconds, _ = alone.submit(compile_alone, model, output, passes, given).result()
            sessions = {"float": floating, "vitq": runtime.session(output, threads=options.threads)}
            unseen = evaluate(task, sessions, tests, labels, order)
            learned = evaluate(task, sessions, train, known, seen)["vitq"]
            score, reference = unseen["vitq"], unseen["float"]
            rows.append((name, score.right / score.images, score.agreeing / score.images, score.sqnr, learned.sqnr, seconds))
    rows.insert(0, ("float", reference.right / reference.images, *[None] * 4))
    kind = "held-out training" if options.held_out else "test"
    note = f"{options.steps} steps, {options.samples} training images, seed {options.seed}; {len(order)} {kind} images."
    bits = options.bits or load_recipe(options.recipe).bits
    formats = {"top-1": ".4f", "agreement": ".4f", "SQNR, dB": ".1f", "SQNR seen, dB": ".1f", "seconds": ".0f"}
    columns = ("way", *formats)
    return [Table(f"Ways of training {options.model}, recipe {options.recipe} at {bits}", columns, tuple(rows), (note,), formats)]
