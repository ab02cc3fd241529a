"""The `config:` line of configuration files, and all shipped files."""

from pathlib import Path

import pytest
import yaml

from rft_lightning.config_files import merge

CONFIGS = Path(__file__).parent.parent / "configs"


def test_merge_goes_key_by_key():
    base = {"trainer": {"max_steps": 1, "devices": 2}, "seed": 0}
    assert merge(base, {"trainer": {"max_steps": 5}}) == {"trainer": {"max_steps": 5, "devices": 2}, "seed": 0}


def test_a_changed_class_brings_none_of_the_old_arguments():
    base = {"opt": {"class_path": "AdamW", "init_args": {"lr": 1, "weight_decay": 2}}}
    over = {"opt": {"class_path": "SGD", "init_args": {"lr": 3}}}
    assert merge(base, over) == over
    same = {"opt": {"class_path": "AdamW", "init_args": {"lr": 3}}}
    assert merge(base, same)["opt"]["init_args"] == {"lr": 3, "weight_decay": 2}


def test_a_class_may_be_named_by_another_spelling_of_its_path():
    base = {"opt": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1, "weight_decay": 0}}}
    over = {"opt": {"class_path": "AdamW", "init_args": {"lr": 3}}}
    assert merge(base, over)["opt"]["init_args"] == {"lr": 3, "weight_decay": 0}


def test_lists_are_replaced_and_appended_with_a_plus():
    assert merge({"a": [1]}, {"a": [2]}) == {"a": [2]}
    assert merge({"a": [1]}, {"a+": [2]}) == {"a": [1, 2]}
    assert merge({"a": [1]}, {"a+": 2}) == {"a": [1, 2]}


def test_an_appended_entry_of_a_class_that_is_there_is_merged_into_it():
    base = {"a": [{"class_path": "X"}, {"class_path": "pkg.Y", "init_args": {"n": 1, "m": 2}}]}
    over = {"a+": [{"class_path": "Y", "init_args": {"n": 3}}, {"class_path": "Z"}]}
    merged = merge(base, over)["a"]
    assert merged == [{"class_path": "X"}, {"class_path": "Y", "init_args": {"n": 3, "m": 2}}, {"class_path": "Z"}]
    assert base["a"][1]["init_args"]["n"] == 1


def parsed(*arguments: str) -> dict:
    """The configuration as the command line sees it."""
    import contextlib
    import io

    from rft_lightning.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main(["fit", *arguments, "--print_config"])
    return yaml.safe_load(out.getvalue())


def runnable() -> list[str]:
    files = sorted(CONFIGS.rglob("*.yaml"))
    return [str(f.relative_to(CONFIGS)) for f in files if "class_path" in contents(f).get("data", {})]


def contents(file: Path) -> dict:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def overlays(*, change_class: bool) -> list[str]:
    files = sorted((CONFIGS / "method").glob("*.yaml"))
    return [str(f.relative_to(CONFIGS)) for f in files if ("class_path" in contents(f)["model"]) == change_class]


@pytest.mark.parametrize("file", runnable())
def test_every_task_file_parses_and_starts_from_the_base(file):
    config = parsed("--config", str(CONFIGS / file))
    assert config["data"]["class_path"].startswith("rft_lightning.datamodules.")
    assert config["trainer"]["use_distributed_sampler"] is False
    assert config["model"]["init_args"]["policy"]


def test_the_papers_values_reach_a_task_file():
    config = parsed("--config", str(CONFIGS / "coco.yaml"))
    model = config["model"]["init_args"]
    assert config["trainer"]["max_steps"] == 200
    assert config["trainer"]["log_every_n_steps"] == 1
    assert (model["group_size"], model["top_k"], model["temperature"]) == (8, 50, 1.0)
    assert (model["max_completion_length"], model["num_iterations"], model["max_grad_norm"]) == (256, 1, 1.0)
    assert model["objective"]["init_args"]["beta"] == 0.04
    assert model["optimizer"]["init_args"]["lr"] == 1e-6
    assert model["optimizer"]["init_args"]["weight_decay"] == 0.0
    assert model["schedule"] == "linear"
    assert config["data"]["init_args"]["max_pixels"] == 401408
    assert len(config["trainer"]["callbacks"]) == 9


def test_the_command_line_wins_over_files_key_by_key():
    config = parsed("--config", str(CONFIGS / "coco.yaml"), "--trainer.max_steps", "7", "--model.objective.beta", "0")
    assert config["trainer"]["max_steps"] == 7
    assert config["trainer"]["val_check_interval"] == 50
    assert config["model"]["init_args"]["objective"]["init_args"]["beta"] == 0
    assert config["model"]["init_args"]["objective"]["init_args"]["epsilon"] == 0.2


@pytest.mark.parametrize("overlay", overlays(change_class=False))
def test_overlays_of_grpo_set_what_they_say_and_nothing_else(overlay):
    task = ["--config", str(CONFIGS / "coco.yaml")]
    config, plain = parsed(*task, "--config", str(CONFIGS / overlay)), parsed(*task)
    stated = contents(CONFIGS / overlay)
    for part in ("model", "data"):
        settings = stated.get(part, {"init_args": {}})["init_args"]
        objective = settings.pop("objective", {"init_args": {}})["init_args"]
        found, expected = config[part]["init_args"], plain[part]["init_args"]
        assert {**expected, **settings} == {**found, **({"objective": expected["objective"]} if objective else {})}
        if objective:
            expected = {**expected["objective"]["init_args"], **objective}
            assert found["objective"] == {"class_path": "rft_lightning.GRPOObjective", "init_args": expected}
        assert settings.keys() <= found.keys()


@pytest.mark.parametrize("overlay", overlays(change_class=True))
def test_overlays_that_change_a_class_leak_nothing(overlay):
    """SFT on top of a GRPO file keeps no rollout settings, and says every argument it shares."""
    config = parsed("--config", str(CONFIGS / "coco.yaml"), "--config", str(CONFIGS / overlay))
    alone = yaml.safe_load((CONFIGS / overlay).read_text(encoding="utf-8"))["model"]
    assert config["model"]["class_path"] == alone["class_path"]
    for key, value in alone["init_args"].items():
        if not isinstance(value, dict):
            assert config["model"]["init_args"][key] == value, key
    assert "group_size" not in config["model"]["init_args"]
    unstated = set(config["model"]["init_args"]) - set(alone["init_args"]) - {"policy", "lr_scheduler"}
    assert not unstated, f"{overlay} must state {sorted(unstated)}: they would be taken from the file below it"


def test_files_that_include_a_missing_file_say_so(tmp_path, capsys):
    from rft_lightning.cli import main

    (tmp_path / "a.yaml").write_text("config: gone.yaml\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "a.yaml")])
    error = capsys.readouterr().err
    assert "gone.yaml" in error
    assert error.count("\n") < 6


@pytest.mark.parametrize("file", runnable())
def test_task_files_state_every_argument_of_their_datamodule(file):
    """An argument left out could be taken from another file by the command line (same name, other class)."""
    stated = yaml.safe_load((CONFIGS / file).read_text(encoding="utf-8"))["data"]["init_args"]
    full = parsed("--config", str(CONFIGS / file))["data"]["init_args"]
    assert set(full) - set(stated) - {"processor"} == set()
