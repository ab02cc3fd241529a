"""`rft score`: what it prints is what pycocotools and lvis-api print; and the examples of docs/metrics.md run."""

import contextlib
import copy
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rft_lightning.cli import main
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError
from rft_lightning.lvis_api import load_lvis
from rft_lightning.score import score

DOCS = Path(__file__).parent.parent / "docs" / "metrics.md"
NAMES = {3: "cat", 7: "hot dog", 10: "7", 12: "tree", 90: "cat (big)"}


def make_case(seed, *, lvis=False):
    """Ground truth and results; scores tie, categories have gaps, some pictures and one category are empty."""
    rng = np.random.default_rng(seed)
    classes = list(NAMES)[:-1]
    images = [
        {"id": int(i), "width": 300, "height": 300, "neg_category_ids": [3, 12], "not_exhaustive_category_ids": [7]}
        for i in rng.permutation(np.arange(20, 60, 3))
    ]
    notes, found = [], []
    for image in images[2:]:
        for _ in range(rng.integers(0, 7)):
            box = [*rng.uniform(0, 150, 2), *np.exp(rng.uniform(1, 5, 2))]
            label, crowd = int(rng.choice(classes)), int(not lvis and rng.uniform() < 0.15)
            notes.append(note(len(notes) + 1, image, label, box, area=box[2] * box[3] * 0.7, iscrowd=crowd))
            for _ in range(rng.integers(0, 4)):
                moved = np.array(box) + rng.normal(0, 0.08, 4) * np.array([*box[2:], *box[2:]])
                found.append(note(None, image, label, moved, score=float(rng.integers(1, 11) / 10)))
        for label in rng.choice(classes, 8):
            box = [*rng.uniform(0, 150, 2), *np.exp(rng.uniform(1, 5, 2))]
            found.append(note(None, image, int(label), box, score=float(rng.integers(1, 11) / 10)))
    categories = [{"id": key, "name": name, "frequency": "rcf"[key % 3]} for key, name in NAMES.items()]
    order = rng.permutation(len(found)).tolist()
    return {"images": images, "annotations": notes, "categories": categories}, [found[i] for i in order]


def note(number, image, label, box, **more):
    x, y, w, h = (float(value) for value in box)
    corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    identity = {} if number is None else {"id": number}
    return {
        **identity,
        "image_id": image["id"],
        "category_id": label,
        "bbox": [x, y, w, h],
        "segmentation": corners,
        **more,
    }


def as_run_lengths(results):
    """Results of masks, as pycocotools wants them."""
    from pycocotools import mask

    def encoded(entry):
        found = mask.merge(mask.frPyObjects(entry["segmentation"], 300, 300))
        return {"size": found["size"], "counts": found["counts"].decode()}

    return [
        {"segmentation": encoded(entry), **{k: entry[k] for k in ("image_id", "category_id", "score")}}
        for entry in results
    ]


@pytest.fixture
def write(tmp_path):
    """Writes both files and returns their names."""

    def files(truth, found):
        names = [str(tmp_path / "gt.json"), str(tmp_path / "results.json")]
        for name, content in zip(names, (truth, found), strict=True):
            Path(name).write_text(json.dumps(content))
        return names

    return files


