"""Presence maps: files, what they make of the questions of a data set, and the average precision of two stages."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rft_lightning.callbacks import DetectionMAP
from rft_lightning.cli import main
from rft_lightning.datamodules import (
    COCODetectionDataModule,
    CustomDetectionDataModule,
    LVISDetectionDataModule,
    Member,
    MixtureDataModule,
)
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError
from rft_lightning.presence_map import PresenceMap
from rft_lightning.sample import Answer, Prediction, PresenceTarget, unasked
from rft_lightning.tasks import PresenceTask
from tests.datamodule_checks import DataModuleChecks
from tests.fakes.coco import ANNOTATIONS, CATEGORIES, SIZES, edit, write_coco
from tests.fakes.lvis import CATEGORIES as LVIS_CATEGORIES
from tests.fakes.lvis import PICTURES, write_lvis
from tests.test_config_files import CONFIGS, parsed

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*share pictures:UserWarning", "ignore:Fewer than:UserWarning", "ignore:Left out of training:UserWarning"
)
IDS = {name: key for key, name in CATEGORIES.items()}
CLASSES = ["person", "bus", "cat", "dog", "backpack"]
# Right and wrong ones; `toothbrush` is not among the classes.
FOUND = {
    9: ["cat", "bus", "toothbrush"],
    25: [],
    30: ["dog", "cat"],
    42: ["dog"],
    61: ["person"],
    139: [],
    285: ["cat"],
}


def write_map(path: Path, content: dict) -> Path:
    path.write_text(json.dumps({str(image): names for image, names in content.items()}))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train2017", "val2017"):
        write_coco(tmp_path / "coco", split)
    return tmp_path / "coco"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_map(tmp_path / "presence_map.json", FOUND)


def data(root: Path, file: Path | None = None, **kwargs) -> COCODetectionDataModule:
    mode = {} if file is None else {"query_mode": "map", "presence_map": file}
    return COCODetectionDataModule(root=root, **{"classes": CLASSES, **mode, **kwargs})


def pairs(samples) -> list[tuple]:
    return [(sample.image_id, sample.target.category) for sample in samples]


def row(image, name: str, said: str | None, **other) -> dict:
    return {"id": f"{image}/{name}", "task": "presence", "image_id": image, "asked": name, "label": said, **other}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(found: dict, names: list[str]) -> list[dict]:
    return [row(image, name, "yes" if name in found[image] else "no") for image in found for name in names]


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_published_map_is_read(tmp_path):
    """The form of the authors' exist_map_coco_Qwen2_vl_2B_baseline.json."""
    file = tmp_path / "exist_map_coco.json"
    file.write_text('{"397133": ["person", "bottle", "bottle"], "37777": ["oven"], "252219": []}\n')
    found = PresenceMap.load(file)
    assert found.present == {"397133": ("person", "bottle"), "37777": ("oven",), "252219": ()}
    assert found.answered is None
    assert found.asks(397133, "bottle")
    assert found.asks("37777", "oven")
    assert not found.asks(252219, "oven")
    assert not found.asks(1, "person")
    assert not found.asks(397133, "bot")


def test_predictions_say_what_was_asked(tmp_path):
    rows = [row(9, "cat", "yes"), row(9, "dog", "no"), row("x/1", "cat", None, parsed=False)]
    found = PresenceMap.load(write_rows(tmp_path / "predictions.jsonl", rows))
    assert found.present == {"9": ("cat",), "x/1": ()}
    assert found.answered == {("9", "cat"), ("9", "dog"), ("x/1", "cat")}


def test_answers_of_other_systems_are_read_in_any_case_of_letters():
    found = PresenceMap.from_rows([row(9, "cat", "Yes"), row(9, "dog", "YES"), row(25, "dog", "No")])
    assert found.present == {"9": ("cat", "dog"), "25": ()}


def test_rows_of_other_tasks_are_left_out():
    rows = [row(9, "cat", "yes"), {**row(9, "dog", "yes"), "task": "detection"}]
    assert PresenceMap.from_rows(rows).present == {"9": ("cat",)}


NAMES = st.lists(st.text(max_size=8), max_size=4, unique=True).map(tuple)


