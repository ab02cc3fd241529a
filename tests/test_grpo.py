"""GRPOModule and SFTModule in a real Trainer, on a tiny random policy."""

import copy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from rft_lightning import GRPOModule, GRPOObjective, SFTModule
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.errors import ConfigConflictError, NonFiniteError
from rft_lightning.policy.loading import load_policy
from rft_lightning.policy.plain import plain_group_logprobs
from rft_lightning.tasks import ClassificationTask, DetectionTask, GroundingTask


def adamw(lr):
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


def length_reward(answer, target, *, rules, step):
    """A reward that a random policy varies in."""
    return (len(answer.text) % 17) / 17


def other_reward(answer, target, *, rules, step):
    return float(len(answer.text) % 2)


def data(tiny_policy, **kwargs):
    settings = {"batch_size": 4, "train_size": 12, "val_size": 5, "eval_batch_size": 2}
    settings["task"] = DetectionTask(rewards={"length": length_reward})
    return ShapesDataModule(processor=tiny_policy, **{**settings, **kwargs})


def grpo(tiny_policy, **kwargs):
    settings = {"group_size": 3, "max_completion_length": 6, "optimizer": adamw(1e-3), "schedule": "constant"}
    return GRPOModule(tiny_policy, **{**settings, **kwargs})


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.policy.named_parameters()}


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


class Record(Callback):
    def __init__(self):
        self.metrics = []

    def on_train_batch_end(self, trainer, *args):
        self.metrics.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def test_on_policy_loss_is_beta_times_kl_and_the_policy_learns(tiny_policy, make_trainer):
    record = Record()
    module = grpo(tiny_policy, objective=GRPOObjective(beta=0.04))
    module.configure_model()
    before = weights(module)
    make_trainer(4, callbacks=[record]).fit(module, datamodule=data(tiny_policy))
    for step, metrics in enumerate(record.metrics):
        assert metrics["train/loss"] == pytest.approx(0.04 * metrics["train/kl_sequence"], abs=1e-6)
        assert (metrics["train/kl"] > 1e-6) == (step > 0)
    assert record.metrics[0]["train/kl"] == 0
    assert largest_difference(before, weights(module)) > 1e-4


def test_the_reference_model_does_not_move_and_is_in_no_checkpoint(tiny_policy, make_trainer, tmp_path):
    module = grpo(tiny_policy)
    module.configure_model()
    reference = copy.deepcopy(module._reference[0].state_dict())
    start = weights(module)
    trainer = make_trainer(3)
    trainer.fit(module, datamodule=data(tiny_policy))
    for name, value in module._reference[0].state_dict().items():
        assert torch.equal(value, reference[name]), name
    assert largest_difference(start, weights(module)) > 0
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("policy.") for name in saved)
    assert len(saved) == len(module.policy.state_dict())


def test_beta_zero_loads_no_reference_model(tiny_policy, make_trainer):
    record = Record()
    module = grpo(tiny_policy, objective=GRPOObjective(beta=0.0))
    make_trainer(1, callbacks=[record]).fit(module, datamodule=data(tiny_policy))
    assert module._reference == ()
    assert "train/kl" not in record.metrics[0]
    assert abs(record.metrics[0]["train/loss"]) < 1e-6


def updated(tiny_policy, make_trainer, **kwargs):
    module = grpo(tiny_policy, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **kwargs)
    module.configure_model()
    before = weights(module)
    make_trainer(1).fit(module, datamodule=data(tiny_policy))
    after = weights(module)
    return {name: after[name] - before[name] for name in after}


def test_micro_batches_do_not_change_the_update(tiny_policy, make_trainer):
    """SGD, so that the update is the gradient; the updates are compared, not the weights."""
    whole = updated(tiny_policy, make_trainer)
    cut = updated(tiny_policy, make_trainer, micro_batch_prompts=1)
    size = max(value.abs().max().item() for value in whole.values())
    assert size > 1e-4
    assert largest_difference(whole, cut) < 2e-3 * size


def test_statistics_do_not_depend_on_the_micro_batches(tiny_policy, make_trainer):
    """Completions of different lengths: token means must be weighted by tokens, kl_sequence by completions."""

    def logged(**kwargs):
        record = Record()
        module = grpo(tiny_policy, max_completion_length=24, group_size=4, **kwargs)
        make_trainer(3, callbacks=[record]).fit(module, datamodule=data(tiny_policy))
        return record.metrics[1]

    whole, cut = logged(), logged(micro_batch_prompts=1)
    assert whole["train/kl"] > 1e-5
    for name in ("train/kl", "train/kl_sequence", "train/entropy", "train/loss"):
        assert cut[name] == pytest.approx(whole[name], rel=2e-3, abs=1e-7), name


