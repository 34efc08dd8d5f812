"""Model files: every unfit input is one line that says what to do; an output appears whole or not at all."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

from tests.builders import DIALECTS, Sizes, difference, feed_of, model_of, run_model, variant, vit, with_text
from vitq_compiler import model_io
from vitq_compiler.errors import ModelError, OutputError, VitqError
from vitq_compiler.graph import Graph
from vitq_compiler.model_io import check_output, convert_opset, file_bytes, opset_of, read_model, write_model, write_text

TINY = "g (float[B, 4] x) => (float[B, 4] y) { y = MatMul(x, w) }"
IDENTITY = np.eye(4, dtype=np.float32)


def tiny(**weights: np.ndarray) -> onnx.ModelProto:
    return model_of(TINY, **({"w": IDENTITY} | weights))


def refused(path: Path, message: str) -> None:
    """Reading ``path`` is a ModelError of one line that holds ``message``."""
    with pytest.raises(ModelError, match=message) as caught:
        read_model(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def refused_model(folder: Path, model: onnx.ModelProto, message: str) -> None:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    refused(path, message)


# Files


def test_a_good_model(tmp_path: Path) -> None:
    model = vit()
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    assert read_model(path) == model


def test_a_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.onnx", "no such file")


def test_a_directory(tmp_path: Path) -> None:
    refused(tmp_path, "is a directory, give the .onnx file in it")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, this is a text file\n" * 20,
        b"\x08\x0a",
        np.random.default_rng(0).bytes(5000),
        b"\x80\x02}q\x00." + b"\x00" * 100,
        b"PK\x03\x04" + b"\x00" * 100,
    ],
    ids=["empty", "text", "header only", "random", "pickle", "zip"],
)
def test_bytes_that_are_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    refused(path, "not a readable ONNX file|not an ONNX model")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(tmp_path: Path, part: float) -> None:
    path = tmp_path / "m.onnx"
    content = vit().SerializeToString()
    path.write_bytes(content[: int(len(content) * part)])
    refused(path, "not a readable ONNX file|not an ONNX model")


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_file_never_escapes_as_another_error(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    content = bytearray(vit().SerializeToString())
    for position in random.integers(0, len(content), 30):
        content[position] = random.integers(0, 256)
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    said = ""
    try:
        read_model(path)
    except ModelError as error:
        said = str(error)
    assert "\n" not in said


def save_external(model: onnx.ModelProto, path: Path) -> None:
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)


def test_external_data_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save_external(tiny(), path)
    model = read_model(path)
    np.testing.assert_array_equal(numpy_helper.to_array(model.graph.initializer[0]), IDENTITY)
    assert file_bytes(path) == path.stat().st_size + (tmp_path / "weights.bin").stat().st_size


def test_external_data_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save_external(tiny(), path)
    (tmp_path / "weights.bin").unlink()
    refused(path, "its external data file weights.bin is missing")


def test_external_data_that_is_too_short(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save_external(vit(), path)
    (tmp_path / "weights.bin").write_bytes(b"\x00" * 8)
    refused(path, "external data|weight|not a readable")


def test_external_data_at_no_number(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save_external(vit(), path)
    model = onnx.load(path, load_external_data=False)
    large = max(model.graph.initializer, key=lambda t: int(np.prod(t.dims)))
    next(entry for entry in large.external_data if entry.key == "offset").value = "here"
    onnx.save(model, path)
    refused(path, "cannot read its external data")


def cached(folder: Path, contents: Path) -> Path:
    """A model with external data as a download cache keeps it: links in ``folder`` into ``contents``; returns the link to the model."""
    folder.mkdir()
    contents.mkdir(exist_ok=True)
    model = contents / "model.onnx"
    save_external(vit(), model)
    for path, name in ((model, "c0ffee"), (contents / "weights.bin", "beef")):
        path.rename(contents / name)
        (folder / path.name).symlink_to(Path("..") / contents.name / name)
    return folder / "model.onnx"


def test_external_data_in_a_download_cache(tmp_path: Path) -> None:
    path = cached(tmp_path / "snapshot", tmp_path / "blobs")
    assert Graph.from_proto(read_model(path)).to_proto() == Graph.from_proto(vit()).to_proto()


def test_external_data_that_is_a_link_to_elsewhere(tmp_path: Path) -> None:
    path = cached(tmp_path / "snapshot", tmp_path / "blobs")
    data = path.with_name("weights.bin")
    data.resolve().rename(tmp_path / "secret")
    data.unlink()
    data.symlink_to("../secret")
    refused(path, "cannot read its external data")


def test_external_data_outside_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "m.onnx"
    path.parent.mkdir()
    save_external(tiny(), path)
    (path.parent / "weights.bin").rename(tmp_path / "weights.bin")
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../weights.bin"
    path.write_bytes(model.SerializeToString())
    refused(path, "external data")


# Models


def test_no_inputs(tmp_path: Path) -> None:
    model = parser.parse_model('<ir_version: 10, opset_import: ["" : 20]> g () => (float[4] y) <float[4] w = {1, 2, 3, 4}> { y = Relu(w) }')
    refused_model(tmp_path, model, "has no inputs")


def test_only_initializers_as_inputs(tmp_path: Path) -> None:
    model = tiny()
    model.graph.input[0].name = "w"
    refused_model(tmp_path, model, "which nothing gives")


def test_no_nodes(tmp_path: Path) -> None:
    refused_model(tmp_path, with_text(tiny(), lambda graph: graph.ClearField("node")), "not an ONNX model, or one without nodes")


@pytest.mark.parametrize("version", [1, 10, onnx.defs.onnx_opset_version() + 1, 999])
def test_an_opset_that_is_too_old_or_too_new(tmp_path: Path, version: int) -> None:
    model = tiny()
    model.opset_import[0].version = version
    refused_model(tmp_path, model, f"opset {version} is not supported, export with opset 11 to {onnx.defs.onnx_opset_version()}")


def test_no_opset(tmp_path: Path) -> None:
    model = tiny()
    model.opset_import[0].domain = "com.example"
    refused_model(tmp_path, model, "opset 0 is not supported")


def test_an_operator_of_another_domain(tmp_path: Path) -> None:
    model = tiny()
    model.graph.node.append(helper.make_node("Fused", ["x", "w"], ["z"], "fused", domain="com.example"))
    refused_model(tmp_path, model, r"operator com\.example\.Fused \(node fused\) is not standard ONNX; export without it")


@pytest.mark.parametrize("domain", ["com.microsoft", "com.microsoft.nchwc"])
def test_a_fused_operator_that_cannot_be_taken_apart(tmp_path: Path, domain: str) -> None:
    model = tiny()
    model.graph.node.append(helper.make_node("ReorderInput", ["x"], ["z"], "fused", domain=domain))
    refused_model(tmp_path, model, "is not standard ONNX; give the model as it was before onnxruntime's optimizer")


def test_fused_operators_in_the_standard_domain_are_adopted(tmp_path: Path) -> None:
    text = """g (float[B, 4] x) => (float[B, 4] y) { a = LayerNormalization(x, w, w) y = SimplifiedLayerNormalization(a, w) }"""
    for opset, domains in ((14, ["com.microsoft", "com.microsoft"]), (17, ["", "com.microsoft"])):
        model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')
        model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "w"))
        onnx.save(model, tmp_path / "m.onnx")
        read = read_model(tmp_path / "m.onnx")
        assert [node.domain for node in read.graph.node] == domains
        assert opset_of(convert_opset(read, 23, tmp_path)) == 23


def test_an_operator_that_does_not_exist(tmp_path: Path) -> None:
    model = tiny()
    model.graph.node.append(helper.make_node("MatMulish", ["x", "w"], ["z"]))
    refused_model(tmp_path, model, r"operator MatMulish \(node \?\) is not in ONNX")


@pytest.mark.parametrize(
    ("kind", "domain"),
    [
        ("QuantizeLinear", ""),
        ("DequantizeLinear", ""),
        ("DynamicQuantizeLinear", ""),
        ("QLinearMatMul", ""),
        ("MatMulInteger", ""),
        ("QGemm", "com.microsoft"),
        ("MatMulNBits", "com.microsoft"),
    ],
)
def test_an_already_quantized_model(tmp_path: Path, kind: str, domain: str) -> None:
    model = tiny()
    model.graph.node.append(helper.make_node(kind, ["x", "w"], ["z"], "q", domain=domain))
    refused_model(tmp_path, model, rf"already quantized \({kind} node q\); give the float32 model")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    weight = IDENTITY.copy()
    weight[1, 2] = bad
    refused_model(tmp_path, tiny(w=weight), "weight w holds NaN or Inf")


def test_an_infinite_mask_is_no_weight(tmp_path: Path) -> None:
    model = model_of("g (float[B, 4] x) => (float[B, 4] y) { y = Add(x, mask) }", mask=np.array([0, 0, -np.inf, 0], np.float32))
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    assert read_model(path).graph.initializer[0].name == "mask"


def test_control_flow(tmp_path: Path) -> None:
    text = """g (float[4] x, bool c) => (float[4] y) {
        y = If (c) <then_branch = a () => (float[4] t) { t = Relu(x) }, else_branch = b () => (float[4] e) { e = Neg(x) }>
    }"""
    model = model_of(text)
    model.graph.node[0].name = "branch"
    refused_model(tmp_path, model, r"control flow \(If node branch\) is not supported: its condition is computed")


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "local" : 1]>
    g (float[B, 4] x) => (float[B, 4] y) { a = local.double(x) y = local.double(a) }
    <domain: "local", opset_import: ["" : 20]>
    double (v) => (r) { r = Add(v, v) }"""
    path = tmp_path / "m.onnx"
    onnx.save(parser.parse_model(text), path)
    model = read_model(path)
    assert [node.op_type for node in model.graph.node] == ["Add", "Add"]
    assert not model.functions
    x = np.ones((1, 4), np.float32)
    np.testing.assert_array_equal(run_model(model, {"x": x})[0], 4 * x)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_conversion_keeps_the_outputs(dialect: object) -> None:
    model = vit(Sizes(depth=1), dialect)  # type: ignore[arg-type]
    converted = convert_opset(model, 23, Path("m.onnx"))
    assert converted.opset_import[0].version == 23
    feed = feed_of(model)
    assert difference(run_model(model, feed), run_model(converted, feed)) <= 1e-6