@settings(max_examples=40, deadline=None)
@given(present=st.dictionaries(st.text(max_size=8), NAMES, max_size=6))
def test_what_is_written_is_read(tmp_path_factory, present):
    file = tmp_path_factory.mktemp("maps") / "new" / "map.json"
    PresenceMap(present).write(file)
    assert PresenceMap.load(file).present == present
    assert [path.name for path in file.parent.iterdir()] == ["map.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "map.json"
    PresenceMap({"1": ("cat",)}).write(file)
    monkeypatch.setattr("rft_lightning.placing.os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        PresenceMap({"2": ()}).write(file)
    assert PresenceMap.load(file).present == {"1": ("cat",)}
    assert [path.name for path in tmp_path.iterdir()] == ["map.json"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"9": ["cat"', "is no JSON"),
        ("\xff", "is no JSON"),
        ("[[9]]", "is a list; expected an object of image id -> list of category names"),
        ('{"9": "cat"}', "has cat for image '9'; expected a list of category names"),
        ('{"9": [17]}', r"has \[17\] for image '9'"),
        ('{"9": {"cat": 1}}', "for image '9'"),
    ],
)
def test_what_is_no_map_is_named(tmp_path, content, problem):
    file = tmp_path / "map.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(AnnotationError, match=problem) as caught:
        PresenceMap.load(file)
    assert str(file) in str(caught.value)
    assert "configs/protocol/presence.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "no row of a presence task"),
        ([{**row(9, "cat", "yes"), "task": "detection"}], "no row of a presence task"),
        (
            [{"task": "presence", "id": "a", "image_id": 9, "label": "yes"}],
            "Row 'a' .* has the keys task, id, image_id",
        ),
        ([row(9, "cat", "yes"), row("9", "cat", "no")], "of image 9 both that it shows 'cat' and that it does not"),
        ([row(9, "cat", "present")], "Row '9/cat' .* label is 'present', expected yes or no, or parsed false"),
        ([row(9, "cat", None)], "label is None, expected yes or no, or parsed false"),
    ],
)
def test_predictions_that_are_no_map_are_named(tmp_path, rows, problem):
    with pytest.raises(AnnotationError, match=problem):
        PresenceMap.load(write_rows(tmp_path / "predictions.jsonl", rows))


def test_predictions_that_were_cut_off_are_named(tmp_path):
    file = tmp_path / "predictions.jsonl"
    file.write_text(json.dumps(row(9, "cat", "yes")) + '\n{"id": ')
    with pytest.raises(AnnotationError, match="line 2"):
        PresenceMap.load(file)


@pytest.mark.parametrize("name", ["gone.json", "."])
def test_a_missing_file_says_how_to_make_one(tmp_path, name):
    with pytest.raises(DatasetNotFoundError, match=r"is no file.*rft evaluate -c CONFIG"):
        PresenceMap.load(tmp_path / name)


# --- rows ------------------------------------------------------------------------------------------------------------


class TestCOCOWithAMap(DataModuleChecks):
    @pytest.fixture
    def make(self, root, file):
        return lambda **kwargs: data(root, file, **kwargs)


class TestCOCOWithPresence(DataModuleChecks):
    @pytest.fixture
    def make(self, root):
        return lambda **kwargs: data(root, task=PresenceTask(), negative_fraction=0.5, **kwargs)

    def test_shots_are_nested(self):
        """Negatives follow the number of rows, so they are not a part of the nesting."""

    def test_excluded_pictures_are_in_no_training_row(self, make):
        assert 9 not in {row.image for row in make(exclude_image_ids=[9]).chosen("train")}


def boxed() -> set[tuple[int, str]]:
    return {(image, name) for _, image, name, box, crowd in ANNOTATIONS if not crowd and box[2] > 0 and name in CLASSES}


@pytest.mark.parametrize("split", ["val", "test", "predict"])
def test_the_map_splits_the_questions_of_all(root, file, split):
    everything = pairs(data(root).split(split))
    assert everything == [(image, name) for image in sorted(SIZES) for name in CLASSES]
    mapped = data(root, file)
    asked, spared = pairs(mapped.split(split)), pairs(mapped.unasked(split))
    assert asked == [pair for pair in everything if pair[1] in FOUND[pair[0]]]
    assert spared == [pair for pair in everything if pair in boxed() and pair not in asked]
    assert {(25, "cat"), (139, "bus"), (9, "dog")} <= set(spared)
    assert (25, "bus") not in spared, "a crowd cannot be missed"
    assert all(len(sample.target.boxes) for sample in mapped.unasked(split))


def test_other_modes_ask_what_they_did_and_leave_nothing_out(root):
    for mode in ("all", "gt"):
        source = data(root, query_mode=mode)
        assert list(source.unasked("test")) == []
    assert set(boxed()) < set(pairs(source.split("test")))