def test_seed_everything_is_the_seed_of_a_run(tiny_policy, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert grpo(tiny_policy).seed == data(tiny_policy).seed == 7
    assert grpo(tiny_policy, seed=3).seed == data(tiny_policy, seed=3).seed == 3


def test_the_last_good_checkpoint_stays_after_a_non_finite_loss(tiny_policy, make_trainer, tmp_path):
    from rft_lightning.callbacks import RolloutCheckpoint

    module = grpo(tiny_policy)
    original = module.advantages
    module.advantages = lambda *args: original(*args) * (torch.nan if module.global_step == 2 else 1.0)
    callback = RolloutCheckpoint(every_n_steps=1, dirpath=str(tmp_path))
    with pytest.raises(NonFiniteError, match="Step 2"):
        make_trainer(4, callbacks=[callback]).fit(module, datamodule=data(tiny_policy))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    for name, value in module.policy.state_dict().items():
        assert torch.equal(saved["state_dict"][f"policy.{name}"], value), name


def test_evaluation_makes_no_reference_model(tiny_policy, make_trainer):
    module = grpo(tiny_policy)
    make_trainer(limit_val_batches=1.0).validate(module, datamodule=data(tiny_policy), verbose=False)
    assert module._reference == ()


def test_the_update_is_the_gradient_of_the_published_loss(tiny_policy, make_trainer):
    """The whole step against the formula written out: mean over completions of the token mean of A * grad log pi."""

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    module = grpo(tiny_policy, optimizer=sgd, max_grad_norm=None, objective=GRPOObjective(beta=0))
    module.configure_model()
    before = copy.deepcopy(module.policy)
    kept = {}
    original = module.update

    def spy(mini_batches, advantages):
        ((micro,),) = mini_batches
        kept["rollouts"], kept["advantages"] = micro.rollouts, advantages
        return original(mini_batches, advantages)

    module.update = spy
    make_trainer(1).fit(module, datamodule=data(tiny_policy))
    rollouts, advantages = kept["rollouts"], kept["advantages"]
    logp, _ = plain_group_logprobs(before, rollouts.prompts, rollouts.completion_ids, rollouts.completion_mask)
    mask = rollouts.completion_mask.float()
    per_completion = (logp * mask).sum(-1) / mask.sum(-1)
    (-(per_completion.flatten() * advantages).mean()).backward()
    assert advantages.abs().max() > 0.5
    for (name, old), new in zip(before.named_parameters(), module.policy.parameters(), strict=True):
        expected = torch.zeros_like(old) if old.grad is None else -0.1 * old.grad
        torch.testing.assert_close(new.detach() - old.detach(), expected, atol=2e-7, rtol=1e-3, msg=name)


def test_mini_batches_and_iterations_make_their_optimiser_steps(tiny_policy, make_trainer):
    record = Record()
    module = grpo(tiny_policy, mini_batch_prompts=2, num_iterations=2)
    trainer = make_trainer(8, callbacks=[record])
    trainer.fit(module, datamodule=data(tiny_policy))
    assert trainer.global_step == 8
    assert len(record.metrics) == 2
    # Off the first step the ratio has moved away from 1, so the loss is no longer just the KL term.
    assert abs(record.metrics[1]["train/loss"] - 0.04 * record.metrics[1]["train/kl_sequence"]) > 1e-7


def test_max_steps_inside_a_rollout_batch_is_refused_with_a_remedy(tiny_policy, make_trainer):
    module = grpo(tiny_policy, mini_batch_prompts=2, num_iterations=2)
    with pytest.raises(ConfigConflictError, match=r"max_steps is 6.*4 optimiser steps.*such as 8"):
        make_trainer(6).fit(module, datamodule=data(tiny_policy))


def test_rollouts_in_chunks_cover_all_prompts(tiny_policy):
    module, samples = grpo(tiny_policy, rollout_prompts=2), data(tiny_policy)
    module.configure_model()
    batch = samples.encoder([samples.sample("train", i) for i in range(3)])
    rollouts, scores, advantages = module.sample_and_score(batch)
    assert rollouts.completion_ids.shape[:2] == (3, 3)
    assert scores.rewards.shape == (9, 1)
    assert advantages.shape == (9,)
    assert [len(texts) for texts in rollouts.texts] == [3, 3, 3]
    for b in range(3):
        for g in range(3):
            ids = rollouts.completion_ids[b, g][rollouts.completion_mask[b, g]]
            assert module.processor.tokenizer.decode(ids, skip_special_tokens=True) == rollouts.texts[b][g]


def test_tasks_with_different_rewards_share_a_batch(tiny_policy, make_trainer):
    record = Record()
    tasks = [
        DetectionTask(rewards={"length": length_reward}, reward_weights={"length": 2.0}),
        ClassificationTask(rewards={"other": other_reward}),
        GroundingTask(rewards={"length": length_reward, "other": other_reward}),
    ]
    make_trainer(1, callbacks=[record]).fit(grpo(tiny_policy), datamodule=data(tiny_policy, task=tasks, batch_size=6))
    assert {"train/rewards/length/mean", "train/rewards/other/mean"} <= set(record.metrics[0])
    assert record.metrics[0]["train/reward_std"] > 0


def test_a_run_is_reproducible_and_the_seed_matters(tiny_policy, make_trainer):
    def run(seed):
        module = grpo(tiny_policy, seed=seed)
        make_trainer(2).fit(module, datamodule=data(tiny_policy))
        return weights(module)

    first = run(0)
    assert largest_difference(first, run(0)) == 0
    assert largest_difference(first, run(1)) > 0


def test_validation_and_prediction_return_predictions(tiny_policy, make_trainer):
    module = grpo(tiny_policy)
    batches = make_trainer().predict(module, datamodule=data(tiny_policy, test_size=3))
    predictions = [prediction for batch in batches for prediction in batch]
    assert [p.sample.id for p in predictions] == [f"shapes/1000003/predict/{i}" for i in range(3)]
    assert all(p.text == p.answer.text for p in predictions)


def test_sft_learns_the_solutions(tiny_policy, make_trainer):
    record = Record()
    module = SFTModule(tiny_policy, optimizer=adamw(3e-3), schedule="constant", micro_batch_prompts=3)
    make_trainer(30, callbacks=[record]).fit(module, datamodule=data(tiny_policy, train_size=4))
    assert record.metrics[-1]["train/loss"] < 0.6 * record.metrics[0]["train/loss"]


def test_sft_loss_is_the_cross_entropy_of_the_solution_tokens(tiny_policy, make_trainer):
    from torch.nn.functional import cross_entropy

    record, samples = Record(), data(tiny_policy, train_size=4)
    module = SFTModule(tiny_policy, optimizer=adamw(0.0), schedule="constant", micro_batch_prompts=1)
    make_trainer(1, callbacks=[record]).fit(module, datamodule=samples)
    total = count = 0
    with torch.no_grad():
        for sample in samples.split("train"):
            prompt = samples.encoder([sample])
            done = prompt.samples[0]
            text = f"<think>{done.task.thought(done.target)}</think> {done.target.solution_text}<|im_end|>"
            ids = module.processor.tokenizer(text, return_tensors="pt").input_ids
            row = torch.cat([prompt.input_ids, ids], 1)
            types = torch.cat([prompt.vision["mm_token_type_ids"], torch.zeros_like(ids)], 1)
            vision = {**prompt.vision, "mm_token_type_ids": types}
            logits = module.policy(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False, **vision).logits
            total += cross_entropy(logits[0, prompt.input_ids.shape[1] - 1 : -1], ids[0], reduction="sum").item()
            count += ids.shape[1]
    assert record.metrics[0]["train/loss"] == pytest.approx(total / count, abs=1e-4)


def test_sft_micro_batches_do_not_change_the_update(tiny_policy, make_trainer):
    def run(micro):
        module = SFTModule(
            tiny_policy, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), schedule="constant", micro_batch_prompts=micro
        )
        module.configure_model()
        before = weights(module)
        make_trainer(1).fit(module, datamodule=data(tiny_policy, train_size=4))
        after = weights(module)
        return {name: after[name] - before[name] for name in after}

    whole, cut = run(None), run(1)
    size = max(value.abs().max().item() for value in whole.values())
    assert size > 1e-3
    assert largest_difference(whole, cut) < 1e-3 * size


# Errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"group_size": 1}, "group_size is 1, expected at least 2"),
        ({"num_iterations": 0}, "num_iterations >= 1"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"schedule": "step"}, "schedule"),
        ({"micro_batch_prompts": 0}, "micro_batch_prompts"),
    ],
)
def test_arguments_out_of_range(tiny_policy, arguments, words):
    with pytest.raises(ConfigConflictError, match=words):
        grpo(tiny_policy, **arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"accumulate_grad_batches": 2}, "micro_batch_prompts"),
        ({"gradient_clip_val": 1.0}, "max_grad_norm"),
        ({"precision": "16-true"}, "bf16-mixed, bf16-true or 32-true"),
    ],
)
def test_trainer_settings_are_refused_by_our_names(tiny_policy, make_trainer, arguments, words):
    with pytest.raises(ConfigConflictError, match=words):
        make_trainer(1, **arguments).fit(grpo(tiny_policy), datamodule=data(tiny_policy))


def test_the_reference_model_is_the_start_though_a_checkpoint_was_looked_at_before(tiny_policy, make_trainer, tmp_path):
    first = grpo(tiny_policy)
    trainer = make_trainer(1)
    trainer.fit(first, datamodule=data(tiny_policy))
    with torch.no_grad():
        for parameter in first.policy.parameters():
            parameter += 0.01
    trainer.save_checkpoint(tmp_path / "moved.ckpt")
    module = grpo(tiny_policy)
    make_trainer(1, limit_val_batches=1).validate(
        module, datamodule=data(tiny_policy), ckpt_path=tmp_path / "moved.ckpt"
    )
    make_trainer(2).fit(module, datamodule=data(tiny_policy), ckpt_path=tmp_path / "moved.ckpt")
    start = load_policy(tiny_policy).state_dict()
    assert all(torch.equal(weight, start[name]) for name, weight in module._reference[0].state_dict().items())


