"""Tiny random checkpoints of every family in policy/families.py, built of the real Hugging Face classes.

Each has its family's peculiarity: windows in the vision tower, deepstack, tiles, anyres, sliding layers with images
seen both ways, linear attention. ``build_family(model_type, folder)`` writes one in about a second.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rft_lightning.policy.tiny import SPECIAL_TOKENS, _scale_to_fan_in, build_tiny, shapes_corpus, train_tokenizer

WIDTH, VOCABULARY = 64, 640
# Tiles of the families that resize to squares: 4 x 4 patches of 8 pixels.
TILE, PATCH = 32, 8

TURNS = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string %}{{ message['content'] }}{%- else %}"
    "{%- for content in message['content'] %}"
    "{%- if content['type'] == 'image' %}{{ IMAGE }}{%- elif 'text' in content %}{{ content['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
# Qwen3-VL has Qwen2-VL's turns without its default system turn; InternVL's differ in the image.
QWEN3_TEMPLATE = TURNS.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'")
INTERNVL_TEMPLATE = TURNS.replace("IMAGE", "'<IMG_CONTEXT>\n'")
# Images before all text, no newline after a turn.
LLAVA_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{%- for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{%- endfor %}"
    "{%- for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{%- endfor %}{{ '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
# The template begins the text itself, the system turn is part of the user's, and the model is called "model".
GEMMA3_TEMPLATE = (
    "{{ bos_token }}{%- set prefix = '' %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set prefix = messages[0]['content'][0]['text'] + '\n\n' %}"
    "{%- set messages = messages[1:] %}{%- endif %}"
    "{%- for message in messages %}{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}"
    "{%- for content in message['content'] %}"
    "{%- if content['type'] == 'image' %}{{ '<start_of_image>' }}{%- else %}{{ content['text'] | trim }}{%- endif %}"
    "{%- endfor %}{{ '<end_of_turn>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{%- endif %}"
)


def build_family(model_type: str, folder: str | Path) -> Path:
    """Write a tiny random checkpoint of a family, with tokenizer and processor, and return its folder."""
    folder = Path(folder)
    torch.manual_seed(0)
    model, processor = BUILDERS[model_type]()
    _scale_to_fan_in(model)
    _sharpen(model)
    tokenizer = processor.tokenizer
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _qwen2_vl() -> tuple[Any, Any]:
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    with TemporaryDirectory() as folder:
        build_tiny(folder, _corpus(), vocabulary=VOCABULARY, width=WIDTH, layers=2, vision_width=32)
        return Qwen2VLForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def _qwen2_5_vl() -> tuple[Any, Any]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    tokenizer = _tokenizer()
    vision = _qwen_vision() | {
        "window_size": 4 * PATCH,  # 2 x 2 image tokens
        "fullatt_block_indexes": [1],
        "hidden_act": "silu",
    }
    config = Qwen2_5_VLConfig(
        text_config=_text(tokenizer, rope_parameters=_mrope([4, 2, 2])),
        vision_config=vision,
        **_vision_ids(tokenizer),
    )
    return Qwen2_5_VLForConditionalGeneration(config), _qwen_processor(Qwen2_5_VLProcessor, tokenizer)


def _qwen3_vl() -> tuple[Any, Any]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    tokenizer = _tokenizer()
    vision = _qwen_vision() | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(
        text_config=_text(tokenizer, rope_parameters=_mrope([4, 2, 2], mrope_interleaved=True)),
        vision_config=vision,
        **_vision_ids(tokenizer),
    )
    return Qwen3VLForConditionalGeneration(config), _qwen_processor(Qwen3VLProcessor, tokenizer, QWEN3_TEMPLATE)


def _qwen3_5() -> tuple[Any, Any]:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration, Qwen3VLProcessor

    tokenizer = _tokenizer()
    text = _text(
        tokenizer,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        rope_parameters=_mrope([2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.5),
    )
    vision = _qwen_vision() | {"num_position_embeddings": 64}
    config = Qwen3_5Config(text_config=text, vision_config=vision, **_vision_ids(tokenizer))
    return Qwen3_5ForConditionalGeneration(config), _qwen_processor(Qwen3VLProcessor, tokenizer, QWEN3_TEMPLATE)


def _internvl() -> tuple[Any, Any]:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    names = {"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>", "video": "<video>"}
    tokenizer = _tokenizer(named={f"{name}_token": token for name, token in names.items()})
    side = {"height": TILE, "width": TILE}
    config = InternVLConfig(
        text_config=_text(tokenizer, model_type="qwen2"),
        vision_config=_tower(image_size=[TILE, TILE], patch_size=[PATCH, PATCH]),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(TILE // PATCH // 2) ** 2,
        tie_word_embeddings=False,
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=side, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=side),
        image_seq_length=config.image_seq_length,
        chat_template=INTERNVL_TEMPLATE,
    )
    return InternVLForConditionalGeneration(config), processor


def _llava_onevision() -> tuple[Any, Any]:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    tokenizer = _tokenizer(more=("<image>", "<video>"))
    side = {"height": TILE, "width": TILE}
    grids = [[TILE * rows, TILE * columns] for rows in (1, 2) for columns in (1, 2)]
    config = LlavaOnevisionConfig(
        text_config=_text(tokenizer, model_type="qwen2"),
        vision_config=_siglip(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grids,
    )
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=grids),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=(TILE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_TEMPLATE,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def _gemma3() -> tuple[Any, Any]:
    from tokenizers.processors import TemplateProcessing
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    names = {"boi": "<start_of_image>", "eoi": "<end_of_image>", "image": "<image_soft_token>"}
    tokenizer = _tokenizer(
        named={f"{name}_token": token for name, token in names.items()},
        more=("<bos>", "<start_of_turn>", "<end_of_turn>"),
        bos_token="<bos>",
        eos_token="<end_of_turn>",
    )
    # Like the original, it begins every text itself; the chat template has done so already.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    config = Gemma3Config(
        text_config=_text(
            tokenizer,
            num_hidden_layers=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            sliding_window=16,
            query_pre_attn_scalar=16,
        ),
        vision_config=_siglip(),
        mm_tokens_per_image=4,
        **{f"{name}_token_index": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": TILE, "width": TILE}),
        tokenizer=tokenizer,
        image_seq_length=config.mm_tokens_per_image,
        chat_template=GEMMA3_TEMPLATE,
    )
    return Gemma3ForConditionalGeneration(config), processor


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "gemma3": _gemma3,
    "internvl": _internvl,
    "llava_onevision": _llava_onevision,
    "qwen3_5": _qwen3_5,
}


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    """The decoder's settings."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return settings | more


