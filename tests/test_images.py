"""ImagesDataModule, PredictionWriter's drawings, and `rft predict` on a folder of pictures."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from rft_lightning.callbacks.predictions import PredictionWriter, drawings_of
from rft_lightning.cli import main
from rft_lightning.datamodules import ImagesDataModule, ShapesDataModule
from rft_lightning.errors import ConfigConflictError, DatasetNotFoundError, RFTError
from rft_lightning.report.drawing import Drawn, draw_boxes
from rft_lightning.sample import Answer, Prediction, Sample
from rft_lightning.tasks import ClassificationTask, DetectionTask, GroundingTask

CONFIGS = Path(__file__).parent.parent / "configs"
ASSET = "asset:tiny-qwen2-vl"


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Pictures of many kinds, in subfolders, beside files that are none."""
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    (root / ".cache").mkdir()
    base = ShapesDataModule(processor=ASSET).sample("val", 0).image
    base.save(root / "b.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees
    base.resize((160, 80)).save(root / "A.JPG", format="JPEG", exif=exif)
    base.convert("RGBA").save(root / "sub" / "b.png")
    base.convert("L").save(root / "sub" / "grey.webp")
    base.save(root / "sub" / "moving.gif", save_all=True, append_images=[base.rotate(90)])
    base.save(root / ".cache" / "hidden.png")
    (root / "notes.txt").write_text("no picture")
    return root


def images(**kwargs) -> ImagesDataModule:
    return ImagesDataModule(**{"processor": ASSET, "classes": ["cat", "dog"], **kwargs})


def test_one_question_per_picture_and_class(pictures):
    data = images(images=pictures, classes=["cat", "dog", "cat"])
    rows = data.split("predict")
    names = ["A.JPG", "b.png", "sub/b.png", "sub/grey.webp", "sub/moving.gif"]
    assert [row.id for row in rows] == [f"{name}/{asked}" for name in names for asked in ("cat", "dog")]
    assert [row.image_size for row in rows[:4]] == [(160, 80)] * 2 + [(112, 112)] * 2  # as stored, not as shown
    assert "'dog'" in rows[1].question
    assert "between 0 and 1000" in rows[1].question
    assert rows[-1].target is None
    batch = data.encoder(rows[::2])
    assert len(batch) == 5
    assert {row.load_image().mode for row in rows} == {"RGB"}
    assert rows[0].load_image().size == (160, 80)


def test_expressions_and_questions_and_classification(pictures):
    (row,) = images(images=pictures / "b.png", classes=["the red star"], task=GroundingTask()).split("predict")
    assert "instruction: the red star" in row.question
    assert row.id == "b.png/the red star"
    rows = images(images=[pictures / "b.png"], classes=None, question="How many {stars}?").split("predict")
    assert [(row.id, row.question, row.asked) for row in rows] == [("b.png", "How many {stars}?", None)]
    task = ClassificationTask(subject="a pet")
    rows = images(images=pictures / "sub", classes=None, task=task).split("predict")
    assert rows[0].id == "b.png"
    assert "containing a pet" in rows[0].question


def test_lists_name_pictures_by_their_path_and_take_each_once(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    rows = images(images=["b.png", "sub", Path("sub") / "b.png"], classes=["x"]).split("predict")
    assert [row.image_id for row in rows] == ["b.png", "sub/b.png", "sub/grey.webp", "sub/moving.gif"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"classes": None}, "DetectionTask needs exactly one of data.question"),
        ({"classes": []}, "needs exactly one"),
        ({"question": "What?"}, "found question='What\\?' and classes=\\['cat', 'dog'\\].*null"),
        ({"classes": None, "task": GroundingTask()}, "GroundingTask needs exactly one"),
        ({"task": ClassificationTask()}, "data.task.choices"),
    ],
)
def test_questions_that_do_not_fit_the_task(settings, words):
    with pytest.raises(ConfigConflictError, match=words):
        images(images="x", **settings)


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_only_for_prediction(pictures, stage):
    with pytest.raises(ConfigConflictError, match="rft predict"):
        images(images=pictures).setup(stage)


def test_missing_and_broken_pictures_are_named(pictures, tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"no file or folder at .*gone"):
        images(images=tmp_path / "gone").split("predict")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetNotFoundError, match=r"No pictures in .*empty, subfolders included.*\.jpeg.*heic"):
        images(images=tmp_path / "empty").split("predict")
    (pictures / "sub" / "broken.jpg").write_bytes(b"\xff\xd8 not really")
    with pytest.raises(DatasetNotFoundError, match=r"1 of 6 files cannot be read as pictures: .*broken.jpg"):
        images(images=pictures).split("predict")
    with pytest.raises(DatasetNotFoundError, match=r"notes.txt"):
        images(images=pictures / "notes.txt").split("predict")


# On the command line


