"""Definitions of tables: the published numbers, what is odd about them, and errors of a definition."""

from pathlib import Path

import pytest
import yaml

from rft_lightning.datamodules.coco import BASE_65, FEW_SHOT_8, NOVEL_15
from rft_lightning.datamodules.lvis import FEW_SHOT_6, RARE_13
from rft_lightning.errors import ConfigConflictError
from rft_lightning.report.table_definition import Stage, class_names, named_classes
from rft_lightning.report.table_files import load_table, shipped_tables
from rft_lightning.report.table_runs import SETTINGS
from tests.test_config_files import CONFIGS, parsed

PUBLISHED = tuple("2345678")


def test_the_flagged_cells_are_exactly_the_known_ones():
    found = {
        (n, str(row), column) for n in PUBLISHED for row in load_table(n).rows for column in load_table(n).flags(row)
    }
    assert found == {
        ("4", "2B, RFT, 10 shots", "kitchen_table"),
        ("4", "7B, RFT, 10 shots", "mAP"),
        ("5", "2B, RFT, 16 shots", "feline-or-canid"),
        ("8", "GroundingDINO (GroundingDINO-B)", "hippopotamus"),
        ("8", "GroundingDINO (GroundingDINO-B)", "kitchen_table"),
        ("8", "2B, RFT", "mAP"),
    }


def test_flagged_means_say_what_is_printed_and_what_it_should_be():
    table = load_table("4")
    (row,) = [row for row in table.rows if str(row) == "7B, RFT, 10 shots"]
    assert table.flags(row)["mAP"] == "printed 33.8, but the mean of the printed cells is 33.1"


def test_every_table_checks_its_printed_means():
    """But for Table 6, which has none: each mean has as many cells as the table has classes or data sets."""
    cells = {n: sum(column.mean_of is not None for column in load_table(n).columns.values()) for n in PUBLISHED}
    assert cells == {"2": 1, "3": 1, "4": 1, "5": 1, "6": 0, "7": 1, "8": 1}
    parts = {n: sum(len(column.weights) for column in load_table(n).columns.values()) for n in PUBLISHED}
    assert parts == {"2": 4, "3": 8, "4": 6, "5": 5, "6": 0, "7": 2, "8": 13}


def test_cells_by_hand():
    """A few cells of each table, copied from the paper by hand."""
    expected = [
        ("2", "2B, zero-shot", {"average": 56.0, "Cars196": 56.8}),
        ("2", "2B, RFT, 16 shots", {"average": 85.3, "Flower102": 79.2, "FGVC-Aircraft": 79.4}),
        ("3", "2B, RFT, 4 shots", {"mAP": 40.6, "bus": 30.0, "toilet": 43.1}),
        ("3", "7B, SFT, 4 shots", {"mAP": 44.1, "train": 51.7}),
        ("4", "2B, RFT, 10 shots", {"mAP": 19.4, "stepladder": 10.9}),
        ("5", "2B, SFT, 16 shots", {"mAP": 51.3, "serpent": 56.4}),
        ("6", "7B, RFT", {"mIoU test": 43.9, "mIoU val": 47.1, "gIoU test": 43.7}),
        ("6", "X-Decoder", {"mIoU test": 28.5, "mIoU val": 29.1, "gIoU test": 24.3}),
        ("7", "2B, RFT", {"mAP novel": 31.3, "mAP base": 20.6, "mAP all": 22.6}),
        ("8", "7B, RFT", {"mAP": 30.4, "egg_roll": 4.3, "sugar_bowl": 59.8}),
    ]
    for number, name, cells in expected:
        table = load_table(number)
        (row,) = [row for row in table.rows if str(row) == name]
        assert cells.items() <= table.published(row).items()


def test_columns_name_the_classes_of_the_data():
    def named(number: str) -> list[str | None]:
        return [column.ap_of for column in load_table(number).columns.values() if column.ap_of is not None]

    assert (named("3"), named("4"), named("8")) == (list(FEW_SHOT_8), list(FEW_SHOT_6), list(RARE_13))
    assert [name for name, column in load_table("8").columns.items() if column.ap_of] == list(RARE_13)
    columns = load_table("7").columns
    assert class_names(columns["mAP novel"].mean_ap_of) == list(NOVEL_15)
    assert class_names(columns["mAP base"].mean_ap_of) == list(BASE_65)


def test_named_sets_of_classes_are_what_they_name():
    assert named_classes("few_shot_8") == named_classes(list(FEW_SHOT_8)[::-1]) == set(FEW_SHOT_8)
    assert named_classes(["base_65", "novel_15"]) == {*BASE_65, *NOVEL_15}
    assert named_classes("rare_13") == set(RARE_13)
    assert named_classes("slime") == {"slime"}
    assert named_classes(None) is None


