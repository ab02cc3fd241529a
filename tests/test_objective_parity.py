"""Losses, gradients, statistics, corrections and advantages against TRL 1.16's own code."""

import inspect
import textwrap
from collections import defaultdict
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from rft_lightning.advantages import group_advantages
from rft_lightning.control import AdaptiveEntropy
from rft_lightning.objective_options import LOSS_TYPES
from rft_lightning.objectives import GRPOObjective


@cache
def trl_module():
    pytest.importorskip("trl")
    from trl.trainer import grpo_trainer

    return grpo_trainer


def trl_lines(module, function, first, last):
    """TRL's code from the line of `first` up to that of `last`: of methods that generate before they compute."""
    source = inspect.getsource(function)
    start = source.rindex("\n", 0, source.index(first)) + 1
    stop = source.rindex("\n", 0, source.index(last, start)) + 1
    code = compile(textwrap.dedent(source[start:stop]), module.__name__, "exec")

    def run(**variables):
        names = {**vars(module), **variables}
        exec(code, names)
        return names

    return run


# With the last two, tokens lie on the threshold of top_entropy_quantile but for rounding.
SEEDS = (0, 1, 2, 3, 152, 178)


class Batch:
    """Random tensors of N completions; some have no token, and the sampler lacks some log-probs."""

    def __init__(self, seed, completions=None, length=6, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        completions = completions or (2, 4, 8, 16)[seed % 4]

        def draw(low, high):
            return (torch.rand(completions, length, generator=generator) * (high - low) + low).to(dtype)

        self.logp, self.old, self.ref = (draw(-2, 0) for _ in range(3))
        self.entropy = draw(0, 3)
        self.sampler = (self.old + draw(-0.3, 0.3)).masked_fill(draw(0, 1) < 0.05, torch.nan)
        lengths = torch.randint(0, length + 1, (completions,), generator=generator)
        lengths[0] = length
        self.mask = torch.arange(length)[None] < lengths[:, None]
        self.advantages = torch.randn(completions, generator=generator).to(dtype)
        self.advantages[-1] = 0
        self.logp.requires_grad_()
        self.entropy.requires_grad_()

    def rows(self, start, stop):
        """A micro-batch, in the same graph."""
        part = object.__new__(Batch)
        part.__dict__ = {name: tensor[start:stop] for name, tensor in vars(self).items()}
        return part


class Metrics(dict):
    def __init__(self):
        super().__init__(train=defaultdict(list))

    def last(self):
        return {name: values[-1] for name, values in self["train"].items()}


class FakeTrainer:
    """What TRL's loss reads of its trainer, set as the objective is."""

    def __init__(self, objective, batch, *, processes=1, accumulation=1, steps_per_generation=1, adaptive=None):
        trainer = trl_module().GRPOTrainer
        self.get_high_entropy_mask = trainer.get_high_entropy_mask.__get__(self)
        self.get_off_policy_mask, self.get_gamma_weights = trainer.get_off_policy_mask, trainer.get_gamma_weights
        self.accelerator = SimpleNamespace(
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            pad_across_processes=lambda x, dim, pad_index: x,
            num_processes=processes,
            sync_gradients=True,
        )
        self.batch, self._metrics = batch, Metrics()
        self.model, self.aux_loss_enabled = SimpleNamespace(training=True), False
        self.current_gradient_accumulation_steps = accumulation
        self.beta, self.loss_type = objective.beta, objective.loss_type
        self.epsilon_low, self.epsilon_high = objective.epsilon, objective.epsilon_high
        self.top_entropy_quantile = objective.top_entropy_quantile
        self.off_policy_mask_threshold = objective.off_policy_mask_threshold
        self.importance_sampling_level = objective.importance_sampling_level
        self.max_completion_length = objective.max_completion_length or batch.logp.shape[1]
        self.use_vllm = self.vllm_importance_sampling_correction = objective.sampler_correction is not None
        self.vllm_importance_sampling_mode = objective.sampler_correction
        self.vllm_importance_sampling_clip_max = objective.sampler_correction_max
        self.vllm_importance_sampling_clip_min = objective.sampler_correction_min
        self.entropy_coef, self.use_adaptive_entropy = objective.entropy_coef, adaptive is not None
        self._entropy_bonus_enabled = self.entropy_coef != 0 or self.use_adaptive_entropy
        self._last_world_entropy, self._entropy_window_stats = float("inf"), None
        self.args = SimpleNamespace(
            delta=objective.delta,
            use_bias_correction_kl=objective.use_bias_correction_kl,
            steps_per_generation=steps_per_generation,
            sapo_temperature_pos=objective.sapo_temperature_pos,
            sapo_temperature_neg=objective.sapo_temperature_neg,
            vespo_k_pos=objective.vespo_k_pos,
            vespo_lambda_pos=objective.vespo_lambda_pos,
            vespo_k_neg=objective.vespo_k_neg,
            vespo_lambda_neg=objective.vespo_lambda_neg,
        )
        if adaptive is not None:
            self.args.entropy_target, self.args.entropy_coef_delta = adaptive.target, adaptive.delta
            self.args.entropy_coef_min, self.args.entropy_coef_max = adaptive.minimum, adaptive.maximum

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self.batch.logp, self.batch.entropy, None

    def sampler_ratio(self, old):
        """TRL computes it, and its statistics, where it generates."""
        module, variables = trl_module(), {"self": self, "old_per_token_logps": old, "tool_mask": None, "mode": "train"}
        variables |= {"sampling_per_token_logps": self.batch.sampler, "completion_mask": self.batch.mask.long()}
        function = module.GRPOTrainer._generate_and_score_completions
        guard = "if self.use_vllm and self.vllm_importance_sampling_correction:\n"
        ratio = trl_lines(
            module, function, guard + " " * 16 + "mask = ", "# Compute the per-token log probabilities for"
        )
        variables = ratio(**variables)
        trl_lines(module, function, guard + " " * 12 + "delta = ", "output = {")(**variables, device="cpu")
        return variables["vllm_importance_sampling_ratio"]

    def loss(self, *, with_old=True, with_sampler=False, items=None):
        batch = self.batch
        ids = torch.zeros_like(batch.mask, dtype=torch.long)
        inputs = {name: ids for name in ("prompt_ids", "prompt_mask", "completion_ids")}
        inputs |= {"completion_mask": batch.mask.long(), "advantages": batch.advantages}
        inputs |= {"ref_per_token_logps": batch.ref}
        inputs["num_items_in_batch"] = batch.mask.sum() if items is None else items
        if with_old:
            inputs["old_per_token_logps"] = batch.old
        if with_sampler:
            inputs["sampling_per_token_logps"] = batch.sampler
        if self.use_vllm:
            inputs["importance_sampling_ratio"] = self.sampler_ratio(batch.old if with_old else batch.logp.detach())
        return trl_module().GRPOTrainer._compute_loss(self, None, inputs)


def ours(objective, batch, *, with_old=True, with_sampler=False, **kwargs):
    return objective(
        batch.logp,
        batch.old if with_old else None,
        batch.ref,
        batch.advantages,
        batch.mask,
        entropy=batch.entropy,
        sampler_logp=batch.sampler if with_sampler else None,
        **kwargs,
    )


def gradients(loss, batch):
    return torch.autograd.grad(loss, (batch.logp, batch.entropy), allow_unused=True, materialize_grads=True)


def assert_relative(actual, expected, tolerance=1e-5):
    """Relative to the largest entry: sums of terms of either sign may cancel."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 0.1 * scale)


EVERYTHING = {
    "epsilon_high": 0.28,
    "delta": 1.5,
    "use_bias_correction_kl": True,
    "top_entropy_quantile": 0.6,
    "entropy_coef": 0.02,
    "off_policy_mask_threshold": 0.05,
    "sampler_correction": "token_truncate",
}
OPTIONS = {
    "defaults": {},
    "no_kl": {"beta": 0.0},
    "clip_higher": {"epsilon": 0.1, "epsilon_high": 0.28},
    "delta": {"delta": 1.5},
    "delta_below_the_clip": {"delta": 1.1},
    "sequence": {"importance_sampling_level": "sequence", "epsilon": 3e-2, "epsilon_high": 4e-2},
    "bias_correction": {"use_bias_correction_kl": True},
    "bias_correction_sequence": {"use_bias_correction_kl": True, "importance_sampling_level": "sequence"},
    "top_entropy": {"top_entropy_quantile": 0.2},
    "top_entropy_one_token": {"top_entropy_quantile": 0.0},
    "entropy_bonus": {"entropy_coef": 0.02},
    "entropy_bonus_top": {"entropy_coef": 0.02, "top_entropy_quantile": 0.3},
    "off_policy_mask": {"off_policy_mask_threshold": 0.02},
    "off_policy_mask_sequence": {"off_policy_mask_threshold": 0.02, "importance_sampling_level": "sequence"},
    "token_truncate": {"sampler_correction": "token_truncate", "sampler_correction_max": 1.1},
    "token_truncate_below": {
        "sampler_correction": "token_truncate",
        "sampler_correction_max": None,
        "sampler_correction_min": 0.9,
    },
    "token_mask": {"sampler_correction": "token_mask", "sampler_correction_max": 1.1, "sampler_correction_min": 0.9},
    "sequence_truncate": {"sampler_correction": "sequence_truncate", "sampler_correction_max": 1.1},
    "sequence_mask": {"sampler_correction": "sequence_mask", "sampler_correction_max": 1.1},
    "sapo_temperatures": {"sapo_temperature_pos": 0.7, "sapo_temperature_neg": 1.4},
    "vespo_shapes": {"vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5, "vespo_k_neg": 2.0, "vespo_lambda_neg": 0.1},
    "everything": EVERYTHING,
    "everything_sequence": {**EVERYTHING, "importance_sampling_level": "sequence"},
}


def objective_of(loss_type, options):
    if loss_type == "vespo" and options.get("sampler_correction", "").startswith("sequence"):
        pytest.skip("refused, as by TRL")
    return GRPOObjective(**{"loss_type": loss_type, "epsilon_high": 1.3 if loss_type == "cispo" else None, **options})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_gradient_and_statistics_equal_trl(loss_type, options):
    objective = objective_of(loss_type, options)
    for seed in SEEDS:
        for with_old in (True, False):
            with_sampler = objective.sampler_correction is not None or seed % 2 == 1
            batch = Batch(seed)
            trl = FakeTrainer(objective, batch)
            expected = trl.loss(with_old=with_old, with_sampler=with_sampler)
            loss, stats = ours(objective, batch, with_old=with_old, with_sampler=with_sampler)
            assert_relative(loss, expected)
            for actual, wanted in zip(gradients(loss, batch), gradients(expected, batch), strict=True):
                assert_relative(actual, wanted)
            for name, value in trl._metrics.last().items():
                if name != "entropy_coef":  # the controller's, not a measurement
                    assert stats[name].item() == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_parity_has_something_to_compare(loss_type):
    """Clipping, empty completions, dropped tokens and gaps of the sampler do occur in the batches above."""
    batch = Batch(2)
    objective = objective_of(loss_type, {"beta": 0.0})
    _, stats = ours(objective, batch)
    _, on_policy = ours(objective, batch, with_old=False)
    assert not batch.mask.any(1).all()
    assert batch.sampler[batch.mask].isnan().any()
    assert any(value > 0 and value != on_policy[name] for name, value in stats.items()) or loss_type == "sapo"


@pytest.mark.parametrize("options", ["defaults", "sequence", "bias_correction", "entropy_bonus", "sequence_mask"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_half_precision_equals_trl_within_its_rounding(loss_type, options):
    """TRL computes in bfloat16, we in float32 from the same bfloat16 inputs.

    bfloat16 keeps 8 bits: each operation is off by up to 2^-9, 0.2 %. A token's loss is about five operations, and a
    log-ratio below 1 adds its own rounding to the ratio: 1.5 % of the largest term bounds both. vespo's weight is the
    exp of a sum of terms of up to 10, each rounded to 0.2 % of itself: 8 %. Ratios stay away from the bounds of the
    clip, where rounding would switch gradients on and off.
    """
    tolerance = 0.08 if loss_type == "vespo" else 0.015
    objective = objective_of(loss_type, OPTIONS[options])
    for seed in SEEDS:
        batch = Batch(seed, dtype=torch.bfloat16)
        with torch.no_grad():
            choice = torch.randint(0, 5, batch.old.shape, generator=torch.Generator().manual_seed(seed))
            steps = torch.tensor([-0.5, -0.1, 0.0, 0.1, 0.5])[choice]
            batch.logp.copy_(batch.old + steps)
        expected = FakeTrainer(objective, batch).loss(with_sampler=True)
        loss, _ = ours(objective, batch, with_sampler=True)
        assert loss.dtype == torch.float32
        terms = torch.autograd.grad(loss, batch.logp, retain_graph=True)[0].float().abs().sum()
        torch.testing.assert_close(loss, expected.float(), rtol=tolerance, atol=tolerance * terms.item())
        for actual, wanted in zip(gradients(loss, batch), gradients(expected, batch), strict=True):
            scale = wanted.float().abs().max().item()
            torch.testing.assert_close(actual.float(), wanted.float(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("steps_per_generation", [2, 4])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_divisor_is_what_trl_divides_an_optimiser_step_by(loss_type, steps_per_generation):
    """Two processes of two accumulated micro-batches; TRL's gradients are averaged over processes.

    With steps_per_generation 4 the rollouts last for two such steps and TRL takes half of their tokens for each, so it
    is told of twice as many here. bnpo is TRL's mean over each micro-batch: ours is dapo's, see the class.
    """
    objective = objective_of(loss_type, {"entropy_coef": 0.0})
    batch = Batch(3, completions=16)
    parts = [batch.rows(start, start + 4) for start in range(0, 16, 4)]
    share = 2 / steps_per_generation
    settings = {"processes": 2, "accumulation": 2, "steps_per_generation": steps_per_generation}
    items = batch.mask.sum() / share
    oracle = objective_of("dapo", {}) if loss_type == "bnpo" else objective
    expected = sum(FakeTrainer(oracle, part, **settings).loss(items=items) for part in parts) / 2
    objective.max_completion_length = batch.logp.shape[1]
    divisor = objective.divisor(len(batch.mask), batch.mask.sum())
    loss = sum(ours(objective, part, normalizer=divisor)[0] for part in parts)
    assert_relative(loss, expected)
    assert_relative(gradients(loss, batch)[0], gradients(expected, batch)[0])


def test_adaptive_entropy_follows_trl_step_by_step():
    settings = {"target": 1.5, "delta": 0.03, "minimum": 0.01, "maximum": 0.08}
    objective, ours_adapts = GRPOObjective(entropy_coef=0.02, top_entropy_quantile=0.7), AdaptiveEntropy(**settings)
    ours_adapts.start(objective.entropy_coef)
    trl = FakeTrainer(objective, Batch(0), adaptive=ours_adapts)
    applied = []
    for step, entropy in enumerate([1.0, 0.5, 0.4, 0.3, 2.0, 2.5, 2.5, 2.5, 2.5, 0.6, 0.5]):
        batch = Batch(step)
        with torch.no_grad():
            batch.entropy.mul_(entropy / 1.5)
        trl.batch = batch
        expected = trl.loss()
        loss, stats = ours(objective, batch, entropy_coef=ours_adapts.value)
        assert_relative(loss, expected)
        applied.append(ours_adapts.value)
        ours_adapts.update(stats["entropy_acting"], len(batch.mask))
        assert ours_adapts.coefficient == pytest.approx(trl.entropy_coef)
    assert applied[0] == 0.0
    assert {0.0, 0.08} < set(applied)  # it was off, at its limit and between


# Advantages


def trl_advantages(rewards, group_size, *, weights, scale="group", aggregation="sum_then_normalize"):
    module = trl_module()
    fake = SimpleNamespace(multi_objective_aggregation=aggregation, scale_rewards=scale, reward_weights=weights)
    fake.reward_funcs = [None] * rewards.shape[1]
    function = module.GRPOTrainer._generate_and_score_completions
    run = trl_lines(module, function, "unscorable_mask = torch", "# Slice to keep only the local part")
    return run(self=fake, rewards_per_func=rewards, num_generations=group_size, device="cpu")["advantages"]


def rloo_advantages(rewards, group_size, *, weights):
    pytest.importorskip("trl")
    from trl.trainer import rloo_trainer as module

    fake = SimpleNamespace(reward_clip_range=None, beta=0.0, normalize_advantages=False, reward_weights=weights)
    function = module.RLOOTrainer._generate_and_score_completions
    run = trl_lines(module, function, "unscorable_mask = torch", "# Slice to keep only the local part")
    return run(self=fake, rewards_per_func=rewards, num_generations=group_size, device="cpu")["advantages"]


def random_rewards(seed, group_size):
    """Rewards with gaps, a group alike, one that nobody can score, one with a single scorable completion."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 4, (6, group_size, 3), generator=generator) / 3
    rewards[torch.rand(rewards.shape, generator=generator) < 0.2] = torch.nan
    rewards[0], rewards[1], rewards[2, 1:] = 0.7, torch.nan, torch.nan
    rewards[3, :, 0] = torch.nan
    rewards[3, 0, 0] = 1.0  # one completion alone has this reward
    return rewards.flatten(0, 1).double()  # in float32 TRL's means of equal rewards round, and are divided by 1e-4


@pytest.mark.parametrize("group_size", [2, 3, 8, 16])
@pytest.mark.parametrize(
    "options",
    [{"scale": "group"}, {"scale": "batch"}, {"scale": "none"}, {"aggregation": "normalize_then_sum"}],
    ids=lambda options: "-".join(options.values()),
)
def test_advantages_equal_trl(group_size, options):
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    for seed in range(5):
        rewards = random_rewards(seed, group_size)
        expected = trl_advantages(rewards, group_size, weights=weights, **options)
        advantages = group_advantages(rewards, group_size, weights=weights, **options)
        # Not closer: TRL takes n / (n - 1) in float32.
        torch.testing.assert_close(advantages, expected, rtol=1e-6, atol=1e-6)
        assert advantages.std() > 0.1


@pytest.mark.parametrize("group_size", [2, 3, 8, 16])
def test_leave_one_out_equals_trls_rloo(group_size):
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    for seed in range(5):
        rewards = random_rewards(seed, group_size)
        expected = rloo_advantages(rewards, group_size, weights=weights)
        advantages = group_advantages(rewards, group_size, weights=weights, scale="none", baseline="leave_one_out")
        torch.testing.assert_close(advantages, expected, rtol=1e-9, atol=1e-9)
        assert advantages.std() > 0.1
