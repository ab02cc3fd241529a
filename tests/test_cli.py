"""The command line on shipped configs, called as a function."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from rft_lightning.cli import main
from rft_lightning.errors import CheckpointError, ConfigConflictError

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture
def quick(tmp_path, monkeypatch, tiny_policy):
    """Arguments that make the quickstart small; runs in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return [
        "--config", str(CONFIGS / "quickstart.yaml"), "--model.policy", tiny_policy, "--data.val_size", "4",
        "--data.test_size", "3", "--data.shots", "2", "--data.batch_size", "2", "--model.group_size", "2",
        "--model.max_completion_length", "8", "--data.eval_batch_size", "4",
    ]  # fmt: skip


def test_fit_validate_test_predict_follow_each_other(quick, tmp_path):
    main(["fit", *quick, "--trainer.max_steps", "2", "--trainer.val_check_interval", "2"])
    (metrics,) = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(metrics.open()))
    columns = {name for row in rows for name, value in row.items() if value}
    assert {"train/reward", "train/kl", "train/completions/mean_length", "train/rewards/iou/mean"} <= columns
    assert {"val/map", "val/box_iou_mean", "val/parse_rate"} <= columns
    assert {"train/time/rollout", "train/time/update", "train/step_time", "train/learning_rate"} <= columns
    assert list(tmp_path.rglob("events.out.tfevents*"))
    assert list(tmp_path.rglob("config.yaml"))
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    for command in ("validate", "test", "predict"):
        main([command, *quick, "--ckpt_path", str(checkpoint)])


def test_the_saved_config_starts_the_same_run_again(quick, tmp_path):
    main(["fit", *quick, "--trainer.max_steps", "1"])
    saved = next(iter(tmp_path.rglob("config.yaml")))
    main(["fit", "--config", str(saved)])
    first, second = sorted(tmp_path.rglob("metrics.csv"))

    def entropies(file):
        return [row["train/entropy"] for row in csv.DictReader(file.open()) if row.get("train/entropy")]

    assert entropies(first) == entropies(second)
    assert float(entropies(first)[0]) > 0


def test_sft_overlay_runs_on_the_same_task(quick):
    overlay = ["--config", str(CONFIGS / "method" / "sft.yaml")]
    arguments = [a for a in quick]
    position = arguments.index("--model.group_size")
    del arguments[position : position + 2]
    main(["fit", *arguments[:2], *overlay, *arguments[2:], "--trainer.max_steps", "1"])


def test_rollout_prints_questions_answers_rewards_and_advantages(quick, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["rollout", *quick, "--num_samples", "2", "--group_size", "3"])
    out = capsys.readouterr().out
    assert out.count("Question: Detect all objects") == 2
    assert out.count("Solution: <answer>[{'Position': [") == 2
    for word in ("answer", "format", "iou", "confidence", "advantage"):
        assert word in out


@pytest.mark.parametrize(
    "frame", [["--data.frame.kind", "relative", "--data.frame.extent", "500"], ["--data.frame", "{extent: 500}"]]
)
def test_the_frame_is_set_key_by_key_or_as_a_whole(quick, capsys, frame):
    main(["rollout", *quick, *frame, "--num_samples", "1"])
    assert "between 0 and 500" in " ".join(capsys.readouterr().out.split())


def test_configs_lists_and_copies(tmp_path, capsys):
    main(["configs"])
    listed = capsys.readouterr().out
    assert "quickstart.yaml" in listed
    assert "coco.yaml" in listed
    main(["configs", "--copy", str(tmp_path / "c")])
    assert (tmp_path / "c" / "base.yaml").read_bytes() == (CONFIGS / "base.yaml").read_bytes()
    (tmp_path / "c" / "base.yaml").write_text("mine")
    main(["configs", "--copy", str(tmp_path / "c")])
    assert (tmp_path / "c" / "base.yaml").read_text() == "mine"
    assert "left alone" in capsys.readouterr().out