def test_what_is_extra_has_no_published_numbers():
    for name in shipped_tables():
        for row in load_table(name).rows:
            extra = row.method == "SFT then RFT" or name.startswith("shapes")
            assert (row.published is None) == extra, f"{name}: {row}"


def definition(**changes) -> dict:
    """A small table that is right but for the changes."""
    block = {
        "title": "T",
        "source": "S",
        "steps": 2,
        "prompts_per_step": 4,
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "answer_tokens": 20,
        "seeds": [0, 1],
        "models": {"m": {"policy": "org/m", "parameters": 1000.0, "rft": {"model.group_size": 3}}},
        "training": {"SFT": ["paper/sft.yaml"], "RFT": []},
        "recipes": {"r": {"file": "coco.yaml", "match": {"data": "D"}, "evaluations": {"test": {"questions": 5}}}},
        "columns": {"mean": {"mean_of": ["a", "b"]}, "a": {"ap_of": "A"}, "b": {"ap_of": "B"}},
        "rows": [{"model": "m", "method": "RFT", "shots": 1, "published": [2.0, 1.0, 3.0]}],
    }
    return {key: value for key, value in {**block, **changes}.items() if value is not ...}


def written(folder: Path, **changes) -> str:
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(definition(**changes), sort_keys=False))
    return str(file)


def test_a_definition_of_ones_own(tmp_path):
    table = load_table(written(tmp_path))
    assert (table.name, table.flags(table.rows[0])) == ("mine", {})


@pytest.mark.parametrize(("printed", "flagged"), [(2.0, False), (2.1, False), (1.9, False), (2.2, True), (1.8, True)])
def test_a_mean_is_flagged_beyond_what_rounding_explains(tmp_path, printed, flagged):
    row = {"model": "m", "method": "RFT", "published": [printed, 1.0, 3.0]}
    table = load_table(written(tmp_path, rows=[row]))
    assert list(table.flags(table.rows[0])) == (["mean"] if flagged else [])


def test_a_weighted_mean(tmp_path):
    columns = {"mean": {"metric": "map", "mean_of": {"a": 3, "b": 1}}, "a": {"ap_of": "A"}, "b": {"ap_of": "B"}}
    table = load_table(written(tmp_path, columns=columns))
    assert table.columns["mean"].mean({"a": 1.0, "b": 3.0}) == 1.5
    assert table.columns["mean"].mean({"a": 1.0, "b": None}) is None
    assert "the mean of the printed cells is 1.5" in table.flags(table.rows[0])["mean"]


RULES = {"DetectionMAP": "ap_protocol", "GroundingMaskIoU": "mask_protocol"}


@pytest.mark.parametrize("name", sorted(shipped_tables()))
def test_the_usual_scoring_and_chain_are_those_of_the_recipes(name):
    """A run of the plan differs in nothing that the plan itself says."""
    table = load_table(name)
    chains = [row for row in table.rows if len(row.trainings) > 1]
    for recipe in table.recipes.values():
        files = [word for file in (recipe.file, *table.training["SFT"]) for word in ("-c", str(CONFIGS / file))]
        config = parsed(*files)
        scoring = {"ap_protocol": "coco", "mask_protocol": "lisa"}
        for callback in config["trainer"]["callbacks"]:
            kind, arguments = callback["class_path"].rsplit(".", 1)[-1], callback.get("init_args") or {}
            if kind in RULES:
                scoring[RULES[kind]] = arguments["protocol"]
            assert arguments.get("score_from", "confidence") == SETTINGS["score_from"]
            assert arguments.get("strict", False) is (SETTINGS["acc_50"] == "strict")
        usual = {**SETTINGS, **table.usual(table.rows[0])}
        assert {name: usual[name] for name in scoring} == scoring
        trained = config["model"]["init_args"]
        assert trained["lora"] is None
        supervised = Stage("SFT", table.steps, "full", trained["with_thought"], table.prompts_per_step)
        assert [table.usual(row)["before"] for row in chains] == [(supervised,)] * len(chains)


def test_a_definition_may_say_what_its_chains_start_with(tmp_path):
    rows = [{"model": "m", "method": "SFT then RFT"}]
    before = [{"method": "SFT", "steps": 5, "thought": False}]
    table = load_table(written(tmp_path, rows=rows, settings_of={"SFT then RFT": {"before": before}}))
    assert table.usual(table.rows[0])["before"] == (Stage("SFT", steps=5, thought=False),)


