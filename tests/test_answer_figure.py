"""Answers of two evaluations side by side."""

import json

import numpy as np
import pytest
from PIL import Image, ImageColor

from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.errors import ConfigConflictError, DatasetNotFoundError
from rft_lightning.report.answer_figure import AFTER, BEFORE, RIGHT, answer_figure, chosen_pairs, pairs_of
from rft_lightning.report.tables import run_table
from rft_lightning.sample import ClassTarget, GroundingTarget
from rft_lightning.tasks import GroundingTask
from tests.table_files import TINY, write_evaluation

NAMES = ("ant", "bee", "cat", "dog", "eel")


def write_rows(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def class_row(number: int, label: str | None, image=None) -> dict:
    return {
        "id": f"s{number}", "task": "classification", "target": {"label": NAMES[number]}, "label": label,
        "parsed": label is not None,
        "thought": f"It looks like {label}.", "text": f"<answer>{label}</answer>", "question": "Which animal?",
        "image": None if image is None else str(image), "image_size": [60, 40],
    }  # fmt: skip


def box_row(number: int, box: list[float], image=None) -> dict:
    return {
        "id": f"s{number}", "task": "grounding", "boxes": [box], "question": "Where?", "text": "a", "thought": "There.",
        "target": {"boxes": [[10, 10, 30, 30]], "expression": "it"},
        "image": None if image is None else str(image), "image_size": [60, 40],
    }  # fmt: skip


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (60, 40), "white").save(tmp_path / "white.png")
    return tmp_path / "white.png"


def test_what_became_right_comes_first_then_what_differs(tmp_path):
    before = ["ant", "x", "cat", None, "x"]
    after = ["x", "x", "cat", "dog", "Eel."]
    folders = tuple(
        write_rows(tmp_path / name, [class_row(i, label) for i, label in enumerate(labels)])
        for name, labels in (("a", before), ("b", after))
    )
    pairs = pairs_of(folders, ClassTarget)
    assert [pair.scores for pair in pairs] == [(1, 0), (0, 0), (1, 1), (0, 1), (0, 1)]
    assert [pair.after.sample.id for pair in chosen_pairs(pairs, 5)] == ["s3", "s4", "s0", "s1", "s2"]
    assert [pair.after.sample.id for pair in chosen_pairs(pairs, 2)] == ["s3", "s4"]


def test_boxes_are_ordered_by_how_much_better_they_are(tmp_path):
    """IoU of the halves and quarters of a square of 20 pixels, by hand."""
    half, quarter, whole, none = [10, 10, 30, 20], [10, 10, 20, 20], [10, 10, 30, 30], [40, 0, 50, 9]
    before = write_rows(tmp_path / "a", [box_row(i, box) for i, box in enumerate((quarter, none, whole, quarter))])
    after = write_rows(tmp_path / "b", [box_row(i, box) for i, box in enumerate((half, whole, none, quarter))])
    pairs = pairs_of((before, after), GroundingTarget)
    assert [pair.scores for pair in pairs] == [(0.25, 0.5), (0, 1), (1, 0), (0.25, 0.25)]
    assert [pair.after.sample.id for pair in chosen_pairs(pairs, 4)] == ["s1", "s0", "s2", "s3"]


def test_only_questions_that_both_answered_are_compared(tmp_path):
    a = write_rows(tmp_path / "a", [class_row(0, "ant"), class_row(1, "bee")])
    b = write_rows(tmp_path / "b", [class_row(1, "x"), class_row(2, "x")])
    assert [pair.after.sample.id for pair in pairs_of((a, b), ClassTarget)] == ["s1"]
    with pytest.raises(ConfigConflictError, match=r"has 0 and .* 0 answers to questions of this figure \(Ground"):
        pairs_of((a, b), GroundingTarget)


def colours_of(image: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()}