def test_training_rows_do_not_change(root, file):
    settings = {"shots": 1, "negative_fraction": 0.5}
    plain, mapped = data(root, **settings), data(root, file, **settings)
    assert [s.id for s in mapped.split("train")] == [s.id for s in plain.split("train")]
    assert list(mapped.unasked("train")) == []


@pytest.mark.parametrize("limits", [{"val_limit": 3}, {"val_shots": 1}, {"val_shots": 1, "val_limit": 2}], ids=str)
def test_limits_choose_the_pictures_before_the_map_does(root, file, limits):
    everything = pairs(data(root, **limits).split("val"))
    mapped = data(root, file, **limits)
    asked, spared = pairs(mapped.split("val")), pairs(mapped.unasked("val"))
    assert asked == [pair for pair in everything if pair[1] in FOUND[pair[0]]]
    assert spared == [pair for pair in everything if pair in boxed() - set(asked)]


def test_the_map_has_to_know_the_chosen_pictures_alone(root, tmp_path):
    first = write_map(tmp_path / "first.json", {image: FOUND[image] for image in sorted(SIZES)[:3]})
    assert pairs(data(root, first, val_limit=3).split("val")) == [(9, "bus"), (9, "cat"), (30, "cat"), (30, "dog")]
    with pytest.raises(ConfigConflictError, match=r"4 of the 7 pictures of the test split are not in .*first\.json"):
        data(root, first, val_limit=3).split("test")


def test_held_out_training_pictures_are_asked_by_the_map(root, file):
    mapped = data(root, file, val_split=None, val_shots=1)
    plain = data(root, val_split=None, val_shots=1)
    expected = [pair for pair in pairs(plain.split("val")) if pair[1] in FOUND[pair[0]]]
    assert pairs(mapped.split("val")) == expected
    assert expected


def test_unasked_samples_are_there_after_the_annotations_were_let_go(root, file):
    mapped = data(root, file)
    mapped.setup("test")
    (root / "annotations/instances_val2017.json").unlink()
    again = pickle.loads(pickle.dumps(mapped))
    assert pairs(again.unasked("test")) == pairs(mapped.unasked("test")) == pairs(data_of(mapped))


def data_of(mapped):
    return [mapped.unasked("test")[i] for i in range(len(mapped.unasked("test")))]


def test_a_manifest_holds_the_rows_of_all(root, file, tmp_path):
    """So that it can be used with another map, or without one."""
    written = tmp_path / "manifest.json"
    data(root, file, seed=3, shots=1).write_manifest(written)
    stated = json.loads(written.read_text())["splits"]["test"]
    assert stated["count"] == len(SIZES) * len(CLASSES)
    mapped, plain = data(root, file, manifest=written), data(root, manifest=written)
    assert pairs(mapped.split("test")) == pairs(data(root, file).split("test"))
    assert pairs(mapped.unasked("test")) == pairs(data(root, file).unasked("test"))
    assert pairs(plain.split("test")) == pairs(data(root).split("test"))


def test_the_summary_counts_what_is_not_asked(root, file):
    summary = data(root, file).summary()
    assert summary["test"]["unasked"] == len(data(root, file).unasked("test")) > 0
    assert "unasked" not in summary["train"]


def test_predictions_serve_as_a_map(root, file, tmp_path):
    rows = write_rows(tmp_path / "predictions.jsonl", rows_of(FOUND, CLASSES))
    assert pairs(data(root, rows).split("test")) == pairs(data(root, file).split("test"))


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ({"query_mode": "map"}, "presence_map None; expected a map with query_mode map"),
        ({"presence_map": "m.json"}, "query_mode is all and data.presence_map m.json"),
        ({"query_mode": "gt", "presence_map": "m.json"}, "query_mode is gt"),
        ({"query_mode": "map", "presence_map": "m.json", "task": PresenceTask()}, "ask again only where"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, setting, problem):
    for make in (COCODetectionDataModule, LVISDetectionDataModule, CustomDetectionDataModule):
        with pytest.raises(ConfigConflictError, match=problem):
            make(root=tmp_path, **setting)


def test_pictures_of_the_map_that_are_unknown_are_counted(root, tmp_path):
    file = write_map(tmp_path / "m.json", {**FOUND, 7: ["cat"], 8: []})
    with pytest.warns(
        UserWarning, match=r"2 of the 9 pictures of the presence map .* not among the 7 of the test split"
    ):
        data(root, file).split("test")