def test_conversion_keeps_metadata_and_newer_models() -> None:
    model = vit(Sizes(depth=1))
    model.graph.node[0].metadata_props.add(key="k", value="v")
    assert convert_opset(model, 23, Path("m.onnx")).graph.node[0].metadata_props[0].value == "v"
    assert convert_opset(model, 17, Path("m.onnx")) is model
    assert convert_opset(model, 11, Path("m.onnx")) is model


def test_no_conversion_is_a_model_error() -> None:
    model = tiny()
    model.opset_import[0].version = 13
    model.graph.node[0].op_type = "Nonsense"
    with pytest.raises(ModelError, match=r"model m\.onnx: cannot convert opset 13 to 23") as caught:
        convert_opset(model, 23, Path("m.onnx"))
    assert "\n" not in str(caught.value)


# Outputs


def files(folder: Path) -> list[str]:
    """Names of everything in a folder."""
    return sorted(path.name for path in folder.iterdir())


def refused_output(path: Path, model: Path, message: str) -> None:
    with pytest.raises(OutputError, match=message) as caught:
        check_output(path, model)
    assert "\n" not in str(caught.value)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.onnx"
    path.write_bytes(tiny().SerializeToString())
    return path


def test_a_good_output(tmp_path: Path, source: Path) -> None:
    check_output(tmp_path / "out.onnx", source)
    (tmp_path / "old.onnx").write_bytes(b"old")
    check_output(tmp_path / "old.onnx", source)


