"""The table of docs/scaling.md: memory per device of the published models, tuned in each way, on 1 to 8 GPUs.

``python -m rft_lightning.report.memory_table`` prints it. Nothing is downloaded: the models' sizes stand here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rft_lightning.memory import PolicySizes
from rft_lightning.memory_setup import DDP, FSDP2, Setup
from rft_lightning.report.estimate import GIB

# As in their config.json: width, width of the feed-forward layers, layers, query heads, key heads, vocabulary, and
# whether the output head is the embedding.
PUBLISHED = {
    "Qwen2-VL-2B": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2-VL-7B": (3584, 18944, 28, 28, 4, 152064, False),
}
# The published runs' group sizes; both with prompts of 512 image tokens, 256 new tokens, 2 prompts a rollout and one
# a micro-batch, which `Setup` starts from.
GROUP_SIZES = {"Qwen2-VL-2B": 8, "Qwen2-VL-7B": 4}
LORA = {"r": 16, "lora_alpha": 32}
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"lora": LORA, "dtype": "bfloat16"},
    "QLoRA": {"lora": LORA, "quantize": "nf4", "dtype": "bfloat16"},
}
SHARDED = (2, 4, 8)
HEADER = (
    "| policy | tuned | checkpointing | 1 GPU | DDP, each GPU | fsdp2, 2 | 4 | 8 |",
    "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
)


def published_config(name: str) -> Any:
    """The configuration of a published model: ``Qwen2-VL-2B`` or ``Qwen2-VL-7B``."""
    from transformers import Qwen2VLConfig

    width, feed_forward, layers, heads, key_heads, vocabulary, tied = PUBLISHED[name]
    return Qwen2VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": feed_forward,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": tied,
        },
        vision_config={
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": width,
            "num_heads": 16,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        tie_word_embeddings=tied,
    )


def row(name: str, tuning: str, *, gradient_checkpointing: bool) -> str:
    """A line of the table, in GiB: the most that a device needs at once."""
    settings = {**TUNINGS[tuning], "gradient_checkpointing": gradient_checkpointing}
    setup = Setup(mixed=True, group_size=GROUP_SIZES[name], **settings)
    sizes = PolicySizes(published_config(name), setup)
    totals = [sizes.memory().total, sizes.memory(strategy=DDP, processes=2).total]
    cells = [f"{total / GIB:.1f}" for total in totals]
    for processes in SHARDED:
        refused = setup.quantize is not None
        shown = "" if refused else f"{sizes.memory(strategy=FSDP2, processes=processes).total / GIB:.1f}"
        cells.append(shown or "-")
    return f"| {name} | {tuning} | {'yes' if gradient_checkpointing else 'no'} | {' | '.join(cells)} |"


def memory_table() -> Iterable[str]:
    """The lines of the table, in Markdown."""
    yield from HEADER
    for name in PUBLISHED:
        for tuning in TUNINGS:
            for gradient_checkpointing in (False, True):
                yield row(name, tuning, gradient_checkpointing=gradient_checkpointing)


if __name__ == "__main__":
    for line in memory_table():
        print(line)
