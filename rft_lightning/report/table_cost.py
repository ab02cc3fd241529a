"""What the runs of a table cost, by arithmetic alone: nothing is measured, no model is loaded.

Each token that passes through a model of N parameters takes 2 N floating-point operations forward, and twice as many
backward; attention between tokens and the decoding's waiting for memory are not counted. With P tokens of a prompt (its
picture included) and completions of at most C tokens, the operations of one prompt are

- Visual-RFT, G completions that share the prompt: sampling, the reference model, the policy forward and backward are
  1 + 1 + 3 passes, 2 N (1 + 1 + 3) (P + G C);
- supervised fine-tuning: 2 N 3 (P + C);
- a question of an evaluation: 2 N (P + C).

Completions mostly end early, so that these are upper bounds in C; what a device really does of its peak in a second is
an assumption (the utilisation), which decides the GPU-hours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

# A100, bf16, without sparsity.
PEAK_FLOPS = 312e12
UTILISATION = 0.1


@dataclass(frozen=True)
class Cost:
    """Amounts of work.

    Attributes:
        steps: optimiser steps.
        prompts: of training, all processes together.
        completions: sampled in training.
        tokens: generated at most, in training and evaluation.
        questions: of evaluations.
        operations: floating-point operations, at most.
        unknown: evaluations of which it is not known before how many questions they have; they count nothing.
    """

    steps: int = 0
    prompts: int = 0
    completions: int = 0
    tokens: int = 0
    questions: int = 0
    operations: float = 0.0
    unknown: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def gpu_hours(self, peak_flops: float, utilisation: float) -> float:
        """Hours of one device that does this share of its peak (operations per second)."""
        return self.operations / (peak_flops * utilisation) / 3600

    def line(self, peak_flops: float, utilisation: float) -> str:
        """The amounts that are not zero, in one line."""
        hours = self.gpu_hours(peak_flops, utilisation)
        unknown = f"{self.unknown} evaluation{'' if self.unknown == 1 else 's'}"
        parts = [
            f"{self.steps:,} optimiser steps" if self.steps else "",
            f"{self.prompts:,} prompts" if self.prompts else "",
            f"{self.completions:,} completions" if self.completions else "",
            f"{self.questions:,} questions" if self.questions else "",
            f"at most {self.tokens:,} generated tokens" if self.tokens else "",
            f"{self.operations:.1e} FLOP" if self.operations else "",
            f"{hours:,.1f} GPU-hours" if hours >= 1 else f"{hours:.2g} GPU-hours" if self.operations else "",
            f"{unknown} with a number of questions not known before, not counted" if self.unknown else "",
        ]
        return ", ".join(part for part in parts if part) or "nothing"


def total(costs: Iterable[Cost]) -> Cost:
    """The sum."""
    return sum(costs, start=Cost())


def training_cost(
    *,
    steps: int,
    prompts_per_step: int,
    group_size: int | None,
    parameters: float,
    prompt_tokens: int,
    completion_tokens: int,
) -> Cost:
    """Of one training run; supervised fine-tuning where `group_size` is None."""
    prompts = steps * prompts_per_step
    if group_size is None:
        return Cost(steps, prompts, operations=2 * parameters * 3 * prompts * (prompt_tokens + completion_tokens))
    completions = prompts * group_size
    tokens = prompt_tokens + group_size * completion_tokens
    operations = 2 * parameters * (1 + 1 + 3) * prompts * tokens
    return Cost(steps, prompts, completions, completions * completion_tokens, operations=operations)


def evaluation_cost(
    *, questions: int | None, parameters: float | None, prompt_tokens: int, completion_tokens: int
) -> Cost:
    """Of one evaluation; a system of unknown size is counted without operations and tokens."""
    if questions is None:
        return Cost(unknown=1)
    if parameters is None:
        return Cost(questions=questions)
    operations = 2 * parameters * questions * (prompt_tokens + completion_tokens)
    return Cost(questions=questions, tokens=questions * completion_tokens, operations=operations)


__all__ = ["PEAK_FLOPS", "UTILISATION", "Cost", "evaluation_cost", "total", "training_cost"]
