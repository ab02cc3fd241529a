"""Build a tiny Qwen2-VL with random weights: the start of the shipped policy, and what the tests run on.

Everything real users have is there: model, byte-level tokenizer, chat template and processor files, so that it is
loaded through the same code as Qwen/Qwen2-VL-2B-Instruct. ``python -m rft_lightning.policy.tiny FOLDER`` writes one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Qwen2-VL's own template for one turn of text and images.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


def train_tokenizer(corpus: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE over `corpus` that encodes any text.

    Digits stay single, as in Qwen2; everything between digits may merge across words, so that the fixed parts of
    questions and answers cost few tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    digits_apart = pre_tokenizers.Split(Regex(r"\p{N}|[^\p{N}]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits_apart, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        model_max_length=32768,
        padding_side="left",
    )


def build_tiny(
    folder: str | Path,
    corpus: Iterable[str] = (),
    *,
    vocabulary: int = 1024,
    width: int = 128,
    layers: int = 3,
    vision_width: int = 96,
    vision_layers: int = 2,
    patch_size: int = 7,
    image_side: int = 42,
    rope_theta: float = 10.0,
    seed: int = 0,
) -> Path:
    """Write a randomly initialised Qwen2-VL to `folder`.

    Args:
        folder: where to write.
        corpus: texts whose frequent strings become tokens.
        vocabulary: most tokens.
        width: width of the decoder, a multiple of 32.
        layers: decoder blocks.
        vision_width: width of the vision tower, a multiple of 32.
        vision_layers: vision blocks.
        patch_size: side of a patch in pixels; four patches make one image token.
        image_side: pictures are resized to about this many pixels squared.
        rope_theta: base of the rotary frequencies. With Qwen2's 10^6 the parts of a short head that encode rows and
            columns would turn by less than 0.01 rad per image token, and places could hardly be told apart.
        seed: seed of the weights.

    Returns:
        the folder.
    """
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor, Qwen2VLProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    folder = Path(folder)
    tokenizer = train_tokenizer(corpus, vocabulary)
    ids = tokenizer.get_vocab()
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 32,
            "num_key_value_heads": max(1, width // 64),
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": vision_layers,
            "embed_dim": vision_width,
            "hidden_size": width,
            "num_heads": vision_width // 32,
            "mlp_ratio": 3,
            "patch_size": patch_size,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    _scale_to_fan_in(model)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    pixels = image_side * image_side
    size = {"shortest_edge": pixels // 2, "longest_edge": pixels}
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=patch_size, merge_size=2, temporal_patch_size=2),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size, patch_size=patch_size, merge_size=2, temporal_patch_size=2),
        chat_template=CHAT_TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def _scale_to_fan_in(model: torch.nn.Module) -> None:
    """Weights with a standard deviation of 1 / sqrt(inputs): the usual 0.02 is made for widths in the thousands."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "embed_tokens" not in name:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5)


def shapes_corpus(rows: int = 3000, seed: int = 0) -> list[str]:
    """Conversations about coloured shapes in every task's wording, with random boxes, to fit the tokenizer to."""
    from rft_lightning.frames import CoordinateFrame
    from rft_lightning.sample import ClassTarget, DetectionTarget, GroundingTarget, Target, as_boxes
    from rft_lightning.tasks import ClassificationTask, DetectionTask, GroundingTask, Task

    generator = torch.Generator().manual_seed(seed)
    frame, size, box = CoordinateFrame(), (1000, 1000), as_boxes([1, 2, 300, 400])

    def pick(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    def boxes() -> torch.Tensor:
        corners = torch.randint(0, 500, (int(torch.randint(0, 4, (1,), generator=generator)), 2), generator=generator)
        return torch.cat([corners, corners + 300], 1)

    # The words of the chat template, which stand around every question.
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * rows
    kinds, colours = ("circle", "square", "triangle", "star"), ("red", "green", "blue", "yellow")
    for _ in range(rows):
        name = f"{pick(colours)} {pick(kinds)}"
        pairs: list[tuple[Task, Target]] = [
            (DetectionTask(), DetectionTarget(boxes(), category=pick(kinds), image_size=size)),
            (ClassificationTask(), ClassTarget(name)),
            (GroundingTask(), GroundingTarget(box, expression=f"the {name}", image_size=size)),
        ]
        for task, target in pairs:
            texts.append(task.question(target, frame))
            texts.append(f"<think>{task.thought(target)}</think> {task.solution(target, frame)}")
    return texts


def main() -> None:
    """Write the untrained tiny policy to the folder named on the command line."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m rft_lightning.policy.tiny FOLDER")
    print(build_tiny(sys.argv[1], shapes_corpus()))


if __name__ == "__main__":
    main()