def test_the_output_is_the_input(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused_output(source, source, "is the input model")
    (tmp_path / "link.onnx").symlink_to(source)
    refused_output(tmp_path / "link.onnx", source, "is the input model")
    refused_output(source, tmp_path / "link.onnx", "is the input model")
    os.link(source, tmp_path / "hard.onnx")
    refused_output(tmp_path / "hard.onnx", source, "is the input model")
    monkeypatch.chdir(tmp_path)
    refused_output(Path("in.onnx"), source, "is the input model")


def test_the_output_is_a_directory(tmp_path: Path, source: Path) -> None:
    refused_output(tmp_path, source, "is a directory")


def test_the_folder_of_the_output_is_missing(tmp_path: Path, source: Path) -> None:
    refused_output(tmp_path / "none" / "out.onnx", source, "does not exist")
    refused_output(source / "out.onnx", source, "does not exist")


def test_the_folder_of_the_output_is_read_only(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old.onnx"
    old.write_bytes(b"old")
    for locked in (tmp_path, old):
        monkeypatch.setattr(model_io.os, "access", lambda path, mode, locked=locked: Path(path) != locked)
        refused_output(old, source, "not writable")


def test_writing_and_reading_back(tmp_path: Path) -> None:
    path, model = tmp_path / "out.onnx", tiny()
    write_model(model, path)
    assert read_model(path) == model
    write_model(vit(), path)
    assert read_model(path) == vit(), "an old output is replaced"
    assert files(tmp_path) == ["out.onnx"]


def test_writing_is_deterministic(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_model(vit(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_output_has_the_permissions_of_any_other_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_model(tiny(), tmp_path / "out.onnx")
    write_text("report", tmp_path / "report.md")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "out.onnx", "report.md")}
    assert len(modes) == 1


WRITERS: list[Callable[[Path], None]] = [lambda path: write_model(tiny(), path), lambda path: write_text("new", path)]


@pytest.mark.parametrize("write", WRITERS, ids=["model", "text"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk full", "killed"])
def test_a_write_that_stops_in_the_middle_leaves_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], error: BaseException
) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(model_io.os, "replace", fail)
    with pytest.raises((OutputError, KeyboardInterrupt)) as caught:
        write(path)
    if isinstance(error, OSError):
        assert str(caught.value) == f"output {path}: cannot be written (No space left on device)"
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["out"], "no temporary file stays"


def test_a_folder_that_vanished_is_an_output_error(tmp_path: Path) -> None:
    for write in WRITERS:
        with pytest.raises(OutputError, match="cannot be written"):
            write(tmp_path / "none" / "out")


def test_a_model_over_the_limit_gets_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = model_of("g (float[B, 64] x) => (float[B, 64] y) { y = MatMul(x, w) }", w=np.eye(64, dtype=np.float32))
    monkeypatch.setattr(model_io, "PROTOBUF_LIMIT", 100)
    expected = run_model(big, {"x": np.ones((1, 64), np.float32)})
    write_model(big, tmp_path / "out.onnx")
    assert files(tmp_path) == ["out.onnx", "out.onnx.0.data"]
    again = onnx.load(tmp_path / "out.onnx")
    np.testing.assert_array_equal(run_model(again, {"x": np.ones((1, 64), np.float32)})[0], expected[0])


def test_data_of_an_older_output_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data file is put in place before the model, so that a model that is there always finds its own."""
    monkeypatch.setattr(model_io, "PROTOBUF_LIMIT", 100)
    text, feed = "g (float[B, 64] x) => (float[B, 64] y) { y = MatMul(x, w) }", {"x": np.ones((1, 64), np.float32)}
    path = tmp_path / "out.onnx"
    write_model(model_of(text, w=np.eye(64, dtype=np.float32)), path)
    shutil.copy(path, tmp_path / "kept.onnx")
    write_model(model_of(text, w=2 * np.eye(64, dtype=np.float32)), path)
    assert files(tmp_path) == ["kept.onnx", "out.onnx", "out.onnx.0.data", "out.onnx.1.data"]
    for name, expected in {"kept.onnx": 1, "out.onnx": 2}.items():
        np.testing.assert_array_equal(run_model(onnx.load(tmp_path / name), feed)[0], expected)


def test_the_output_is_the_data_of_the_input(tmp_path: Path) -> None:
    model = model_of("g (float[B, 64] x) => (float[B, 64] y) { y = MatMul(x, w) }", w=np.eye(64, dtype=np.float32))
    onnx.save(model, tmp_path / "in.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    refused_output(tmp_path / "weights.bin", tmp_path / "in.onnx", "is the input model or its data; give another name")
    check_output(tmp_path / "other.bin", tmp_path / "in.onnx")


def test_all_these_errors_are_for_the_user() -> None:
    assert issubclass(ModelError, VitqError)
    assert issubclass(OutputError, VitqError)


def test_dialects_differ_but_compute_the_same() -> None:
    """The builders that the other tests rest on."""
    feed = feed_of(vit())
    expected = run_model(vit(), feed)
    texts = {vit(Sizes(), dialect).SerializeToString() for dialect in DIALECTS.values()}
    assert len(texts) == len(DIALECTS)
    for dialect in DIALECTS.values():
        assert difference(expected, run_model(vit(Sizes(), variant(dialect)), feed)) <= 1e-5
