"""Plans of tables: commands that can be run, once each, in order, and what they cost."""

import contextlib
import io
import os
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
from rft_lightning.report.table_plan import Choice, Later, Plan, config_file
from rft_lightning.report.table_script import command, script
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
    """What is left to do, without the conditions."""
    found = (re.fullmatch(r"(?:trained .+|\[ -e .+ \]) \|\| (rft .+)", line) for line in text.splitlines())
    return [match[1] for match in found if match and not match[0].startswith("#")]


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
    end = f'--split test --ckpt_path "$(last {RFT_RUN})" --output_dir {RFT_RUN}/evaluation'
    mapped = f"--data.query_mode map --data.presence_map {base}/predictions.jsonl"
    assert found == [
        f'rft fit {run} --run_dir {RFT_RUN} --ckpt_path "$(begun {RFT_RUN})"',
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
    sft, second_run = "runs/paper/table7/7B/sft/seed0", "runs/paper/table7/7B/sft_then_rft/seed0"
    assert first.endswith(f'--run_dir {sft} --ckpt_path "$(begun {sft})"')
    assert "sft.yaml" not in second
    assert f'--model.policy "$(policy {sft})" --model.group_size 4' in second
    assert second.endswith(f'--run_dir {second_run} --ckpt_path "$(begun {second_run})"')


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
    assert presence.endswith(f'--ckpt_path "$(last {RFT_RUN})" --output_dir {own}')
    assert f"--data.presence_map {own}/predictions.jsonl" in mapped


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
            elif looked_up := re.fullmatch(r"\$\((?:last|begun|policy) (.+)\)", value):
                assert looked_up[1] in written
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
    kinds = {re.sub(r"runs/paper/[^\s)]+", "", command(step)): step for step in plan.steps.values()}
    for step in list(kinds.values())[-3:]:
        config = printed([known(word) for word in step.words[1:]])
        if step.words[1] == "fit":
            assert config["trainer"]["max_steps"] == plan.table.steps
            assert config["data"]["init_args"]["batch_size"] == plan.table.prompts_per_step
            assert config["model"]["init_args"]["max_completion_length"] == plan.table.completion_tokens
            assert config["seed_everything"] == 2
        else:
            assert config["output_dir"] == str(step.folder)


def known(word: str | Later) -> str:
    """A word as it is when nothing was interrupted."""
    found = {"begun": "null", "last": "csv/version_0/checkpoints/last.ckpt", "policy": "csv/version_0/policy"}
    if isinstance(word, str):
        return word
    return found[word.function] if word.function == "begun" else f"{word.run}/{found[word.function]}"


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
    assert f"# {command(plan.steps[str(run)])}" in text.splitlines()
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


FAKE_RFT = r"""#!/usr/bin/env bash
# Writes what rft would; a training is interrupted while there is a file to say so.
printf '%s\n' "$*" >> "$FAKE_LOG"
while [ $# -gt 0 ]; do
  case $1 in --run_dir) run=$2 ;; --output_dir) out=$2 ;; esac
  shift
done
if [ -n "$out" ]; then mkdir -p "$out"; touch "$out/metrics.json"; exit; fi
attempt=$run/csv/version_$(find "$run/csv" -maxdepth 1 -name 'version_*' 2>/dev/null | wc -l)
mkdir -p "$attempt/checkpoints"; touch "$attempt/checkpoints/last.ckpt"
if [ -e "$FAKE_STOP" ]; then rm "$FAKE_STOP"; exit 75; fi
mkdir "$attempt/policy"; touch "$attempt/policy/config.json"
"""


class Runs:
    """Runs the script of a plan with a command `rft` that writes files alone."""

    def __init__(self, folder: Path, choice: Choice) -> None:
        self.root, self.log, self.stop = folder / "my runs", folder / "log", folder / "stop"
        self.plan = plan_of("3", choice, self.root)
        self.script = text_of(self.plan)
        self.folder = folder / "bin"
        self.folder.mkdir()
        (self.folder / "rft").write_text(FAKE_RFT)
        (self.folder / "rft").chmod(0o755)

    def __call__(self) -> tuple[int, list[str]]:
        """Exit status, and the commands that ran."""
        self.log.write_text("")
        paths = f"{self.folder}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": paths, "FAKE_LOG": str(self.log), "FAKE_STOP": str(self.stop)}
        status = subprocess.run(["bash"], input=self.script, text=True, env=env, check=False).returncode
        return status, self.log.read_text().splitlines()


def test_the_same_script_goes_on_after_an_interruption(tmp_path):
    choice = Choice(models=["2B"], methods=["SFT then RFT"], shots=[4], seeds=[1], evaluations=["all", "map"])
    runs = Runs(tmp_path, choice)
    sft, second = (runs.root / f"table3/2B/{name}_4shot/seed1" for name in ("sft", "sft_then_rft"))
    runs.stop.touch()
    status, first = runs()
    assert (status, len(first)) == (75, 1)
    assert first[0].endswith(f"--run_dir {sft} --ckpt_path null")
    status, rest = runs()
    assert (status, len(rest)) == (0, len(runs.plan.steps)) == (0, 5)
    assert rest[0].endswith(f"--run_dir {sft} --ckpt_path {sft}/csv/version_0/checkpoints/last.ckpt")
    assert f"--model.policy {sft}/csv/version_1/policy " in rest[1]
    assert rest[1].endswith(f"--run_dir {second} --ckpt_path null")
    assert f"--ckpt_path {second}/csv/version_0/checkpoints/last.ckpt --output_dir {second}/evaluation/all" in rest[2]
    assert runs() == (0, [])