def test_bf16_true_is_for_weights_alone(tiny_policy, make_trainer):
    """Lightning's own plugin would round rewards, and the boxes of targets."""
    seen = {}

    class Watched(GRPOModule):
        def advantages(self, scores, group_size, *args):
            found = super().advantages(scores, group_size, *args)
            seen.update(rewards=scores.rewards.dtype, advantages=found.dtype, default=torch.tensor(0.5).dtype)
            return found

        def training_step(self, batch, batch_idx):
            seen.update(target=batch.samples[0].target.boxes.dtype, pixels=batch.vision["pixel_values"].dtype)
            return super().training_step(batch, batch_idx)

    module = Watched(
        tiny_policy, group_size=2, max_completion_length=5, schedule="constant", seed=0, max_grad_norm=None,
        optimizer=lambda p: torch.optim.SGD(p, lr=10.0),
    )  # fmt: skip
    make_trainer(2, precision="bf16-true").fit(module, datamodule=data(tiny_policy))
    assert seen == {
        "rewards": torch.float32, "advantages": torch.float32, "default": torch.float32, "target": torch.float64,
        "pixels": torch.float32,
    }  # fmt: skip
    for model in (module.policy, *module._reference):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    start = load_policy(tiny_policy, dtype="bfloat16").state_dict()
    assert any(not torch.equal(weight, start[name]) for name, weight in module.policy.state_dict().items())
    assert module.record()["settings"]["dtype"] == "bfloat16"


def test_a_schedule_needs_max_steps(tiny_policy, make_trainer):
    with pytest.raises(ConfigConflictError, match=r"linear schedule.*max_steps"):
        make_trainer(-1, max_epochs=1).fit(grpo(tiny_policy, schedule="linear"), datamodule=data(tiny_policy))


def test_a_non_finite_loss_names_step_and_samples_and_keeps_the_weights(tiny_policy, make_trainer):
    module = grpo(tiny_policy)
    module.configure_model()
    before = weights(module)
    module.advantages = lambda scores, *args: torch.full((len(scores.rewards),), torch.nan)
    words = r"Step 0: the loss is nan.*gradients.*Samples of the step: shapes/0/train/"
    with pytest.raises(NonFiniteError, match=words):
        make_trainer(1).fit(module, datamodule=data(tiny_policy))
    assert largest_difference(before, weights(module)) == 0


