"""GRPOObjective: what follows from its definition. Parity with TRL: test_objective_parity.py."""

import pytest
import torch

from rft_lightning.advantages import group_advantages
from rft_lightning.kl import KL_ESTIMATORS, kl_estimate, sequence_kl
from rft_lightning.objective_options import LOSS_TYPES
from rft_lightning.objectives import GRPOObjective, entropy_threshold

NAN = float("nan")


def batch(seed=0, completions=6, length=5, dtype=torch.float32):
    """Arguments of the objective; the last completion has no token."""
    generator = torch.Generator().manual_seed(seed)
    logp, old, ref, sampler, entropy = (
        (-torch.rand(completions, length, generator=generator) * 2).to(dtype) for _ in range(5)
    )
    lengths = torch.randint(1, length + 1, (completions,), generator=generator)
    lengths[0], lengths[-1] = length, 0
    return {
        "logp": logp.requires_grad_(),
        "old_logp": old,
        "ref_logp": ref,
        "advantages": torch.randn(completions, generator=generator).to(dtype),
        "mask": torch.arange(length)[None] < lengths[:, None],
        "entropy": (-entropy).requires_grad_(),
        "sampler_logp": old + 0.2 * (sampler + 1),
    }


def rows(inputs, selected):
    return {name: tensor[selected] for name, tensor in inputs.items()}


def gradients(loss, inputs):
    wanted = (inputs["logp"], inputs["entropy"])
    return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)


def objective_of(loss_type, **options):
    if loss_type == "vespo" and options.get("sampler_correction", "").startswith("sequence"):
        pytest.skip("refused")
    options.setdefault("epsilon_high", 1.3 if loss_type == "cispo" else None)
    return GRPOObjective(loss_type=loss_type, **options)


# Options that together touch every path.
VARIANTS = {
    "defaults": {},
    "sequence": {"importance_sampling_level": "sequence", "use_bias_correction_kl": True, "kl_estimator": "k1"},
    "all": {
        "delta": 1.5,
        "kl_estimator": "k2",
        "entropy_coef": 0.02,
        "top_entropy_quantile": 0.5,
        "off_policy_mask_threshold": 0.05,
        "sampler_correction": "token_mask",
        "sampler_correction_min": 0.9,
        "sampler_correction_max": 1.1,
    },
    "sampler": {"sampler_correction": "token_truncate", "kl_placement": "reward"},
    "sampler_sequence": {"sampler_correction": "sequence_truncate", "sampler_correction_max": 1.1},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
every_loss = pytest.mark.parametrize("loss_type", LOSS_TYPES)


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


@every_variant
@every_loss
def test_micro_batches_add_up_to_the_whole(loss_type, options):
    inputs = batch(completions=8)
    objective = objective_of(loss_type, max_completion_length=9, **options)
    share, mask = objective.top_entropy_quantile, inputs["mask"]
    threshold = entropy_threshold(inputs["entropy"], mask, share)
    acting = (mask & (inputs["entropy"] >= threshold)).sum() if share < 1 else mask.sum()
    whole, whole_stats = objective(**inputs)
    loss, parts = 0, []
    for selected in (slice(0, 1), slice(1, 5), slice(5, 7), slice(7, 8)):  # the last has no token at all
        part = rows(inputs, selected)
        part_loss, stats = objective(
            **part,
            normalizer=objective.divisor(8, mask.sum()),
            token_count=acting,
            entropy_threshold=threshold if share < 1 else None,
        )
        loss = loss + part_loss
        parts.append((stats, len(part["mask"]), int(part["mask"].sum())))
    torch.testing.assert_close(loss, whole)
    for actual, expected in zip(gradients(loss, inputs), gradients(whole, inputs), strict=True):
        torch.testing.assert_close(actual, expected)
    combined = objective.combine_statistics(parts)
    assert combined.keys() == whole_stats.keys()
    for name, value in whole_stats.items():
        torch.testing.assert_close(combined[name], value, msg=name)


@every_variant
@every_loss
def test_padding_may_hold_anything(loss_type, options):
    inputs = batch()
    objective = objective_of(loss_type, **options)
    loss, stats = objective(**inputs)
    expected_gradients, mask = gradients(loss, inputs), inputs["mask"]
    for junk in (NAN, float("inf"), -1e30):
        dirty = {
            name: tensor.detach().masked_fill(mask.any(1).logical_not() if tensor.ndim == 1 else ~mask, junk)
            for name, tensor in inputs.items()
            if name != "mask"
        }
        dirty["logp"].requires_grad_()
        dirty["entropy"].requires_grad_()
        dirty_loss, dirty_stats = objective(**dirty, mask=mask)
        assert torch.equal(dirty_loss, loss)
        for actual, expected in zip(gradients(dirty_loss, dirty), expected_gradients, strict=True):
            assert torch.equal(actual, expected)
        for name, value in stats.items():
            assert torch.equal(dirty_stats[name], value), name


@every_variant
@every_loss
def test_no_token_at_all_gives_zero(loss_type, options):
    inputs = batch()
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    loss, _ = objective_of(loss_type, **options)(**inputs)
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(loss, inputs))