def test_the_tenth_attempt_is_newer_than_the_ninth(tmp_path):
    runs = Runs(tmp_path, Choice(models=["2B"], methods=["RFT"], shots=[4], seeds=[1], evaluations=["all"]))
    run = runs.root / "table3/2B/rft_4shot/seed1"
    for attempt in range(11):
        (run / f"csv/version_{attempt}/checkpoints").mkdir(parents=True)
        if attempt != 10:  # stopped before its first checkpoint
            (run / f"csv/version_{attempt}/checkpoints/last.ckpt").touch()
    _, (fit, evaluate) = runs()
    assert fit.endswith(f"--ckpt_path {run}/csv/version_9/checkpoints/last.ckpt")
    assert f"--ckpt_path {run}/csv/version_11/checkpoints/last.ckpt " in evaluate
    assert plan_of("3", runs.plan.choice, runs.root).steps[str(run)].done


def test_an_evaluation_without_its_checkpoint_is_not_one_of_the_base_model(tmp_path):
    """What is missing has a path that does not exist, not an empty one."""
    runs = Runs(tmp_path, Choice(models=["2B"], methods=["RFT"], shots=[4], seeds=[1], evaluations=["all"]))
    run = runs.root / "table3/2B/rft_4shot/seed1"
    (run / "csv/version_0/policy").mkdir(parents=True)
    (run / "csv/version_0/policy/config.json").touch()
    _, (evaluate,) = runs()
    assert f"--ckpt_path {run}/csv/version_*/checkpoints/last.ckpt --output_dir" in evaluate


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


def roots_of(words: list[str]) -> dict[str, set[str]]:
    """Configuration file -> `--data.root` of its commands in a plan."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run_table(words)
    found: dict[str, set[str]] = {}
    for line in map(shlex.split, commands(out.getvalue())):
        root = line[line.index("--data.root") + 1] if "--data.root" in line else ""
        found.setdefault(Path(line[line.index("-c") + 1]).stem, set()).add(root)
    return found


def test_data_roots_of_recipes():
    roots = ["--root", "pets37=my pets", "cars196=cars", "--root", "flowers102=a=b"]
    assert roots_of(["2", "--plan", *roots]) == {
        "table2_pets37": {"my pets"}, "table2_cars196": {"cars"}, "table2_flowers102": {"a=b"},
        "table2_fgvc_aircraft": {""},
    }  # fmt: skip
    expected = {"table7_coco": {"data/coco"}, "table8_lvis": {"data"}}
    assert roots_of(["8", "--plan", "--root", "lvis=data", "lvis.fit=data/coco"]) == expected
    assert roots_of(["8", "--plan", "--root", "lvis=data"]) == {**expected, "table7_coco": {""}}
    assert roots_of(["3", "--plan", "--root", "coco=c"]) == {"table3_coco": {"c"}}
    assert roots_of(["3", "--plan", "--options", "--data.root c"]) == {"table3_coco": {"c"}}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["2", "--options", "--data.root X"], "give --root flowers102=FOLDER pets37=FOLDER fgvc_aircraft=FOLDER cars"),
        (["2", "--options=--data.root=X"], "--data.root would be that of flowers102"),
        (["8", "--options", "--data.root X"], "give --root lvis=FOLDER lvis.fit=FOLDER"),
        (["3", "--options", "--data.root X", "--root", "coco=Y"], "Leave it out, and give --root coco=FOLDER"),
        (["2", "--root", "pets=X"], "no recipe pets; it has flowers102, pets37"),
        (["2", "--root", "pets37.fit=X"], "no recipe pets37.fit; it has"),
        (["2", "--root", "X"], "expected RECIPE=FOLDER, found 'X'"),
        (["2", "--root", "pets37="], "expected RECIPE=FOLDER, found 'pets37='"),
        (["2", "--root", "pets37=X", "pets37=Y"], "found X and Y for pets37"),
        (["3", "--options", "'"], "--options: expected words as in a shell.*No closing quotation"),
    ],
)
def test_roots_and_options_that_cannot_be_used(words, message):
    with pytest.raises(ConfigConflictError, match=message):
        run_table([words[0], "--plan", *words[1:]])


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
        (
            Choice(models=["7B"], methods=["SFT"], shots=[16]),
            "--models 7B --methods SFT --shots 16: the table has no such row. Name one of those that it has: "
            "7B, zero-shot; 7B, SFT, 4 shots; 7B, RFT, 4 shots; 7B, SFT then RFT, 4 shots.",
        ),
        (
            Choice(models=["2B"], methods=["zero-shot"], evaluations=["map_tuned"]),
            "the rows 2B, zero-shot have no such evaluation",
        ),
    ],
)
def test_what_the_table_has_not_is_refused(choice, message):
    with pytest.raises(ConfigConflictError, match=message):
        plan_of("3", choice)
