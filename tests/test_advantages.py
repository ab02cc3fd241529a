import numpy as np
import pytest
import torch

from rft_lightning.advantages import group_advantages, total_rewards


def test_group_advantages_are_the_papers_z_scores():
    rewards = torch.tensor([1.0, 2.0, 4.0, 0.0, 0.0, 1.0])
    expected = []
    for group in ([1.0, 2.0, 4.0], [0.0, 0.0, 1.0]):
        expected += [(r - np.mean(group)) / (np.std(group, ddof=1) + 1e-4) for r in group]
    torch.testing.assert_close(group_advantages(rewards, 3), torch.tensor(expected, dtype=torch.float32))


def test_a_group_without_spread_teaches_nothing():
    assert group_advantages(torch.full((4,), 0.7), 4).abs().max() == 0


def test_advantages_of_a_group_sum_to_zero():
    torch.manual_seed(0)
    for scale in ("group", "batch", "none"):
        advantages = group_advantages(torch.rand(24), 8, scale=scale).view(3, 8)
        torch.testing.assert_close(advantages.sum(1), torch.zeros(3), atol=1e-5, rtol=0)


def test_scales_match_their_definitions():
    rewards = torch.tensor([0.0, 1.0, 0.0, 3.0])
    centred = torch.tensor([-0.5, 0.5, -1.5, 1.5])
    torch.testing.assert_close(group_advantages(rewards, 2, scale="none"), centred)
    torch.testing.assert_close(group_advantages(rewards, 2, scale="batch"), centred / (rewards.std() + 1e-4))


def test_several_rewards_are_weighted_summed_and_nan_is_skipped():
    rewards = torch.tensor([[1.0, float("nan")], [0.5, 2.0], [float("nan"), float("nan")]])
    total = total_rewards(rewards, [2.0, 0.25])
    assert total[:2].tolist() == [2.0, 1.5]
    assert total[2].isnan()


def test_a_completion_without_rewards_stays_out_of_its_group():
    rewards = torch.tensor([1.0, 3.0, float("nan"), 2.0])
    with_gap = group_advantages(rewards, 4)
    without = group_advantages(torch.tensor([1.0, 3.0, 2.0]), 3)
    assert with_gap[2] == 0
    torch.testing.assert_close(with_gap[[0, 1, 3]], without)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"group_size": 1}, "group_size >= 2"),
        ({"group_size": 3}, "multiple of group_size=3"),
        ({"group_size": 2, "scale": "grop"}, "scale"),
        ({"group_size": 2, "baseline": "x"}, "baseline"),
    ],
)
def test_errors_say_what_was_expected(arguments, words):
    with pytest.raises(ValueError, match=words):
        group_advantages(torch.rand(4), **arguments)
