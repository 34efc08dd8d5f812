"""Model folders: which file is taken and why, where its configurations are, and what a compiled graph is called there."""

from pathlib import Path

import pytest

from vitq_compiler.errors import ModelError
from vitq_compiler.model_folder import choose, compiled_name, config_folders, configs_of, part_of
from vitq_compiler.model_source import find_model

QUANTIZED = ("model_int8", "model_uint8", "model_quantized", "model_q4", "model_q4f16", "model_bnb4", "model_qint8_avx512_vnni")


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["model.onnx"], "model.onnx"),
        (["onnx/model.onnx", "config.json", "onnx/model.onnx_data"], "onnx/model.onnx"),
        (["onnx/model.onnx", "model.onnx"], "model.onnx"),
        (["vit.onnx"], "vit.onnx"),
        (["a_fp16.onnx", "vit.onnx"], "vit.onnx"),
        (["onnx/model_fp16.onnx", "onnx/model_int8.onnx"], "onnx/model_fp16.onnx"),
        (["onnx/model.onnx", *(f"onnx/{name}.onnx" for name in QUANTIZED)], "onnx/model.onnx"),
        (["onnx/text_model.onnx", "onnx/vision_model.onnx", "onnx/vision_model_fp16.onnx"], "onnx/vision_model.onnx"),
        (["onnx/model.onnx", "onnx/text_model.onnx", "onnx/vision_model.onnx"], "onnx/model.onnx"),
        (["decoder_model.onnx", "decoder_with_past_model.onnx", "encoder_model.onnx"], "encoder_model.onnx"),
        (["onnx/prompt_encoder_mask_decoder.onnx", "onnx/vision_encoder.onnx"], "onnx/vision_encoder.onnx"),
        (["onnx/model_int8.onnx"], "onnx/model_int8.onnx"),  # the compiler refuses it, --check does not
        (["model.onnx", "old/model.onnx"], "model.onnx"),
    ],
)
def test_the_model_by_its_name(names: list[str], taken: str) -> None:
    assert choose(names, "repo").name == taken
    assert choose(reversed(names), "repo").name == taken


def test_the_choice_is_explained_where_there_was_one() -> None:
    assert choose(["model.onnx", "config.json"], "repo").why == ""
    told = "onnx/model.onnx, by its name the whole model in full precision; left: onnx/model_fp16.onnx, onnx/model_quantized.onnx"
    assert choose(["onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_quantized.onnx"], "repo").why == told
    told = "encoder_model.onnx, by its name the encoder in full precision; left: decoder_model.onnx"
    assert choose(["encoder_model.onnx", "decoder_model.onnx"], "repo").why == told
    assert (
        choose(["vit_fp16.onnx", "vit_q4.onnx"], "r").why == "vit_fp16.onnx, by its name the only one in half precision; left: vit_q4.onnx"
    )


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        ([], "no .onnx file in this folder; export the model to ONNX first"),
        (["model.safetensors", "onnx/readme.txt"], "no .onnx file in this folder; export"),
        (
            ["cpu/b.onnx", "cpu/a.onnx"],
            "no .onnx file in this folder or its folder onnx, only cpu/a.onnx, cpu/b.onnx; give repo/cpu/a.onnx",
        ),
        (["b.onnx", "a.onnx"], "holds several models, a.onnx, b.onnx; give one of them, such as repo/a.onnx"),
        (["decoder_model.onnx", "onnx/text_model.onnx"], "holds several models, decoder_model.onnx, onnx/text_model.onnx; give one"),
    ],
)
def test_none_and_several_are_refused(names: list[str], fault: str) -> None:
    with pytest.raises(ModelError) as caught:
        choose(names, "repo")
    assert str(caught.value).startswith(f"model repo: {fault}")


@pytest.mark.parametrize("stem", QUANTIZED)
def test_the_suffix_of_a_precision(stem: str) -> None:
    assert part_of(f"onnx/{stem}.onnx") == "model"
    assert part_of(f"vision_{stem}.onnx") == "vision_model"


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        ("onnx/model.onnx", "model_int8.onnx"),
        ("onnx/model_fp16.onnx", "model_int8.onnx"),
        ("vision_model_bf16.onnx", "vision_model_int8.onnx"),
        ("decoder_model_merged.onnx", "decoder_model_merged_int8.onnx"),
        ("vit_small_patch16_224.onnx", "model_int8.onnx"),
    ],
)
def test_what_a_compiled_graph_is_called(name: str, compiled: str) -> None:
    assert compiled_name(name) == compiled


def test_configs_are_beside_the_model_and_above_a_folder_onnx(tmp_path: Path) -> None:
    for name in ("config.json", "onnx/config.json", "merges.txt", "notes.txt", "onnx/quantize_config.json", "model.safetensors.index.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    model = tmp_path / "onnx" / "model.onnx"
    assert config_folders(model) == (tmp_path / "onnx", tmp_path)
    assert config_folders(tmp_path / "onnx") == (tmp_path / "onnx", tmp_path)
    assert config_folders(tmp_path / "model.onnx") == (tmp_path,)
    assert configs_of(model) == {"config.json": tmp_path / "onnx" / "config.json", "merges.txt": tmp_path / "merges.txt"}


def test_a_model_is_found_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").touch()
    (tmp_path / "onnx" / "model_q4.onnx").touch()
    (tmp_path / "model.onnx").mkdir()  # a folder is no model, whatever it is called
    found = find_model(tmp_path)
    assert (found.file, found.name) == (tmp_path / "onnx" / "model.onnx", str(tmp_path / "onnx" / "model.onnx"))
    assert found.why.startswith("onnx/model.onnx, by its name")
    assert find_model(found) is found


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    missing = find_model(tmp_path / "model.onnx")
    assert (missing.file, missing.in_folder, missing.why) == (tmp_path / "model.onnx", False, "")