CHANGES = {
    "beta": 0.5,
    "epsilon": 0.1,
    "epsilon_high": 0.6,
    "delta": 1.3,
    "importance_sampling_level": "sequence",
    "kl_estimator": "k1",
    "kl_placement": "reward",
    "use_bias_correction_kl": True,
    "entropy_coef": 0.1,
    "top_entropy_quantile": 0.5,
    "off_policy_mask_threshold": 0.05,
    "sampler_correction": "token_truncate",
}


@pytest.mark.parametrize(("option", "value"), CHANGES.items())
def test_each_option_changes_the_gradient(option, value):
    inputs = batch(completions=16)
    before, after = (gradients(GRPOObjective(**options)(**inputs)[0], inputs) for options in ({}, {option: value}))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("loss_type", "before", "after"),
    [
        ("dr_grpo", {"max_completion_length": 5}, {"max_completion_length": 50}),
        ("cispo", {"epsilon_high": 5.0}, {"epsilon_high": 1.0}),
        ("sapo", {}, {"sapo_temperature_pos": 2.0}),
        ("sapo", {}, {"sapo_temperature_neg": 2.0}),
        ("vespo", {}, {"vespo_k_pos": 1.0}),
        ("vespo", {}, {"vespo_lambda_pos": 1.0}),
        ("vespo", {}, {"vespo_k_neg": 1.0}),
        ("vespo", {}, {"vespo_lambda_neg": 1.0}),
        *(
            ("grpo", {"sampler_correction": mode, **before}, {"sampler_correction": mode, **after})
            for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
            for before, after in (
                ({"sampler_correction_max": 9.0}, {"sampler_correction_max": 1.05}),
                ({}, {"sampler_correction_min": 0.95}),
            )
        ),
    ],
)
def test_each_option_of_one_loss_changes_it(loss_type, before, after):
    inputs = batch()
    results = [
        gradients(GRPOObjective(loss_type=loss_type, **options)(**inputs)[0], inputs)[0] for options in (before, after)
    ]
    assert (results[0] - results[1]).abs().max() > 1e-3


def test_loss_types_differ():
    """But for bnpo and dapo, which differ only in whose tokens the caller counts."""
    inputs = batch()
    found = {name: gradients(objective_of(name)(**inputs)[0], inputs)[0] for name in LOSS_TYPES}
    assert torch.equal(found.pop("bnpo"), found["dapo"])
    for name, gradient in found.items():
        for other in found.keys() - {name}:
            assert (gradient - found[other]).abs().max() > 1e-4, (name, other)


def test_arguments_of_forward_replace_the_objectives():
    inputs = batch()
    expected, _ = GRPOObjective(beta=0.3, entropy_coef=0.2)(**inputs)
    loss, stats = GRPOObjective(beta=0.0)(**inputs, beta=0.3, entropy_coef=0.2)
    torch.testing.assert_close(loss, expected)
    bonus = 0.2 * inputs["entropy"][inputs["mask"]].mean()
    torch.testing.assert_close(stats["policy_loss"], loss.detach() + bonus.detach())
    without = inputs | {"ref_logp": None, "entropy": None}
    assert GRPOObjective(beta=0.3, entropy_coef=0.2)(**without, beta=0.0, entropy_coef=0.0)[0].isfinite()


def test_kl_in_the_reward_is_reported_and_not_in_the_loss():
    inputs = batch()
    loss, stats = GRPOObjective(beta=0.3, kl_placement="reward")(**inputs)
    torch.testing.assert_close(loss, GRPOObjective(beta=0.0)(**inputs)[0])
    assert stats["kl"] > 0.01
    assert GRPOObjective(beta=0.3, kl_placement="reward").needs_reference


def test_advantages_may_be_of_tokens():
    inputs = batch()
    for loss_type in LOSS_TYPES:
        for level in ("token", "sequence"):
            objective = objective_of(loss_type, importance_sampling_level=level)
            expected, expected_stats = objective(**inputs)
            spread = inputs["advantages"][:, None].repeat(1, 5)
            loss, stats = objective(**inputs | {"advantages": spread})
            torch.testing.assert_close(loss, expected)
            for name in expected_stats.keys() - {"vespo/phi_seq_mean"}:  # that of an empty completion is 1
                torch.testing.assert_close(stats[name], expected_stats[name], msg=name)


def test_float64_stays_and_is_exact():
    inputs = batch(dtype=torch.float64)
    loss, stats = GRPOObjective()(**inputs)
    single = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    assert loss.dtype == torch.float64
    assert stats["kl"].dtype == torch.float64
    torch.testing.assert_close(loss.float(), GRPOObjective()(**single)[0])


