"""Make the tiny models of this folder: ``VITQ_SHARED=... python -m tests.data.zoo.make [NAME ...]`` from the root of the repository.

Each has the structure of a family of `benchmarks.architectures` with two blocks of 16 channels and random weights, as torch's
exporters write it. Needs timm and transformers; the tests need neither.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from benchmarks.architectures import ARCHITECTURES, Architecture, export_architecture

FOLDER = Path(__file__).parent
SIDE = 16
TIMM = {"img_size": SIDE, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 10}
HF = {
    "image_size": SIDE,
    "patch_size": 4,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": 10,
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
WINDOWS = {"image_size": SIDE, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 10}
POOLED = {
    "image_size": [SIDE, SIDE],
    "patch_size": [3, 3],
    "patch_stride": [2, 2],
    "patch_padding": [1, 1],
    "embed_dim": 16,
    "num_labels": 10,
}
POOLED |= {"depths": [1, 2], "num_heads": [1, 2], "masked_unit_attention": [True, False], "num_query_pool": 1, "masked_unit_size": [2, 2]}
REDUCED = {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
REDUCED |= {"image_size": SIDE, "patch_sizes": [3, 3], "strides": [2, 2], "num_labels": 10}
POSITIONS = {"max_position_embeddings": 16}


def tiny(name: str, sizes: dict[str, Any], **options: Any) -> Architecture:
    """An architecture of the zoo at the size of a fixture."""
    architecture = ARCHITECTURES[name]
    return replace(architecture, options={**architecture.options, **sizes, **options}, image=architecture.image and SIDE, tokens=12)


MODELS = {
    "deit_distilled": (tiny("deit_small_distilled_patch16_224", TIMM), "torchscript"),
    "layer_scale": (tiny("deit3_small_patch16_224", TIMM), "dynamo"),
    "parallel": (tiny("vit_base_patch16_xp_224", TIMM), "dynamo"),
    "relative_position": (tiny("vit_relpos_small_patch16_224", TIMM), "torchscript"),
    "query_key_norm": (tiny("vit_intern300m_patch14_448", TIMM, qk_norm=True), "dynamo"),
    "attention_pooling": (tiny("vit_base_patch16_siglip_224", TIMM), "torchscript"),
    "dinov3": (tiny("vit_small_plus_patch16_dinov3", TIMM), "dynamo"),
    "rope_mixed": (tiny("vit_small_patch16_rope_mixed_224", TIMM), "dynamo"),
    "eva02": (tiny("eva02_tiny_patch14_224", TIMM), "dynamo"),
    "eva02_norms": (tiny("eva02_base_patch16_clip_224", TIMM), "dynamo"),
    "beit": (tiny("beit_base_patch16_224", TIMM), "dynamo"),
    "beit3": (tiny("beit3_base_patch16_224", TIMM), "torchscript"),
    "cait": (tiny("cait_xxs24_224", TIMM), "torchscript"),
    "convit": (tiny("convit_tiny", TIMM), "dynamo"),
    "quick_gelu": (tiny("hf_clip_vision", HF), "torchscript"),
    "swiglu": (tiny("hf_dinov2_swiglu", HF), "dynamo"),
    "dinov3_hf": (tiny("hf_dinov3_gated", HF), "dynamo"),
    "data2vec": (tiny("hf_data2vec", HF), "dynamo"),
    "siglip_hf": (tiny("hf_siglip_vision", HF), "dynamo"),
    "swin": (tiny("hf_swin", WINDOWS), "torchscript"),
    "swinv2": (tiny("hf_swinv2", WINDOWS), "dynamo"),
    "hiera": (tiny("hf_hiera", POOLED), "dynamo"),
    "pvt_v2": (tiny("hf_pvt_v2", REDUCED | {"sr_ratios": [4, 2]}), "dynamo"),
    "segformer": (tiny("hf_segformer", REDUCED | {"sr_ratios": [4, 2], "decoder_hidden_size": 16}), "torchscript"),
    "bert": (tiny("hf_bert", TEXT, **POSITIONS), "torchscript"),
    "clip_text": (tiny("hf_clip_text", TEXT, **POSITIONS, eos_token_id=49, bos_token_id=48, pad_token_id=1), "dynamo"),
}


def make(name: str) -> None:
    """Export one model and take out what only people read."""
    architecture, exporter = MODELS[name]
    path = FOLDER / f"{name}.onnx"
    export_architecture(architecture, exporter, path)
    model = onnx.load(path)
    del model.graph.value_info[:], model.graph.metadata_props[:], model.metadata_props[:]
    for node in model.graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    for tensor in (*model.graph.initializer, *model.graph.input, *model.graph.output):
        tensor.ClearField("doc_string")
        tensor.ClearField("metadata_props")
    onnx.save(model, path)


if __name__ == "__main__":
    for chosen in sys.argv[1:] or MODELS:
        make(chosen)