def predict(pictures: Path, *words: str) -> list[str]:
    return [
        "predict", "-c", str(CONFIGS / "coco.yaml"), *words, "--model.policy", ASSET, "--trainer.precision", "32-true",
        "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false",
        "--model.max_completion_length", "48", "--data", "ImagesDataModule", "--data.images", str(pictures),
        "--data.num_workers", "0", "--data.min_pixels", "null", "--data.max_pixels", "1764",
    ]  # fmt: skip


def data_of(capsys, words: list[str]) -> dict:
    with pytest.raises(SystemExit):
        main([*words, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)["data"]


def test_predict_writes_lines_and_drawings(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([*predict(pictures), "--data.classes", "[circle,star]", "--data.eval_batch_size", "3"])
    captured = capsys.readouterr()
    assert "init_args" not in captured.out + captured.err
    (file,) = tmp_path.rglob("predictions.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["image_id"], row["asked"]) for row in rows[:3]] == [
        ("A.JPG", "circle"), ("A.JPG", "star"), ("b.png", "circle"),
    ]  # fmt: skip
    assert len(rows) == 10
    with_boxes = {row["image_id"] for row in rows if row["boxes"]}
    assert len(with_boxes) >= 2
    drawn = sorted((file.parent / "drawn").iterdir())
    assert len(drawn) == len(with_boxes)
    with Image.open(drawn[0]) as image:
        assert max(image.size) == 640
    assert f"({len(drawn)} pictures with boxes)" in captured.out


def test_the_files_own_data_does_not_leak_and_its_prompts_stay(pictures, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        f"config: {CONFIGS / 'coco.yaml'}\n"
        "data:\n  init_args:\n    classes: [person, bus]\n    system_prompt: Be brief.\n    seed: 5\n"
        "    task: {init_args: {rules: paper}}\n"
    )
    words = [*predict(pictures), "--data.question", "What?"]
    words[words.index("-c") + 1] = str(tmp_path / "mine.yaml")
    found = data_of(capsys, words)
    assert found["class_path"] == "rft_lightning.datamodules.ImagesDataModule"
    assert found["init_args"]["classes"] is None
    assert found["init_args"]["question"] == "What?"
    assert found["init_args"]["max_prompt_length"] == 2048
    assert found["init_args"]["system_prompt"] == "Be brief."
    assert found["init_args"]["task"]["init_args"]["rules"] == "paper"


def test_a_second_file_may_say_more_of_the_same_data(tmp_path, pictures, capsys):
    (tmp_path / "more.yaml").write_text("data:\n  init_args:\n    classes: [person]\n    seed: 5\n")
    words = [*predict(pictures), "--data.question", "What?"]
    words[3:3] = ["-c", str(tmp_path / "more.yaml")]
    found = data_of(capsys, words)["init_args"]
    assert (found["classes"], found["seed"]) == (None, 5)
    (tmp_path / "more.yaml").write_text("data:\n  init_args:\n    shots: 3\n")
    words = ["fit", "-c", str(CONFIGS / "quickstart.yaml"), "-c", str(tmp_path / "more.yaml")]
    assert data_of(capsys, [*words, "--data", "ShapesDataModule"])["init_args"]["shots"] == 3


def test_naming_the_datamodule_of_the_file_changes_nothing(capsys):
    words = ["fit", "-c", str(CONFIGS / "quickstart.yaml")]
    plain = data_of(capsys, words)
    assert data_of(capsys, [*words, "--data", "rft_lightning.datamodules.ShapesDataModule"]) == plain
    assert data_of(capsys, [*words, "--data=ShapesDataModule", "--data.shots", "3"])["init_args"]["shots"] == 3
    other = data_of(capsys, ["fit", "-c", str(CONFIGS / "coco.yaml"), "--data", "ShapesDataModule"])["init_args"]
    assert (other["shots"], other["batch_size"], other["max_pixels"]) == (None, 2, 401408)


def test_fit_on_pictures_says_what_they_are_for(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*predict(pictures), "--data.classes", "[cat]"]
    words[0] = "fit"
    with pytest.raises(RFTError, match="can be predicted on only"):
        main(words)


def test_a_file_name_that_is_no_text_is_predicted_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd").mkdir()
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    ShapesDataModule(processor=ASSET).sample("val", 0).image.save(tmp_path / "odd" / name)
    main([*predict(tmp_path / "odd"), "--data.classes", "[circle]"])
    (file,) = tmp_path.rglob("predictions.jsonl")
    assert json.loads(file.read_text(errors="surrogateescape"))["image_id"] == name


# Drawing


def prediction(path: Path | Image.Image, name: str, asked: str | None, boxes: list, target=None) -> Prediction:
    sample = Sample(name, path, target, DetectionTask(), (112, 112), image_id=name, question="?", asked=asked)
    return Prediction(sample, "", Answer(boxes=boxes))


class FakeTrainer:
    """What the writer asks of a Trainer, for one of several processes."""

    def __init__(self, folder: Path, rank: int = 0, world_size: int = 1) -> None:
        self.log_dir, self.global_rank, self.world_size = str(folder), rank, world_size
        self.is_global_zero, self.strategy = rank == 0, self

    def broadcast(self, value):
        return value

    def barrier(self) -> None:
        pass


def write(folder: Path, predictions: list[Prediction], **kwargs) -> list[str]:
    writer, trainer = PredictionWriter(**kwargs), FakeTrainer(folder)
    writer.on_predict_start(trainer, None)
    writer.on_predict_batch_end(trainer, None, predictions, None, 0)
    writer.on_predict_end(trainer, None)
    return sorted(path.name for path in (folder / "drawn").glob("*"))


def test_answers_about_one_picture_are_drawn_on_one(pictures, tmp_path):
    found = [
        prediction(pictures / "b.png", "b.png", "cat", [[5, 5, 40, 40]]),
        prediction(pictures / "sub" / "b.png", "sub/b.png", "cat", []),
        prediction(pictures / "b.png", "b.png", "dog", [[50, 50, 90, 90], [1e300, -1e300, 3, 3]]),
        prediction(pictures / "A.JPG", "../../A.JPG", None, [[5, 5, 40, 40]]),
        prediction(pictures / "sub" / "grey.webp", "A.webp", None, [[60, 5, 40, 40]]),
    ]
    assert write(tmp_path / "out", found) == ["A-2.jpg", "A.jpg", "b.jpg"]
    drawings = drawings_of([tmp_path / "out" / "predictions.jsonl"], labelled=False)
    captions = [(box.caption, box.colour) for box in drawings["b.jpg"][1]]
    assert [caption for caption, _ in captions] == ["cat 1.00", "dog 1.00", "dog 1.00"]
    assert captions[0][1] != captions[1][1] == captions[2][1]
    with Image.open(tmp_path / "out" / "drawn" / "A.jpg") as image:
        assert image.size == (640, 320)  # as stored


def test_what_is_drawn_can_be_chosen(pictures, tmp_path):
    target = ShapesDataModule(processor=ASSET).sample("val", 0).target
    found = [
        prediction(pictures / "b.png", "labelled", None, [[5, 5, 40, 40]], target),
        prediction(pictures / "A.JPG", "unlabelled", "cat", [[5, 5, 40, 40]]),
        prediction(Image.new("RGB", (9, 9)), "rendered", "cat", [[5, 5, 40, 40]]),
    ]
    assert write(tmp_path / "auto", found) == ["unlabelled.jpg"]
    assert write(tmp_path / "all", found, draw=True) == ["labelled.jpg", "unlabelled.jpg"]
    assert write(tmp_path / "none", found, draw=False) == []


def test_two_processes_draw_each_picture_once_with_all_its_boxes(pictures, tmp_path):
    """The classes of a picture are dealt out row by row, so that no process has them all."""
    names = ["b.png", "A.JPG", "sub/grey.webp"]
    shares = [
        [prediction(pictures / name, name, asked, [[5, 5, 40, 40]]) for name in names] for asked in ("cat", "dog")
    ]
    trainers = [FakeTrainer(tmp_path / "out", rank, 2) for rank in (0, 1)]
    writers = [PredictionWriter() for _ in trainers]
    for writer, trainer, share in zip(writers, trainers, shares, strict=True):
        writer.on_predict_start(trainer, None)
        writer.on_predict_batch_end(trainer, None, share, None, 0)
    files = [tmp_path / "out" / f"predictions-{rank}.jsonl" for rank in (0, 1)]
    both_done = [writers[0].close(trainers[0]), writers[1].close(trainers[1])]
    assert both_done == files
    writers[0].draw_share(trainers[0])
    first = {path.name for path in (tmp_path / "out" / "drawn").iterdir()}
    writers[1].draw_share(trainers[1])
    both = {path.name for path in (tmp_path / "out" / "drawn").iterdir()}
    assert (len(first), len(both)) == (2, 3)
    assert {len(boxes) for _, boxes in drawings_of(files, labelled=False).values()} == {2}


def test_boxes_and_captions_are_where_they_belong():
    canvas = draw_boxes(Image.new("RGB", (4000, 1000), "white"), [Drawn([1000, 400, 2000, 800], "cat", "#ff0000")])
    assert canvas.size == (2048, 512)
    assert canvas.getpixel((512, 300)) == (255, 0, 0)  # left edge
    assert canvas.getpixel((768, 300)) == (255, 255, 255)
    assert canvas.getpixel((514, 199)) == (255, 0, 0)  # the caption's ground, above the box
    tiny = draw_boxes(Image.new("L", (3, 2000)), [Drawn([0, 0, 3, 3], "a long caption"), Drawn([0, 0, 3, 3], "again")])
    assert tiny.size == (3, 2000)
    assert draw_boxes(Image.new("P", (10, 10)), []).size == (640, 640)


def test_task_without_a_class_is_detection():
    assert isinstance(images(images="x").task, DetectionTask)
