"""The architectures of the zoo: how each is built, from timm or transformers, with random weights.

Add one to `FLAT` or `HIERARCHICAL`; nothing else needs to know of it. ``small`` builds the same structure with two blocks and
small pictures: fast enough to try a change on all of them. All vectors of a model get seeded noise, for the reason given in
`benchmarks.models`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.models import NOISE, OPSETS, import_timm, import_torch

SMALL = 64  # pixels of a small model
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One model of the zoo.

    Attributes:
        name: on the command line.
        family: "flat" or "hierarchical".
        source: the package that builds it, "timm" or "transformers".
        kind: timm's model name, or the class of transformers.
        options: for timm keyword arguments of the model, for transformers the fields of its configuration.
        small: the options that differ in the small variant.
        image: pixels of a side; None for token ids.
        output: of a transformers model, the field of its result that is exported.
        part: of a transformers model, the configuration class where it is not called like the model.
        tokens: length of a text, where the inputs are token ids.
        fixed: whether the small variant needs pictures of full size.
    """

    name: str
    family: str
    source: str
    kind: str
    options: Options = field(default_factory=dict)
    small: Options = field(default_factory=dict)
    image: int | None = 224
    output: str = "logits"
    config: str = ""
    tokens: int = 64
    fixed: bool = False

    def side(self, small: bool) -> int:
        """Pixels of a side."""
        if not small or self.fixed:
            return int(self.image or 0)
        size = self.small.get("img_size", self.small.get("image_size", SMALL))
        return int(size[0] if isinstance(size, list) else size)


def _timm(
    name: str, family: str = "flat", *, image: int = 224, small: Options | None = None, sized: bool = True, **options: Any
) -> Architecture:
    """A model of timm; ``sized``: whether it takes the image size as an option."""
    reduced = {"depth": 2, **({"img_size": SMALL} if sized else {}), **(small or {})}
    return Architecture(name, family, "timm", name, {**options, **({"img_size": image} if sized else {})}, reduced, image)


def _transformers(
    name: str,
    kind: str,
    family: str = "flat",
    *,
    small: Options | None = None,
    image: int | None = 224,
    output: str = "logits",
    config: str = "",
    **options: Any,
) -> Architecture:
    """A model of transformers, of the sizes of a ViT-S unless told otherwise."""
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6, **options}
    reduced = {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 3}
    if image is not None:
        sizes, reduced = {"image_size": image, **sizes}, {**reduced, "image_size": SMALL}
    return Architecture(name, family, "transformers", kind, sizes, {**reduced, **(small or {})}, image, output, config)


def _pyramid(name: str, *, image: int = 224, small: Options | None = None, sized: bool = False, fixed: bool = False) -> Architecture:
    """A hierarchical model of timm; ``sized`` and ``fixed``: whether it takes the image size, and has only one."""
    options = {"img_size": image} if sized else {}
    reduced = {**({"img_size": SMALL} if sized and not fixed else {}), **(small or {})}
    return Architecture(name, "hierarchical", "timm", name, options, reduced, image, fixed=fixed)


def _stages(
    name: str, kind: str, small: Options, *, image: int = 224, output: str = "logits", config: str = "", **options: Any
) -> Architecture:
    """A hierarchical model of transformers."""
    reduced = {"image_size": SMALL, **small}
    return Architecture(name, "hierarchical", "transformers", kind, {"image_size": image, **options}, reduced, image, output, config)