def test_predictions_that_lack_a_question_are_refused(root, tmp_path):
    rows = write_rows(tmp_path / "predictions.jsonl", rows_of(FOUND, ["cat", "dog"]))
    assert pairs(data(root, rows, classes=["cat"]).split("test"))
    with pytest.raises(
        ConfigConflictError, match=r"no answer to 21 of the 35 questions .* such as 'person' in image 9"
    ):
        data(root, rows).split("test")


def test_names_that_the_map_does_not_have_are_warned_of(root, tmp_path):
    file = write_map(tmp_path / "m.json", {image: ["backpacks", "cat"] for image in SIZES})
    source = data(root, file, classes=["cat", "backpack"])
    with pytest.warns(
        UserWarning, match=r"names 1 of the 2 wanted classes nowhere: 'backpack' \(did you mean 'backpac"
    ):
        source.split("test")
    assert (285, "backpack") in pairs(source.unasked("test"))


def test_a_map_of_other_names_is_refused(root, tmp_path):
    file = write_map(tmp_path / "m.json", {image: ["Person", "bus_"] for image in SIZES})
    with pytest.raises(ConfigConflictError, match=r"names none of the wanted classes: 'backpack'; .*'Person', 'bus_'"):
        data(root, file).split("test")


def test_a_map_that_asks_nothing_is_refused(root, tmp_path):
    nothing = write_map(tmp_path / "m.json", {image: [] for image in SIZES})
    with pytest.raises(ConfigConflictError, match=r"no category in any of its 7 pictures: all answers .* were no, or"):
        data(root, nothing).split("test")
    # Cats are where none of the pictures of the split is.
    elsewhere = write_map(tmp_path / "n.json", {**{image: [] for image in SIZES}, 1000: ["cat"]})
    with pytest.raises(
        ConfigConflictError, match=r"so there is nothing to ask\. Is it of another data set.*predictions"
    ):
        data(root, elsewhere, classes=["cat"]).split("test")


@pytest.mark.parametrize("said", [{"said": "no"}, {"said": None, "parsed": False}])
def test_a_stage_one_that_found_nothing_leaves_everything_missed(root, tmp_path, said):
    answers = write_rows(tmp_path / "p.jsonl", [row(image, name, **said) for image in SIZES for name in CLASSES])
    source = data(root, answers)
    with pytest.warns(UserWarning, match="all 35 answers of the first stage are no, or could not be read"):
        assert len(source.split("test")) == 0
    there = pairs(sample for sample in data(root).split("test") if len(sample.target.boxes))
    assert pairs(source.unasked("test")) == there
    assert len(source.unasked("test", 1)) == len(there)
    with pytest.raises(ConfigConflictError, match="nothing to ask in the test split, and a loop without a question"):
        source.setup("test")