def by_pycocotools(truth, found, iou_type="bbox", classes=None):
    """Its printed lines, and its numbers."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(found)), iou_type)
        if classes is not None:
            evaluation.params.catIds = classes
        evaluation.evaluate()
        evaluation.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluation.summarize()
    return printed.getvalue().splitlines(), evaluation


def by_lvis_api(gt_file, found, classes=None):
    api = load_lvis()
    truth = api.LVIS(gt_file)
    evaluation = api.LVISEval(truth, api.LVISResults(truth, copy.deepcopy(found)), "bbox")
    if classes is not None:
        evaluation.params.cat_ids = classes
    evaluation.run()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluation.print_results()
    return printed.getvalue().splitlines(), evaluation


# The table ------------------------------------------------------------------------------------------------------------


# Not seed 0: there a number is exactly half of the last printed digit, and a last bit decides how it is rounded.
@pytest.mark.parametrize("seed", range(1, 6))
def test_the_table_is_that_of_pycocotools(seed, write, capsys):
    truth, found = make_case(seed)
    main(["score", *write(truth, found)])
    lines, evaluation = by_pycocotools(truth, found)
    assert capsys.readouterr().out.splitlines() == lines
    assert len(lines) == 12
    assert 0.05 < evaluation.stats[0] < 0.95


def test_masks(write, capsys):
    truth, found = make_case(11)
    found = as_run_lengths(found)
    main(["score", *write(truth, found), "--iou_type", "segm"])
    lines, evaluation = by_pycocotools(truth, found, "segm")
    assert capsys.readouterr().out.splitlines() == lines
    assert evaluation.stats[0] > 0.05


@pytest.mark.parametrize("seed", range(5))
def test_the_table_of_lvis_is_that_of_lvis_api(seed, write, capsys):
    truth, found = make_case(seed, lvis=True)
    files = write(truth, found)
    main(["score", *files, "--lvis"])
    lines, evaluation = by_lvis_api(files[0], found)
    assert capsys.readouterr().out.splitlines() == lines
    assert len(lines) == 13
    assert 0.05 < evaluation.get_results()["AP"] < 0.95


def test_lvis_and_coco_differ(write):
    truth, found = make_case(2, lvis=True)
    files = write(truth, found)
    assert score(*files)["map"] != score(*files, lvis=True)["map"]


def test_chosen_classes_are_all_that_counts(write, capsys):
    truth, found = make_case(3)
    main(["score", *write(truth, found), "--classes", "hot dog", "3"])
    lines, _ = by_pycocotools(truth, found, classes=[3, 7])
    assert capsys.readouterr().out.splitlines() == lines
    assert lines != by_pycocotools(truth, found)[0]


def test_chosen_classes_of_lvis(write, capsys):
    truth, found = make_case(3, lvis=True)
    # The limit of 300 a picture holds over all categories, the chosen ones or not.
    found += [note(None, truth["images"][5], 12, [1, 1, 9, 9], score=0.95)] * 300
    files = write(truth, found)
    main(["score", *files, "--lvis", "--classes", "cat", "hot dog"])
    assert capsys.readouterr().out.splitlines() == by_lvis_api(files[0], found, classes=[3, 7])[0]


def test_a_name_goes_before_an_id_and_a_single_class_is_a_class(write):
    truth, found = make_case(4)
    files = write(truth, found)
    assert [row["id"] for row in score(*files, classes=["7"])["per_class"]] == [10]
    assert [row["id"] for row in score(*files, classes=[7])["per_class"]] == [7]
    assert [row["id"] for row in score(*files, classes=["12", "cat"])["per_class"]] == [3, 12]


def test_per_class_and_output(write, capsys, tmp_path):
    truth, found = make_case(5)
    output = tmp_path / "new" / "metrics.json"
    main(["score", *write(truth, found), "--per_class", "--output", str(output)])
    _, evaluation = by_pycocotools(truth, found)
    record = json.loads(output.read_text())
    keys = "map map_50 map_75 map_small map_medium map_large mar_1 mar_10 mar_100 mar_small mar_medium mar_large"
    np.testing.assert_allclose([record[key] for key in keys.split()], evaluation.stats, atol=1e-9)
    precision = evaluation.eval["precision"][..., 0, -1]
    per_class = [float(p[p > -1].mean()) if (p > -1).any() else -1.0 for p in np.moveaxis(precision, 2, 0)]
    assert [(row["id"], row["name"]) for row in record["per_class"]] == list(NAMES.items())
    np.testing.assert_allclose([row["ap"] for row in record["per_class"]], per_class, atol=1e-9)
    assert per_class[-1] == -1  # the category without objects
    printed = capsys.readouterr().out.splitlines()
    assert printed[13:] == [
        f"{k:>8}  {ap:>6.3f}  {name}" for (k, name), ap in zip(NAMES.items(), per_class, strict=True)
    ]


def test_no_results_are_no_error(write):
    truth, _ = make_case(6)
    record = score(*write(truth, []))
    assert record["map"] == record["mar_100"] == 0
    with pytest.raises(IndexError):
        by_pycocotools(truth, [])


# What is wrong --------------------------------------------------------------------------------------------------------


def test_results_of_unknown_categories_are_left_out_and_named(write, capsys):
    truth, found = make_case(7)
    expected = score(*write(truth, found))
    assert capsys.readouterr().err == ""
    stray = note(None, truth["images"][4], 5, [0, 0, 9, 9], score=1.0)
    assert score(*write(truth, [*found, stray])) == expected
    assert (
        "left out 1 results of 1 categories that the ground truth does not have, such as 5" in capsys.readouterr().err
    )


def with_category(truth, number):
    return {**truth, "categories": [*truth["categories"], {"id": number, "name": "x"}]}


def without(entries, key):
    return [{k: v for k, v in entry.items() if k != key} for entry in entries]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gt, dt: (dt, gt), r"gt.json is a list; expected a dict.* arguments is ground truth, results"),
        (lambda gt, dt: (gt, gt), r"results.json is a dict; expected a list"),
        (lambda gt, dt: ({**gt, "categories": None}, dt), r"is a dict with .*annotations.*; expected a dict with"),
        (lambda gt, dt: (gt, without(dt, "score")), r"results.json, entry 0: expected the keys .*score, found"),
        (lambda gt, dt: (gt, without(dt, "bbox")), r"results.json, entry 0: expected the keys bbox"),
        (lambda gt, dt: (gt, [3]), r"results.json, entry 0: expected the keys .*, found 3"),
        (lambda gt, dt: (gt, [{**dt[0], "bbox": [1, 2, 3]}]), r"entry 0: expected a bbox of four numbers.*\[1, 2, 3\]"),
        (lambda gt, dt: (gt, [{**dt[0], "category_id": [3]}]), r"results has something else than expected"),
        (lambda gt, dt: (with_category(gt, "car"), dt), r"Category 'x' of The ground truth .* has the id 'car'"),
        (lambda gt, dt: (with_category(gt, 2**53), dt), r"id 9007199254740992; expected a whole number below 2\*\*53"),
        (lambda gt, dt: (with_category(gt, -(2**70)), dt), r"expected a whole number below 2\*\*53"),
        (lambda gt, dt: (with_category(gt, 1.5), dt), r"has the id 1.5; expected a whole number"),
        (lambda gt, dt: (gt, [{**dt[0], "image_id": 1}]), r"name 1 images that the ground truth does not have.*1"),
    ],
)  # fmt: skip
def test_wrong_files_are_named(change, message, write):
    with pytest.raises(AnnotationError, match=message) as caught:
        main(["score", *write(*change(*make_case(8)))])
    assert "\n" not in str(caught.value)


def test_missing_files_folders_and_broken_files_are_named(write, tmp_path):
    gt, results = write(*make_case(8))
    with pytest.raises(DatasetNotFoundError, match=r"results .*gone.json does not exist"):
        score(gt, tmp_path / "gone.json")
    with pytest.raises(DatasetNotFoundError, match=r"ground truth .* is a folder; expected a JSON file"):
        score(tmp_path, results)
    Path(results).write_text("[{")
    with pytest.raises(AnnotationError, match=r"results.json is no JSON file"):
        score(gt, results)
    with pytest.raises(ConfigConflictError, match="is a folder; expected the name of a JSON file"):
        score(gt, results, output=tmp_path)


@pytest.mark.parametrize("output", ["results.json/below/metrics.json", "closed/metrics.json", "n" * 300])
def test_what_cannot_be_written_is_refused_and_named(write, tmp_path, output, monkeypatch, capsys):
    gt, results = write(*make_case(8))
    (tmp_path / "closed").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "closed" and allowed(path, mode))
    with pytest.raises(ConfigConflictError, match="cannot be written: "):
        score(gt, results, output=tmp_path / output)
    assert capsys.readouterr().out == ""


def test_what_fails_while_it_is_written_is_named_and_leaves_the_old_file(write, tmp_path, monkeypatch):
    gt, results = write(*make_case(8))
    output = tmp_path / "metrics.json"
    output.write_text("before")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigConflictError, match=r"metrics\.json cannot be written: No space left on device"):
        score(gt, results, output=output)
    assert output.read_text() == "before"


def test_output_may_be_a_pipe_or_a_link(write, tmp_path):
    files = write(*make_case(8))
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    record = score(*files, output=tmp_path / "pipe")
    assert json.loads(os.read(reader, 1 << 16)) == record
    os.close(reader)
    (tmp_path / "link").symlink_to("metrics.json")
    score(*files, output=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "metrics.json").read_text()) == record


@pytest.mark.parametrize("lvis", [False, True])
@pytest.mark.parametrize("move", [2**63, -(2**64), 2**80])
def test_ids_of_pictures_may_be_of_any_size(write, move, lvis):
    truth, found = make_case(9, lvis=lvis)
    expected = score(*write(truth, found), lvis=lvis)
    for entry in truth["images"]:
        entry["id"] += move
    for entry in (*truth["annotations"], *found):
        entry["image_id"] += move
    assert score(*write(truth, found), lvis=lvis) == expected


def test_the_largest_ids_of_categories(write, capsys):
    largest = 2**53 - 1
    truth, found = make_case(10)
    for entry in (*truth["annotations"], *found):
        entry["category_id"] = {3: largest, 7: largest - 1}.get(entry["category_id"], entry["category_id"])
    truth["categories"] = [{"id": key, "name": str(key)} for key in (10, 12, largest - 1, largest)]
    main(["score", *write(truth, found)])
    assert capsys.readouterr().out.splitlines() == by_pycocotools(truth, found)[0]


def test_unknown_classes_and_contradictions_are_named(write):
    truth, found = make_case(8)
    files = write(truth, found)
    with pytest.raises(ConfigConflictError, match=r"no category 'cot' by name or id; it has 5, such as cat"):
        score(*files, classes=["cot"])
    with pytest.raises(ConfigConflictError, match="boxes only; leave out --iou_type, or --lvis"):
        score(*files, lvis=True, iou_type="segm")
    truth["categories"][1]["name"] = "cat"
    with pytest.raises(ConfigConflictError, match=r"'cat' belongs to the categories \[3, 7\]; name one by its id"):
        score(*write(truth, found), classes=["cat"])


def test_from_a_terminal_an_error_is_one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "rft_lightning", "score", "gt.json", "results.json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if "gt.json" in line]
    assert line.startswith("rft: DatasetNotFoundError: ")
    assert "Traceback" not in result.stderr


def test_a_forgotten_argument_is_named():
    with pytest.raises(ConfigConflictError, match=r"Found one file, gt\.json\. Expected ground truth and results"):
        main(["score", "gt.json"])


# The page -------------------------------------------------------------------------------------------------------------


def test_the_examples_of_the_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = DOCS.read_text(encoding="utf-8")
    blocks = re.findall(r"```(python|console)\n(.*?)```", page, re.DOTALL)
    assert [kind for kind, _ in blocks].count("python") >= 3
    namespace = {}
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, str(DOCS), "exec"), namespace)
        else:
            command, _, expected = block.partition("\n")
            capsys.readouterr()
            main(command.removeprefix("$ rft ").split())
            assert capsys.readouterr().out == expected
