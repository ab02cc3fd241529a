"""Metric callbacks on two ranks that see different numbers of samples give the numbers of one process."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from rft_lightning.callbacks import DetectionMAP, GroundingIoU, LabelAccuracy
from rft_lightning.sample import Answer, ClassTarget, DetectionTarget, Prediction, Sample, Target

BATCH = 3
CASES = ("one rank has nothing", "each kind on its own rank", "uneven with repeats", "nothing anywhere")


def prediction(number: int, kind: str, target: Target, answer: Answer) -> Prediction:
    image = Image.new("RGB", (8, 8))
    sample = Sample(f"{kind}/{number}", image, target, None, (100, 100), image_id=f"image {number // 2}")
    return Prediction(sample, answer.text, answer)


def detections() -> list[Prediction]:
    """Two questions per picture, tied confidences, some answers that cannot be read."""
    rng = np.random.default_rng(0)
    items = []
    for number in range(20):
        corners = rng.integers(0, 50, (3, 2))
        truth = np.concatenate([corners, corners + rng.integers(5, 50, (3, 2))], 1)[: int(rng.integers(0, 4))]
        boxes = (truth + rng.integers(-3, 4, truth.shape))[: int(rng.integers(0, 4))]
        target = DetectionTarget(truth.tolist(), category=f"class \u00e9{number % 2}", category_id=number % 2)
        answer = Answer(boxes=boxes.tolist(), confidences=rng.choice([0.5, 1.0], len(boxes)), text="an answer")
        items.append(prediction(number, "detection", target, answer))
    return items


def labels() -> list[Prediction]:
    names = ["rose", "tulip", "primrose", "fire lily"]
    pairs = [(names[number % 4], names[number % 3]) for number in range(11)]
    return [prediction(i, "label", ClassTarget(right), Answer(label=said)) for i, (said, right) in enumerate(pairs)]


def shares(case: str) -> list[list[Prediction]]:
    """What each rank sees."""
    boxes, names = detections(), labels()
    if case == "one rank has nothing":
        return [[], [*boxes, *names]]
    if case == "each kind on its own rank":
        return [names, boxes]
    if case == "nothing anywhere":
        return [[], []]
    # As a padding sampler deals them: rank one repeats samples of rank zero.
    return [[*boxes[:13], *names[::2]], [*boxes[13:], *boxes[:2], *names[1::2], *names[:4]]]


def run(items: list[Prediction]) -> dict:
    """Drive the hooks as the Trainer does; returns what was logged and kept."""
    callbacks = [DetectionMAP(), LabelAccuracy(), GroundingIoU()]
    logged: dict[str, float] = {}

    def log_dict(values: dict[str, float], **kwargs: object) -> None:
        assert kwargs["rank_zero_only"] is False
        assert kwargs["sync_dist"] is False
        logged.update(values)

    module = SimpleNamespace(device=torch.device("cpu"), log_dict=log_dict)
    trainer = SimpleNamespace(sanity_checking=False, is_global_zero=True, loggers=[], global_step=0)
    for _ in range(2):  # a second epoch starts afresh
        for callback in callbacks:
            callback.on_validation_epoch_start(trainer, module)
        for start in range(0, len(items), BATCH):
            outputs = {"predictions": items[start : start + BATCH]}
            for callback in callbacks:
                callback.on_validation_batch_end(trainer, module, outputs, None, start // BATCH)
        for callback in callbacks:
            callback.on_validation_epoch_end(trainer, module)
    return {
        "logged": logged,
        "results": [callback.results for callback in callbacks],
        "per_class": [callback.per_class for callback in callbacks],
    }


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {case: run(shares(case)[rank]) for case in CASES}
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes found, per case; they start once because their imports take most of the time."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        # pytest imports test files under names of its own; the new processes need one they can find.
        patch.syspath_prepend(Path(__file__).parent)
        target = importlib.import_module(Path(__file__).stem).worker
        torch.multiprocessing.spawn(target, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(case: str, ranks: list[dict]) -> None:
    silent = case == "nothing anywhere"
    expected = run([] if silent else [*detections(), *labels()])
    assert ranks[0][case] == ranks[1][case] == expected
    assert bool(expected["logged"]) is not silent
    assert expected["results"][2] == {}
    if not silent:
        assert 0 < expected["logged"]["val/map"] < 1
        assert list(expected["per_class"][0]) == ["class \u00e90", "class \u00e91"]
