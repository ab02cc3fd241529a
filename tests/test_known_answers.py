"""Numbers known beforehand come out of the whole path: files, datamodule, another system's answers, callbacks."""

import json
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rft_lightning.cli import main
from rft_lightning.lvis_api import load_lvis

CONFIGS = Path(__file__).parent.parent / "configs"
CATEGORIES = {3: "car", 18: "dog", 21: "cow", 88: "teddy bear"}
SIZE = (160, 120)


def evaluated(folder: Path, config: str, answers: list[dict], *more: str) -> dict:
    """What `rft evaluate` measures of a file of answers."""
    file = folder / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in answers))
    overlay = ["-c", str(CONFIGS / "baselines" / "predictions_file.yaml"), "--model.path", str(file)]
    common = ["--trainer.enable_progress_bar", "false", "--data.num_workers", "0", "--trainer.precision", "32-true"]
    out = ["--output_dir", str(folder / "out")]
    main(["evaluate", "-c", str(CONFIGS / f"{config}.yaml"), *overlay, *common, *out, *more])
    return json.loads((folder / "out" / "metrics.json").read_text())


def random_boxes(rng: np.random.Generator, number: int) -> np.ndarray:
    """[K, 4] xywh of all three of COCO's sizes, inside the picture."""
    side = rng.choice([12.0, 40.0, 100.0], size=(number, 1)) * rng.uniform(0.6, 1.1, size=(number, 2))
    corner = rng.uniform(0, 1, size=(number, 2)) * (np.array(SIZE) - side)
    return np.concatenate([corner, side], axis=1).round(2)


