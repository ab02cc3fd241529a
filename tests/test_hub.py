"""HubDataModule: published training sets of questions and solutions, in the forms they come in."""

import json
from pathlib import Path

import pytest
from PIL import Image

from rft_lightning.datamodules import HubDataModule
from rft_lightning.datamodules.hub_answers import plain_question, read_row, tagged
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError
from rft_lightning.frames import CoordinateFrame
from rft_lightning.sample import ClassTarget, DetectionTarget, GroundingTarget
from rft_lightning.tasks import ClassificationTask, DetectionTask
from tests.datamodule_checks import DataModuleChecks

SIZE = (200, 100)
QUESTION = DetectionTask().template
CATEGORIES = ("cat", "dog", "bird's nest")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "hf_cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def ask(category: str) -> str:
    return QUESTION.format(category=category, range="between 0 and 1000, integer")


def boxes(*found: list[int]) -> str:
    return f"<answer>{[{'Position': box, 'Confidence': 1} for box in found]}</answer>" if found else "No Objects"


def picture(number: int) -> Image.Image:
    """RGBA, as the published sets have them; no two alike."""
    return Image.new("RGBA", SIZE, (number * 7 % 256, number * 31 % 256, 90, 255))


def detection_rows(pictures: range) -> dict[str, list]:
    """Two questions about each picture, one of them without objects and one with a single one."""
    rows: dict[str, list] = {"image": [], "problem": [], "solution": []}
    for number in pictures:
        for shift in (0, 1):
            category = CATEGORIES[(number + shift) % 3]
            found = [[100, 200, 300, 400 + number], [0, 0, 1000, 1000]][
                : {(4, 1): 0, (3, 0): 1}.get((number, shift), 2)
            ]
            rows["image"].append(picture(number))
            rows["problem"].append(f" {ask(category)} ")
            rows["solution"].append(boxes(*found))
    return rows


def dataset(rows: dict[str, list]):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "problem": Value("string"), "solution": Value("string")})
    return Dataset.from_dict(rows, features=features)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    from datasets import DatasetDict

    folder = tmp_path_factory.mktemp("hub") / "saved"
    splits = {"train": range(9), "validation": range(20, 23), "test": range(30, 33)}
    DatasetDict({name: dataset(detection_rows(numbers)) for name, numbers in splits.items()}).save_to_disk(str(folder))
    return folder


class TestHubSavedToDisk(DataModuleChecks):
    @pytest.fixture
    def make(self, saved):
        return lambda **kwargs: HubDataModule(root=saved, test_root="@test", **kwargs)

    def picture(self, sample):
        return sample.image_id


class TestHubJson(DataModuleChecks):
    @pytest.fixture
    def make(self, tmp_path):
        for split, numbers in (("train", range(8)), ("test", range(20, 24))):
            rows = []
            for number in numbers:
                picture(number).save(tmp_path / f"{number}.png")
                name = ("rose", "tulip")[number % 2]
                rows.append({"image_path": f"{number}.png", "problem": "Which?", "solution": name})
            (tmp_path / f"{split}.json").write_text(json.dumps(rows))
        return lambda **kwargs: HubDataModule(
            root=tmp_path / "train.json", test_root=str(tmp_path / "test.json"), **kwargs
        )


@pytest.fixture(params=["saved", "one split", "parquet file", "parquet folder"])
def place(request, saved, tmp_path) -> Path:
    """The same training rows in every form."""
    if request.param == "saved":
        return saved
    rows = dataset(detection_rows(range(9)))
    if request.param == "one split":
        rows.save_to_disk(str(tmp_path / "rows"))
        return tmp_path / "rows"
    folder = tmp_path / "ViRFT_fake" / "data"
    folder.mkdir(parents=True)
    for shard in range(2):
        rows.shard(2, shard).to_parquet(str(folder / f"train-0000{shard}-of-00002.parquet"))
    return folder.parent if request.param == "parquet folder" else folder / "train-00000-of-00002.parquet"


