"""Rows of predictions from elsewhere: what cannot be scored is refused by line, in words, and nothing is made up."""

import json
from pathlib import Path

import numpy as np
import pytest

from rft_lightning.callbacks import GroundingMaskIoU
from rft_lightning.errors import AnnotationError
from rft_lightning.evaluation.rows import read_predictions
from rft_lightning.run_lengths import encode_mask

BOX = [2, 2, 10, 10]
CLASS = {"task": "classification", "label": "pug", "target": {"label": "pug"}}
DETECTION = {"task": "detection", "boxes": [BOX], "target": {"category": "cat", "category_id": 1, "boxes": [BOX]}}
GROUNDING = {"task": "grounding", "boxes": [BOX], "image_size": [20, 16], "target": {"boxes": [BOX]}}
CORNERS = [[2, 2], [10, 2], [10, 10], [2, 10]]


def written(path: Path, *rows: dict, mark: str = "") -> Path:
    lines = (json.dumps({"id": f"r{number}", **row}) + "\n" for number, row in enumerate(rows))
    path.write_text(mark + "".join(lines), encoding="utf-8")
    return path


def target(row: dict, **other) -> dict:
    return {**row, "target": {**row["target"], **other}}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({**CLASS, "id": ["a"]}, "id is"),
        ({**CLASS, "id": 1.5}, "id is 1.5"),
        ({**CLASS, "image_id": {"a": 1}}, "image_id is"),
        ({**CLASS, "image_id": 1.5}, "image_id is 1.5"),
        ({**CLASS, "image_id": True}, "image_id is True"),
        ({**CLASS, "image_size": [0, 0]}, "image_size is"),
        (target(CLASS, label=None), "label of the target is None"),
        (target(CLASS, aliases="cat"), "aliases is 'cat'"),
        (target(DETECTION, category_id=1.5), r"category_id is 1\.5"),
        (target(DETECTION, category_id=2**70), r"below 2\^53"),
        (target(DETECTION, frequency="x"), "frequency is 'x'"),
        (target(DETECTION, areas=[float("inf")]), "areas is"),
        (target(DETECTION, ignore_boxes=[[float("nan"), 0, 1, 1]]), "four finite numbers"),
        (target(GROUNDING, boxes=[]), "no boxes"),
        (target(GROUNDING, regions=[{"points": []}]), "points of a region"),
        ({**target(GROUNDING, regions=[{"points": CORNERS}]), "image_size": None}, "no image_size"),
    ],
)
def test_what_cannot_be_scored(tmp_path, row, named):
    with pytest.raises(AnnotationError, match=rf"line 2: .*{named}"):
        read_predictions(written(tmp_path / "p.jsonl", CLASS, row))


def test_one_frequency_for_each_category(tmp_path):
    rows = [target(DETECTION, frequency=frequency) for frequency in "rf"]
    with pytest.raises(AnnotationError, match="frequency f, and 'cat' of frequency r before"):
        read_predictions(written(tmp_path / "p.jsonl", *rows))


def test_a_picture_without_an_id_is_one_of_its_own(tmp_path):
    found = read_predictions(written(tmp_path / "p.jsonl", {**DETECTION, "image_id": None}, DETECTION, mark="\ufeff"))
    assert [prediction.sample.image_id for prediction in found] == ["r0", "r1"]


def test_where_some_answers_have_masks_the_others_are_empty(tmp_path):
    mask = np.zeros((16, 20), dtype=bool)
    mask[2:11, 2:11] = True
    asked = target(GROUNDING, regions=[{"points": CORNERS}])
    rows = [{**asked, "mask": encode_mask(mask)}, asked]
    found = read_predictions(written(tmp_path / "p.jsonl", *rows))
    numbers, _ = GroundingMaskIoU().score(found)
    assert numbers["mask_iou_mean"] == pytest.approx(0.5)
    assert numbers["mask_iou_cumulative"] == pytest.approx(0.5)
    alone, _ = GroundingMaskIoU().score(found[1:])
    assert alone == {}, "nobody made masks"