def noisy_answers(rng: np.random.Generator, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes near some of the true ones, others anywhere; with confidences, some of them equal."""
    found = truth[rng.random(len(truth)) < 0.8]
    near = found + rng.normal(0, 1, size=found.shape)
    boxes = np.concatenate([near, random_boxes(rng, int(rng.integers(0, 3)))]).clip(0)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], 1)
    return boxes.round(2), rng.integers(1, 20, size=len(boxes)) / 20


def xyxy(boxes: np.ndarray) -> list[list[float]]:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).tolist()


def write_picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE).save(path)


def coco_tree(root: Path, rng: np.random.Generator) -> tuple[dict, dict[tuple[int, int], np.ndarray]]:
    """A val2017 of random boxes and crowds; its content, and the boxes that are no crowds of each pair."""
    images = [{"id": i, "width": SIZE[0], "height": SIZE[1], "file_name": f"{i:012}.jpg"} for i in range(1, 41)]
    annotations, pairs, ids = [], {}, count(1)
    for image in images:
        write_picture(root / "val2017" / image["file_name"])
        for category in CATEGORIES:
            boxes = random_boxes(rng, int(rng.choice([0, 0, 1, 2, 4])))
            crowds = rng.random(len(boxes)) < 0.1
            pairs[image["id"], category] = boxes[~crowds]
            for box, crowd in zip(boxes.tolist(), crowds.tolist(), strict=True):
                x, y, w, h = box
                corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                outline = {"size": [SIZE[1], SIZE[0]], "counts": [SIZE[0] * SIZE[1]]} if crowd else corners
                annotations.append(
                    {"id": next(ids), "image_id": image["id"], "category_id": category, "bbox": box,
                     "area": round(w * h * 0.8, 3), "iscrowd": int(crowd), "segmentation": outline}
                )  # fmt: skip
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": key, "name": name, "supercategory": "x"} for key, name in CATEGORIES.items()],
    }
    (root / "annotations").mkdir(parents=True)
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return content, pairs


def test_coco_average_precision(tmp_path: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(7)
    _, pairs = coco_tree(tmp_path / "coco", rng)
    answers, results = [], []
    for (image, category), truth in pairs.items():
        boxes, scores = noisy_answers(rng, truth)
        row = {"image_id": image, "asked": CATEGORIES[category], "boxes": xyxy(boxes), "confidences": scores.tolist()}
        answers.append(row)
        for (x1, y1, x2, y2), score in zip(row["boxes"], scores.tolist(), strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            results.append({"image_id": image, "category_id": category, "bbox": box, "score": score})
    data = ["--data.root", str(tmp_path / "coco"), "--data.classes", "null", "--data.train_split", "val2017"]
    record = evaluated(tmp_path, "coco", answers, *data)
    truth = COCO(str(tmp_path / "coco" / "annotations" / "instances_val2017.json"))
    evaluator = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    for name, value in zip(names, evaluator.stats, strict=False):
        assert record["metrics"][name] == pytest.approx(value, abs=1e-9), name
    assert record["metrics"]["mar_100"] == pytest.approx(evaluator.stats[8], abs=1e-9)
    precision = evaluator.eval["precision"][:, :, :, 0, 2]
    for number, name in enumerate(CATEGORIES.values()):
        assert record["per_class"][name] == pytest.approx(precision[:, :, number].mean(), abs=1e-9), name
    assert 0.2 < record["metrics"]["map"] < 0.9
    assert record["experiment"]["method"] == "X-Decoder"
    # The results file that was written scores the same.
    gt, written = str(tmp_path / "coco" / "annotations" / "instances_val2017.json"), tmp_path / "out" / "results.json"
    main(["score", gt, str(written), "--output", str(tmp_path / "again.json")])
    assert json.loads((tmp_path / "again.json").read_text())["map"] == pytest.approx(record["metrics"]["map"], abs=1e-9)


def lvis_tree(root: Path, rng: np.random.Generator) -> tuple[dict, dict[tuple[int, int], np.ndarray]]:
    """A federated val of random boxes; its content, and the boxes of each pair whose truth is known."""
    frequency = dict(zip(CATEGORIES, "rcff", strict=True))
    images, annotations, pairs, ids = [], [], {}, count(1)
    for number in range(1, 41):
        write_picture(root / "coco" / "val2017" / f"{number:012}.jpg")
        drawn = {category: rng.choice(4, p=[0.3, 0.3, 0.2, 0.2]) for category in CATEGORIES}
        boxes = {category: random_boxes(rng, int(k) - 1) for category, k in drawn.items() if k > 1}
        negative = [category for category, k in drawn.items() if k == 0]
        images.append(
            {"id": number, "width": SIZE[0], "height": SIZE[1],
             "coco_url": f"http://images.cocodataset.org/val2017/{number:012}.jpg",
             "neg_category_ids": negative,
             "not_exhaustive_category_ids": [category for category in boxes if rng.random() < 0.3]}
        )  # fmt: skip
        pairs |= {(number, category): np.zeros((0, 4)) for category in negative}
        for category, found in boxes.items():
            pairs[number, category] = found
            for x, y, w, h in found.tolist():
                annotations.append(
                    {"id": next(ids), "image_id": number, "category_id": category, "bbox": [x, y, w, h],
                     "area": round(w * h * 0.8, 3), "segmentation": [[x, y, x + w, y, x + w, y + h]]}
                )  # fmt: skip
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": key, "name": name, "synset": f"{name}.n.01", "synonyms": [name], "def": "x",
             "frequency": frequency[key], "image_count": 5, "instance_count": 5}
            for key, name in CATEGORIES.items()
        ],
    }  # fmt: skip
    folder = root / "lvis" / "annotations"
    folder.mkdir(parents=True)
    for split in ("train", "val"):
        (folder / f"lvis_v1_{split}.json").write_text(json.dumps(content))
    return content, pairs


def test_lvis_average_precision(tmp_path: Path) -> None:
    api = load_lvis()
    rng = np.random.default_rng(8)
    _, pairs = lvis_tree(tmp_path / "data", rng)
    answers, results = [], []
    for (image, category), truth in pairs.items():
        boxes, _ = noisy_answers(rng, truth)
        # lvis-api sorts equal scores in no particular order.
        scores = rng.permutation(1000)[: len(boxes)] / 1000
        row = {"image_id": image, "asked": CATEGORIES[category], "boxes": xyxy(boxes), "confidences": scores.tolist()}
        answers.append(row)
        for (x1, y1, x2, y2), score in zip(row["boxes"], scores.tolist(), strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            results.append({"image_id": image, "category_id": category, "bbox": box, "score": score})
    record = evaluated(tmp_path, "lvis", answers, "--data.root", str(tmp_path / "data"), "--data.classes", "null")
    truth = api.LVIS(str(tmp_path / "data" / "lvis" / "annotations" / "lvis_v1_val.json"))
    evaluator = api.LVISEval(truth, api.LVISResults(truth, results), "bbox")
    evaluator.run()
    expected = evaluator.get_results()
    ours = {"AP": "map", "AP50": "map_50", "AP75": "map_75", "APs": "map_small", "APm": "map_medium",
            "APl": "map_large", "APr": "map_rare", "APc": "map_common", "APf": "map_frequent",
            "AR@300": "mar_300"}  # fmt: skip
    for theirs, name in ours.items():
        assert record["metrics"][name] == pytest.approx(expected[theirs], abs=1e-9), name
    assert 0.2 < record["metrics"]["map"] < 0.9


PUBLISHED = [  # CLIP's predictions in the published repository: strict and lenient accuracy in percent
    ("fgvc_aircraft", "fgvc_aircraft_variants100", 24.69, 24.69),
    ("oxford_flowers", "flowers102", 70.48, 71.70),
    ("pets", "oxford_pets37", 89.07, 89.07),
    ("stanford_cars", "stanford_cars196", 65.51, 65.51),
]


def clip_pairs(sample_data: Path, predictions: str, classes: str) -> list[tuple[str, str]]:
    """Right class and CLIP's, of each test picture."""
    names = (sample_data / f"class_names/visual_rft/{classes}.txt").read_text().splitlines()
    lines = (sample_data / f"clip_top1/{predictions}.csv").read_text().splitlines()[1:]
    return [tuple(names[int(index)] for index in line.split(",")) for line in lines]


@pytest.mark.sample_data
@pytest.mark.parametrize(("predictions", "classes", "strict", "lenient"), PUBLISHED)
def test_clip_predictions_of_the_published_repository(
    sample_data: Path, tmp_path: Path, predictions: str, classes: str, strict: float, lenient: float
) -> None:
    rows = [
        {"id": str(i), "task": "classification", "target": {"label": right}, "text": f"<answer>{said}</answer>",
         "label": said}
        for i, (right, said) in enumerate(clip_pairs(sample_data, predictions, classes))
    ]  # fmt: skip
    file = tmp_path / "clip.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["score", str(file), "--output", str(tmp_path / "numbers.json")])
    metrics = json.loads((tmp_path / "numbers.json").read_text())["metrics"]
    assert 100 * metrics["accuracy"] == pytest.approx(strict, abs=0.005)
    assert 100 * metrics["accuracy_lenient"] == pytest.approx(lenient, abs=0.005)


@pytest.mark.sample_data
def test_clip_predictions_through_the_datamodule(sample_data: Path, tmp_path: Path) -> None:
    """2463 pictures of flowers in CoOp's layout, as many names of one file."""
    names = (sample_data / "class_names/visual_rft/flowers102.txt").read_text().splitlines()
    pairs = clip_pairs(sample_data, "oxford_flowers", "flowers102")
    folder = tmp_path / "flowers" / "jpg"
    write_picture(folder / "image_00001.jpg")
    rows = []
    for number, (right, _) in enumerate(pairs, 1):
        name = f"image_{number:05}.jpg"
        if number > 1:
            (folder / name).hardlink_to(folder / "image_00001.jpg")
        rows.append([name, names.index(right), right])
    split = {"train": rows[:102], "val": rows[:102], "test": rows}
    (tmp_path / "flowers" / "split_zhou_OxfordFlowers.json").write_text(json.dumps(split))
    answers = [{"image_id": f"jpg/{name}", "label": said} for (name, _, _), (_, said) in zip(rows, pairs, strict=True)]
    record = evaluated(tmp_path, "flowers102", answers, "--data.root", str(tmp_path / "flowers"))
    assert record["samples"] == 2463
    assert 100 * record["metrics"]["accuracy"] == pytest.approx(70.48, abs=0.005)
    assert 100 * record["metrics"]["accuracy_lenient"] == pytest.approx(71.70, abs=0.005)
    assert record["parse_failures"]["count"] == 0
