"""The policies of the benchmarks: Qwen2-VL of the sizes in step_config.json with random weights; nothing is downloaded."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from rft_lightning.policy.loading import DTYPES
from rft_lightning.policy.tiny import CHAT_TEMPLATE, shapes_corpus, train_tokenizer

CONFIGS = Path(__file__).with_name("step_config.json")


def sizes(name: str) -> dict[str, Any]:
    """One policy of step_config.json: ``cpu`` (5 M parameters) or ``cuda`` (Qwen2-VL-2B's sizes)."""
    return json.loads(CONFIGS.read_text(encoding="utf-8"))[name]


def build(name: str, folder: Path, **text: Any) -> Path:
    """Write a policy of step_config.json with random weights to a folder, and its processor; `text` changes sizes."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor, Qwen2VLProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    wanted = sizes(name)
    tokenizer = train_tokenizer(shapes_corpus(300), wanted["tokenizer_size"])
    ids = tokenizer.get_vocab()
    ends = {"bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    config = Qwen2VLConfig(
        text_config={**wanted["text_config"], **ends, **text},
        vision_config=wanted["vision_config"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[wanted["dtype"]])
        model = Qwen2VLForConditionalGeneration(config)
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    pixels = wanted["image_side"] ** 2
    images = {"size": {"shortest_edge": pixels // 2, "longest_edge": pixels}, "patch_size": 14, "merge_size": 2}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**images),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**images),
        chat_template=CHAT_TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import transformers

    found = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    found |= {"transformers": transformers.__version__}
    return found | ({"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})
