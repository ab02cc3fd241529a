"""Measured numbers beside published ones, from evaluation folders made by hand."""

import csv
import io
import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError
from rft_lightning.report import tables
from rft_lightning.report.table_files import load_table
from rft_lightning.report.table_plan import Choice, Plan, Step
from rft_lightning.report.table_report import csv_text, markdown
from rft_lightning.report.table_runs import find_runs, match_runs
from rft_lightning.report.tables import run_table
from tests.table_files import COCO, TINY, write_evaluation
from tests.test_config_files import CONFIGS

# What the supervised runs of a plan have other than the published ones.
LIKE_FOR_LIKE = "tuning full, not lora; thought True, not False; prompts_per_step 16, not 64"
CLASSES = ("bus", "train", "fire hydrant", "stop sign", "cat", "dog", "bed", "toilet")


def eight(value: float) -> dict[str, float]:
    return {name: value + number / 100 for number, name in enumerate(CLASSES)}


def report(word: str, *folders) -> str:
    table = load_table(word)
    return markdown(table, match_runs(table, *find_runs(folders)))


def lines_of(text: str, start: str) -> list[list[str]]:
    """Cells of the lines of a Markdown table that start like this, and of those below that leave these cells empty."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    head = [cell.strip() for cell in start.split("|")]
    found, inside = [], False
    for row in rows:
        inside = row[: len(head)] == head or (inside and not any(row[:3]))
        if inside:
            found.append(row)
    return found


@pytest.fixture
def coco_runs(tmp_path):
    """Three seeds of 4-shot RFT, one of zero-shot, and what belongs to no row."""
    runs = tmp_path / "runs"
    for seed, value in enumerate((0.40, 0.43, 0.37)):
        folder = runs / f"rft/seed{seed}/evaluation"
        facts = {**COCO, "shots": 4, "seed": seed, "samples": 40000}
        write_evaluation(folder / "all", metrics={"map": value}, per_class=eight(value), failures=4000, **facts)
        facts |= {"query_mode": "map", "presence_map": "base", "samples": 1700}
        write_evaluation(folder / "map", metrics={"map": value + 0.1}, per_class=eight(value + 0.1), **facts)
    write_evaluation(
        runs / "zero", metrics={"map": 0.196}, per_class=eight(0.1), **{**COCO, "samples": 40000, "method": "zero-shot"}
    )
    return runs


def test_a_report_as_a_whole(coco_runs):
    text = report("3", coco_runs)
    assert [" ".join(line) for line in lines_of(text, "2B | zero-shot")] == [
        "2B zero-shot  published  19.6 19.0 15.8 25.8 18.4 29.9 23.2 14.6 9.8 ",
        "   measured, all 1 19.6 10.0 11.0 12.0 13.0 14.0 15.0 16.0 17.0 0.0",
        "   difference  +0.0 -9.0 -4.8 -13.8 -5.4 -15.9 -8.2 +1.4 +7.2 ",
    ]
    rft = lines_of(text, "2B | RFT | 4")
    assert [line[3:6] for line in rft] == [
        ["published", "", "40.6"],
        ["measured, all", "3", "40.0 ± 3.0"],
        ["difference", "", "-0.6"],
        ["measured, map (base)", "3", "50.0 ± 3.0"],
        ["difference", "", "+9.4"],
    ]
    assert [line[-1] for line in rft] == ["", "10.0", "", "0.0", ""]
    assert "The published protocol is map (base)." in text
    assert "belong to no row" not in text


def test_rows_without_runs_are_dashes(coco_runs):
    assert lines_of(report("3", coco_runs), "7B | RFT | 4")[1] == ["", "", "", "measured", "0", *["-"] * 9, "-"]
    assert lines_of(report("3", coco_runs), "2B | SFT then RFT | 4") == [
        ["2B", "SFT then RFT", "4", "measured", "0", *["-"] * 10]
    ]


def test_mean_and_spread_are_those_over_seeds(coco_runs):
    table = load_table("3")
    rows = list(csv.DictReader(io.StringIO(csv_text(table, match_runs(table, *find_runs([coco_runs]))))))
    (cell,) = [r for r in rows if (r["method"], r["shots"], r["column"], r["asked"]) == ("RFT", "4", "cat", "all")]
    values = [44.0, 47.0, 41.0]
    assert float(cell["mean"]) == pytest.approx(statistics.mean(values), abs=1e-4)
    assert float(cell["std"]) == pytest.approx(statistics.stdev(values), abs=1e-4)
    assert (cell["seeds"], cell["published"], cell["difference"]) == ("3", "60.9000", "-16.9000")
    assert cell["parse_failures"] == "10.0000"


def test_csv_and_markdown_have_the_same_numbers(coco_runs):
    """Every number of a Markdown cell is that of its CSV line, rounded."""
    table = load_table("3")
    matched = match_runs(table, *find_runs([coco_runs]))
    cells = [row for row in csv.DictReader(io.StringIO(csv_text(table, matched))) if row["mean"]]
    text = markdown(table, matched)
    measured = [line for line in text.splitlines() if "| measured" in line and "| 0 |" not in line]
    shown = [cell.strip() for line in measured for cell in line.strip("|").split("|")[5:-1]]
    assert len(shown) == len(cells) == 27
    for words, cell in zip(shown, cells, strict=True):
        spread = f" ± {float(cell['std']):.1f}" if cell["std"] else ""
        assert words == f"{float(cell['mean']):.1f}{spread}"


def test_a_mean_of_several_data_sets_takes_the_seeds_that_all_have(tmp_path):
    sets = {
        "Flowers102DataModule": (2463, {0: 0.5, 1: 0.6, 2: 0.7}), "Pets37DataModule": (3669, {0: 0.7, 1: 0.8}),
        "FGVCAircraftDataModule": (3333, {0: 0.3, 1: 0.4}), "Cars196DataModule": (8041, {1: 0.2, 0: 0.1}),
    }  # fmt: skip
    for data, (samples, seeds) in sets.items():
        for seed, value in seeds.items():
            facts = {**COCO, "query_mode": None, "classes": None, "data": data, "shots": 4, "seed": seed}
            write_evaluation(tmp_path / data / str(seed), metrics={"accuracy": value}, samples=samples, **facts)
    (_, line, _) = lines_of(report("2", tmp_path), "2B | RFT | 4")
    assert line[4:] == ["2 to 3", "45.0 ± 7.1", "60.0 ± 10.0", "75.0 ± 7.1", "35.0 ± 7.1", "15.0 ± 7.1", "0.0"]
    for seed in ("0", "1"):
        (tmp_path / "Pets37DataModule" / seed / "metrics.json").unlink()
    assert lines_of(report("2", tmp_path), "2B | RFT | 4")[1][5:8] == ["-", "60.0 ± 10.0", "-"]


def test_splits_and_box_rules_of_the_grounding_table(tmp_path):
    facts = {
        **COCO,
        "data": "LISAGroundingDataModule",
        "classes": None,
        "query_mode": None,
        "steps": 500,
        "samples": 779,
    }
    first = {**facts, "box_from": "first_shape", "mask_protocol": "published_code"}
    write_evaluation(tmp_path / "a", metrics={"box_iou_mean": 0.3, "mask_iou_mean": 0.2}, **first)
    write_evaluation(tmp_path / "b", metrics={"box_iou_mean": 0.4}, **{**first, "split": "val", "samples": 200})
    write_evaluation(
        tmp_path / "c", metrics={"box_iou_mean": 0.5}, **{**facts, "box_from": "union_target", "mask_protocol": "lisa"}
    )
    lines = lines_of(report("6", tmp_path), "2B | RFT")
    assert [line[3:] for line in lines if line[3].startswith("measured")] == [
        ["measured", "1", "30.0", "40.0", "20.0", "0.0"],
        [
            "measured [differs: box_from union_target, not first_shape; mask_protocol lisa, not published_code]",
            *("1", "50.0", "-", "-", "0.0"),
        ],
    ]


def test_open_vocabulary_means_over_classes(tmp_path):
    names = [f"{colour} {kind}" for colour in ("red", "green", "blue", "yellow")
             for kind in ("circle", "square", "triangle", "star")]  # fmt: skip
    per_class = {name: 0.2 for name in names} | {"red circle": 0.6, "green square": 0.4, "blue triangle": -1.0}
    write_evaluation(tmp_path / "x", metrics={"map": 0.25}, per_class=per_class, **TINY)
    # Novel are one combination of each kind: 0.6, 0.4, one that is absent, and 0.2.
    assert lines_of(report("shapes_table7", tmp_path), "tiny | RFT")[0][5:8] == ["40.0", "20.0", "25.0"]


@pytest.mark.parametrize(
    ("facts", "mark"),
    [
        ({"steps": 25}, "steps 25, not 60"),
        ({"answers": 8, "choose": "majority"}, "answers 8, not 1; choose majority"),
        ({"temperature": 1.0}, "temperature 1.0, not 0.0"),
        ({"tuning": "lora"}, "tuning lora, not full"),
        ({"rules": "published_code"}, "rules published_code, not strict"),
        ({"group_size": 4}, "group_size 4, not 8"),
        ({"prompts_per_step": 16}, "prompts_per_step 16, not 8"),
        ({"samples": 100}, "questions 100 of 256"),
        ({"ap_protocol": "lvis"}, "ap_protocol lvis, not coco"),
        ({"score_from": "rank"}, "score_from rank, not confidence"),
        ({"mask_protocol": "published_code"}, "mask_protocol published_code, not lisa"),
        ({"acc_50": "strict"}, "acc_50 strict, not at least"),
    ],
)
def test_other_settings_are_marked_on_lines_of_their_own(tmp_path, facts, mark):
    write_evaluation(tmp_path / "a", metrics={"map": 0.5}, per_class={"circle": 0.5}, **TINY, shots=4)
    write_evaluation(tmp_path / "b", metrics={"map": 0.25}, per_class={"circle": 0.25}, **{**TINY, "shots": 4, **facts})
    lines = lines_of(report("shapes_table3", tmp_path), "tiny | RFT | 4")
    found = {line[3]: line[5] for line in lines}
    assert found == {"measured": "50.0", f"measured [differs: {mark}]": "25.0"}


def test_the_usual_group_size_is_that_of_the_model(tmp_path):
    for size, policy in ((4, "Qwen/Qwen2-VL-7B-Instruct"), (4, COCO["policy"]), (None, COCO["policy"])):
        facts = {**COCO, "shots": 4, "samples": 40000, "policy": policy, "group_size": size, "seed": 0}
        facts |= {"rules": None, "prompts_per_step": None} if size is None else {}
        name = f"{size}{policy[-11:-9]}"
        write_evaluation(tmp_path / name, metrics={"map": 0.5}, per_class=eight(0.5), **facts)
    text = report("3", tmp_path)
    (seven,) = [line[3] for line in lines_of(text, "7B | RFT | 4") if line[3].startswith("measured")]
    two = [line[3] for line in lines_of(text, "2B | RFT | 4") if line[3].startswith("measured")]
    # What is not known is not compared.
    assert seven == "measured, all"
    assert sorted(two) == ["measured, all", "measured, all [differs: group_size 4, not 8]"]


def test_an_approximation_is_not_called_what_it_stands_in_for(tmp_path):
    facts = {"data": "LISAGroundingDataModule", "task": "grounding", "box_from": "first_shape", "samples": 779}
    write_evaluation(tmp_path / "a", metrics={"box_iou_mean": 0.3}, **facts, method="OVSegApproximation")
    write_evaluation(tmp_path / "b", metrics={"box_iou_mean": 0.3}, **facts, method="GroundedSAM")
    text = report("6", tmp_path)
    assert [line[1:4] for line in lines_of(text, " | OV-Seg")] == [
        ["OV-Seg", "", "published"],
        ["", "", "measured by OVSegApproximation"],
        ["", "", "difference"],
    ]
    assert [line[3] for line in lines_of(text, " | GroundedSAM")] == ["published", "measured", "difference"]
    table = load_table("6")
    rows = list(csv.DictReader(io.StringIO(csv_text(table, match_runs(table, *find_runs([tmp_path]))))))
    names = {(row["method"], row["published_as"]) for row in rows if row["mean"]}
    assert names == {("OVSegApproximation", "OV-Seg"), ("GroundedSAM", "GroundedSAM")}


def test_classes_written_out_are_the_named_set(tmp_path):
    facts = {**COCO, "shots": 4, "samples": 40000, "classes": [*reversed(CLASSES)]}
    write_evaluation(tmp_path / "a", metrics={"map": 0.5}, per_class=eight(0.5), **facts)
    assert lines_of(report("3", tmp_path), "2B | RFT | 4")[1][5] == "50.0"
    write_evaluation(tmp_path / "a", metrics={"map": 0.5}, per_class=eight(0.5), **{**facts, "classes": [*CLASSES[1:]]})
    assert "belong to no row" in report("3", tmp_path)


def option(step: Step, name: str) -> str | None:
    """A word of a command."""
    return str(step.words[step.words.index(name) + 1]) if name in step.words else None


def test_a_default_plan_is_reported_on_as_a_whole(tmp_path):
    """Every row has its three protocols, though stage one lies among them with classes of the same names."""
    table = load_table("3")
    plan = Plan(table, tmp_path, Choice())
    for folder, step in plan.steps.items():
        if step.is_training:
            continue
        path = Path(folder).relative_to(tmp_path)
        model, trained, seed = path.parts[1], path.parts[2], option(step, "--seed_everything")
        presence = path.name == "presence"
        method, _, shots = trained.partition("shot")[0].rpartition("_")
        facts = {
            **COCO,
            "method": {"zero": "zero-shot", "sft_then_rft": "SFT then RFT"}.get(method, method.upper()),
            "task": "presence" if presence else "detection",
            "policy": table.models[model].policy,
            "group_size": table.models[model].rft["model.group_size"],
            "thought": True if method == "sft" else None,
            "shots": int(shots) if shots else None,
            "seed": int(seed) if seed else None,
            "query_mode": option(step, "--data.query_mode"),
            "presence_map": "base" if option(step, "--data.presence_map") else None,
        }
        questions = {"map": {"2B": 1608, "7B": 1299}[model], "gt": 5000}.get(path.name, 40000)
        metrics = {"presence_f1": 0.9} if presence else {"map": 0.5}
        write_evaluation(Path(folder), metrics=metrics, per_class=eight(0.5), samples=questions, **facts)
    text = report("3", tmp_path / "table3")
    measured = [line for line in text.splitlines() if "| measured" in line]
    assert [line.split("|")[4].strip() for line in measured] == [
        f"measured, {asked}" + mark
        for row in table.rows
        for asked in ("all", "gt", "map (base)")
        for mark in ([f" [differs: {LIKE_FOR_LIKE}]"] if row.method == "SFT" else [""])
    ]
    stage_one = [tmp_path / f"table3/{model}/zero_shot/evaluation/presence" for model in ("2B", "7B")]
    assert [line for line in text.splitlines() if line.startswith("- ")] == [
        f"- {folder}: presence evaluation, stage one" for folder in stage_one
    ]


def test_supervised_runs_differ_from_the_published_ones_in_what_these_are_known_to_be(tmp_path):
    facts = {**COCO, "method": "SFT", "shots": 4, "samples": 40000}
    write_evaluation(tmp_path / "a", metrics={"map": 0.5}, per_class=eight(0.5), **facts, thought=True)
    published = {**facts, "tuning": "lora", "prompts_per_step": 64}
    write_evaluation(tmp_path / "b", metrics={"map": 0.5}, per_class=eight(0.5), **published, thought=False)
    found = [line[3] for line in lines_of(report("3", tmp_path), "2B | SFT | 4") if line[3].startswith("measured")]
    assert sorted(found) == ["measured, all", f"measured, all [differs: {LIKE_FOR_LIKE}]"]


def measured(text: str, start: str) -> dict[str, tuple[str, str]]:
    """Which line of a row -> its seeds and its first number."""
    return {line[3]: (line[4], line[5]) for line in lines_of(text, start) if line[3].startswith("measured")}


def write_value(folder: Path, value: float, **facts) -> Path:
    """An evaluation of shapes whose numbers are all the same."""
    return write_evaluation(
        folder, metrics={"map": value}, per_class={"circle": value}, **{**TINY, "shots": 4, **facts}
    )


PLANNED = {"method": "SFT", "steps": 60, "tuning": "full", "thought": True, "prompts_per_step": 8}
WORDS = "SFT (60 steps, full, with thought, 8 prompts per step)"


@pytest.mark.parametrize(
    ("before", "mark"),
    [
        ([PLANNED], ""),
        ([{**PLANNED, "prompts_per_step": None}], ""),  # what is not known is not compared
        (
            [{**PLANNED, "tuning": "lora", "thought": False}],
            f" [differs: before SFT (60 steps, lora, no thought, 8 prompts per step), not {WORDS}]",
        ),
        (
            [{**PLANNED, "steps": 20}],
            f" [differs: before SFT (20 steps, full, with thought, 8 prompts per step), not {WORDS}]",
        ),
        ([PLANNED, PLANNED], f" [differs: before {WORDS} then {WORDS}, not {WORDS}]"),
    ],
)
def test_what_came_before_is_compared_with_the_plan(tmp_path, before, mark):
    write_value(tmp_path / "a", 0.5, method="SFT then RFT", before=before)
    assert measured(report("shapes_table3", tmp_path), "tiny | SFT then RFT | 4") == {f"measured{mark}": ("1", "50.0")}


def test_chains_of_other_starts_are_lines_of_their_own(tmp_path):
    """They were averaged as seeds of one line, or taken for the same run, when only the last training was known."""
    for seed, value in enumerate((0.5, 0.6)):
        write_value(tmp_path / f"a{seed}", value, method="SFT then RFT", seed=seed)
    write_value(tmp_path / "b", 0.1, method="SFT then RFT", seed=1, before=[{**PLANNED, "steps": 5}])
    found = measured(report("shapes_table3", tmp_path), "tiny | SFT then RFT | 4")
    assert [found.pop("measured")] == [("2", "55.0 ± 7.1")]
    ((name, numbers),) = found.items()
    assert name.startswith("measured [differs: before SFT (5 steps")
    assert numbers == ("1", "10.0")


def test_trainings_that_differ_in_other_settings_are_told_apart_by_their_hash(tmp_path):
    for seed, value in enumerate((0.5, 0.6)):
        write_value(tmp_path / f"a{seed}", value, seed=seed)
    alone = measured(report("shapes_table3", tmp_path), "tiny | RFT | 4")
    assert alone == {"measured": ("2", "55.0 ± 7.1")}
    write_value(tmp_path / "b", 0.1, seed=1, training="ffffffff")
    write_value(tmp_path / "c", 0.2, seed=1, without=["training"])
    which = "measured [differs: one of 3 trainings that differ in other settings ({})]"
    assert measured(report("shapes_table3", tmp_path), "tiny | RFT | 4") == {
        which.format("0a1b2c3d"): ("2", "55.0 ± 7.1"),
        which.format("ffffffff"): ("1", "10.0"),
        which.format("not recorded"): ("1", "20.0"),
    }


def test_recipes_of_one_table_have_hashes_of_their_own(tmp_path):
    """They differ in their data, so in their settings: a line has all of them."""
    sizes = {"Flowers102": 2463, "Pets37": 3669, "FGVCAircraft": 3333, "Cars196": 8041}
    facts = {**COCO, "query_mode": None, "classes": None, "shots": 4}
    for number, (name, size) in enumerate(sizes.items()):
        other = {**facts, "data": f"{name}DataModule", "training": f"{number}{number}"}
        write_evaluation(tmp_path / name, metrics={"accuracy": 0.2 + number / 10}, samples=size, **other)
    assert measured(report("2", tmp_path), "2B | RFT | 4") == {"measured": ("1", "35.0")}


def test_evaluations_of_earlier_versions_count_as_the_usual(tmp_path):
    """Those of the published protocol of the table, and as the planned chain."""
    facts = {
        **COCO, "data": "LVISDetectionDataModule", "classes": "few_shot_6", "shots": 10, "method": "SFT then RFT",
    }  # fmt: skip
    later = ("before", "ap_protocol", "score_from", "mask_protocol", "acc_50")
    for seed, without in enumerate(((), later)):
        write_evaluation(
            tmp_path / str(seed),
            metrics={"map": 0.1 + seed / 10},
            per_class={"die": 0.1},
            without=without,
            **{**facts, "seed": seed, "ap_protocol": "lvis_published_code"},
        )
    assert measured(report("4", tmp_path), "2B | SFT then RFT | 10") == {"measured, all": ("2", "15.0 ± 7.1")}
    write_evaluation(tmp_path / "x", metrics={"map": 0.1}, per_class={"die": 0.1}, **{**facts, "ap_protocol": "lvis"})
    mark = "[differs: ap_protocol lvis, not lvis_published_code]"
    assert f"measured, all {mark}" in measured(report("4", tmp_path), "2B | SFT then RFT | 10")


def test_a_negative_mean_is_a_number(tmp_path):
    """A mean GIoU may be; -1 alone stands for absent, and what is no number is absent too."""
    table = tmp_path / "giou.yaml"
    shipped = (CONFIGS / "paper/tables/shapes_table6.yaml").read_text()
    table.write_text(shipped.replace("{metric: acc_50}", "{metric: box_giou_mean}"))
    values = {"SFT": -0.25, "RFT": -1.0, "zero-shot": float("nan")}
    for method, value in values.items():
        metrics = {"box_iou_mean": 0.5, "box_giou_mean": value}
        facts = {**TINY, "method": method, "thought": True if method == "SFT" else None}
        write_evaluation(tmp_path / method, metrics=metrics, **facts)
    text = report(str(table), tmp_path)
    assert {method: lines_of(text, f"tiny | {method}")[0][6] for method in values} == {
        "SFT": "-25.0", "RFT": "-", "zero-shot": "-",
    }  # fmt: skip


def test_a_copy_of_a_policy_is_known_by_its_last_part(tmp_path):
    facts = {**COCO, "shots": 4, "samples": 40000, "policy": "/models/Qwen2-VL-7B-Instruct/"}
    write_evaluation(tmp_path / "a", metrics={"map": 0.5}, per_class=eight(0.5), **facts)
    assert lines_of(report("3", tmp_path), "7B | RFT | 4")[1][5] == "50.0"


def test_flagged_cells_have_notes():
    text = markdown(load_table("8"), match_runs(load_table("8"), []))
    assert re.search(r"\| 20\.7 \[3\] \|", text)
    assert "[3] 2B, RFT, mAP: printed 20.7, but the mean of the printed cells is 20.0." in text
    assert "92.5 [2]" in text


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (
            {"data": "D", "classes": None},
            "data is D, classes None; the table is on COCODetectionDataModule, classes few_",
        ),
        ({"classes": "base_65"}, "its data is COCODetectionDataModule, classes base_65"),
        ({"split": "val"}, "no column is read from split val"),
        ({"method": "GroundingDINO"}, "there is no row of method GroundingDINO"),
        ({"policy": "Qwen/Qwen3-VL-2B"}, "there is no row of method RFT with policy Qwen/Qwen3-VL-2B"),
        ({"shots": 3}, "there is no row of 2B, RFT with 3 shots"),
        ({"metrics": {"loss": 0.9}, "per_class": {}}, "it has none of the numbers of the columns, but loss"),
        # Its numbers by class are F1.
        (
            {"task": "presence", "metrics": {"presence_accuracy": 0.9, "presence_f1": 0.7}},
            ": presence evaluation, stage one",
        ),
    ],
)
def test_what_belongs_to_no_row_is_named_with_the_reason(tmp_path, facts, reason):
    facts = {**COCO, "shots": 4, "metrics": {"map": 0.5}, "per_class": eight(0.5), **facts}
    write_evaluation(tmp_path / "x" / "test", **facts)
    (line,) = [line for line in report("3", tmp_path).splitlines() if line.startswith(f"- {tmp_path / 'x' / 'test'}: ")]
    assert reason in line


def test_a_run_that_is_there_twice_with_other_numbers_is_an_error(tmp_path):
    for name, value in (("a", 0.5), ("b", 0.6)):
        write_value(tmp_path / name, value, seed=1)
    same = r"/a and .*/b are the same run, but their numbers differ: tiny, RFT, 4 shots with seed 1"
    with pytest.raises(ConfigConflictError, match=same):
        report("shapes_table3", tmp_path)
    with pytest.raises(ConfigConflictError, match="same run"):
        report("shapes_table3", tmp_path / "a", tmp_path / "b")


def test_a_copy_counts_once_and_is_named(tmp_path):
    write_value(tmp_path / "a", 0.5)
    alone = report("shapes_table3", tmp_path)
    write_value(tmp_path / "b", 0.5)
    with_copy = report("shapes_table3", tmp_path)
    assert with_copy.startswith(alone.rstrip())
    assert f"- {tmp_path}/b: the same run as {tmp_path}/a, with the same numbers; it counts once" in with_copy


def test_a_folder_named_twice_counts_once(tmp_path):
    folder = write_evaluation(tmp_path / "a", metrics={"map": 0.5}, per_class={"star": 0.5}, **TINY, shots=4)
    assert report("shapes_table3", tmp_path, folder, folder) == report("shapes_table3", tmp_path)


def test_folders_that_hold_nothing_are_errors(tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"holds no metrics\.json"):
        find_runs([tmp_path])
    with pytest.raises(DatasetNotFoundError, match="is no folder"):
        find_runs([tmp_path / "missing"])


def odd(**facts) -> str:
    """A `metrics.json` with facts that no evaluation states."""
    experiment = {"method": "RFT", "policy": "p", "data": "d", "task": "t", "split": "test", **facts}
    numbers = {"samples": 1, "metrics": {}, "per_class": {}, "parse_failures": {"count": 0}}
    return json.dumps({"experiment": experiment, **numbers})


@pytest.mark.parametrize(
    "text",
    [
        *(
            "{",
            "[]",
            "{}",
            "1",
            '{"eval_loss": 1.0}',
            '{"experiment": {"method": "RFT"}, "parse_failures": {"count": 0}}',
        ),
        *(odd(before=5), odd(before=["SFT"]), odd(before=[{"method": []}]), odd(steps=[1]), odd(seed={})),
    ],
)
def test_a_foreign_metrics_file_is_named_with_the_reason(tmp_path, text):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "metrics.json").write_text(text)
    expected = r"metrics\.json: expected what `rft evaluate` writes"
    with pytest.raises(AnnotationError, match=f"None of the 1 metrics.json that were found can be read.*{expected}"):
        find_runs([tmp_path])
    write_value(tmp_path / "a", 0.5)
    found = report("shapes_table3", tmp_path)
    assert measured(found, "tiny | RFT | 4") == {"measured": ("1", "50.0")}
    (line,) = [line for line in found.splitlines() if line.startswith(f"- {tmp_path}/x: ")]
    assert re.search(expected, line)


def test_the_command_prints_and_writes(tmp_path, capsys, coco_runs):
    files = tmp_path / "out" / "report.md", tmp_path / "out" / "report.csv"
    run_table(["3", str(coco_runs), "--output", str(files[0]), "--csv", str(files[1])])
    assert capsys.readouterr().out == files[0].read_text() == report("3", coco_runs)
    head = "table,model,method,shots,column,asked,differs,published_as,published,flag,seeds,mean"
    assert files[1].read_text().startswith(head)


def test_options_may_stand_between_the_words(tmp_path, capsys, coco_runs):
    file = tmp_path / "x.csv"
    run_table(["3", "--csv", str(file), str(coco_runs / "rft"), "--output", str(tmp_path / "x.md"), str(coco_runs)])
    assert capsys.readouterr().out == report("3", coco_runs)
    assert file.is_file()
    with pytest.raises(ConfigConflictError, match="takes two folders of evaluations, before and after; found a b c"):
        run_table(["a", "--figure", "5", "b", "--samples", "2", "c"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Name a table"),
        (["3"], "Name folders of evaluations"),
        (["3", "runs", "--plan"], "--plan takes no evaluations"),
        (["3", ".", "--seeds", "1"], "--seeds changes nothing of a report"),
        (["3", "--plan", "--csv", "x.csv"], "--csv changes nothing of --plan"),
        (["3", "--plan", "--utilisation", "0"], "0 < --utilisation <= 1"),
        (["3", "--plan", "--methods", "DPO"], "--methods: the table has no DPO; it has zero-shot, SFT, RFT, SFT then"),
        (["--figure", "4", "a"], "takes two folders"),
        (["--figure", "6", "a", "b"], "Expected --figure 4"),
        (["3", "a", "--figure", "4"], "--figure takes no table number, found 3; .* --figure 4 BEFORE AFTER"),
        (["shapes_table3", "a", "b", "--figure", "5"], "--figure takes no table number, found shapes_table3"),
        (["3", ".", "--root", "coco=X"], "--root changes nothing of a report"),
        (["--figure", "4", "a", "b", "--samples", "0"], "--samples >= 1"),
        (["--figure", "4", "a", "b", "--plan"], "--plan changes nothing of --figure"),
        (["--figure", "4", "a", "b", "--output", "x.jpg"], "a figure is written as PNG, found x.jpg"),
        (["--figure", "4", "a", "b", "--output", "x"], "Name a file that ends in .png"),
    ],
)
def test_errors_of_the_command(words, message):
    with pytest.raises(ConfigConflictError, match=message):
        run_table(words)


def test_a_file_that_cannot_be_written_is_named(tmp_path, coco_runs):
    with pytest.raises(ConfigConflictError, match="cannot be written"):
        run_table(["3", str(coco_runs), "--output", str(tmp_path)])


def test_a_report_is_never_seen_in_part(tmp_path, coco_runs, monkeypatch):
    words = ["3", str(coco_runs), "--output", str(tmp_path / "new" / "report.md")]
    run_table(words)
    monkeypatch.setattr("rft_lightning.placing.os.replace", Mock(side_effect=OSError(28, "No space left on device")))
    monkeypatch.setattr(tables, "markdown", lambda *_: "another")
    with pytest.raises(ConfigConflictError, match=r"cannot be written.*No space left"):
        run_table(words)
    assert "| " in (tmp_path / "new" / "report.md").read_text(encoding="utf-8")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.md"]
    with pytest.raises(ConfigConflictError, match="cannot be written"):
        run_table([*words[:3], "."])


def test_made_folders_are_as_evaluate_writes_them(tmp_path):
    """The facts that tables read are among those that an evaluation states."""
    from rft_lightning.evaluation.experiment import describe
    from rft_lightning.evaluation.voting import Voting

    folder = write_evaluation(tmp_path, metrics={}, **TINY)
    made = json.loads((folder / "metrics.json").read_text())["experiment"]
    stated = describe(object(), SimpleNamespace(parts=dict), None, None, split="test", voting=Voting())
    assert list(made) == list(stated)