FLAT = (
    # the plain ViT and what differs in a detail
    _timm("vit_small_patch16_224"),
    _timm("vit_base_patch16_224"),
    _timm("deit_small_distilled_patch16_224"),
    _timm("deit3_small_patch16_224"),
    _timm("vit_small_patch16_18x2_224"),
    _timm("vit_base_patch16_xp_224"),
    _timm("vit_little_patch16_reg4_gap_256", image=256),
    _timm("flexivit_small", image=240),
    _timm("vit_relpos_small_patch16_224"),
    _timm("vit_srelpos_small_patch16_224"),
    _timm("vit_intern300m_patch14_448", image=224, depth=6, small={"img_size": 56}),
    # self-supervised and contrastive towers
    _timm("vit_small_patch14_dinov2", image=224, small={"img_size": 56}),
    _timm("vit_small_patch14_reg4_dinov2", image=224, small={"img_size": 56}),
    _timm("vit_giant_patch14_dinov2", image=224, depth=4, small={"img_size": 56}),
    _timm("vit_small_patch16_dinov3", image=224),
    _timm("vit_small_plus_patch16_dinov3", image=224),
    _timm("vit_base_patch16_clip_quickgelu_224"),
    _timm("vit_base_patch16_siglip_224"),
    _timm("vit_pe_core_tiny_patch16_384", image=384),
    _timm("aimv2_large_patch14_224", depth=6, small={"img_size": 56}),
    # rotary and relative positions
    _timm("vit_small_patch16_rope_224"),
    _timm("vit_small_patch16_rope_mixed_224"),
    _timm("eva02_tiny_patch14_224", small={"img_size": 56}),
    _timm("eva02_base_patch16_clip_224"),
    _timm("beit_base_patch16_224"),
    _timm("beitv2_base_patch16_224"),
    _timm("beit3_base_patch16_224"),
    # other attention
    _timm("cait_xxs24_224", small={"depth_token_only": 1}),
    _timm("convit_tiny"),
    _timm("tnt_s_patch16_224"),
    _timm("crossvit_tiny_240", image=240, sized=False, small={"depth": ((1, 2, 0), (1, 2, 0)), "img_size": 240}),
    # transformers
    _transformers("hf_vit", "ViTForImageClassification"),
    _transformers("hf_deit", "DeiTForImageClassificationWithTeacher", config="DeiT"),
    _transformers("hf_dinov2_swiglu", "Dinov2ForImageClassification", use_swiglu_ffn=True),
    _transformers("hf_dinov2_registers", "Dinov2WithRegistersForImageClassification"),
    _transformers("hf_dinov3", "DINOv3ViTModel", config="DINOv3ViT", output="last_hidden_state"),
    _transformers(
        "hf_dinov3_gated", "DINOv3ViTModel", config="DINOv3ViT", output="last_hidden_state", use_gated_mlp=True, hidden_act="silu"
    ),
    _transformers("hf_beit", "BeitForImageClassification", use_relative_position_bias=True, layer_scale_init_value=0.1),
    _transformers("hf_data2vec", "Data2VecVisionForImageClassification", use_shared_relative_position_bias=True),
    _transformers("hf_clip_vision", "CLIPVisionModel", output="pooler_output", config="CLIPVision"),
    _transformers("hf_siglip_vision", "SiglipVisionModel", output="pooler_output", config="SiglipVision"),
    _transformers("hf_mae", "ViTMAEModel", output="last_hidden_state", config="ViTMAE", mask_ratio=0.0),
    _transformers("hf_ijepa", "IJepaModel", output="last_hidden_state", config="IJepa"),
    _transformers("hf_blip_vision", "BlipVisionModel", output="last_hidden_state", config="BlipVision"),
    _transformers("hf_clip_text", "CLIPTextModel", image=None, output="last_hidden_state", config="CLIPText"),
    _transformers("hf_bert", "BertModel", image=None, output="last_hidden_state", config="Bert"),
    _transformers("hf_distilbert", "DistilBertModel", image=None, output="last_hidden_state", config="DistilBert"),
)

ONE_EACH = {"depths": (1, 1, 1, 1)}
TWO_STAGES = {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 48, "window_size": 4}