def test_every_form_of_a_published_set(place, tiny_policy):
    data = HubDataModule(root=place, processor=tiny_policy, max_prompt_length=None)
    samples = data.split("train")
    assert len(samples) == (9 if place.suffix == ".parquet" else 18)  # the file is one of two
    assert data.class_names == sorted(CATEGORIES)
    first = samples[0]
    assert first.question == ask("cat")
    assert first.image_size == SIZE
    assert first.load_image().mode == "RGB"
    assert isinstance(first.target, DetectionTarget)
    assert first.target.boxes.tolist() == [[20, 20, 60, 40], [0, 0, 200, 100]]
    assert first.target.solution_text == boxes([100, 200, 300, 400], [0, 0, 1000, 1000])
    assert samples[0].image_id == samples[1].image_id
    batch = data.encoder([samples[0], samples[3]])
    assert [s.question for s in batch.samples] == [samples[0].question, samples[3].question]


def test_ids_do_not_depend_on_the_form(saved, tmp_path):
    rows = dataset(detection_rows(range(9)))
    rows.to_parquet(str(tmp_path / "saved.parquet"))
    one, other = (HubDataModule(root=p).split("train") for p in (saved, tmp_path / "saved.parquet"))
    assert [(s.id, s.image_id) for s in one] == [(s.id, s.image_id) for s in other]
    assert one[0].id.startswith("hub/saved/0-")


def test_rows_without_objects(saved):
    rows = HubDataModule(root=saved).rows("train")
    (empty,) = [row for row in rows if not row.instances]
    sample = next(s for s in HubDataModule(root=saved).split("train") if s.id == empty.id)
    assert len(sample.target.boxes) == 0
    assert sample.target.solution_text == "<answer>No Objects</answer>"


def test_pictures_are_not_decoded_before_a_sample_is_encoded(saved, monkeypatch):
    from PIL import PngImagePlugin

    decoded = []
    load = PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: decoded.append(1) or load(self))
    data = HubDataModule(root=saved, shots=2, val_shots=1)
    with pytest.warns(UserWarning, match="training rows are used"):
        samples = [data.split(split) for split in ("train", "val", "test")]
    assert [s.image_size for s in samples[0]] == [SIZE] * len(samples[0])
    assert decoded == []


def test_classes_and_their_ids(saved):
    some = HubDataModule(root=saved, classes=["dog"]).split("train")
    everything = {s.target.category: s.target.category_id for s in HubDataModule(root=saved).split("train")}
    assert {s.target.category: s.target.category_id for s in some} == {"dog": everything["dog"]}
    with pytest.raises(ConfigConflictError, match=r"dgo.*did you mean 'dog'"):
        HubDataModule(root=saved, classes=["dgo"]).split("train")


def test_questions_worded_anew_for_another_frame(saved, family_folder):
    policy = family_folder("qwen2_5_vl")
    with pytest.raises(ConfigConflictError, match=r"between 0 and 1000.*in pixels of the image.*data.question task"):
        HubDataModule(root=saved, processor=policy).split("train")
    data = HubDataModule(root=saved, processor=policy, question="task", max_prompt_length=None)
    (sample,) = data.encoder([data.split("train")[0]]).samples
    assert "between 0 and 1000" not in sample.question
    size = data.encoder.frame.size(SIZE)
    assert str([round(0.1 * size[0]), round(0.2 * size[1])])[1:-1] in sample.target.solution_text
    relative = CoordinateFrame("relative", extent=1000)
    assert HubDataModule(root=saved, processor=policy, frame=relative).split("train")


