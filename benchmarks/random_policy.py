"""What the benchmarks of speed share: Qwen2-VL of the sizes in step_config.json with random weights, prompts, a clock.

Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rft_lightning.policy.loading import DTYPES, load_policy
from rft_lightning.policy.tiny import CHAT_TEMPLATE, shapes_corpus, train_tokenizer
from rft_lightning.prompts import PromptEncoder
from rft_lightning.sample import DetectionTarget, PromptBatch, Sample
from rft_lightning.tasks import DetectionTask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    with torch.device(DEVICE):
        model = Qwen2VLForConditionalGeneration(config).to(DTYPES[wanted["dtype"]])
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


def load(name: str, folder: Path | str, **options: Any) -> Any:
    """The policy that `build` wrote, on the device, in training mode; `options` are those of load_policy."""
    return load_policy(str(folder), dtype=sizes(name)["dtype"], **options).to(DEVICE)


def prompts_of(folder: Path | str, count: int, *, side: int, digits: int = 0) -> PromptBatch:
    """Questions about pictures of `side` x `side` pixels, 28 x 28 to a token; `digits` more tokens of text."""
    encoder = PromptEncoder(str(folder), min_pixels=side**2, max_pixels=side**2, max_prompt_length=None)
    task, rng = DetectionTask(), np.random.default_rng(0)
    target = DetectionTarget(torch.zeros(0, 4), category="circle", image_size=(side, side))
    question = task.question(target, encoder.frame) + digits * "0"
    pictures = [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]
    samples = [
        Sample(str(index), picture, target, task, (side, side), question=question)
        for index, picture in enumerate(pictures)
    ]
    return encoder(samples).to(DEVICE)


def random_completions(name: str, model: Any, group_size: int, length: int) -> torch.Tensor:
    """[1, G, C] token ids that the tokenizer does not have: no special ones are among them."""
    to = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(sizes(name)["tokenizer_size"], to, (1, group_size, length), generator=generator).to(DEVICE)


def report(
    settings: argparse.Namespace, found: dict[str, Any], table: Callable[[dict[str, Any]], str]
) -> dict[str, Any]:
    """Print what was measured, and write it to `settings.output`, with the machine, the settings and the policy."""
    shown = {name: value for name, value in vars(settings).items() if name != "output"}
    results = {"machine": machine(), "settings": shown, "policy": sizes(settings.policy), **found}
    print(table(results))
    if settings.output is not None:
        settings.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


def now() -> float:
    """A time in seconds, when all work on the device is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(run: Callable[[], Any]) -> float:
    """The time of a call, its work on the device included."""
    begun = now()
    run()
    return now() - begun