def test_clip_statistics_count_clipped_tokens():
    logp = torch.log(torch.tensor([[1.5, 1.0, 0.5, 0.5]])).requires_grad_()
    old, mask = torch.zeros(1, 4), torch.ones(1, 4)
    _, stats = GRPOObjective(beta=0.0)(logp, old, None, torch.tensor([1.0]), mask)
    assert stats["clip_ratio/high_mean"] == stats["clip_ratio/high_max"] == 0.25
    _, stats = GRPOObjective(beta=0.0)(logp, old, None, torch.tensor([-1.0]), mask)
    assert stats["clip_ratio/low_mean"] == stats["clip_ratio/low_min"] == 0.5
    _, stats = GRPOObjective(beta=0.0, delta=1.1)(logp, old, None, torch.tensor([1.0]), mask)
    assert stats["clip_ratio/high_mean"] == 0  # delta came first


def test_extremes_leave_out_completions_without_tokens():
    logp, mask = torch.log(torch.tensor([[0.5, 1.0]] * 2)), torch.tensor([[1, 1], [0, 0]])
    arguments = (logp, torch.zeros(2, 2), None, -torch.ones(2))
    objective = GRPOObjective(beta=0.0)
    _, stats = objective(*arguments, mask)
    assert stats["clip_ratio/low_min"] == 0.5
    _, empty = objective(*arguments, torch.zeros(2, 2))
    assert empty["clip_ratio/low_min"].isnan()
    assert objective.combine_statistics([(empty, 2, 0), (stats, 2, 2)])["clip_ratio/low_min"] == 0.5


def test_divisor_counts_what_the_loss_type_averages_over():
    counts = {name: objective_of(name, max_completion_length=7).divisor(3, 20) for name in LOSS_TYPES}
    completions = {name for name, count in counts.items() if count == 3}
    assert completions == {"grpo", "sapo", "luspo"}
    assert counts["dr_grpo"] == 21
    assert {name for name, count in counts.items() if count == 20} == {"bnpo", "dapo", "cispo", "vespo"}
    assert GRPOObjective(loss_type="dapo").divisor(3, 0) == 1
    assert GRPOObjective(loss_type="dapo").divisor(torch.tensor(3), torch.tensor(0)) == torch.tensor(1)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.25, 0.5, 0.7, 1.0])
def test_entropy_threshold_is_the_quantile_to_the_last_bit(share):
    """Which tokens act depends on it."""
    for count in [*range(1, 200), 1000]:
        entropy = torch.rand(count, generator=torch.Generator().manual_seed(count))
        assert entropy_threshold(entropy, torch.ones(count), share) == torch.quantile(entropy, 1 - share)


def test_entropy_threshold_takes_any_number_of_tokens():
    count = 2**24 + 1
    threshold = entropy_threshold(torch.arange(count).flip(0).double(), torch.ones(count), 0.25)
    assert threshold == 0.75 * (count - 1)
    assert entropy_threshold(torch.rand(3), torch.zeros(3), 0.5) == float("inf")
    assert entropy_threshold(torch.rand(8).bfloat16(), torch.ones(8), 0.5).dtype == torch.float32


# KL


def test_kl_is_zero_only_where_the_models_agree():
    a, b = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0])
    for estimator in KL_ESTIMATORS:
        assert kl_estimate(a, b, estimator)[0] == 0
        assert kl_estimate(a, b, estimator)[1] != 0
    assert kl_estimate(a, b, "k1")[1] == -1
    assert kl_estimate(a, b, "k2")[1] == 0.5
    assert kl_estimate(a, b, "k3")[1].item() == pytest.approx(torch.e - 2)


def test_sequence_kl_sums_over_tokens():
    logp, ref = torch.tensor([[-1.0, -2.0, NAN]] * 2), torch.tensor([[-2.0, -2.5, 0.0]] * 2)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert sequence_kl(logp, ref, mask, "k1").tolist() == [1.5, 0.0]
    assert sequence_kl(logp, ref, mask, "k2").tolist() == [0.625, 0.0]
    assert sequence_kl(logp.bfloat16(), ref.bfloat16(), mask, "k1").dtype == torch.float32


