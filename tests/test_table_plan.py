"""Plans of tables: commands that can be run, once each, in order, and what they cost."""

import contextlib
import io
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from rft_lightning.cli import main
from rft_lightning.errors import ConfigConflictError
from rft_lightning.report.table_cost import Cost, evaluation_cost, total, training_cost
from rft_lightning.report.table_files import load_table, shipped_tables
from rft_lightning.report.table_plan import Choice, Plan, config_file, script
from rft_lightning.report.tables import run_table
from tests.table_files import write_evaluation

ROOT = Path(__file__).parent.parent
FOUR_SHOT = Choice(models=["2B"], shots=[4], seeds=[1])
RFT_RUN = "runs/paper/table3/2B/rft_4shot/seed1"


def plan_of(word: str, choice: Choice | None = None, root: Path = Path("runs/paper")) -> Plan:
    return Plan(load_table(word), root, choice or Choice())


def text_of(plan: Plan) -> str:
    return script(plan, peak_flops=1e14, utilisation=0.1)


def commands(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("rft ")]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_commands_of_a_row_as_a_whole():
    """Training, and the evaluations of a method: every category, the published map, an oracle."""
    found = commands(text_of(plan_of("3", Choice(models=["2B"], methods=["RFT"], shots=[4], seeds=[1]))))
    files = "-c configs/paper/table3_coco.yaml"
    start = "--model.policy Qwen/Qwen2-VL-2B-Instruct"
    run = f"{files} --data.shots 4 --seed_everything 1 {start} --model.group_size 8"
    base, asked = "runs/paper/table3/2B/zero_shot/evaluation/presence", "--model.max_completion_length 1024"
    end = f"--split test --ckpt_path {RFT_RUN}/csv/version_0/checkpoints/last.ckpt --output_dir {RFT_RUN}/evaluation"
    mapped = f"--data.query_mode map --data.presence_map {base}/presence_map.json"
    assert found == [
        f"rft fit {run} --run_dir {RFT_RUN}",
        f"rft evaluate {run} {asked} --data.query_mode all {end}/all",
        f"rft evaluate {files} -c configs/protocol/presence.yaml {start} --model.max_completion_length 128 "
        f"--data.query_mode all --split test --output_dir {base}",
        f"rft evaluate {run} {asked} {mapped} {end}/map",
        f"rft evaluate {run} {asked} --data.query_mode gt {end}/gt",
    ]


def test_sft_then_rft_goes_on_from_the_supervised_policy():
    found = commands(
        text_of(plan_of("7", Choice(models=["7B"], methods=["SFT then RFT"], seeds=[0], evaluations=["all"])))
    )
    first, second = [command for command in found if command.startswith("rft fit")]
    assert "-c configs/paper/sft.yaml" in first
    assert "group_size" not in first
    assert first.endswith("--run_dir runs/paper/table7/7B/sft/seed0")
    assert "sft.yaml" not in second
    assert "--model.policy runs/paper/table7/7B/sft/seed0/csv/version_0/policy --model.group_size 4" in second
    assert second.endswith("--run_dir runs/paper/table7/7B/sft_then_rft/seed0")


def test_table_8_tests_what_table_7_trained():
    fits = [command for command in commands(text_of(plan_of("8"))) if command.startswith("rft fit")]
    assert fits
    assert set(fits) == {command for command in commands(text_of(plan_of("7"))) if command.startswith("rft fit")}


def test_comparison_systems_are_evaluated_alone():
    found = commands(text_of(plan_of("6", Choice(methods=["GroundedSAM"], evaluations=["test", "val"]))))
    files = "-c configs/paper/table6_lisa.yaml -c configs/baselines/grounded_sam.yaml"
    folder = "runs/paper/table6/systems/groundedsam/evaluation"
    assert found == [f"rft evaluate {files} --split {s} --output_dir {folder}/{s}" for s in ("test", "val")]


def test_the_map_of_the_tuned_model_is_planned_where_it_is_asked_for():
    everything = text_of(plan_of("3", FOUR_SHOT))
    assert "map_tuned" not in everything
    choice = Choice(models=["2B"], methods=["RFT", "zero-shot"], shots=[4], seeds=[1], evaluations=["map_tuned"])
    presence, mapped = [c for c in commands(text_of(plan_of("3", choice))) if c.startswith("rft evaluate")]
    own = f"{RFT_RUN}/evaluation/presence"
    assert presence.endswith(f"--ckpt_path {RFT_RUN}/csv/version_0/checkpoints/last.ckpt --output_dir {own}")
    assert f"--data.presence_map {own}/presence_map.json" in mapped


