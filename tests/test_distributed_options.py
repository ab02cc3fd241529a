"""GRPOModule's options that look at all processes: two gloo processes against one, on the same completions.

Run by a test, this file is also the program of each process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from rft_lightning import GRPOModule, GRPOObjective
from rft_lightning.control import AdaptiveEntropy, AdaptiveKL
from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.tasks import DetectionTask

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

RANK, PROCESSES = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def length_reward(answer, target):
    return (len(answer.text) % 17) / 17


def sometimes_reward(answer, target):
    return float(len(answer.text) % 3) * 2 if len(answer.text) % 5 else None


def differs_on_rank_0_reward(answer, target):
    return length_reward(answer, target) if RANK == 0 else 0.5


def adaptive():
    kl, entropy = AdaptiveKL(target=1e-4, horizon=100), AdaptiveEntropy(target=9.0, delta=0.05)
    return {"kl_controller": kl, "entropy_controller": entropy}


CASES = {
    "baseline batch": lambda: {"baseline": "batch", "scale_rewards": "none"},
    "scale batch": lambda: {"scale_rewards": "batch"},
    "gdpo": lambda: {"aggregation": "normalize_then_sum"},
    "kl in the reward": lambda: {
        "baseline": "batch",
        "scale_rewards": "batch",
        "objective": GRPOObjective(kl_placement="reward", kl_estimator="k1", beta=0.5),
    },
    "top entropy": lambda: {
        "num_iterations": 2,
        "objective": GRPOObjective(loss_type="dapo", top_entropy_quantile=0.3, entropy_coef=0.1),
    },
    "bnpo": lambda: {
        "mask_truncated_completions": True,
        "num_iterations": 2,
        "objective": GRPOObjective(loss_type="bnpo", beta=0.5),
    },
    "adaptive": lambda: {
        "objective": GRPOObjective(beta=0.1, entropy_coef=0.02, top_entropy_quantile=0.4),
        **adaptive(),
    },
}


class Varied(GRPOModule):
    """Completions of different lengths, some cut off, each the same wherever it is sampled."""

    def roll_out(self, batch, **settings):
        rollouts = super().roll_out(batch, **settings)
        groups, longest = rollouts.completion_ids.shape[1:]
        for b, sample in enumerate(rollouts.prompts.samples):
            for g in range(groups):
                length = 1 + (sum(map(ord, sample.id)) + 3 * sample.occurrence + 5 * g) % longest
                rollouts.completion_mask[b, g, length:] = False
                rollouts.truncated[b, g] = length % 3 == 0
        return rollouts


class Waves(GRPOModule):
    """Remembers how many groups each process rolled out and trained on."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rolled_out, self.trained = [], []

    def roll_out(self, batch, **settings):
        self.rolled_out.append(len(batch))
        return super().roll_out(batch, **settings)

    def update(self, mini_batches, advantages_N):
        self.trained.append((advantages_N.view(-1, 3).abs().amax(1) > 0).tolist())
        return super().update(mini_batches, advantages_N)


def train(cls, policy, data, steps, **settings):
    module = cls(
        policy, group_size=3, max_completion_length=6, optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        schedule="constant", max_grad_norm=None, micro_batch_prompts=1, **settings,
    )  # fmt: skip
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", devices=PROCESSES,
        strategy="ddp" if PROCESSES > 1 else "auto", limit_val_batches=0, num_sanity_val_steps=0,
        use_distributed_sampler=False, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return module, trainer


def outcome(policy, settings):
    data = ShapesDataModule(
        processor=policy, batch_size=4 // PROCESSES, train_size=12, val_size=4,
        task=DetectionTask(rewards={"length": length_reward, "sometimes": sometimes_reward}),
    )  # fmt: skip
    module, trainer = train(Varied, policy, data, 4, **settings)
    return {
        "weights": {name: p.detach() for name, p in module.policy.named_parameters()},
        "coefficients": {name: controller.state_dict() for name, controller in module.controllers.items()},
        "logged": {
            name: value.item() for name, value in trainer.callback_metrics.items() if not name.endswith("_time")
        },
    }


def waves(policy):
    data = ShapesDataModule(
        processor=policy, batch_size=2, oversample=3, train_size=30, val_size=4,
        task=DetectionTask(rewards={"differs": differs_on_rank_0_reward}),
    )  # fmt: skip
    module, _ = train(Waves, policy, data, 2, objective=GRPOObjective(loss_type="dapo", beta=0.0))
    return {"rolled_out": module.rolled_out, "trained": module.trained}


def main(policy, folder):
    torch.set_num_threads(1)
    found = {name: outcome(policy, settings()) for name, settings in CASES.items()}
    if PROCESSES > 1:
        found["waves"] = waves(policy)
    torch.save(found, Path(folder) / f"{PROCESSES}-{RANK}.pt")


@pytest.fixture(scope="module")
def found(tiny_policy, tmp_path_factory):
    """(processes, rank) -> case -> outcome."""
    folder = tmp_path_factory.mktemp("options")
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launcher, __file__, tiny_policy, str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=600)
        assert result.returncode == 0, result.stderr[-4000:]
    return {ranks: torch.load(folder / "{}-{}.pt".format(*ranks)) for ranks in ((1, 0), (2, 0), (2, 1))}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_and_log_what_one_does(found, tiny_policy, case):
    one, first, second = (found[ranks][case] for ranks in ((1, 0), (2, 0), (2, 1)))
    start = GRPOModule(tiny_policy)
    start.configure_model()
    moved = max((one["weights"][name] - p).abs().max().item() for name, p in start.policy.named_parameters())
    assert moved > 1e-3
    for name, weights in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert (weights - first["weights"][name]).abs().max() < 1e-3 * moved
    assert first["coefficients"] == second["coefficients"]
    for name, state in one["coefficients"].items():
        assert first["coefficients"][name] == pytest.approx(state, rel=1e-4)
    logged = {name: value for name, value in one["logged"].items() if "time" not in name}
    assert logged.keys() <= first["logged"].keys()
    for name, value in logged.items():
        assert first["logged"][name] == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), name


def test_a_process_without_groups_that_differ_neither_hangs_nor_stops_the_others(found):
    first, second = found[2, 0]["waves"], found[2, 1]["waves"]
    assert first["rolled_out"] == second["rolled_out"] == [2] * 6  # every wave of both steps: rank 1 finds none
    assert [all(step) for step in first["trained"]] == [True, True]
    assert [any(step) for step in second["trained"]] == [False, False]
    assert [len(step) for step in first["trained"]] == [len(step) for step in second["trained"]] == [2, 2]


if __name__ == "__main__":
    main(*sys.argv[1:])
