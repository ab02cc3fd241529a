"""Group-relative advantages: definitions and properties. Parity with TRL: test_objective_parity.py."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rft_lightning.advantages import BASELINES, SCALES, group_advantages, informative_groups, total_rewards
from rft_lightning.errors import NonFiniteError

NAN = float("nan")


def test_group_advantages_are_the_papers_z_scores():
    rewards = torch.tensor([1.0, 2.0, 4.0, 0.0, 0.0, 1.0])
    expected = []
    for group in ([1.0, 2.0, 4.0], [0.0, 0.0, 1.0]):
        expected += [(r - np.mean(group)) / (np.std(group, ddof=1) + 1e-4) for r in group]
    torch.testing.assert_close(group_advantages(rewards, 3), torch.tensor(expected, dtype=torch.float32))


@given(
    value=st.floats(-1e3, 1e3, width=32),
    group_size=st.integers(2, 16),
    baseline=st.sampled_from(["group", "leave_one_out"]),
    scale=st.sampled_from(SCALES),
)
@settings(max_examples=60, deadline=None)
def test_a_group_without_spread_teaches_exactly_nothing(value, group_size, baseline, scale):
    """Even where the mean of equal numbers rounds."""
    rewards = torch.cat([torch.full((group_size,), value), torch.arange(float(group_size))])
    advantages = group_advantages(rewards, group_size, scale=scale, baseline=baseline)
    assert advantages[:group_size].abs().max() == 0
    assert advantages[group_size:].abs().max() > 0
    assert informative_groups(rewards, group_size).tolist() == [False, True]


def test_advantages_of_a_group_sum_to_zero():
    torch.manual_seed(0)
    for scale in SCALES:
        for baseline in ("group", "leave_one_out"):
            advantages = group_advantages(torch.rand(24), 8, scale=scale, baseline=baseline).view(3, 8)
            torch.testing.assert_close(advantages.sum(1), torch.zeros(3), atol=1e-5, rtol=0)
            assert advantages.std() > 0.1


def test_scales_match_their_definitions():
    rewards = torch.tensor([0.0, 1.0, 0.0, 3.0])
    centred = torch.tensor([-0.5, 0.5, -1.5, 1.5])
    torch.testing.assert_close(group_advantages(rewards, 2, scale="none"), centred)
    torch.testing.assert_close(group_advantages(rewards, 2, scale="batch"), centred / (rewards.std() + 1e-4))


def restated(totals, group_size, scale, baseline, eps=1e-4):
    """The definitions, one number at a time."""

    def mean(values):
        return sum(values) / len(values) if values else NAN

    def std(values):
        return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0

    advantages = []
    scored = [r for r in totals if not math.isnan(r)]
    for index, reward in enumerate(totals):
        start = index - index % group_size
        others = [r for j in range(start, start + group_size) if j != index and not math.isnan(r := totals[j])]
        group = [*others, reward]
        base = {"group": mean(group), "leave_one_out": mean(others), "batch": mean(scored)}[baseline]
        divisor = {"group": std(group) + eps, "batch": std(scored) + eps, "none": 1.0}[scale]
        advantage = (reward - base) / divisor
        advantages.append(0.0 if math.isnan(advantage) else advantage)
    return advantages


@given(
    st.lists(st.one_of(st.just(NAN), st.sampled_from([0.0, 0.25, 1.0, 2.0])), min_size=12, max_size=12),
    st.sampled_from([2, 3, 4, 6]),
    st.sampled_from(SCALES),
    st.sampled_from(BASELINES),
)
@settings(max_examples=200, deadline=None)
def test_advantages_equal_their_definitions(rewards, group_size, scale, baseline):
    totals = torch.tensor(rewards, dtype=torch.float64)
    advantages = group_advantages(totals, group_size, scale=scale, baseline=baseline)
    expected = torch.tensor(restated(rewards, group_size, scale, baseline), dtype=torch.float64)
    # A distance from the batch beside a group alike is multiplied by 1 / eps.
    torch.testing.assert_close(advantages, expected, rtol=1e-9, atol=1e-9)
    assert advantages.isfinite().all()


@given(
    st.lists(st.one_of(st.just(NAN), st.sampled_from([0.0, 0.5, 1.0])), min_size=24, max_size=24),
    st.sampled_from([2, 3, 4]),
)
@settings(max_examples=100, deadline=None)
def test_informative_groups_are_those_with_an_advantage(rewards, group_size):
    rewards_NK = torch.tensor(rewards, dtype=torch.float64).view(12, 2)
    informative = informative_groups(rewards_NK, group_size)
    advantages = group_advantages(rewards_NK, group_size).view(-1, group_size)
    assert torch.equal(informative, advantages.abs().amax(1) > 1e-3)


def test_normalising_first_counts_rewards_that_cancel():
    """Two rewards of opposite order: their sum is the same for everyone, their z-scores still tell them apart."""
    rewards = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    separately = {"aggregation": "normalize_then_sum"}
    assert informative_groups(rewards, 2).tolist() == [False, False]
    assert informative_groups(rewards, 2, **separately).tolist() == [True, False]
    assert informative_groups(rewards, 2, weights=[0.0, 1.0], **separately).tolist() == [True, False]
    assert informative_groups(rewards, 2, weights=[0.0, 0.0], **separately).tolist() == [False, False]
    assert informative_groups(rewards, 2, weights=[1.0, 2.0]).tolist() == [True, False]


def test_a_group_with_one_scorable_completion_is_not_informative():
    rewards = torch.tensor([[1.0, 2.0], [NAN, NAN], [NAN, 1.0], [NAN, 0.0]])
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        assert informative_groups(rewards, 2, aggregation=aggregation).tolist() == [False, True]


def test_several_rewards_are_weighted_summed_and_nan_is_skipped():
    rewards = torch.tensor([[1.0, NAN], [0.5, 2.0], [NAN, NAN]])
    total = total_rewards(rewards, [2.0, 0.25])
    assert total[:2].tolist() == [2.0, 1.5]
    assert total[2].isnan()


def test_weights_may_differ_between_completions():
    """As in a mixture of tasks."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    weights = torch.tensor([[1.0, 0.5], [1.0, 0.5], [0.0, 1.0], [0.0, 1.0]])
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        advantages = group_advantages(rewards, 2, weights=weights, aggregation=aggregation)
        assert (advantages > 0).tolist() == [True, False, False, True]