def test_a_non_finite_reward_names_reward_and_sample(tiny_policy, make_trainer):
    task = DetectionTask(rewards={"broken": lambda answer, target: float("nan")}, failed_reward=None)
    with pytest.raises(NonFiniteError, match=r"'broken'.* returned nan.* sample 'shapes/"):
        make_trainer(1).fit(grpo(tiny_policy), datamodule=data(tiny_policy, task=task))


def test_a_sample_without_target_is_named(tiny_policy):
    module, samples = grpo(tiny_policy), data(tiny_policy)
    module.configure_model()
    batch = samples.encoder([replace(samples.sample("train", 0), target=None)])
    with pytest.raises(ConfigConflictError, match=r"'shapes/0/train/0' has no target.*labelled samples"):
        module.sample_and_score(batch)


def test_fsdp_is_refused_with_an_alternative(tiny_policy):
    from types import SimpleNamespace

    from lightning.pytorch.strategies import FSDPStrategy

    from rft_lightning.trainer import check_trainer

    with pytest.raises(ConfigConflictError, match=r"fsdp2.*ddp"):
        check_trainer(SimpleNamespace(strategy=FSDPStrategy()))


# One run, three forwards


def test_ten_steps_are_the_same_on_every_forward(tiny_policy, make_trainer):
    """Rewards and losses of a run with KL, several steps per rollout and micro-batches."""
    runs = {}
    for forward in ("plain", "prefix_cache", "packed"):
        record = Record()
        module = grpo(
            tiny_policy, forward=forward, num_iterations=2, micro_batch_prompts=2, max_completion_length=12, seed=3,
            top_k=50, optimizer=adamw(2e-4),
        )  # fmt: skip
        make_trainer(20, callbacks=[record]).fit(module, datamodule=data(tiny_policy))
        assert module.layout == forward
        runs[forward] = record.metrics
    names = ["train/reward", "train/loss", "train/kl", "train/entropy", "train/completions/mean_length"]
    assert len({metrics["train/reward"] for metrics in runs["plain"]}) > 5
    for metrics, *others in zip(*runs.values(), strict=True):
        for other in others:
            for name in names:
                assert other[name] == pytest.approx(metrics[name], abs=1e-4), name
    assert len(runs["plain"]) == 10
    assert runs["plain"][-1]["train/kl"] > 1e-4


def test_hf_engine_runs_too(tiny_policy, make_trainer, monkeypatch):
    from rft_lightning.policy import rollout

    calls, sample = [], rollout.hf_sample
    monkeypatch.setattr(rollout, "hf_sample", lambda *arguments: calls.append(1) or sample(*arguments))
    record = Record()
    module = grpo(tiny_policy, rollout_engine="hf")
    make_trainer(2, callbacks=[record]).fit(module, datamodule=data(tiny_policy))
    assert len(calls) == 2
    assert record.metrics[1]["train/kl"] > 0


@pytest.mark.parametrize(
    "setting",
    [{"rollout_prompts": 0}, {"eval_temperature": -1.0}, {"top_p": 0.0}, {"top_k": -2}, {"max_completion_length": 0}],
)
def test_settings_out_of_range_are_refused_before_anything_is_loaded(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ConfigConflictError, match=f"{name.removeprefix('eval_')}.*found {value}"):
        grpo("no/such/policy/anywhere", **setting)


@pytest.mark.parametrize("setting", [{"forward": "fast"}, {"rollout_engine": "vllm"}])
def test_unknown_switches_are_refused(tiny_policy, setting):
    ((name, value),) = setting.items()
    with pytest.raises(ConfigConflictError, match=f"{name}.*found '{value}'"):
        grpo(tiny_policy, **setting)


def test_the_reference_model_is_computed_as_the_policy_where_a_layout_fails(tiny_policy, make_trainer, monkeypatch):
    """A kernel that is wrong for the one is wrong for the other: the KL of the first step stays 0."""
    from rft_lightning.policy import group_attention

    part = group_attention.part
    monkeypatch.setattr(group_attention, "part", lambda *x, **o: part(*x, **(o | {"causal": False})))
    record = Record()
    module = grpo(tiny_policy, objective=GRPOObjective(beta=0.04), gradient_checkpointing=True)
    with pytest.warns(UserWarning, match="packed gives other log-probs"):
        make_trainer(1, callbacks=[record]).fit(module, datamodule=data(tiny_policy))
    assert module.layout == "packed"
    assert abs(record.metrics[0]["train/kl"]) < 1e-5