def test_the_right_box_is_green_and_both_answers_are_drawn_beside(tmp_path, picture):
    a = write_rows(tmp_path / "a", [box_row(0, [0, 0, 20, 20], picture)])
    b = write_rows(tmp_path / "b", [box_row(0, [12, 12, 34, 34], picture)])
    image = answer_figure(5, a, b)
    shown = np.asarray(image.convert("RGB"))
    bar = next(y for y in range(shown.shape[0]) if shown[y, 0].tolist() == [255, 255, 255])
    # Scaled from 60 to 480 pixels: the right box has its lower right corner at 8 x (30, 30).
    left, top, scale = 14, bar + 14, 8
    for corner, colour in (((30, 29), RIGHT), ((20, 5), BEFORE), ((34, 20), AFTER)):
        x, y = left + corner[0] * scale, top + corner[1] * scale
        near = {tuple(pixel) for pixel in shown[y - 3 : y + 4, x - 3 : x + 4].reshape(-1, 3).tolist()}
        assert ImageColor.getrgb(colour) in near, colour


def test_as_many_rows_as_asked_for_or_as_there_are(tmp_path, picture):
    a = write_rows(tmp_path / "a", [class_row(i, "x", picture) for i in range(3)])
    b = write_rows(tmp_path / "b", [class_row(i, "cat", picture) for i in range(3)])
    folders = (a, b)
    one, three = (answer_figure(4, *folders, samples=count) for count in (1, 3))
    assert one.width == three.width
    rows = (three.height - one.height) / (one.height - 52)
    assert rows == pytest.approx(2, abs=0.05)
    assert ImageColor.getrgb(RIGHT) in colours_of(one)  # the answer that became right, in letters
    many = answer_figure(4, *folders, samples=9)
    assert many.tobytes() == three.tobytes()


def test_a_long_thought_makes_its_row_taller_and_is_cut(tmp_path):
    picture = tmp_path / "low.png"
    Image.new("RGB", (200, 10), "white").save(picture)

    def drawn(thought: str) -> Image.Image:
        rows = {**class_row(0, "ant", picture), "thought": thought}
        a, b = (write_rows(tmp_path / name, [rows]) for name in ("a", "b"))
        return answer_figure(4, a, b)

    short, long, longer = drawn("A."), drawn("word " * 170), drawn("word " * 3000)
    assert short.height < long.height <= longer.height < 2 * long.height
    control = drawn("".join(f"{chr(number)}word" for number in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)))
    assert control.height > short.height  # some of them end a line


def test_rendered_pictures_are_made_again(tmp_path, tiny_policy):
    """Those that the data of the evaluation's configuration renders, by their ids."""
    data = ShapesDataModule(task=GroundingTask(), test_size=4, image_side=96, processor=tiny_policy)
    samples = data.split("test")
    rows = [
        {**box_row(0, sample.target.boxes[0].tolist()), "id": sample.id, "image_size": [96, 96]}
        for sample in (samples[i] for i in range(4))
    ]
    config = {
        "data": {
            "class_path": "rft_lightning.datamodules.ShapesDataModule",
            "init_args": {
                "test_size": 4, "image_side": 96, "task": {"class_path": "rft_lightning.tasks.GroundingTask"},
            },
        },
        "model": {"init_args": {"policy": tiny_policy}}, "split": "test",
    }  # fmt: skip
    folders = [write_rows(tmp_path / name, rows) for name in ("a", "b")]
    with pytest.raises(DatasetNotFoundError, match=r"no files but were rendered, and it has no config\.yaml"):
        answer_figure(5, *folders)
    write_evaluation(folders[1], metrics={}, **TINY)
    (folders[1] / "config.yaml").write_text(json.dumps(config))
    image = answer_figure(5, *folders, samples=1)
    expected = np.asarray(samples[0].load_image())[0, 0]
    assert np.asarray(image)[68, 16].tolist() == expected.tolist()  # the corner of the picture, below the head
    config["data"]["init_args"]["test_size"] = 2
    (folders[1] / "config.yaml").write_text(json.dumps(config))
    with pytest.raises(DatasetNotFoundError, match="has no such sample"):
        answer_figure(5, *folders)


def test_the_command_writes_the_same_file_twice(tmp_path, picture, capsys):
    a = write_rows(tmp_path / "a", [class_row(i, "x", picture) for i in range(5)])
    b = write_rows(tmp_path / "b", [class_row(i, NAMES[i], picture) for i in range(5)])
    files = [tmp_path / name for name in ("one.png", "two.png")]
    for file in files:
        run_table(["--figure", "4", str(a), str(b), "--samples", "2", "--output", str(file)])
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "side by side are in" in capsys.readouterr().out