def test_an_unknown_key_is_named(quick, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *quick, "--model.groop_size", "3"])
    assert "groop_size" in capsys.readouterr().err


def test_an_unknown_key_in_a_file_is_named(quick, tmp_path, capsys):
    (tmp_path / "more.yaml").write_text("data:\n  init_args:\n    shotz: 3\n")
    with pytest.raises(SystemExit):
        main(["fit", *quick, "--config", str(tmp_path / "more.yaml")])
    assert "shotz" in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["fsdp", "lightning.pytorch.strategies.FSDPStrategy"])
def test_fsdp_names_fsdp2_and_ddp(quick, strategy):
    with pytest.raises(ConfigConflictError, match=r"fsdp2.*ddp"):
        main(["fit", *quick, "--trainer.strategy", strategy])


def test_a_processor_other_than_the_policy_is_refused(quick):
    with pytest.raises(ConfigConflictError, match=r"data.processor is 'other'.*leave data.processor out"):
        main(["fit", *quick, "--data.processor", "other"])


def test_swapping_the_optimiser_on_the_command_line_leaks_nothing(tiny_policy, capsys):
    import yaml

    with pytest.raises(SystemExit):
        main([
            "fit", "--model", "GRPOModule", "--model.policy", tiny_policy, "--data", "ShapesDataModule",
            # By its full name: an earlier test has imported bitsandbytes, which has a SGD too.
            "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1", "--print_config",
        ])  # fmt: skip
    optimizer = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]
    assert optimizer["init_args"]["weight_decay"] == 0
    assert "betas" not in optimizer["init_args"]


def test_from_a_terminal_an_error_is_one_line_and_status_2(tmp_path, tiny_policy):
    command = [sys.executable, "-m", "rft_lightning", "fit", "--config", str(CONFIGS / "quickstart.yaml")]
    result = subprocess.run(
        [*command, "--model.policy", tiny_policy, "--model.group_size", "1"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "group_size is 1, expected at least 2" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_loader_worker_is_one_line_too(tmp_path, tiny_policy):
    command = [sys.executable, "-m", "rft_lightning", "fit", "--config", str(CONFIGS / "quickstart.yaml")]
    result = subprocess.run(
        [*command, "--model.policy", tiny_policy, "--data.num_workers", "1", "--data.max_prompt_length", "5",
         "--data.val_size", "4", "--data.shots", "2"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("rft: ")]
    assert "max_prompt_length=5" in line
    assert "Traceback" not in result.stderr


def test_the_progress_bar_can_be_switched_off(quick):
    main(["fit", *quick, "--trainer.enable_progress_bar", "false", "--trainer.fast_dev_run", "1"])


def test_rollout_reads_a_checkpoint(quick, tmp_path, capsys):
    main(["fit", *quick, "--trainer.max_steps", "1"])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    main(["rollout", *quick, "--num_samples", "1", "--ckpt_path", str(checkpoint)])
    assert "advantage" in capsys.readouterr().out
    with pytest.raises(ConfigConflictError, match="num_samples >= 1, found 0"):
        main(["rollout", *quick, "--num_samples", "0"])
    with pytest.raises(CheckpointError, match=r"No checkpoint at .*gone.ckpt"):
        main(["rollout", *quick, "--num_samples", "1", "--ckpt_path", str(tmp_path / "gone.ckpt")])


def test_a_missing_checkpoint_is_a_named_error(tmp_path, monkeypatch, tiny_policy):
    monkeypatch.chdir(tmp_path)
    for command in ("fit", "validate"):
        with pytest.raises(CheckpointError, match=r"No checkpoint at nope\.ckpt"):
            main(
                [
                    command,
                    "-c",
                    str(CONFIGS / "quickstart.yaml"),
                    "--model.policy",
                    tiny_policy,
                    "--ckpt_path",
                    "nope.ckpt",
                ]
            )
