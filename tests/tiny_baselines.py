"""Tiny random checkpoints of the models behind the comparison systems, of the real transformers classes."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

# BERT's ids of [CLS], [SEP], "." and "?", which GroundingDINO knows by number.
_BERT_IDS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
_WORDS = ("the", "red", "green", "blue", "yellow", "circle", "square", "triangle", "star", "stop", "sign", "what")
SAM_SIDE = 64


def build_baseline(kind: str, folder: str | Path) -> str:
    """Write a tiny random checkpoint with its processor, and return its folder."""
    torch.manual_seed(0)
    model, processor = BUILDERS[kind]()
    _stir(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _grounding_dino() -> tuple[Any, Any]:
    from transformers import (
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
    )

    fillers = {f"[unused{number}]": number for number in range(1030) if number not in _BERT_IDS.values()}
    vocabulary = {**fillers, **_BERT_IDS, **{word: 1030 + number for number, word in enumerate(_WORDS)}}
    text = {
        "model_type": "bert",
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    }
    config = GroundingDinoConfig(
        backbone_config=_swin(out_indices=[2, 3, 4]),
        text_config=text,
        d_model=64,  # two channels per group of its group norms, which refuse single values
        num_queries=12,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_text_len=16,
    )
    tokenizer = BertTokenizer(vocab=vocabulary)
    images = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    return GroundingDinoForObjectDetection(config), GroundingDinoProcessor(images, tokenizer)


def _sam() -> tuple[Any, Any]:
    from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

    config = SamConfig(
        vision_config={
            "hidden_size": 16,
            "output_channels": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": SAM_SIDE,
            "patch_size": 8,
            "num_pos_feats": 8,
            "window_size": 4,
            "global_attn_indexes": [0],
            "initializer_range": 0.02,
        },
        prompt_encoder_config={
            "hidden_size": 16,
            "image_size": SAM_SIDE,
            "patch_size": 8,
            "mask_input_channels": 4,
        },
        mask_decoder_config=_mask_decoder(),
    )
    images = SamImageProcessor(
        size={"longest_edge": SAM_SIDE},
        pad_size={"height": SAM_SIDE, "width": SAM_SIDE},
        mask_size={"longest_edge": SAM_SIDE // 4},
        mask_pad_size={"height": SAM_SIDE // 4, "width": SAM_SIDE // 4},
    )
    return SamModel(config), SamProcessor(images)


def _sam2(*, video: bool = False) -> tuple[Any, Any]:
    from transformers import (
        Sam2Config,
        Sam2ImageProcessor,
        Sam2Model,
        Sam2Processor,
        Sam2VideoConfig,
        Sam2VideoModel,
    )

    vision = {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 8,
            "image_size": [SAM_SIDE, SAM_SIDE],
            "blocks_per_stage": [1, 1, 2, 1],
            "embed_dim_per_stage": [8, 16, 24, 32],
            "num_attention_heads_per_stage": [1, 1, 1, 1],
            "window_size_per_stage": [4, 4, 4, 2],
            "global_attention_blocks": [3],
            "window_positional_embedding_background_size": [4, 4],
        },
        "backbone_channel_list": [32, 24, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 16,
    }
    parts = {
        "vision_config": vision,
        "prompt_encoder_config": {
            "hidden_size": 16,
            "image_size": SAM_SIDE,
            "patch_size": 16,
            "mask_input_channels": 4,
        },
        "mask_decoder_config": _mask_decoder(),
    }
    side = {"height": SAM_SIDE, "width": SAM_SIDE}
    quarter = {"height": SAM_SIDE // 4, "width": SAM_SIDE // 4}
    processor = Sam2Processor(Sam2ImageProcessor(size=side, mask_size=quarter))
    if not video:
        return Sam2Model(Sam2Config(**parts)), processor
    memory = {
        "image_size": SAM_SIDE,
        "memory_attention_hidden_size": 16,
        "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": 16,
        "memory_attention_rope_feat_sizes": [4, 4],
        "memory_encoder_hidden_size": 16,
        "memory_encoder_output_channels": 8,
        "mask_downsampler_embed_dim": 16,
        "memory_fuser_num_layers": 1,
        "memory_fuser_embed_dim": 16,
        "memory_fuser_intermediate_dim": 16,
    }
    return Sam2VideoModel(Sam2VideoConfig(**parts, **memory)), processor


def _sam2_video() -> tuple[Any, Any]:
    return _sam2(video=True)


def _maskformer() -> tuple[Any, Any]:
    from transformers import MaskFormerConfig, MaskFormerForInstanceSegmentation, MaskFormerImageProcessor

    decoder = {
        "model_type": "detr",
        "d_model": 16,
        "num_queries": 6,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
    }
    config = MaskFormerConfig(
        backbone_config=_swin(out_features=["stage1", "stage2", "stage3", "stage4"]),
        decoder_config=decoder,
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=4,
    )
    processor = MaskFormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    return MaskFormerForInstanceSegmentation(config), processor


def _clip() -> tuple[Any, Any]:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    names = ["<|startoftext|>", "<|endoftext|>"]
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {token: n for n, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters), *names])}
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **size,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 24,
            "bos_token_id": vocabulary[names[0]],
            "eos_token_id": vocabulary[names[1]],
        },
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return CLIPModel(config), CLIPProcessor(images, CLIPTokenizer(vocab=vocabulary, merges=[]))


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "grounding-dino": _grounding_dino,
    "sam": _sam,
    "sam2": _sam2,
    "sam2_video": _sam2_video,
    "maskformer": _maskformer,
    "clip": _clip,
}


def _swin(**more: Any) -> dict[str, Any]:
    sizes = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 4, "image_size": 64}
    return {"model_type": "swin", **sizes, **more}


def _mask_decoder() -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "mlp_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    }


@torch.no_grad()
def _stir(model: Any) -> None:
    """Weights large enough that pictures, words and prompts make a difference; some start at zero."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.1)


@cache
def baseline_folder(kind: str) -> str:
    """The folder of such a checkpoint, built once."""
    folder = TemporaryDirectory(prefix=f"tiny_{kind}_")
    atexit.register(folder.cleanup)
    return build_baseline(kind, folder.name)