def _mrope(sections: list[int], **more: Any) -> dict[str, Any]:
    # A small base, as in build_tiny: with the usual ones places in a picture could hardly be told apart.
    return {"rope_type": "default", "rope_theta": 10.0, "mrope_section": sections} | more


def _tower(**more: Any) -> dict[str, Any]:
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2} | more


def _siglip() -> dict[str, Any]:
    return _tower(model_type="siglip_vision_model", image_size=TILE, patch_size=PATCH, vision_use_head=False)


def _qwen_vision() -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


def _vision_ids(tokenizer: Any) -> dict[str, int]:
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}


def _qwen_processor(processor_class: Any, tokenizer: Any, template: str | None = None) -> Any:
    from transformers import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    from rft_lightning.policy.tiny import CHAT_TEMPLATE

    limits = {"shortest_edge": (4 * PATCH) ** 2, "longest_edge": (10 * PATCH) ** 2}
    patches = {"size": limits, "patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    videos = Qwen2VLVideoProcessor if template is None else Qwen3VLVideoProcessor
    return processor_class(
        image_processor=Qwen2VLImageProcessor(**patches),
        tokenizer=tokenizer,
        video_processor=videos(**patches),
        chat_template=template or CHAT_TEMPLATE,
    )


@cache
def _corpus() -> list[str]:
    return shapes_corpus(60)


def _tokenizer(named: dict[str, str] | None = None, more: tuple[str, ...] = (), **tokens: str) -> Any:
    """A byte-level tokenizer with further special tokens: `named` ones become attributes, as processors want them."""
    from transformers import PreTrainedTokenizerFast

    named = named or {}
    base = train_tokenizer(_corpus(), VOCABULARY)
    base.add_special_tokens({"additional_special_tokens": [*SPECIAL_TOKENS[3:], *more, *named.values()]})
    return PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        pad_token="<|endoftext|>",
        extra_special_tokens=named,
        padding_side="left",
        model_max_length=2048,
        **({"eos_token": "<|im_end|>"} | tokens),
    )


@torch.no_grad()
def _sharpen(model: Any) -> None:
    """Logits with a standard deviation of about 3: nearly flat ones would tell wrong numbers from right ones badly."""
    sharpness = 3.0 / (float(model.get_output_embeddings().weight.std()) * WIDTH**0.5)
    gain = model.model.language_model.norm.weight
    gain.add_(sharpness - 1.0)  # 1 before; some families store the gain less one
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.uniform_(-4.0, -2.0)  # slow decay: a recurrence that remembers the picture