@pytest.mark.parametrize("name", sorted(shipped_tables()))
def test_every_plan_is_a_script_of_commands_on_existing_files_in_order(name):
    """Each command once, and after those whose files it reads."""
    text = text_of(plan_of(name))
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    found = [shlex.split(command) for command in commands(text)]
    assert len(found) == len(plan_of(name).steps)
    written: set[str] = set()
    for words in found:
        assert words[:2] in (["rft", "fit"], ["rft", "evaluate"])
        for option, value in pairwise(words):
            if option == "-c":
                assert Path(value).is_file()
            elif option in ("--run_dir", "--output_dir"):
                assert value not in written
                written.add(value)
            elif value.startswith("runs/"):
                assert any(value.startswith(f"{folder}/") for folder in written), value


@pytest.mark.parametrize("name", sorted(shipped_tables()))
def test_every_row_is_planned_with_every_seed(name):
    table = load_table(name)
    folders = {str(key.rsplit("/evaluation/", 1)[0]) for key in plan_of(name).steps if "/evaluation/" in key}
    expected = sum(len(table.seeds) if row.trainings else 1 for row in table.rows) * len(table.recipes)
    assert len(folders) == expected


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("2", Choice(methods=["SFT"], shots=[8])),
        ("3", Choice(models=["7B"], methods=["RFT"], evaluations=["map"])),
        ("6", Choice(methods=["X-Decoder"], evaluations=["test"])),
        ("6", Choice(models=["2B"], methods=["SFT"], evaluations=["val_lisa"])),
        ("7", Choice(models=["2B"], methods=["SFT"], evaluations=["map_tuned"])),
        ("shapes_table7", Choice(methods=["SFT then RFT"])),
    ],
)
def test_the_command_line_takes_what_is_planned(name, choice):
    """All options exist, and the recipe has the steps, prompts and tokens that the cost is of."""
    choice.seeds = [2]
    plan = plan_of(name, choice)
    kinds = {re.sub(r"runs/paper/\S+", "", " ".join(step.words)): step for step in plan.steps.values()}
    for step in list(kinds.values())[-3:]:
        config = printed(step.words[1:])
        if step.words[1] == "fit":
            assert config["trainer"]["max_steps"] == plan.table.steps
            assert config["data"]["init_args"]["batch_size"] == plan.table.prompts_per_step
            assert config["model"]["init_args"]["max_completion_length"] == plan.table.completion_tokens
            assert config["seed_everything"] == 2
        else:
            assert config["output_dir"] == str(step.output.parent)


def printed(words: list[str]) -> dict:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        main([*words, "--print_config"])
    assert end.value.code in (0, None)
    return yaml.safe_load(out.getvalue())


@pytest.mark.parametrize("name", [name for name in sorted(shipped_tables()) if name not in ("table8",)])
def test_the_cost_is_that_of_the_recipe(name):
    """Group sizes are planned as options; steps and prompts are the recipe's own."""
    table = load_table(name)
    for recipe in table.recipes.values():
        config = printed(["fit", "-c", config_file(recipe.fit or recipe.file)])
        prompts = config["data"]["init_args"]["batch_size"] * config["trainer"]["devices"]
        assert (config["trainer"]["max_steps"], prompts) == (table.steps, table.prompts_per_step)
        facts = {"data": config["data"]["class_path"].rsplit(".", 1)[-1], **config["data"]["init_args"]}
        overrides = {k.removeprefix("data."): v for e in recipe.evaluations.values() for k, v in e.overrides.items()}
        assert recipe.match.items() <= {**facts, **overrides}.items()


def test_what_is_done_is_commented_out(tmp_path):
    before = plan_of("3", FOUR_SHOT, tmp_path)
    assert not any(step.done for step in before.steps.values())
    run = tmp_path / "table3/2B/rft_4shot/seed1"
    for name in ("all", "map"):
        write_evaluation(run / "evaluation" / name, metrics={})
    plan = plan_of("3", FOUR_SHOT, tmp_path)
    assert [key for key, step in plan.steps.items() if step.done] == [
        str(run / "evaluation" / n) for n in ("all", "map")
    ]
    write_evaluation(run / "evaluation" / "gt", metrics={})
    plan = plan_of("3", FOUR_SHOT, tmp_path)
    # Nothing needs the policy any more; the map is needed by other rows.
    assert [step.done for key, step in plan.steps.items() if key.startswith(str(run))] == [True] * 4
    assert not plan.steps[str(tmp_path / "table3/2B/zero_shot/evaluation/presence")].done
    text = text_of(plan)
    assert f"# rft fit {shlex.join(plan.steps[str(run)].words[2:])}" in text.splitlines()
    assert "of which 4 are done" in text
    assert plan.left().steps == before.left().steps - 200