def test_pixels(tmp_path):
    picture(1).save(tmp_path / "1.png")
    row = {"image": "1.png", "problem": ask("cat"), "solution": "[{'bbox_2d': [20, 30, 1200, 90], 'label': 'cat'}]"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(AnnotationError, match=r"rows, row 0: .*goes beyond 1000.*data.coordinates to pixel"):
        HubDataModule(root=tmp_path / "rows.jsonl").split("train")
    (sample,) = HubDataModule(root=tmp_path / "rows.jsonl", coordinates="pixel").split("train")
    assert sample.target.boxes.tolist() == [[20, 30, 1200, 90]]
    assert sample.target.solution_text is None


def jsonl(path: Path, *rows: dict) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_conversations_with_folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture(1).save(tmp_path / name / "1.png")
    turns = [{"from": "human", "value": f"<image>{ask('cat')}"}, {"from": "gpt", "value": boxes([1, 2, 3, 4])}]
    one = jsonl(tmp_path / "one.jsonl", {"id": 1, "image": "1.png", "conversations": turns})
    two = jsonl(tmp_path / "two.jsonl", {"id": 1, "image": ["1.png"], "conversations": turns})
    data = HubDataModule(root=f"{one}:{two}", image_folders=f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    assert [s.image for s in data.split("train")] == [tmp_path / "a" / "1.png", tmp_path / "b" / "1.png"]
    assert data.split("train")[0].question == ask("cat")
    with pytest.raises(ConfigConflictError, match="1 folders for the 2 places"):
        HubDataModule(root=f"{one}:{two}", image_folders=str(tmp_path)).split("train")
    gone = HubDataModule(root=one)
    with pytest.raises(DatasetNotFoundError, match=r"one, row 0: the picture .*image_folders"):
        gone.split("train")


def test_places_of_the_same_name_are_told_apart(tmp_path):
    row = {"image": "images/1.png", "problem": "Which?", "solution": "rose"}
    places = []
    for number, name in enumerate(("a", "b", "c")):
        (tmp_path / name / "images").mkdir(parents=True)
        picture(number).save(tmp_path / name / "images" / "1.png")
        places.append(jsonl(tmp_path / name / "train.jsonl", row))
    a, b, c = places
    data = HubDataModule(root=f"{a}:{b}", test_root=str(c))
    train, test = data.split("train"), data.split("test")
    assert [s.id.rpartition("/")[0] for s in (*train, *test)] == ["hub/a/train.jsonl", "hub/b/train.jsonl", "hub/train"]
    assert [s.image_id for s in (*train, *test)] == ["a/images/1.png", "b/images/1.png", "images/1.png"]
    assert [s.load_image().getpixel((0, 0)) for s in train] == [
        picture(n).convert("RGB").getpixel((0, 0)) for n in (0, 1)
    ]
    alone = HubDataModule(root=a, test_root=str(b))
    test, train = alone.split("test"), alone.split("train")
    assert [s.id.rpartition("/")[0] for s in (*train, *test)] == ["hub/train", "hub/b/train.jsonl"]
    assert [s.image_id for s in (*train, *test)] == ["images/1.png", "b/images/1.png"]
    with pytest.raises(AnnotationError, match=r"has the row hub/train/0-\w+ twice"):
        HubDataModule(root=f"{a}:{a}").split("train")


def test_pictures_that_two_places_share_stay_one(tmp_path):
    picture(1).save(tmp_path / "1.png")
    row = {"image": "1.png", "problem": "Which?", "solution": "rose"}
    one, two = (jsonl(tmp_path / f"{name}.jsonl", row) for name in ("one", "two"))
    assert [s.image_id for s in HubDataModule(root=f"{one}:{two}").split("train")] == ["1.png", "1.png"]


def test_splits_have_ids_of_their_own(tmp_path):
    from datasets import DatasetDict

    rows = dataset(detection_rows(range(2)))
    DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "rows"))
    data = HubDataModule(root=tmp_path / "rows", test_root="@test")
    assert data.split("test")[0].id.startswith("hub/rows@test/0-")
    assert not {s.id for s in data.split("train")} & {s.id for s in data.split("test")}


def test_folders_with_an_at_sign(saved, tmp_path):
    home = tmp_path / "me@home"
    home.mkdir()
    picture(1).save(home / "1.png")
    file = jsonl(home / "rows.jsonl", {"image": "1.png", "problem": "Which?", "solution": "rose"})
    assert len(HubDataModule(root=file).split("train")) == 1
    (home / "saved").symlink_to(saved)
    data = HubDataModule(root=f"{home / 'saved'}@train", test_root="@test")
    assert [len(data.split(split)) for split in ("train", "test")] == [18, 6]
    with pytest.raises(DatasetNotFoundError, match=r"no file or folder at .*me@home/gone.jsonl"):
        HubDataModule(root=home / "gone.jsonl").split("train")


