"""GRPOObjective against TRL's own loss, and against what follows from its definition."""

from types import SimpleNamespace

import pytest
import torch

from rft_lightning.advantages import group_advantages
from rft_lightning.objectives import GRPOObjective, k3


def batch(seed: int = 0, completions: int = 6, length: int = 5):
    generator = torch.Generator().manual_seed(seed)
    logp, old, ref = (-torch.rand(completions, length, generator=generator) * 2 for _ in range(3))
    lengths = torch.randint(1, length + 1, (completions,), generator=generator)
    mask = torch.arange(length)[None] < lengths[:, None]
    advantages = torch.randn(completions, generator=generator)
    return logp.requires_grad_(), old, ref, advantages, mask


def trl_loss(logp, old, ref, advantages, mask, *, beta, epsilon, epsilon_high):
    from trl import GRPOTrainer

    accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)

    class Metrics(dict):
        def __missing__(self, key):
            self[key] = value = Metrics() if key == "train" else []
            return value

    class Fake:
        top_entropy_quantile, off_policy_mask_threshold, importance_sampling_level = 1.0, None, "token"
        loss_type, use_vllm, aux_loss_enabled, _entropy_bonus_enabled = "grpo", False, False, False
        current_gradient_accumulation_steps, max_completion_length = 1, logp.shape[1]
        args = SimpleNamespace(use_bias_correction_kl=False, delta=None)
        model = SimpleNamespace(training=True)
        _metrics = Metrics()

        def __init__(self):
            self.beta, self.epsilon_low, self.epsilon_high = beta, epsilon, epsilon_high
            self.accelerator = accelerator

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            return logp, torch.zeros_like(logp), None

    ids = torch.zeros_like(logp, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": ref,
    }
    return GRPOTrainer._compute_loss(Fake(), None, inputs)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("on_policy", [True, False])
def test_loss_and_gradient_equal_trl(beta, on_policy):
    pytest.importorskip("trl")
    for seed in range(5):
        logp, old, ref, advantages, mask = batch(seed)
        old = None if on_policy else old
        expected = trl_loss(logp, old, ref, advantages, mask, beta=beta, epsilon=0.2, epsilon_high=0.28)
        (expected_gradient,) = torch.autograd.grad(expected, logp)
        loss, _ = GRPOObjective(beta=beta, epsilon=0.2, epsilon_high=0.28)(logp, old, ref, advantages, mask)
        (gradient,) = torch.autograd.grad(loss, logp)
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-7, rtol=0)


def test_on_policy_loss_is_beta_times_kl_sequence():
    """Advantages of a group sum to zero and the ratio is 1, so the policy-gradient part vanishes from the value."""
    torch.manual_seed(1)
    logp = (-torch.rand(8, 6)).requires_grad_()
    ref, mask = -torch.rand(8, 6), torch.rand(8, 6) > 0.3
    mask[:, 0] = True
    advantages = group_advantages(torch.rand(8), 4)
    loss, stats = GRPOObjective(beta=0.04)(logp, None, ref, advantages, mask)
    assert loss.item() == pytest.approx(0.04 * stats["kl_sequence"].item(), abs=1e-6)
    assert stats["kl_sequence"] > 0.01
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.abs().max() > 1e-3


def test_micro_batches_add_up_to_the_whole():
    logp, old, ref, advantages, mask = batch()
    objective = GRPOObjective()
    whole, _ = objective(logp, old, ref, advantages, mask)
    parts = [
        objective(logp[rows], old[rows], ref[rows], advantages[rows], mask[rows], normalizer=6)[0]
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_padding_may_hold_anything():
    logp, old, ref, advantages, mask = batch()
    clean = GRPOObjective()(logp, old, ref, advantages, mask)[0]
    dirty = torch.where(mask, logp, torch.tensor(float("nan")))
    assert torch.equal(GRPOObjective()(dirty, old, ref, advantages, mask)[0], clean)


def test_k3_is_zero_only_where_the_models_agree():
    a, b = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0])
    assert k3(a, b)[0] == 0
    assert k3(a, b)[1] > 0


def test_clip_statistics_count_clipped_tokens():
    logp = torch.log(torch.tensor([[1.5, 1.0, 0.5, 0.5]])).requires_grad_()
    old, mask = torch.zeros(1, 4), torch.ones(1, 4)
    _, stats = GRPOObjective(beta=0.0)(logp, old, None, torch.tensor([1.0]), mask)
    assert stats["clip_ratio/high_mean"] == 0.25
    _, stats = GRPOObjective(beta=0.0)(logp, old, None, torch.tensor([-1.0]), mask)
    assert stats["clip_ratio/low_mean"] == 0.5


def test_errors():
    logp, old, _, advantages, mask = batch()
    with pytest.raises(ValueError, match="reference model"):
        GRPOObjective(beta=0.04)(logp, old, None, advantages, mask)
    with pytest.raises(ValueError, match="loss_type"):
        GRPOObjective(loss_type="ppo")
    with pytest.raises(ValueError, match="beta >= 0"):
        GRPOObjective(beta=-1)