@pytest.mark.filterwarnings("ignore:By the presence map:UserWarning", "ignore:.*args parameter:UserWarning")
def test_an_evaluation_without_a_question_is_zero(root, tmp_path):
    answers = write_rows(tmp_path / "p.jsonl", rows_of({image: [] for image in SIZES}, CLASSES))
    (tmp_path / "none.jsonl").touch()
    settings = {
        "model.path": tmp_path / "none.jsonl", "data.root": root, "data.classes": f"[{','.join(CLASSES)}]",
        "data.query_mode": "map", "data.presence_map": answers, "data.num_workers": 0, "trainer.accelerator": "cpu",
        "trainer.logger": "false", "run_dir": tmp_path / "run", "output_dir": tmp_path / "out",
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    files = [word for name in ("coco.yaml", "baselines/predictions_file.yaml") for word in ("-c", str(CONFIGS / name))]
    main(["evaluate", *files, *words])
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["samples"] == record["parse_failures"]["count"] == 0
    assert record["metrics"]["map"] == 0
    assert set(record["per_class"]) == {name for _, _, name, _, crowd in ANNOTATIONS if not crowd and name in CLASSES}
    assert set(record["per_class"].values()) == {0}


# --- presence as the task --------------------------------------------------------------------------------------------


def test_presence_asks_the_same_pairs(root):
    asked = data(root, task=PresenceTask(), negative_fraction=0.5, classes=None)
    boxes = data(root, negative_fraction=0.5, classes=None)
    for split in ("train", "val", "test"):
        samples = asked.split(split)
        assert [sample.id for sample in samples] == [sample.id for sample in boxes.split(split)]
        assert all(isinstance(sample.target, PresenceTarget) for sample in samples)
        for sample, other in zip(samples, boxes.split(split), strict=True):
            there = bool(len(other.target.boxes) or len(other.target.ignore_boxes))
            assert sample.target == PresenceTarget(
                there, other.target.category, other.target.category_id, other.image_size
            )
    assert next(s for s in asked.split("test") if (s.image_id, s.target.category) == (139, "toothbrush")).target.present
    counts = [sample.target.present for sample in asked.split("train")]
    assert counts.count(True) == counts.count(False) > 0


def test_presence_of_the_other_sets(tmp_path):
    write_lvis(tmp_path)
    source = LVISDetectionDataModule(root=tmp_path, classes=["die", "papaya"], task=PresenceTask())
    assert {(s.image_id, s.target.category, s.target.present) for s in source.split("test")} == {
        (201, "die", True), (201, "papaya", False), (202, "papaya", True), (202, "die", False),
    }  # fmt: skip


# --- LVIS, own sets, mixtures ----------------------------------------------------------------------------------------


def test_lvis_asks_only_what_is_known(tmp_path):
    """204/die is in the map, but nobody looked for dice there: the evaluation could not count an answer."""
    write_lvis(tmp_path)
    found = {201: ["die", "papaya"], 202: ["die"], 203: [], 204: ["die", "stepladder"]}
    settings = {"root": tmp_path, "classes": ["die", "papaya", "stepladder"]}
    plain = LVISDetectionDataModule(**settings)
    mapped = LVISDetectionDataModule(**settings, query_mode="map", presence_map=write_map(tmp_path / "m.json", found))
    names = {key: name for key, (name, _) in LVIS_CATEGORIES.items()}
    known = {(i, names[c]) for i, entry in PICTURES["val"].items() for c in [*entry[2], *entry[3]]}
    assert set(pairs(plain.split("test"))) == {pair for pair in known if pair[1] in settings["classes"]}
    assert pairs(mapped.split("test")) == [(201, "die"), (201, "papaya"), (202, "die"), (204, "stepladder")]
    spared = mapped.unasked("test")
    assert pairs(spared) == [(202, "papaya"), (203, "stepladder")]
    assert spared[0].target.not_exhaustive
    assert spared[0].target.frequency == "r"


@pytest.fixture
def custom(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "custom"
    folder.mkdir()
    lines = {"train": [("a", ["cat"])], "test": [("t1", ["cat", "dog"]), ("t2", ["dog"]), ("t3", [])]}
    for split, pictures in lines.items():
        rows = [
            {"image": f"{name}.png", "boxes": [[2, 2, 20, 20]] * len(labels), "labels": labels}
            for name, labels in pictures
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, _ in pictures:
            Image.new("RGB", (40, 30)).save(folder / f"{name}.png")
    return folder


def test_own_pictures_are_asked_by_their_ids(custom, tmp_path):
    everything = CustomDetectionDataModule(root=custom)
    ids = sorted({sample.image_id for sample in everything.split("test")})
    assert len(ids) == 3
    file = write_map(tmp_path / "m.json", dict(zip(ids, (["dog"], ["dog"], ["cat"]), strict=True)))
    mapped = CustomDetectionDataModule(root=custom, query_mode="map", presence_map=file)
    assert pairs(mapped.split("test")) == [(ids[0], "dog"), (ids[1], "dog"), (ids[2], "cat")]
    assert pairs(mapped.unasked("test")) == [(ids[0], "cat")]


def test_a_mixture_has_what_its_members_do_not_ask(root, file, tiny_policy):
    members = [Member(data(root)), Member(data(root, file)), Member(data(root, task=PresenceTask()))]
    mixture = MixtureDataModule(members=members, processor=tiny_policy)
    spared, own = mixture.unasked("test"), members[1].data.unasked("test")
    assert [sample.id for sample in spared] == [f"1/{sample.id}" for sample in own]
    assert [sample.image_id for sample in spared] == [f"1/{sample.image_id}" for sample in own]
    assert {sample.target.category_id for sample in spared} == {1_000_000 + s.target.category_id for s in own}
    asked = mixture.split("test")
    assert {sample.target.category_id // 1_000_000 for sample in asked} == {0, 1, 2}
    assert not {s.id for s in asked} & {s.id for s in spared}


# --- average precision of two stages ---------------------------------------------------------------------------------


def clean(content: dict) -> None:
    """Nothing that our reader and pycocotools see differently: boxes across the border, or without area."""
    content["annotations"] = [note for note in content["annotations"] if note["image_id"] != 30]


def oracle(file: Path, results: list[dict]) -> tuple[float, dict[str, float]]:
    """AP over all pictures of the file, and per class, by pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.catIds = sorted(IDS[name] for name in CLASSES)
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    assert len(evaluation.params.imgIds) == len(SIZES)
    names = [CATEGORIES[key] for key in evaluation.params.catIds]
    per_class = {n: float(precision[:, :, k][precision[:, :, k] > -1].mean()) for k, n in enumerate(names)}
    return float(np.mean(list(per_class.values()))), per_class


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_is_that_of_pycocotools_over_all_pictures(root, tmp_path, seed):
    """Stage two answers what it is asked, with boxes that jitter and some where nothing is; the rest is missed."""
    annotations = root / "annotations" / "instances_val2017.json"
    edit(annotations, clean)
    rng = np.random.default_rng(seed)
    found = {image: [name for name in CLASSES if rng.random() < 0.6] for image in SIZES}
    notes = json.loads(annotations.read_text())["annotations"]
    results = []
    for image, names in found.items():
        for name in names:
            boxes = [n["bbox"] for n in notes if (n["image_id"], n["category_id"]) == (image, IDS[name])]
            boxes += [[1.0, 1.0, 8.0, 8.0]] * int(rng.random() < 0.3)
            for x, y, width, height in boxes:
                box = [x, y, float(width * rng.uniform(0.8, 1)), height]
                entry = {"image_id": image, "category_id": IDS[name], "bbox": box, "score": float(rng.random())}
                results.append(entry)
    source = data(root, write_map(tmp_path / "m.json", found))
    predictions = [answered(sample, results) for sample in source.split("test")]
    callback = DetectionMAP()
    value, per_class = callback.score([*predictions, *map(unasked, source.unasked("test"))])
    expected, expected_per_class = oracle(annotations, results)
    assert value["map"] == pytest.approx(expected, abs=1e-12)
    assert {name: per_class[name] for name in CLASSES} == pytest.approx(expected_per_class, abs=1e-12)
    assert callback.score(predictions)[0]["map"] > expected, "what was not asked counts"


def answered(sample, results: list[dict]) -> Prediction:
    pair = (sample.image_id, sample.target.category_id)
    mine = [entry for entry in results if (entry["image_id"], entry["category_id"]) == pair]
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in mine)]
    return Prediction(sample, "?", Answer(text="?", boxes=boxes, confidences=[entry["score"] for entry in mine]))


def test_perfect_answers_to_a_map_are_worth_what_it_found(root, tmp_path):
    """By hand: of four pictures with cats three are asked, so that recall, and precision up to there, is 3/4 of 1."""
    annotations = root / "annotations" / "instances_val2017.json"
    edit(
        annotations,
        lambda c: c.update(annotations=[n for n in c["annotations"] if n["id"] in (1001, 1010, 1021, 1040)]),
    )
    source = data(root, write_map(tmp_path / "m.json", {i: ["cat"] * (i != 25) for i in SIZES}), classes=["cat"])
    asked = [
        Prediction(s, "?", Answer(text="?", boxes=s.target.boxes, no_objects=not len(s.target.boxes)))
        for s in source.split("test")
    ]
    callback = DetectionMAP()
    # 101 recalls from 0 to 1, of which 0 to 0.75 are reached.
    assert callback.score([*asked, *map(unasked, source.unasked("test"))])[0]["map"] == pytest.approx(76 / 101)
    assert callback.score(asked)[0]["map"] == pytest.approx(1.0)


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["coco", "lvis", "custom_detection", "mg"])
def test_the_overlay_changes_the_task_and_nothing_else(task):
    plain = parsed("--config", str(CONFIGS / f"{task}.yaml"))
    found = parsed("--config", str(CONFIGS / f"{task}.yaml"), "--config", str(CONFIGS / "protocol/presence.yaml"))
    expected = plain["data"]["init_args"] | {"eval_batch_size": 80, "task": found["data"]["init_args"]["task"]}
    assert found["data"]["init_args"] == expected
    assert found["data"]["init_args"]["task"] == {
        "class_path": "rft_lightning.tasks.PresenceTask",
        "init_args": {
            "rules": "strict",
            "rewards": {"presence": "rft_lightning.rewards.presence_reward"},
            "reward_weights": {"presence": 1.0},
            "template": None,
            "reward_time_limit": 10.0,
            "failed_reward": 0.0,
        },
    }
    assert found["model"]["init_args"] == plain["model"]["init_args"] | {"max_completion_length": 128}
    assert found["trainer"] == plain["trainer"]