def test_columns_by_another_name(tmp_path):
    picture(1).save(tmp_path / "1.png")
    file = jsonl(tmp_path / "rows.jsonl", {"file": "1.png", "prompt": "Which?", "answer": "rose"})
    with pytest.raises(AnnotationError, match=r"no column image or images.*has file, prompt, answer.*NAME"):
        HubDataModule(root=file).split("train")
    (sample,) = HubDataModule(root=file, columns={"image": "file"}).split("train")
    assert (sample.target.label, sample.target.solution_text) == ("rose", "<answer>rose</answer>")


def test_missing_column_of_a_dataset(tmp_path):
    dataset(detection_rows(range(2))).rename_column("solution", "gold").save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(AnnotationError, match=r"no column solution or answer.*it has image, problem, gold"):
        HubDataModule(root=tmp_path / "rows").split("train")
    assert len(HubDataModule(root=tmp_path / "rows", columns={"solution": "gold"}).split("train")) == 4


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"problem": ask("cat"), "solution": "a cat"}, r"row 1: the solution 'a cat' cannot be read: expected a list"),
        ({"problem": ask("cat"), "solution": "[{'Position': [1, 2, 3]}]"}, "is no box of four numbers"),
        ({"problem": "Which?", "solution": "<answer> </answer>"}, "class name is empty"),
        ({"problem": "Find them", "solution": "[{'bbox_2d': [1, 2, 3, 4]}]"}, "names no category"),
        ({"images": ["1.png", "1.png"], "problem": "?", "solution": "x"}, "expected one picture, found 2"),
        ({"conversations": [{"value": "one"}], "problem": "?", "solution": "x"}, "found 1"),
    ],
)
def test_what_cannot_be_read_is_named(row, problem, tmp_path):
    picture(1).save(tmp_path / "1.png")
    good = {"image": "1.png", "problem": ask("cat"), "solution": boxes([1, 2, 3, 4])}
    row = row if "images" in row else {"image": "1.png", **row}
    with pytest.raises(AnnotationError, match=problem):
        HubDataModule(root=jsonl(tmp_path / "rows.jsonl", good, row)).split("train")


def test_what_is_not_there_is_named(saved, tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"no file or folder at .*gone.*no id of the Hugging Face Hub"):
        HubDataModule(root=tmp_path / "gone").split("train")
    with pytest.raises(DatasetNotFoundError, match=r"laolao77/ViRFT_COCO.*hf download.*--local-dir FOLDER"):
        HubDataModule(root="laolao77/ViRFT_COCO").split("train")
    with pytest.raises(DatasetNotFoundError, match="holds no data set"):
        HubDataModule(root=tmp_path).split("train")
    with pytest.raises(DatasetNotFoundError, match="no split 'dev'; it has train, validation, test"):
        HubDataModule(root=f"{saved}@dev").split("train")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(AnnotationError, match="cannot be read as JSON"):
        HubDataModule(root=tmp_path / "bad.json").split("train")


def test_a_damaged_picture_in_a_row(tmp_path):
    rows = detection_rows(range(2))
    picture(0).save(tmp_path / "whole.png")
    rows["image"][2] = {"bytes": (tmp_path / "whole.png").read_bytes()[:-40], "path": None}
    rows["image"][3] = {"bytes": b"no picture", "path": None}
    dataset(rows).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(DatasetNotFoundError, match=r"rows, row 3: the picture in the row cannot be read"):
        HubDataModule(root=tmp_path / "rows").split("train")
    with pytest.warns(UserWarning, match="2 pictures of train cannot be used"):
        assert len(HubDataModule(root=tmp_path / "rows", on_bad_image="skip").split("train")) == 2


def test_pictures_by_path_in_a_dataset(tmp_path):
    from datasets import Dataset

    picture(1).save(tmp_path / "1.png")
    rows = {"images": [["1.png"], [str(tmp_path / "1.png")]], "question": ["?", "?"], "answer": ["rose", "rose"]}
    Dataset.from_dict(rows).save_to_disk(str(tmp_path / "rows"))
    samples = HubDataModule(root=tmp_path / "rows", image_folders=str(tmp_path)).split("train")
    assert [s.load_image().size for s in samples] == [SIZE, SIZE]
    assert [s.image_id for s in samples] == ["1.png", f"{tmp_path.name}/1.png"]


