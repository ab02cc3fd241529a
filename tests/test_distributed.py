"""Two gloo processes against one, through the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.datamodules.samplers import RolloutBatchSampler
from rft_lightning.policy.loading import load_policy

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

CONFIGS = Path(__file__).parent.parent / "configs"


def fit(folder, policy, processes, batch, *arguments, method=None):
    folder.mkdir(parents=True, exist_ok=True)
    overlay = ["--config", str(CONFIGS / "method" / f"{method}.yaml")] if method else []
    command = [
        sys.executable, "-m", "rft_lightning", "fit", "--config", str(CONFIGS / "quickstart.yaml"), *overlay,
        "--model.policy", policy, "--model.max_completion_length", "8",
        "--trainer.devices", str(processes), "--trainer.strategy", "ddp" if processes > 1 else "auto",
        "--data.batch_size", str(batch), "--data.shots", "2", "--data.val_size", "5", "--data.eval_batch_size", "2",
        *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env=environment, timeout=400
    )
    assert result.returncode == 0, result.stderr[-4000:]
    (checkpoint,) = folder.rglob("last.ckpt")
    return torch.load(checkpoint, weights_only=True)


def test_two_processes_make_the_supervised_update_of_one(tmp_path, tiny_policy):
    """SGD and micro-batches, with token counts that differ between the ranks: one gradient, however it is cut."""
    common = (
        "--model.optimizer", "SGD", "--model.optimizer.lr", "0.1", "--model.schedule", "constant",
        "--model.micro_batch_prompts", "1", "--trainer.max_steps", "3", "--trainer.val_check_interval", "3",
    )  # fmt: skip
    still = (*common, "--model.optimizer.lr", "0.0")
    one = fit(tmp_path / "one", tiny_policy, 1, 4, *common, method="sft")["state_dict"]
    two = fit(tmp_path / "two", tiny_policy, 2, 2, *common, method="sft")["state_dict"]
    start = fit(tmp_path / "start", tiny_policy, 1, 4, *still, method="sft")["state_dict"]
    moved = max((one[name] - start[name]).abs().max().item() for name in one)
    assert moved > 1e-3
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-3 * moved


HELPERS = """
import torch
from lightning.pytorch import Callback

def length_reward(answer, target, *, rules, step):
    return (len(answer.text) % 17) / 17

class SameOnEveryRank(Callback):
    def on_train_end(self, trainer, pl_module):
        flat = torch.cat([p.detach().flatten() for p in pl_module.policy.parameters()])
        both = pl_module.all_gather(flat)
        assert torch.equal(both[0], both[1])
        print("ranks agree")
"""


def test_grpo_with_two_processes_moves_both_alike_validates_and_saves(tmp_path, tiny_policy):
    folder = tmp_path / "grpo"
    folder.mkdir()
    (folder / "helpers.py").write_text(HELPERS)
    (folder / "more.yaml").write_text(
        "trainer: {callbacks+: [{class_path: helpers.SameOnEveryRank}]}\n"
        "data: {init_args: {task: {class_path: rft_lightning.tasks.DetectionTask, init_args: "
        "{rewards: {length: helpers.length_reward}, reward_weights: {length: 1.0}}}}}\n"
    )
    state = fit(
        folder, tiny_policy, 2, 2, "--config", "more.yaml", "--model.group_size", "2",
        "--model.mini_batch_prompts", "1", "--model.micro_batch_prompts", "1", "--model.num_iterations", "2",
        "--model.optimizer.lr", "1e-3", "--trainer.max_steps", "4", "--trainer.val_check_interval", "1",
    )  # fmt: skip
    assert state["global_step"] == 4
    start = load_policy(tiny_policy).state_dict()
    moved = max((state["state_dict"][f"policy.{name}"] - value).abs().max().item() for name, value in start.items())
    assert moved > 1e-3
    metrics = (next(iter(folder.rglob("metrics.csv")))).read_text()
    assert "val/box_iou_mean" in metrics
    assert "train/rewards/length/mean" in metrics


def test_a_bad_loss_on_one_rank_names_its_samples_alone(tmp_path, tiny_policy):
    folder = tmp_path / "nan"
    folder.mkdir()
    (folder / "helpers.py").write_text(
        "from rft_lightning import GRPOModule\n"
        "class Broken(GRPOModule):\n"
        "    def advantages(self, *args):\n"
        "        return super().advantages(*args) + (float('nan') if self.global_rank == 1 else 0.0)\n"
    )
    rows = ShapesDataModule(seed=0, shots=2, max_shapes=2, min_side=0.25, max_side=0.55).split("train")
    culprits = ", ".join(rows[row].id for row, _ in RolloutBatchSampler(len(rows), 2, rank=1, world_size=2).batch(0))
    with pytest.raises(AssertionError, match=rf"NonFiniteError: Step 0.*Samples of the step: {culprits}\. The weights"):
        fit(folder, tiny_policy, 2, 2, "--model.class_path", "helpers.Broken", "--model.group_size", "2",
            "--trainer.max_steps", "1", "--trainer.val_check_interval", "1")  # fmt: skip


RECORDER = """
import json
from rft_lightning import GRPOModule

class Recorder(GRPOModule):
    def roll_out(self, batch, **settings):
        rollouts = super().roll_out(batch, **settings)
        with open(f"rollouts-{self.global_rank}.jsonl", "a") as file:
            for sample, texts in zip(batch.samples, rollouts.texts):
                file.write(json.dumps([self.global_step, sample.id, sample.occurrence, texts]) + "\\n")
        return rollouts

def length_reward(answer, target, *, rules, step):
    return (len(answer.text) % 17) / 17
"""


def test_two_processes_sample_and_learn_what_one_does(tmp_path, tiny_policy):
    """The same completions of every sample in every step, and the same weights after three of them."""
    weights, rollouts = {}, {}
    for processes, batch in ((1, 6), (2, 3)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        (folder / "recorder.py").write_text(RECORDER)
        (folder / "more.yaml").write_text(
            "model: {class_path: recorder.Recorder, init_args: {group_size: 3, max_completion_length: 8}}\n"
            "data: {init_args: {task: {class_path: rft_lightning.tasks.DetectionTask, init_args: "
            "{rewards: {length: recorder.length_reward}, reward_weights: {length: 1.0}}}}}\n"
        )
        # Few rows: some occur twice in a global batch of six.
        state = fit(
            folder, tiny_policy, processes, batch, "--config", "more.yaml", "--data.shots", "1",
            "--model.optimizer", "SGD", "--model.optimizer.lr", "0.1", "--model.schedule", "constant",
            "--trainer.max_steps", "3", "--trainer.val_check_interval", "3",
        )  # fmt: skip
        weights[processes] = state["state_dict"]
        lines = [json.loads(line) for file in folder.glob("rollouts-*.jsonl") for line in file.open()]
        rollouts[processes] = {(step, sample, occurrence): texts for step, sample, occurrence, texts in lines}
        assert len(rollouts[processes]) == len(lines) == 18
    assert rollouts[1] == rollouts[2]
    assert any(occurrence for _, _, occurrence in rollouts[1])
    for (step, sample, occurrence), texts in rollouts[1].items():
        if occurrence:
            assert texts != rollouts[1][step, sample, 0]
    start = load_policy(tiny_policy).state_dict()
    moved = max((weights[1][f"policy.{name}"] - value).abs().max().item() for name, value in start.items())
    assert moved > 1e-3
    assert max((weights[1][name] - weights[2][name]).abs().max().item() for name in weights[1]) < 1e-3 * moved
