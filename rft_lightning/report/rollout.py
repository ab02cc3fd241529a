"""Print groups of sampled answers with their rewards and advantages."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rft_lightning.errors import ConfigConflictError
from rft_lightning.sample import Rollouts
from rft_lightning.trainer import equip_trainer


def print_rollouts(
    model: Any,
    datamodule: Any,
    *,
    num_samples: int,
    split: str,
    group_size: int | None,
    temperature: float | None,
    ckpt_path: str | None = None,
    trainer: Any,
) -> None:
    """Sample and print groups on the trainer's device; see `RFTTrainer.rollout` for the other arguments.

    Raises:
        ConfigConflictError: the model has no rewards to show, or the split is unknown.
    """
    if not hasattr(model, "sample_and_score"):
        raise ConfigConflictError(f"rollout needs a GRPOModule, found {type(model).__name__}.")
    if split not in ("train", "val", "test"):
        raise ConfigConflictError(f"Expected split train, val or test, found {split!r}.")
    if num_samples < 1:
        raise ConfigConflictError(f"Expected num_samples >= 1, found {num_samples}.")
    datamodule.prepare_data()
    samples = datamodule.split(split)
    samples = [samples[i] for i in range(min(num_samples, len(samples)))]
    equip_trainer(trainer)
    model.trainer = trainer  # whose precision says in which dtype the weights are loaded
    model.load_for_sampling(ckpt_path)
    device = trainer.strategy.root_device
    batch = datamodule.encoder(samples).to(device)
    with trainer.precision_plugin.forward_context():
        rollouts, scores, advantages_N = model.to(device).sample_and_score(
            batch, group_size=group_size, temperature=temperature
        )
    console = Console()
    size = rollouts.completion_ids.shape[1]
    for number in range(len(samples)):
        rows = slice(number * size, (number + 1) * size)
        columns = [scores.names.index(name) for name in samples[number].task.rewards]
        rewards = scores.rewards[rows][:, columns].tolist()
        _print_group(console, rollouts, number, rewards, advantages_N[rows].tolist())


def _print_group(
    console: Console, rollouts: Rollouts, number: int, rewards: list[list[float]], advantages: list[float]
) -> None:
    sample = rollouts.prompts.samples[number]
    console.rule(Text(f"{sample.id} ({sample.image_size[0]}x{sample.image_size[1]} pixels)"))
    console.print(Text(f"Question: {sample.question}"))
    assert sample.target is not None  # it was rewarded
    console.print(Text(f"Solution: {sample.target.solution_text}"))
    table = Table("answer", *sample.task.rewards, "advantage")
    for text, row, advantage in zip(rollouts.texts[number], rewards, advantages, strict=True):
        table.add_row(Text(text), *(f"{value:.3f}" for value in row), f"{advantage:+.2f}")
    console.print(table)
