"""The layout of a model folder, as optimum, transformers.js and the Hugging Face hub have it.

The model is ``model.onnx``, in the folder or in its folder ``onnx``; a suffix tells its precision (``model_fp16.onnx``,
``model_quantized.onnx``), and a model in parts has a name for each (``vision_model.onnx``). Configurations lie in the folder itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vitq_compiler.errors import ModelError

ONNX_FOLDER = "onnx"
PARTS = {
    "model": "the whole model",
    "vision_model": "the tower for pictures",
    "vision_encoder": "the encoder of pictures",
    "encoder_model": "the encoder",
}
"""Stem of a file that is taken where there are several, in this order -> what it is."""

OTHER_PARTS = (
    *("text_model", "text_encoder", "audio_model", "audio_encoder", "embed_tokens", "prompt_encoder_mask_decoder"),
    *("decoder_model", "decoder_model_merged", "decoder_with_past_model"),
)
"""Stems that mean something too, but are never taken for the model."""

CONFIGS = (
    *("config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "open_clip_config.json"),
    *("generation_config.json", "chat_template.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "LICENSE", "LICENSE.txt", "LICENSE.md"),
)
"""What goes with a model wherever it goes: all that loading it takes but weights, and its licence. Not what tells how it was quantized."""

_HALF = re.compile(r"(.+)_(?:fp16|bf16)")
_QUANTIZED = re.compile(r"(.+?)_(?:quantized|q?u?int[48]|q\d(?:f16)?|bnb4)(?:_.+)?")  # the rest names processors
_PRECISIONS = ("full precision", "half precision", "quantized")


@dataclass(frozen=True)
class Choice:
    """A file of a folder, by its path in it, and why it was taken; empty where there was no other."""

    name: str
    why: str = ""


def choose(names: Iterable[str], where: str) -> Choice:
    """The model among the files of a folder, by their names alone: full precision first, then the whole before its parts.

    Args:
        names: paths in the folder, with slashes; what is no ``.onnx`` file is passed over.
        where: what stands for the folder in messages; a file in it is ``where/name``.

    Raises:
        ModelError: there is none, or several between which the names do not decide; the message lists them.
    """
    found = sorted(name for name in names if name.endswith(".onnx"))
    near = [name for name in found if str(PurePosixPath(name).parent) in (".", ONNX_FOLDER)]
    if not found:
        raise ModelError(f"model {where}: no .onnx file in this folder; export the model to ONNX first")
    if not near:
        listed = ", ".join(found)
        raise ModelError(f"model {where}: no .onnx file in this folder or its folder {ONNX_FOLDER}, only {listed}; give {where}/{found[0]}")
    best = min(map(_rank, near))
    chosen = [name for name in near if _rank(name) == best]
    if len({part_of(name) for name in chosen}) > 1:
        raise ModelError(f"model {where}: holds several models, {', '.join(near)}; give one of them, such as {where}/{chosen[0]}")
    name = min(chosen, key=lambda name: (name.count("/"), len(name)))
    others = ", ".join(other for other in near if other != name)
    told = PARTS.get(part_of(name), "the only one")
    return Choice(name, f"{name}, by its name {told} in {_PRECISIONS[best[0]]}; left: {others}" if others else "")


def part_of(name: str) -> str:
    """The stem of a model file without the suffix that tells its precision: ``onnx/vision_model_fp16.onnx`` -> ``vision_model``."""
    stem = PurePosixPath(name).stem
    found = _HALF.fullmatch(stem) or _QUANTIZED.fullmatch(stem)
    return found[1] if found else stem


def compiled_name(name: str) -> str:
    """The file that a compiled graph becomes in a model folder: what loads it looks for ``model_int8.onnx`` or for the same part."""
    part = part_of(name)
    return f"{part if part in (*PARTS, *OTHER_PARTS) else 'model'}_int8.onnx"


def _rank(name: str) -> tuple[int, int]:
    """Precision and part; less is better."""
    stem, part = PurePosixPath(name).stem, part_of(name)
    parts = list(PARTS)
    return 0 if stem == part else 1 if _HALF.fullmatch(stem) else 2, parts.index(part) if part in parts else len(parts)


def config_folders(model: Path) -> tuple[Path, ...]:
    """Where the configurations of a model may lie, nearest first: beside the file, and above a folder ``onnx``.

    Args:
        model: the model's file, or its folder.
    """
    folder = model if model.is_dir() else model.parent
    if folder.absolute().name != ONNX_FOLDER:
        return (folder,)
    return folder, folder.parent if folder.name else folder.absolute().parent


def configs_of(model: Path) -> dict[str, Path]:
    """The `CONFIGS` there are of a model file, by name; the nearest of each."""
    found = [folder / name for folder in reversed(config_folders(model)) for name in CONFIGS if (folder / name).is_file()]
    return {path.name: path for path in found}
