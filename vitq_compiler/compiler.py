"""The whole flow on one screen: model, recipe and data in; integer graph and report out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from math import isnan, nan
from pathlib import Path
from typing import Any

import onnx

from vitq_compiler import runtime
from vitq_compiler.catalog import load_target, pipeline_for
from vitq_compiler.cpu import integer_unit
from vitq_compiler.data import Data
from vitq_compiler.destination import Destination, place_output
from vitq_compiler.errors import ModelError, RecipeError
from vitq_compiler.graph import LARGE_MODEL, Graph
from vitq_compiler.model_io import check_output, file_bytes, make_work_folder, write_model
from vitq_compiler.model_source import ModelSource, find_model
from vitq_compiler.opening import open_model, open_samples
from vitq_compiler.pipeline import Compilation
from vitq_compiler.precision import HalfPrecision, narrow
from vitq_compiler.probing import find_probes, first_run
from vitq_compiler.progress import Progress, silent
from vitq_compiler.provenance import Provenance
from vitq_compiler.recipe import load_recipe
from vitq_compiler.releases import requirement
from vitq_compiler.report import CompileReport, DataRow, GateRow, NeedsRow, NoteRow, PassRow, Validation
from vitq_compiler.sizes import other_sizes, sized
from vitq_compiler.verdict import linear_rows, validate
from vitq_compiler.verify import Dump, PairLimits, Parity, Structure, Thrift

PROBE_SAMPLES = 2


def compile(
    model: ModelSource | Path | str,
    output: Destination | Path | str | None = None,
    *,
    recipe: str = "w8a8",
    bits: str | None = None,
    definition: str | None = None,
    target: str = "onnxruntime",
    target_options: Mapping[str, Any] | None = None,
    attention: str | None = None,
    storage: str | None = None,
    calibration: Path | None = None,
    samples: int | None = None,
    augment: int = 0,
    batch_size: int = 8,
    preprocess: str | None = None,
    exclude: Sequence[str] = (),
    passes: str | None = None,
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
    output_on_failure: bool = True,
    dump_after: Sequence[str] = (),
    seed: int = 0,
    threads: int = 0,
    device: str = "auto",
    validate_provider: str = "cpu",
    work_dir: Path | None = None,
    progress: Progress = silent,
) -> CompileReport:
    """Compile a vision transformer into an integer graph and validate it.

    Args:
        model: an ONNX file, a folder that holds one, or ``hf:owner/name[@revision]`` on the hub; never changed. See `find_model`.
        output: where to write the integer graph: a file, or a folder (there already, or a text that ends in a slash) that gets the
            layout of a model folder, with copies of the configurations; None writes nothing. See `place_output`.
        recipe: name of a recipe of the package, or a ``.toml`` file.
        bits: of weights and activations, such as ``w4a4``, instead of the recipe's.
        definition: ``strict`` or ``deploy``, see `Recipe.definition`, instead of the recipe's.
        target: name of a target.
        target_options: its fields: ``version`` of onnxruntime, ``version``, ``float_type`` and ``compute_capability`` of tensorrt.
        attention: what the operands of the attention products become, of `recipe.ATTENTION`, instead of the recipe's choice.
        storage: where weights of at most 4 bits lie: ``container`` (int8) or ``native`` (INT4), instead of the recipe's choice.
        calibration: folder of images, ``.npz`` or ``.npy``; None takes built-in images.
        samples: number of calibration samples; None takes what the recipe is made for.
        augment: altered copies of each calibration picture to calibrate on too.
        batch_size: samples per run, where the model leaves it open.
        preprocess: see `preprocess.resolve`.
        exclude: regular expressions; matching Linear layers stay in float.
        passes: a pipeline text instead of the recipe's and target's.
        min_sqnr: least SQNR of any float output, in dB.
        min_agreement: least top-1 agreement, 0 to 1.
        output_on_failure: write the output even where one of these is missed.
        dump_after: passes after which the graph is written beside the output.
        seed: of the choice of samples and of the built-in images.
        threads: runtime threads, 0 for all.
        device: of passes that train, as torch names it; ``auto`` takes a GPU where torch has one.
        validate_provider: what runs the compiled graph for the report's accuracy, of `runtime.PROVIDERS`.
        work_dir: where passes that fit weights keep activations instead of in memory, and what they can resume from.
        progress: told how far each step is.

    Returns:
        The report; ``report.passed`` says whether the gates were met.

    Raises:
        VitqError: see `errors`; ``output`` has not been touched then.
    """
    began = time.perf_counter()
    providers = runtime.providers_of(validate_provider)
    plan = load_recipe(recipe).with_bits(bits).defined(definition).with_attention(attention).stored(storage)
    plan = plan.excluding(tuple(exclude))
    chosen = load_target(target, target_options)
    pipeline = pipeline_for(plan, chosen, passes)
    if missing := [name for name in dump_after if name not in {p.name for p in pipeline.passes}]:
        raise RecipeError(f"cannot dump after {missing[0]}: the pipeline has no such pass; see --print-pipeline")
    source = find_model(model)
    model, destination = source.file, None if output is None else place_output(output, source)
    dumps = {name: (destination or Destination(source.beside(model.name))).dump(name) for name in dump_after}
    if work_dir is not None:
        work_dir = Path(work_dir)
        make_work_folder(work_dir)
    if destination is not None:
        destination.check(model)
    for path in dumps.values():
        check_output(path, model)

    progress("reading", 0, 1)
    opened = open_model(model, chosen)
    graph, half, boundary = opened.graph, opened.half, opened.boundary
    large = file_bytes(model) > LARGE_MODEL
    # What everything is held against. Rounding to half precision would drown what the passes are checked for.
    floating: Path | Graph = model if opened.runs_here and not half.computes and not opened.mended else graph.snapshot()
    data = open_samples(
        graph, model, plan, calibration, samples=samples, augment=augment, batch_size=batch_size, preprocess=preprocess, seed=seed
    )
    c = Compilation(graph, plan, chosen, data, threads=threads, progress=progress, device=device, work_dir=work_dir, providers=providers)
    progress("reading", 1, 1)

    feed = _probe_batch(graph, data)
    try:
        first = first_run(floating, graph, feed, threads)
    except ModelError as error:
        raise ModelError(f"model {model}: {error}") from error
    c.floating = floating = first.model
    c.probes = find_probes(graph, feed, first.runner)
    c.warnings += first.warnings
    parity = Parity(feed, first.outputs, threads, large, other_sizes(c.probes, graph.inputs, first.runner))
    del first
    dump = Dump(dump_after, lambda name, proto: write_model(proto, dumps[name]))
    provenance = Provenance()
    try:
        results = pipeline.run(c, (parity, Structure(), PairLimits(), dump, provenance, *([Thrift()] if large else [])))
    except ModelError as error:
        raise ModelError(f"model {model}: {error}") from error  # a pass knows the graph, not the file
    parity.check()

    integer = c.graph.to_proto()
    if chosen.runs_here:
        integer.metadata_props.add(key="cpu", value=chosen.platform.cpu)
    if source.origin:
        integer.metadata_props.add(key="source", value=source.origin)
    needs = _needs(integer, c)
    if half.kind:
        floating = _restore(model, integer, boundary, half, floating, c)
    verdict, kernel_of = validate(floating, file_bytes(model), integer, c, parity)
    gates = _measure_gates(verdict, min_sqnr, min_agreement)
    written = destination if output_on_failure or all(gate.passed for gate in gates) else None
    if written is not None:
        written.write(narrow(integer, boundary) if half.kind == "bfloat16" else integer)
    return CompileReport(
        version=version("vitq-compiler"),
        model=source.name,
        output=str(written.file) if written else None,
        recipe=plan.name,
        bits=plan.bits,
        definition=plan.definition,
        target=chosen.name,
        pipeline=str(pipeline),
        seconds=time.perf_counter() - began,
        data=_describe(data),
        passes=tuple(PassRow(r.spec, r.changes, r.seconds) for r in results),
        linears=linear_rows(c, kernel_of),
        notes=tuple(NoteRow(n.stage, n.where, n.reason) for n in c.notes),
        validation=verdict,
        needs=needs,
        gates=gates,
        warnings=(*source.warnings, *opened.mended, *data.warnings, *c.warnings, *(written.warnings if written else ())),
        nodes=provenance.rows(c),
        cpu=chosen.platform.cpu if chosen.runs_here else "",
        integer_unit=integer_unit(),
        command=chosen.command(written.file, sized(graph.inputs, c.probes[0].shapes)) if written else "",
        attention=tuple(c.prices),
        training=tuple(c.training),
        chosen=source.why,
    )


def _probe_batch(graph: Graph, data: Data) -> runtime.Feed:
    """A few samples that calibration does not see, for the parity of float-exact passes and for inner comparisons."""
    return runtime.first_samples(graph.inputs, next(data.validation() if data.validation_count else data.calibration()), PROBE_SAMPLES)


def _needs(integer: onnx.ModelProto, c: Compilation) -> NeedsRow:
    """What the result asks of ONNX Runtime, told in its metadata too; a warning where that is more than the release named has."""
    found = requirement(integer)
    needs = NeedsRow(c.graph.opset, c.graph.ir_version, found.release, found.reason)
    integer.metadata_props.add(key="onnxruntime", value=f">={found.release}" if found.release else "none")
    if c.target.release and not found.met_by(c.target.release):
        c.warnings.append(f"onnxruntime {c.target.release} does not run the result, {needs.releases} does: {found.reason}")
    return needs


def _restore(
    model: Path, integer: onnx.ModelProto, boundary: dict[str, int], half: HalfPrecision, floating: Path | Graph, c: Compilation
) -> Path | Graph:
    """Give inputs and outputs their half precision back; returns what the result is compared with."""
    if not half.computes:
        c.warnings.append(f"the model computes in float32 and only stores weights in {half.kind}: compiled from these, as float32")
        return floating
    ends = {name: boundary.get(name) for name in (*(spec.name for spec in c.graph.inputs), *c.graph.output_names)}
    kept = (
        f"between {half.kind} inputs and outputs" if all(ends.values()) else f"{', '.join(boundary) or 'no input or output'} in {half.kind}"
    )
    c.warnings.append(f"the model computes in {half.kind}: compiled from its weights in float32, {kept}")
    if half.kind == "bfloat16":
        c.warnings.append("onnxruntime cannot run bfloat16 on the CPU: compared with the model in float32, without its casts")
        return floating
    narrow(integer, boundary)
    return model


def _measure_gates(verdict: Validation, min_sqnr: float | None, min_agreement: float | None) -> tuple[GateRow, ...]:
    gates = []
    if min_sqnr is not None:
        measured = min((o.sqnr_db for o in verdict.outputs if not isnan(o.sqnr_db)), default=nan)
        gates.append(GateRow("min-sqnr", min_sqnr, measured, measured >= min_sqnr))
    if min_agreement is not None:
        measured = min((o.agreement for o in verdict.outputs if o.agreement is not None), default=nan)
        gates.append(GateRow("min-agreement", min_agreement, measured, measured >= min_agreement))
    return tuple(gates)


def _describe(data: Data) -> DataRow:
    preprocess = data.preprocess.source if data.preprocess is not None else "none: arrays are fed as they are"
    return DataRow(data.description, preprocess, data.calibration_count, data.validation_count, tuple(data.skipped))