@pytest.mark.parametrize(
    ("estimator", "weighted", "direction"),
    [("k1", False, None), ("k2", False, "reverse"), ("k3", False, "forward"), ("k1", True, "reverse"),
     ("k3", True, "reverse")],
)  # fmt: skip
def test_expected_gradients_are_those_the_documentation_states(estimator, weighted, direction):
    """By enumeration over a small vocabulary, on policy."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    policy, reference = scores.log_softmax(0), torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    objective = GRPOObjective(beta=1.0, kl_estimator=estimator, use_bias_correction_kl=weighted)
    advantage, mask = torch.zeros(1), torch.ones(1, 1)
    losses = [
        objective(policy[token].view(1, 1), None, reference[token].view(1, 1), advantage, mask)[0] for token in range(6)
    ]
    expectation = (policy.exp().detach() * torch.stack(losses)).sum()
    (gradient,) = torch.autograd.grad(expectation, scores, retain_graph=True)
    wanted = {
        None: 0 * scores.sum(),
        "reverse": (policy.exp() * (policy - reference)).sum(),
        "forward": (reference.exp() * (reference - policy)).sum(),
    }[direction]
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, scores)[0])


# Errors


def test_missing_tensors_are_named():
    inputs = batch()
    for options, name, words in (
        ({}, "ref_logp", "beta needs log-probs of the reference model"),
        ({"entropy_coef": 0.1}, "entropy", "entropy_coef needs entropies, with their gradient"),
        ({"top_entropy_quantile": 0.5}, "entropy", "top_entropy_quantile needs entropies"),
        ({"sampler_correction": "token_mask"}, "sampler_logp", "sampler_correction needs the sampler's"),
    ):
        with pytest.raises(ValueError, match=words):
            GRPOObjective(**options)(**inputs | {name: None})


@pytest.mark.parametrize("name", ["old_logp", "ref_logp", "mask", "entropy", "sampler_logp", "advantages"])
def test_a_tensor_of_another_shape_is_named(name):
    inputs = batch()
    with pytest.raises(ValueError, match=rf"Expected {name} shaped like logp, \[6, 5\], found"):
        GRPOObjective()(**inputs | {name: inputs[name][:1]})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "ppo"}, "loss_type to be one of grpo, .*found 'ppo'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level to be one of token, sequence"),
        ({"kl_estimator": "k4"}, "kl_estimator to be one of k1, k2, k3"),
        ({"kl_placement": "both"}, "kl_placement to be one of loss, reward"),
        ({"sampler_correction": "clip"}, "sampler_correction to be one of null, token_truncate"),
        ({"beta": -1}, "beta >= 0, found -1"),
        ({"beta": NAN}, "beta >= 0, found nan"),
        ({"beta": None}, "beta >= 0, found None"),
        ({"beta": "0.1"}, "beta >= 0, found '0.1'"),
        ({"epsilon": 1.0}, "epsilon >= 0 and < 1"),
        ({"epsilon_high": -0.1}, "epsilon_high >= 0"),
        ({"delta": 1.0}, "delta > 1"),
        ({"max_completion_length": 0}, "max_completion_length >= 1"),
        ({"entropy_coef": -0.1}, "entropy_coef >= 0"),
        ({"top_entropy_quantile": 1.1}, "top_entropy_quantile between 0 and 1"),
        ({"off_policy_mask_threshold": -1}, "off_policy_mask_threshold >= 0"),
        ({"sampler_correction_max": 0}, "sampler_correction_max > 0"),
        ({"sampler_correction_min": -1}, "sampler_correction_min >= 0"),
        ({"sapo_temperature_pos": 0}, "sapo_temperature_pos > 0"),
        ({"sapo_temperature_neg": 0}, "sapo_temperature_neg > 0"),
        ({"vespo_k_pos": -1}, "vespo_k_pos >= 0"),
        ({"vespo_k_neg": -1}, "vespo_k_neg >= 0"),
        ({"vespo_lambda_pos": 0}, "vespo_lambda_pos >= 1e-4"),
        ({"vespo_lambda_neg": 1e-5}, "vespo_lambda_neg >= 1e-4"),
        ({"kl_placement": "reward", "use_bias_correction_kl": True}, "set one of them back"),
        ({"sampler_correction": "token_mask", "sampler_correction_min": 3.0}, "sampler_correction_min below"),
        ({"sampler_correction": "token_truncate", "sampler_correction_max": None}, "found neither"),
        ({"loss_type": "vespo", "sampler_correction": "sequence_mask"}, "take token_truncate or token_mask"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        GRPOObjective(**options)


def test_dr_grpo_needs_a_length_to_divide_by():
    with pytest.raises(ValueError, match="max_completion_length, found null"):
        GRPOObjective(loss_type="dr_grpo").divisor(4, 20)


def test_cispo_without_its_cap_warns():
    with pytest.warns(UserWarning, match=r"epsilon_high.*5\.0"):
        GRPOObjective(loss_type="cispo")


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_what_the_objective_needs():
    assert GRPOObjective(beta=0.1).needs_reference
    assert not GRPOObjective(beta=0.0).needs_reference
    assert GRPOObjective(entropy_coef=0.1).entropy_needs_gradient
    assert not GRPOObjective().entropy_needs_gradient
    assert not GRPOObjective().state_dict()
