"""Which release of ONNX Runtime runs a graph: what the tables say, and (slow) what the releases themselves say."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from benchmarks.runtimes import VERSIONS, environment, run_in
from tests.builders import Sizes, model_of, vit
from vitq_compiler.compiler import compile
from vitq_compiler.releases import KERNELS, NEVER, NEWEST, OLDEST, RELEASES, TYPES, Requirement, known_release, order, requirement

ROIS = {"rois": np.array([[0, 0, 2, 2]], np.float32), "picture": np.array([0])}


def test_newer_releases_have_more() -> None:
    releases = sorted(RELEASES, key=order)
    assert (releases[0], releases[-1]) == (OLDEST, NEWEST)
    for older, newer in pairwise(releases):
        assert all(a <= b for a, b in zip(RELEASES[older], RELEASES[newer], strict=True))
    assert {*KERNELS.values(), *TYPES.values()} - {NEVER} <= RELEASES.keys()
    for (op, form), release in KERNELS.items():
        assert onnx.defs.get_schema(op, form).since_version == form
        assert release == NEVER or RELEASES[release][0] >= form


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("1.20.1", "1.20"),
        ("1.20", "1.20"),
        ("1.29.0", "1.25"),
        ("1.32.0", "1.32"),
        ("2.1", "1.32"),
        ("1.2", "1.15"),
        ("1.33.0.dev20270101", "1.32"),
    ],
)
def test_known_releases(version: str, release: str) -> None:
    assert known_release(version) == release


def needs(text: str, opset: int = 20, ir_version: int = 8, more: tuple[str, ...] = (), **weights: np.ndarray) -> Requirement:
    model = model_of(f"g (float[1, 1, 4, 4] x) => (float y) {{ {text} }}", opset=opset, **weights)
    model.ir_version = ir_version
    return requirement(model, more=more)


NEEDS = {
    "nothing": ({"text": "y = Relu(x)", "opset": 13}, OLDEST, ""),
    "an opset": ({"text": "y = Gelu(x)"}, "1.17", "Gelu is of opset 20"),
    "an opset that nothing needs": ({"text": "y = Relu(x)", "opset": 21}, "1.18", "opset 21"),
    "an IR version": ({"text": "y = Relu(x)", "opset": 13, "ir_version": 11}, "1.23", "IR version 11"),
    "an operator": ({"text": "y = Relu(x)", "opset": 23, "more": ("QuantizeLinear",)}, "1.24", "QuantizeLinear of opset 23"),
    "an operator that none has": (
        {"text": "y = RoiAlign <output_height = 2, output_width = 2> (x, rois, picture)", "opset": 22, **ROIS},
        NEVER,
        "RoiAlign of opset 22",
    ),
    "a type": (
        {"text": "c = Cast <to = 3> (w) d = DequantizeLinear(c, s) y = MatMul(x, d)", "opset": 21, "w": np.ones((4, 2), ml_dtypes.int4)}
        | {"s": np.float32(1)},
        "1.23",
        "Cast of INT4",
    ),
    "a branch": (
        {
            "text": "y = If (t) <then_branch = a () => (float[1, 1, 4, 4] b) { b = LpNormalization(x) }, "
            "else_branch = c () => (float[1, 1, 4, 4] d) { d = Relu(x) }>",
            "opset": 22,
            "t": np.array(True),
        },
        "1.25",
        "LpNormalization of opset 22",
    ),
}


@pytest.mark.parametrize(("given", "release", "reason"), NEEDS.values(), ids=NEEDS)
def test_what_a_graph_needs(given: dict[str, Any], release: str, reason: str) -> None:
    found = needs(**given)
    assert found.release == release
    assert reason in found.reason
    assert found.met_by(NEWEST) == (release != NEVER)
    assert found.met_by(OLDEST) == (release == OLDEST)


# What the tables say is what the installed release does, and (slow) what seven others do.


def models() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Small graphs of what the tables tell, by name."""
    for opset in sorted({opset for opset, _ in RELEASES.values()}):
        yield f"opset {opset}", model_of("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=opset)
    for version in sorted({version for _, version in RELEASES.values()}):
        model = model_of("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=13)
        model.ir_version = version
        yield f"IR version {version}", model
    for op, form in KERNELS:
        text, weights = OPERATORS[op]
        opset = 25 if op == "Swish" else form  # in its own opset the runtime writes it in other operators
        yield f"{op} {form}", model_of(f"g (float[1, 1, 4, 4] x) => (float y) {{ {text} }}", opset=opset, **weights)
    for op, kind in TYPES:
        name = onnx.TensorProto.DataType.Name(kind).lower()
        code = np.dtype(getattr(ml_dtypes, name))
        read = "c = Cast <to = 3> (w) d = DequantizeLinear(c, s)" if op == "Cast" else "d = DequantizeLinear(w, s)"
        text = f"g (float[4, 4] x) => (float y) {{ {read} y = MatMul(x, d) }}"
        yield f"{op} of {name}", model_of(text, opset=21, w=np.ones((4, 2), code), s=np.float32(1))


OPERATORS: dict[str, tuple[str, dict[str, np.ndarray]]] = {
    "Bernoulli": ("p = Sigmoid(x) y = Bernoulli(p)", {}),
    "DeformConv": ("y = DeformConv(x, k, o)", {"k": np.ones((1, 1, 2, 2), np.float32), "o": np.zeros((1, 8, 3, 3), np.float32)}),
    "GlobalLpPool": ("y = GlobalLpPool(x)", {}),
    "ImageDecoder": ("i = ImageDecoder(bytes) f = Cast <to = 1> (i) m = ReduceMean(f) y = Add(x, m)", {"bytes": np.zeros(8, np.uint8)}),
    "LpNormalization": ("y = LpNormalization(x)", {}),
    "MaxRoiPool": ("y = MaxRoiPool <pooled_shape = [2, 2]> (x, r)", {"r": np.array([[0, 0, 0, 2, 2]], np.float32)}),
    "Multinomial": ("f = Flatten(x) i = Multinomial(f) c = Cast <to = 1> (i) y = Add(x, c)", {}),
    "QuantizeLinear": ("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", {"s": np.float32(0.1), "z": np.uint8(128)}),
    "RandomNormal": ("r = RandomNormal <shape = [1]> () y = Add(x, r)", {}),
    "RandomNormalLike": ("y = RandomNormalLike(x)", {}),
    "RandomUniform": ("r = RandomUniform <shape = [1]> () y = Add(x, r)", {}),
    "RandomUniformLike": ("y = RandomUniformLike(x)", {}),
    "RoiAlign": ("y = RoiAlign <output_height = 2, output_width = 2> (x, rois, picture)", ROIS),
    "Swish": ("y = Swish(x)", {}),
    "TensorScatter": ("y = TensorScatter(x, u, i)", {"u": np.zeros((1, 1, 1, 4), np.float32), "i": np.array([0])}),
}


def expected(model: onnx.ModelProto, release: str) -> bool:
    return requirement(model).met_by(release)


def test_the_installed_release(tmp_path: Path) -> None:
    release = known_release(ort.__version__)
    for name, model in models():
        onnx.save(model, tmp_path / "model.onnx")
        try:
            session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
            session.run(None, {i.name: np.ones(i.shape, np.float32) for i in session.get_inputs()})
            runs = True
        except Exception:  # of several private types
            runs = False
        assert runs == expected(model, release), name


COMPILED: dict[str, dict[str, Any]] = {
    "portable": {},
    "newest": {"target_options": {"version": "newest"}},
    "1.16": {"target_options": {"version": "1.16"}},
    "1.20": {"target_options": {"version": "1.20"}},
    "native": {"recipe": "best", "bits": "w4a4", "storage": "native"},
    **{name: {"recipe": name, "bits": "w4a4"} for name in ("best", "adalog", "ptq4vit", "fq-vit", "dopq-vit", "repq-vit", "fast-w4a4")},
    "tensorrt 8.6": {"target": "tensorrt", "target_options": {"version": "8.6"}},
    "tensorrt 10": {"target": "tensorrt"},
    "tensorrt 10, attention": {"target": "tensorrt", "attention": "int8"},
}
SIZES = Sizes(depth=1, image=16, patch=4, width=32, heads=2, hidden=64)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Requirement]]:
    """Graphs by name: the file, and what it is said to need."""
    folder = tmp_path_factory.mktemp("graphs")
    found: dict[str, tuple[Path, Requirement]] = {}
    for name, model in models():
        onnx.save(model, path := folder / f"{len(found)}.onnx")
        found[name] = (path, requirement(model))
    onnx.save(vit(SIZES), folder / "vit.onnx")
    onnx.save(vit(replace(SIZES, norm="rms")), folder / "rms.onnx")
    for name, options in COMPILED.items():
        for kind in ("vit", "rms"):
            path = folder / f"{len(found)}.onnx"
            report = compile(folder / f"{kind}.onnx", path, samples=8, threads=1, **options)
            (told,) = [p.value for p in onnx.load(path).metadata_props if p.key == "onnxruntime"]
            assert told == f">={report.needs.onnxruntime}"
            found[f"{kind}, {name}"] = (path, Requirement(report.needs.onnxruntime, report.needs.reason))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_release_itself(version: str, graphs: dict[str, tuple[Path, Requirement]], tmp_path: Path) -> None:
    try:
        python = environment(tmp_path / "environment", version)
    except SystemExit as error:
        pytest.skip(f"pip cannot install onnxruntime {version} here: {error}")
    answer = run_in(python, {name: str(path) for name, (path, _) in graphs.items()})
    assert version in ("newest", answer["version"])
    release = known_release(answer["version"])
    wrong = {name: row["error"] for name, row in answer["graphs"].items() if (not row["error"]) != graphs[name][1].met_by(release)}
    assert wrong == {}


def test_the_metadata_of_a_file(tmp_path: Path) -> None:
    onnx.save(vit(SIZES), tmp_path / "vit.onnx")
    report = compile(tmp_path / "vit.onnx", tmp_path / "out.onnx", samples=4, threads=1)
    model = onnx.load(tmp_path / "out.onnx")
    assert {p.key: p.value for p in model.metadata_props} == {"cpu": "any", "onnxruntime": ">=1.17"}
    assert (report.needs.opset, report.needs.ir_version, report.needs.releases) == (20, 9, "onnxruntime 1.17 and later")
