"""Both stages by the command line: questions about presence, the map they make, and boxes of what it names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rft_lightning import policy_module
from rft_lightning.cli import main
from tests.fakes.coco import ANNOTATIONS, SIZES, write_coco
from tests.test_config_files import CONFIGS

pytestmark = pytest.mark.filterwarnings("ignore:.*share pictures:UserWarning", "ignore:.*args parameter:UserWarning")
CLASSES = ("cat", "dog", "person")


@pytest.fixture
def evaluate(tmp_path, tiny_policy, monkeypatch):
    """evaluate(folder, *words): an evaluation by a policy that writes what `answer` says of a sample."""
    sample_groups = policy_module.sample_groups
    for split in ("train2017", "val2017"):
        write_coco(tmp_path / "coco", split)

    def run(folder: str, answer, *words: str) -> Path:
        def written(model, prompts, *args, **kwargs):
            rollouts = sample_groups(model, prompts, *args, **{**kwargs, "max_completion_length": 2})
            return replace(rollouts, texts=[[answer(sample)] for sample in rollouts.prompts.samples])

        monkeypatch.setattr(policy_module, "sample_groups", written)
        settings = {
            "data.root": tmp_path / "coco", "data.classes": f"[{','.join(CLASSES)}]", "data.num_workers": 0,
            "data.min_pixels": "null", "data.max_pixels": "null", "model.policy": tiny_policy,
            "trainer.precision": "null", "trainer.accelerator": "cpu", "trainer.logger": "false",
            "trainer.enable_progress_bar": "false", "run_dir": tmp_path / "run", "output_dir": tmp_path / folder,
        }  # fmt: skip
        options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        main(["evaluate", "-c", str(CONFIGS / "coco.yaml"), *words, *options])
        return tmp_path / folder

    return run


def says(sample) -> str:
    """Right about cats, "perhaps" of dogs, and persons everywhere."""
    return {"cat": "Yes." if sample.target.present else "No.", "dog": "perhaps"}.get(
        sample.target.category, "Yes, one."
    )


def boxes(sample) -> str:
    """The boxes of the annotation, in thousandths of width and height."""
    width, height = sample.image_size
    scaled = [
        [round(1000 * value / side) for value, side in zip(box, (width, height) * 2, strict=True)]
        for box in sample.target.boxes.tolist()
    ]
    return f"<think>t</think><answer>{[{'Position': box, 'Confidence': 0.9} for box in scaled]}</answer>"


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def score(folder: Path) -> dict:
    """What `rft score` says of the predictions of an evaluation."""
    main(["score", str(folder / "predictions.jsonl"), "--output", str(folder.parent / "scored.json")])
    return json.loads((folder.parent / "scored.json").read_text())


def test_presence_then_boxes(evaluate):
    first = evaluate("first", says, "-c", str(CONFIGS / "protocol/presence.yaml"))
    cats = {image for _, image, name, _, crowd in ANNOTATIONS if name == "cat" and not crowd}
    found = json.loads((first / "presence_map.json").read_text())
    assert {int(image) for image in found} == set(SIZES)
    assert found == {str(i): ["person"] + ["cat"] * (i in cats) for i in SIZES}
    metrics = json.loads((first / "metrics.json").read_text())["metrics"]
    assert metrics["presence_recall"] == pytest.approx((5 + 2) / (5 + 2 + 2))  # cats, persons; two dogs are missed
    assert metrics["presence_precision"] == pytest.approx((5 + 2) / (5 + 7))
    assert metrics["parse_rate"] == pytest.approx(2 / 3)
    assert len(rows(first)) == len(SIZES) * len(CLASSES)
    assert json.loads((first / "metrics.json").read_text())["experiment"]["task"] == "presence"
    assert score(first)["metrics"] == metrics

    for name in ("presence_map.json", "predictions.jsonl"):
        words = ("--data.query_mode", "map", "--data.presence_map", str(first / name))
        second = evaluate(f"second-{name}", boxes, *words)
        asked = [row for row in rows(second) if not row.get("unasked")]
        assert [(row["image_id"], row["asked"]) for row in asked] == [
            (image, name) for image in sorted(SIZES) for name in ("person", "cat") if name in found[str(image)]
        ]
        spared = [(row["image_id"], row["asked"]) for row in rows(second) if row.get("unasked")]
        assert spared == [(9, "dog"), (42, "dog")]
        result = json.loads((second / "metrics.json").read_text())
        assert result["experiment"]["query_mode"] == "map"
        assert result["per_class"]["dog"] == 0
        assert result["per_class"]["person"] > 0.8
        assert result["metrics"]["map"] == pytest.approx(sum(result["per_class"].values()) / 3)
        assert score(second)["metrics"] == result["metrics"]
        assert [json.loads(line)["asked"] for line in (second / "failures.jsonl").read_text().splitlines()] == []


def test_a_policy_that_decides_nothing_makes_an_empty_map(evaluate):
    first = evaluate("first", lambda sample: "?", "-c", str(CONFIGS / "protocol/presence.yaml"))
    assert json.loads((first / "presence_map.json").read_text()) == {str(image): [] for image in SIZES}
    record = json.loads((first / "metrics.json").read_text())
    assert record["parse_failures"]["count"] == len(SIZES) * len(CLASSES)
    assert record["metrics"]["presence_recall"] == 0
    assert record["metrics"]["presence_precision"] == -1
    assert isinstance(rows(first)[0]["target"]["present"], bool)