def test_a_supervised_run_is_needed_while_what_follows_it_is(tmp_path):
    sft, second = tmp_path / "table3/2B/sft_4shot/seed1", tmp_path / "table3/2B/sft_then_rft_4shot/seed1"
    for name in ("all", "map", "gt"):
        write_evaluation(sft / "evaluation" / name, metrics={})
    assert not plan_of("3", FOUR_SHOT, tmp_path).steps[str(sft)].done
    policy = second / "csv/version_0/policy/config.json"
    policy.parent.mkdir(parents=True)
    policy.touch()
    steps = plan_of("3", FOUR_SHOT, tmp_path).steps
    assert steps[str(sft)].done
    assert steps[str(second)].done


def test_an_interrupted_training_goes_on_from_its_checkpoint(tmp_path):
    run = tmp_path / "table3/2B/rft_4shot/seed1"
    checkpoint = run / "csv/version_0/checkpoints/last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    steps = plan_of("3", FOUR_SHOT, tmp_path).steps
    assert not steps[str(run)].done
    assert steps[str(run)].words[-2:] == ["--ckpt_path", str(checkpoint)]
    # The second attempt logs into a folder of its own, which is where its policy is evaluated from.
    assert str(run / "csv/version_1/checkpoints/last.ckpt") in steps[str(run / "evaluation/all")].words
    done = run / "csv/version_1/policy/config.json"
    done.parent.mkdir(parents=True)
    done.touch()
    steps = plan_of("3", FOUR_SHOT, tmp_path).steps
    assert steps[str(run)].done
    assert str(run / "csv/version_1/checkpoints/last.ckpt") in steps[str(run / "evaluation/all")].words


def test_costs_by_hand():
    # 2 steps of 3 prompts with 4 completions each: 24 of at most 5 tokens after prompts of 7.
    rft = training_cost(steps=2, prompts_per_step=3, group_size=4, parameters=10, prompt_tokens=7, completion_tokens=5)
    assert rft == Cost(steps=2, prompts=6, completions=24, tokens=120, operations=2 * 10 * 5 * 6 * (7 + 20))
    sft = training_cost(
        steps=2, prompts_per_step=3, group_size=None, parameters=10, prompt_tokens=7, completion_tokens=5
    )
    assert sft == Cost(steps=2, prompts=6, operations=2 * 10 * 3 * 6 * 12)
    asked = evaluation_cost(questions=9, parameters=10, prompt_tokens=7, completion_tokens=5)
    assert asked == Cost(questions=9, tokens=45, operations=2 * 10 * 9 * 12)
    unknown = evaluation_cost(questions=None, parameters=10, prompt_tokens=7, completion_tokens=5)
    assert total([rft, sft, asked, unknown]) == Cost(4, 12, 24, 165, 9, rft.operations + sft.operations + 2160, 1)
    assert Cost(operations=3600e12).gpu_hours(1e13, 0.1) == 1.0


def test_totals_of_a_table():
    """16 rows of Table 3 are trained: 10 with SFT or RFT on top alone for 2B, and so on, each with 3 seeds."""
    left = plan_of("3").left()
    trained = [row for row in load_table("3").rows if row.trainings]
    assert left.steps == 200 * 3 * len(trained)
    groups = {"2B": 8, "7B": 4}
    completions = [3200 * 3 * groups[row.model or ""] for row in trained if row.method != "SFT"]
    assert left.completions == sum(completions)


def test_more_words_reach_every_command():
    plan = Plan(load_table("3"), Path("r"), FOUR_SHOT, ["--data.root", "my folder"])
    assert all("--data.root 'my folder'" in command for command in commands(text_of(plan)))


def test_elsewhere_the_packaged_files_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command, *_) = commands(text_of(plan_of("3", FOUR_SHOT)))
    file = shlex.split(command)[3]
    assert Path(file).is_absolute()
    assert Path(file).samefile(ROOT / "configs/paper/table3_coco.yaml")
    with pytest.raises(ConfigConflictError, match=r"no configuration file paper/none\.yaml"):
        config_file("paper/none.yaml")


def test_the_command_prints_a_script_and_writes_it(tmp_path, capsys):
    words = ["2", "--plan", "--shots", "1", "--seeds", "0", "1", "--methods", "RFT", "--runs", "r"]
    run_table([*words, "--output", str(tmp_path / "plan.sh")])
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "plan.sh").read_text()
    assert len(commands(printed)) == 4 * 2 * 2
    assert "# 200 optimiser steps, 3,200 prompts, 25,600 completions, at most 6,553,600 generated tokens" in printed
    assert "r/table2/fgvc_aircraft/2B/rft_1shot/seed1/evaluation/test" in printed


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(models=["3B"]), "--models: the table has no 3B; it has 2B, 7B"),
        (Choice(shots=[3]), "--shots: the table has no 3; it has 1, 2, 4, 8, 16"),
        (Choice(evaluations=["best"]), "--evaluations: the table has no best; it has all, map, map_tuned, gt"),
    ],
)
def test_what_the_table_has_not_is_refused(choice, message):
    with pytest.raises(ConfigConflictError, match=message):
        plan_of("3", choice)