def test_rows_without_a_solution(tmp_path):
    rows = detection_rows(range(2))
    rows["solution"][1] = None
    dataset(rows).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(AnnotationError, match=r"rows, row 1: no solution \(1 rows"):
        HubDataModule(root=tmp_path / "rows").split("train")


def test_splits_by_name(saved):
    data = HubDataModule(root=f"{saved}@train", val_root="@validation", test_root="@test")
    assert [len(data.split(split)) for split in ("train", "val", "test")] == [18, 6, 6]


@pytest.mark.parametrize(
    ("problem", "solution", "kind", "asked", "found"),
    [
        (ask("cat"), boxes([1, 2, 3, 4]), "detection", "cat", 1),
        (ask("bird's nest"), "[]", "detection", "bird's nest", 0),
        (ask("cat"), "<answer>\n no objects. </answer>", "detection", "cat", 0),
        (ask("cat"), '```json\n[{"bbox_2d": [1, 2, 3, 4], "x": null}]\n```', "detection", "cat", 1),
        ("Find", '[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]', "detection", "cat", 1),
        ("... corresponding to the instruction: the left one", "(1,2),(3,4)", "grounding", "the left one", 1),
        (
            "Output the bounding box in the image corresponding to the instruction: a cup. Output the thinking process",
            "<answer> (1,2),(3,4) </answer>", "grounding", "a cup", 1,
        ),
        ("<image>Where is it?", "[1, 2.5, 3, 4]", "grounding", "Where is it?", 1),
        ("Which?", "<answer>Boeing 707</answer>", "classification", "", 0),
        ("Which?", "707", "classification", "", 0),
    ],
)  # fmt: skip
def test_reading(problem, solution, kind, asked, found):
    reading = read_row(problem, solution)
    assert (reading.kind, reading.asked, len(reading.boxes)) == (kind, asked, found)


def test_texts():
    assert plain_question("<img>a/b.jpg</img>\n Where? ") == "Where?"
    assert tagged(" cat ") == tagged("<answer>cat</answer>") == "<answer>cat</answer>"


def test_a_task_for_all_rows(tmp_path):
    picture(1).save(tmp_path / "1.png")
    file = jsonl(tmp_path / "rows.jsonl", {"image": "1.png", "problem": "Which?", "solution": "[1, 2, 3, 4]"})
    task = ClassificationTask(subject="a thing", noun="its name")
    (sample,) = HubDataModule(root=file, task=task, question="task").split("train")
    assert sample.task is task
    assert sample.target.label == "[1, 2, 3, 4]"
    assert sample.question is None


def test_the_sample_sets(sample_data):
    hub = sample_data / "virft_hub_mini"
    for place in (hub / "ViRFT_COCO_mini", hub / "saved_to_disk" / "ViRFT_COCO_mini"):
        samples = HubDataModule(root=place).split("train")
        assert len(samples) == 12
        assert {s.target.category for s in samples if len(s.target.boxes) == 0} == {"toaster"}
        assert samples[0].load_image().mode == "RGB"
    pets = HubDataModule(root=hub / "ViRFT_CLS_pets_mini_4shot", shots=1)
    assert sorted(s.target.label for s in pets.split("train")) == pets.class_names
    assert isinstance(pets.split("train")[0].target, ClassTarget)


def test_the_sample_formats_say_the_same(sample_data):
    formats, images = sample_data / "custom_formats", str(sample_data / "coco2017_mini" / "coco")
    found = [
        HubDataModule(root=formats / "virft_build_dataset.json").split("train"),
        HubDataModule(root=formats / "easyr1.jsonl", image_folders=images).split("train"),
        HubDataModule(root=formats / "vlm_r1_conversations.jsonl", image_folders=images).split("train"),
    ]
    for samples in zip(*found, strict=True):
        assert len({sample.question for sample in samples}) == 1
        assert len({str(sample.target.boxes) for sample in samples}) == 1
        assert len({sample.target.solution_text for sample in samples}) == 1
        assert all(sample.load_image().size == sample.image_size for sample in samples)
    (lisa,) = HubDataModule(root=formats / "lisa_sft.json").split("train")
    assert isinstance(lisa.target, GroundingTarget)
    assert lisa.target.expression == "the person in front"
    assert lisa.target.solution_text == "<answer>(0,173),(650,887)</answer>"