def test_normalising_first_undoes_differences_of_size():
    """GDPO's point: a reward a hundred times larger does not drown the other."""
    torch.manual_seed(0)
    rewards = torch.rand(32, 2, dtype=torch.float64)
    scaled = rewards * torch.tensor([100.0, 1.0])
    options = {"aggregation": "normalize_then_sum", "eps": 0.0}
    expected = group_advantages(rewards, 8, **options)
    torch.testing.assert_close(group_advantages(scaled, 8, **options), expected)
    assert (group_advantages(scaled, 8, eps=0.0) - expected).abs().max() > 0.1
    torch.testing.assert_close(group_advantages(rewards, 8, scale="none", **options), expected)  # scale is not read


def test_a_completion_without_rewards_stays_out_of_its_group():
    rewards = torch.tensor([1.0, 3.0, NAN, 2.0])
    with_gap = group_advantages(rewards, 4)
    without = group_advantages(torch.tensor([1.0, 3.0, 2.0]), 3)
    assert with_gap[2] == 0
    torch.testing.assert_close(with_gap[[0, 1, 3]], without)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.float32, torch.float64])
def test_dtype_is_float32_at_least(dtype):
    advantages = group_advantages(torch.tensor([0, 1, 1, 1]).to(dtype), 4)
    assert advantages.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"group_size": 1}, "group_size >= 2"),
        ({"group_size": 3}, "multiple of group_size=3"),
        ({"group_size": 2, "scale": "grop"}, "scale"),
        ({"group_size": 2, "baseline": "x"}, "baseline"),
        ({"group_size": 2, "aggregation": "x"}, "aggregation"),
        ({"group_size": 2, "weights": [1.0, 2.0]}, r"one weight per reward, 1 in all.*\[2\]"),
        (
            {"group_size": 2, "aggregation": "normalize_then_sum", "baseline": "leave_one_out"},
            "own baseline, found baseline 'leave_one_out'",
        ),
    ],
)
def test_errors_say_what_was_expected(arguments, words):
    with pytest.raises(ValueError, match=words):
        group_advantages(torch.rand(4), **arguments)


def test_an_infinite_reward_is_refused():
    with pytest.raises(NonFiniteError, match="bound the reward"):
        group_advantages(torch.tensor([1.0, float("inf")]), 2)
