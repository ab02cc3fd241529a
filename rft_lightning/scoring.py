"""Rollouts -> rewards: every completion read and rewarded by the task of its sample, and what is logged of it.

Shape legend: B prompts, G completions per prompt, N = B * G completions, K rewards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from rft_lightning.advantages import informative_groups, total_rewards
from rft_lightning.answers import Problem
from rft_lightning.errors import ConfigConflictError
from rft_lightning.sample import Rollouts


@dataclass
class Scores:
    """Rewards of N completions.

    Attributes:
        names: K reward names, the union over the tasks of the batch.
        rewards: [N, K] unweighted; NaN where a reward does not apply.
        weights: [N, K] of each sample's task; 0 where it has no such reward.
        parse_rate: share of completions that could be read as an answer of their kind.
        problems: kind of problem -> share of completions that have one of it; kinds that occur. Problems that a task of
            the user's own states in bare words have no kind.
        failures: reward name -> completions on which it failed; rewards that failed.
    """

    names: list[str]
    rewards: Tensor
    weights: Tensor
    parse_rate: float
    problems: dict[str, float]
    failures: dict[str, int]

    @property
    def total(self) -> Tensor:
        """[N] weighted sums; NaN where no reward applies."""
        return total_rewards(self.rewards, self.weights)

    def to(self, device: torch.device | str) -> Scores:
        """The same scores with their tensors on `device`."""
        return replace(self, rewards=self.rewards.to(device), weights=self.weights.to(device))

    def take(self, rows: Tensor) -> Scores:
        """The scores of some of the completions; rates and counts stay those of all that were scored."""
        return replace(self, rewards=self.rewards[rows], weights=self.weights[rows])


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Scores of several batches behind one another, with the rewards that any of them has."""
    if len(parts) == 1:
        return parts[0]
    names = list(dict.fromkeys(name for part in parts for name in part.names))
    sizes = [len(part.rewards) for part in parts]
    rewards = parts[0].rewards.new_full((sum(sizes), len(names)), torch.nan)
    weights = torch.zeros_like(rewards)
    for part, start in zip(parts, accumulate([0, *sizes]), strict=False):
        columns = [names.index(name) for name in part.names]
        rewards[start : start + len(part.rewards), columns] = part.rewards.to(rewards)
        weights[start : start + len(part.weights), columns] = part.weights.to(weights)

    def mean(values: Iterable[float]) -> float:
        return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)

    kinds = sorted({kind for part in parts for kind in part.problems})
    return Scores(
        names=names,
        rewards=rewards,
        weights=weights,
        parse_rate=mean(part.parse_rate for part in parts),
        problems={kind: mean(part.problems.get(kind, 0.0) for part in parts) for kind in kinds},
        failures=dict(sum((Counter(part.failures) for part in parts), Counter())),
    )


def score_rollouts(rollouts: Rollouts, *, step: int, token_limit: int | None) -> Scores:
    """Read and reward every completion.

    Args:
        rollouts: B groups of G completions.
        step: optimiser steps so far.
        token_limit: most tokens that a completion could have; None where it is not known.

    Returns:
        the scores, on the device of the completions.

    Raises:
        ConfigConflictError: a sample has no target.
        RFTError: see :meth:`rft_lightning.tasks.base.Task.score`.
    """
    prompts = rollouts.prompts
    names = list(dict.fromkeys(name for sample in prompts.samples for name in sample.task.rewards))
    # One transfer for all completions: reading them one by one would wait for the device each time.
    facts_BG2 = torch.stack([rollouts.completion_mask.sum(-1), rollouts.truncated.long()], -1).tolist()
    rewards_NK: list[list[float]] = []
    weights_NK: list[list[float]] = []
    parsed = 0
    problems: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    for sample, texts, facts_G2 in zip(prompts.samples, rollouts.texts, facts_BG2, strict=True):
        if sample.target is None:
            raise ConfigConflictError(
                f"Sample {sample.id!r} has no target, so it cannot be rewarded; train on labelled samples."
            )
        task = sample.task
        answers = [task.read(text, prompts.frame, sample.image_size) for text in texts]
        for answer, (length, truncated) in zip(answers, facts_G2, strict=True):
            answer.num_tokens, answer.token_limit, answer.truncated = length, token_limit, bool(truncated)
        task.prepare(answers, sample.target)
        for answer in answers:
            values = task.score(answer, sample.target, step=step, sample_id=sample.id, failures=failures)
            by_name = dict(zip(task.rewards, values.tolist(), strict=True))
            rewards_NK.append([by_name.get(name, torch.nan) for name in names])
            weights_NK.append([task.reward_weights.get(name, 0.0) for name in names])
            parsed += bool(answer.parsed)
            problems.update({problem.kind for problem in answer.problems if isinstance(problem, Problem)})
    count = len(rewards_NK)
    device = rollouts.completion_ids.device
    return Scores(
        names=names,
        rewards=torch.tensor(rewards_NK, device=device),
        weights=torch.tensor(weights_NK, device=device),
        parse_rate=parsed / count,
        problems={kind: number / count for kind, number in sorted(problems.items())},
        failures=dict(failures),
    )


def statistics(scores: Scores, group_size: int) -> dict[str, float]:
    """What is logged of a rollout batch, under TRL's names where TRL has the number.

    - ``reward``: mean over completions of the weighted sum of rewards; ``reward_std``: its unbiased standard deviation
      over the batch; ``reward_group_std``: the mean over groups of that within a group; ``frac_reward_zero_std``: share
      of groups whose completions are rewarded alike.
    - ``rewards/<name>/mean`` and ``rewards/<name>/std``: one reward, unweighted, over the batch.
    - ``parse_rate``, and ``parse_problems/<kind>`` for the kinds that occur: shares of completions.
    - ``rewards/<name>/failed``: number of completions on which a reward failed, if any.

    What a reward does not apply to is left out; NaN where nothing remains.
    """
    rewards_NK, weights_NK = scores.rewards.cpu(), scores.weights.cpu()
    total_N = scores.total.cpu()
    alike_B = ~informative_groups(rewards_NK, group_size, weights=weights_NK)
    values: dict[str, Tensor | float] = {
        "reward": total_N.nanmean(),
        "reward_std": _std(total_N),
        "reward_group_std": _std(total_N.view(-1, group_size)).nanmean(),
        "frac_reward_zero_std": alike_B.float().mean(),
        "parse_rate": scores.parse_rate,
    }
    for name, rewards_N in zip(scores.names, rewards_NK.T, strict=True):
        values[f"rewards/{name}/mean"] = rewards_N.nanmean()
        values[f"rewards/{name}/std"] = _std(rewards_N)
    values |= {f"parse_problems/{kind}": share for kind, share in scores.problems.items()}
    values |= {f"rewards/{name}/failed": number for name, number in scores.failures.items()}
    return {name: float(value) for name, value in values.items()}


def _std(values: Tensor) -> Tensor:
    """Unbiased standard deviation over the last dimension without NaN entries; NaN where fewer than two remain."""
    count = (~values.isnan()).sum(-1)
    squares = (values - values.nanmean(-1, keepdim=True)).square().nansum(-1)
    return (squares / (count - 1)).sqrt().masked_fill(count < 2, torch.nan)