HIERARCHICAL = (
    # windows
    _pyramid("swin_tiny_patch4_window7_224", sized=True, small={"img_size": 56, "depths": (2, 2), "num_heads": (3, 6)}),
    _pyramid("swin_s3_tiny_224", sized=True, small={"depths": (2, 2, 1, 1), "img_size": 224}),
    _pyramid(
        "swinv2_tiny_window8_256", image=256, sized=True, small={"depths": (2, 2), "num_heads": (3, 6), "embed_dim": 48, "img_size": 64}
    ),
    _pyramid("swinv2_cr_tiny_224", sized=True, fixed=True, small=ONE_EACH),
    _pyramid("twins_svt_small", sized=True, small={"depths": (1, 1, 2, 1)}),
    _pyramid("davit_tiny", small=ONE_EACH, fixed=True),
    _pyramid(
        "samvit_base_patch16", image=512, sized=True, small={"depth": 3, "window_size": 3, "global_attn_indexes": (2,), "img_size": 128}
    ),
    _stages("hf_swin", "SwinForImageClassification", TWO_STAGES),
    _stages("hf_swinv2", "Swinv2ForImageClassification", TWO_STAGES, image=256, window_size=8),
    _stages(
        "hf_sam_vision",
        "SamVisionModel",
        {"num_hidden_layers": 3, "image_size": 128, "window_size": 3, "global_attn_indexes": [2]},
        image=512,
        output="last_hidden_state",
        config="SamVision",
    ),
    # pooled queries, reduced keys and values
    _pyramid("hiera_tiny_224", sized=True, small={"stages": (1, 2, 2, 1)}),
    _pyramid("mvitv2_tiny", sized=True),
    _pyramid("pvt_v2_b1", small=ONE_EACH),
    _pyramid("pvt_v2_b2_li", small=ONE_EACH),
    _stages(
        "hf_hiera",
        "HieraForImageClassification",
        {"depths": [1, 2, 2], "num_heads": [1, 2, 4], "embed_dim": 48, "masked_unit_attention": [True, True, False]}
        | {"image_size": [64, 64], "num_query_pool": 2, "masked_unit_size": [4, 4]},
        image_size=[224, 224],
    ),
    _stages("hf_pvt_v2", "PvtV2ForImageClassification", {"depths": [1, 1, 1, 1]}),
    _stages("hf_segformer", "SegformerForImageClassification", {"depths": [1, 1, 1, 1]}),
    _stages("hf_segformer_maps", "SegformerForSemanticSegmentation", {"depths": [1, 1, 1, 1]}, config="Segformer"),
    _stages("hf_glpn", "GLPNForDepthEstimation", {"depths": [1, 1, 1, 1]}, config="GLPN", output="predicted_depth"),
    # channels
    _pyramid("xcit_tiny_12_p16_224", sized=True, small={"depth": 2}),
    _pyramid("edgenext_x_small"),
    # with convolutions
    _pyramid("levit_128s", fixed=True, small={"depth": (1, 1, 1)}),
    _pyramid("levit_conv_128s", fixed=True, small={"depth": (1, 1, 1)}),
    _pyramid("tiny_vit_5m_224", fixed=True, small=ONE_EACH),
    _pyramid("efficientformer_l1", fixed=True, small={"depths": (1, 1, 1, 2)}),
    _pyramid("efficientformerv2_s0", fixed=True, small={"depths": (1, 1, 2, 2)}),
    _pyramid("mobilevit_xs"),
    _pyramid("mobilevitv2_100"),
    _pyramid("coatnet_nano_rw_224", fixed=True),
    _pyramid("maxvit_rmlp_pico_rw_256", image=256, fixed=True),
    _pyramid("efficientvit_b1"),
    _pyramid("fastvit_sa12"),
    _stages("hf_levit", "LevitForImageClassification", {"depths": [1, 1, 1], "image_size": 224}),
    _stages("hf_mobilevit", "MobileViTForImageClassification", {}, config="MobileViT"),
    _stages("hf_mobilevitv2", "MobileViTV2ForImageClassification", {}, config="MobileViTV2"),
)

ARCHITECTURES = {architecture.name: architecture for architecture in (*FLAT, *HIERARCHICAL)}


def export_architecture(architecture: Architecture, exporter: str, path: Path, small: bool = False, seed: int = 0) -> None:
    """Build with random weights and write to ``path``, the batch left open.

    Args:
        architecture: which.
        exporter: one of `OPSETS`.
        path: the ONNX file.
        small: the variant with few blocks.
        seed: of the weights.
    """
    torch = import_torch()
    build: dict[str, Callable[[Architecture, bool], Any]] = {"timm": _build_timm, "transformers": _build_transformers}
    torch.manual_seed(seed)
    model = build[architecture.source](architecture, small).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += NOISE * torch.randn_like(parameter)
    if architecture.image is None:
        inputs = {"input_ids": torch.ones(2, architecture.tokens, dtype=torch.int64)}
    else:
        inputs = {"pixel_values": torch.randn(2, 3, architecture.side(small), architecture.side(small))}
    names: dict[str, Any] = {"input_names": list(inputs), "output_names": ["output"], "opset_version": OPSETS[exporter]}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs)
            program = torch.onnx.export(model, tuple(inputs.values()), dynamic_shapes=shapes, dynamo=True, verbose=False, **names)
            program.save(path, external_data=False)
        else:
            axes = {name: {0: "batch"} for name in (*inputs, "output")}
            torch.onnx.export(model, tuple(inputs.values()), path, dynamic_axes=axes, dynamo=False, **names)


def _build_timm(architecture: Architecture, small: bool) -> Any:
    timm, _ = import_timm()
    options = {**architecture.options, **(architecture.small if small else {})}
    return timm.create_model(architecture.kind, pretrained=False, **options)


def _build_transformers(architecture: Architecture, small: bool) -> Any:
    torch = import_torch()
    import transformers

    options = {**architecture.options, **(architecture.small if small else {})}
    stem = architecture.config or architecture.kind.removesuffix("ForImageClassification")
    network = getattr(transformers, architecture.kind)(getattr(transformers, f"{stem}Config")(**options))

    class Plain(torch.nn.Module):
        """One tensor in, one tensor out."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Any) -> Any:
            return getattr(self.network(x), architecture.output)

    return Plain()