ROW = {"model": "m", "method": "RFT"}
RECIPE = {"file": "coco.yaml", "match": {"data": "D"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"columms": {}}, "unknown key 'columms'; did you mean columns"),
        ({"steps": ...}, "steps is missing"),
        ({"steps": "many"}, "expected steps to be int, found 'many'"),
        ({"steps": None}, "expected steps to be int, found None"),
        ({"steps": True}, "expected steps to be int, found True"),
        ({"seeds": [0, "1"]}, r"expected seeds to be list.int., found .0, '1'."),
        ({"training": {"SFT": "paper/sft.yaml", "RFT": []}}, r"expected training to be dict.str, list.str..,"),
        ({"models": ["m"]}, "expected models to be a mapping"),
        ({"models": {"m": {"policy": "p", "parameters": "2e9", "rft": {}}}}, "expected parameters to be float"),
        ({"models": {"m": {"policy": "p", "parameters": 1, "rft": {}}}}, "models.m.rft needs model.group_size"),
        ({"training": {"DPO": []}}, "training has .'DPO'."),
        ({"settings": {"before": "SFT"}}, "to be a list of trainings, each with method, steps, .*; found 'SFT'"),
        ({"settings_of": {"RFT": {"before": [5]}}}, "expected before of the settings to be a list of trainings"),
        ({"rows": {}}, "expected rows to be a list"),
        ({"rows": [ROW, ROW]}, r"row 2 \(m, RFT\) is there twice"),
        ({"rows": [{**ROW, "published": [1.0]}]}, r"expected 3 published numbers \(mean, a, b\), found 1"),
        ({"rows": [{**ROW, "published": [1.0, "2", None]}]}, "expected published to be list.float . null."),
        ({"rows": [{**ROW, "method": "DPO"}]}, "unknown method 'DPO'; expected one of zero-shot, SFT, RFT"),
        ({"rows": [{**ROW, "model": "n"}]}, "found model 'n'; expected one of m"),
        ({"rows": [{"method": "RFT"}]}, "found model None; expected one of m"),
        ({"rows": [{**ROW, "notes": {"c": "odd"}}]}, r"notes on unknown columns .'c'."),
        ({"training": {"SFT": []}}, "training says nothing of .'RFT'."),
        ({"columns": {"a": {"metric": "map", "ap_of": "A"}}}, "expected one of metric, ap_of, mean_ap_of"),
        ({"columns": {"a": {}}}, "expected one of metric, ap_of, mean_ap_of"),
        ({"columns": {"a": {"mean_of": ["b"]}}}, "mean_of has unknown columns"),
        ({"columns": {"a": {"metric": "map", "recipe": "s"}}}, "unknown recipe 's'; there are r"),
        ({"columns": {"a": {"metric": "map", "split": "val"}}}, "no evaluation is on split val"),
        ({"columns": {"a": {"mean_ap_of": "no.such.NAMES"}}}, "mean_ap_of 'no.such.NAMES': expected a list"),
        ({"columns": {"a": {"metric": "map"}}, "recipes": {n: {**RECIPE, "evaluations": {"t": {}}} for n in "rs"}},
         "expected a recipe, one of r, s"),
        ({"recipes": {"r": RECIPE}}, "expected evaluations to be a mapping"),
        ({"recipes": {"r": {**RECIPE, "evaluations": {}}}}, "there are no evaluations"),
        ({"recipes": {"r": {**RECIPE, "evaluations": {"t": {"presence_map": "base"}}}}}, "but the recipe no presence"),
        ({"recipes": {"r": {**RECIPE, "evaluations": {"t": {"presence_map": "best"}}}}}, "one of base, tuned"),
        ({"recipes": {"r": {**RECIPE, "evaluations": {"t": {"questions": {"n": 1}}}}}}, "unknown models .'n'."),
    ],
)  # fmt: skip
def test_errors_of_a_definition(tmp_path, changes, message):
    file = written(tmp_path, **changes)
    with pytest.raises(ConfigConflictError, match=message):
        load_table(file)


def test_an_unknown_table_is_refused_with_those_there_are():
    with pytest.raises(ConfigConflictError, match=r"no table '9'.*shapes_table2.*2, 3, 4, 5, 6, 7, 8"):
        load_table("9")


def test_what_is_no_yaml_is_refused(tmp_path):
    (tmp_path / "t.yaml").write_text("a: [")
    with pytest.raises(ConfigConflictError, match="no YAML file"):
        load_table(str(tmp_path / "t.yaml"))
    (tmp_path / "t.yaml").write_text("- a")
    with pytest.raises(ConfigConflictError, match="expected a mapping with the keys of a table, found list"):
        load_table(str(tmp_path / "t.yaml"))
