"""GroundingMaskIoU: masks of answers against the regions of targets, made where they are missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch.utils.data import DataLoader

from rft_lightning.callbacks import GroundingIoU, GroundingMaskIoU
from rft_lightning.masks import Region
from rft_lightning.metrics import MaskIoU
from rft_lightning.sample import Answer, ClassTarget, GroundingTarget, Prediction, Sample
from rft_lightning.segmenter import Segmenter
from rft_lightning.tasks import GroundingTask
from tests.tiny_baselines import baseline_folder

SIZE = (80, 60)
SQUARE = Region(((10, 10), (39, 10), (39, 29), (10, 29)))
RIGHT = Region(((50, 5), (69, 5), (69, 44), (50, 44)))
UNCLEAR = Region(((40, 10), (49, 10), (49, 29), (40, 29)), 255)
# The object of the published protocol is the first region, of LISA's all but the unclear one.
TARGET = GroundingTarget([[10, 10, 40, 30]], expression="it", image_size=SIZE, regions=(SQUARE, UNCLEAR, RIGHT))


class Answers(LightningModule):
    """Gives predictions made before, one per batch."""

    def __init__(self, predictions: list[Prediction]) -> None:
        super().__init__()
        self.predictions = predictions

    def test_step(self, batch, batch_idx):
        return {"predictions": [self.predictions[batch_idx]]}


class Painter(Segmenter):
    """A segmenter whose masks are the boxes themselves; counts the pictures it is shown."""

    seen = 0

    def masks(self, images, boxes=None, *, points=None):
        self.seen += len(images)
        found = []
        for image, box in zip(images, boxes.tolist(), strict=True):
            rows, columns = np.mgrid[: image.height, : image.width] + 0.5
            inside = (columns > box[0]) & (rows > box[1]) & (columns < box[2]) & (rows < box[3])
            found.append(inside)
        return found


def prediction(name, answer, target=TARGET):
    noise = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    return Prediction(Sample(name, Image.fromarray(noise), target, GroundingTask(), SIZE), "", answer)


def measured(make_trainer, predictions, *callbacks):
    trainer = make_trainer(callbacks=list(callbacks))
    trainer.test(Answers(predictions), DataLoader(range(len(predictions)), batch_size=1), verbose=False)
    return {name.removeprefix("test/"): float(value) for name, value in trainer.callback_metrics.items()}


def painted(*regions):
    mask = np.zeros((SIZE[1], SIZE[0]), dtype=bool)
    for region in regions:
        (left, top), (right, bottom) = region.points[0], region.points[2]
        mask[top : bottom + 1, left : right + 1] = True
    return mask


def test_masks_of_boxes_under_lisas_protocol(make_trainer):
    """The answer covers the first square and the unclear part, which is not scored, and misses the right one."""
    painter = Painter()
    found = prediction("a", Answer(boxes=[[10, 10, 50, 30]]))
    nothing = prediction("b", Answer(text="?"))
    results = measured(make_trainer, [found, nothing], GroundingMaskIoU(painter, "lisa"))
    inside, union = 30 * 20, 30 * 20 + 20 * 40
    assert results["mask_iou_mean"] == pytest.approx(inside / union / 2, abs=1e-4)
    assert results["mask_iou_cumulative"] == pytest.approx(inside / (2 * union), abs=1e-4)
    assert results["parse_rate"] == 0.5
    assert painter.seen == 1
    assert found.answer.mask.sum() == 40 * 20
    assert nothing.answer.mask.shape == (60, 80)
    assert not nothing.answer.mask.any()


def test_masks_of_boxes_under_the_published_protocol(make_trainer):
    """Corners are cut to whole pixels, and the first region alone is the object."""
    found = prediction("a", Answer(boxes=[[10.9, 10.9, 50.9, 30.9]]))
    results = measured(make_trainer, [found], GroundingMaskIoU(Painter(), "published_code"))
    assert found.answer.mask.sum() == 40 * 20
    assert results["mask_iou_mean"] == pytest.approx(30 * 20 / (40 * 20), abs=1e-4)
    assert results["n_skipped"] == 0


def test_it_is_mask_iou_of_what_the_segmenter_makes(make_trainer):
    boxes = [[10, 10, 50, 30], [5, 5, 70, 50], [40, 20, 60, 40]]
    predictions = [prediction(str(number), Answer(boxes=[box])) for number, box in enumerate(boxes)]
    callback = GroundingMaskIoU(baseline_folder("sam"))
    results = measured(make_trainer, predictions, callback)
    images = [item.sample.load_image() for item in predictions]
    metric = MaskIoU()
    metric.update(Segmenter(baseline_folder("sam")).masks(images, torch.tensor(boxes)), [TARGET] * 3)
    expected = {name: float(value) for name, value in metric.compute().items()}
    assert {name: callback.results[name] for name in expected} == expected
    assert results["mask_iou_mean"] == pytest.approx(expected["mask_iou_mean"], abs=1e-6)
    assert 0 < expected["mask_iou_mean"] < 1
    assert "sam" in callback.summary()


def test_masks_that_answers_have_are_kept(make_trainer):
    painter = Painter()
    mask = painted(SQUARE, RIGHT)
    answer = Answer(boxes=[[0, 0, 5, 5]], mask=mask)
    results = measured(make_trainer, [prediction("a", answer)], GroundingMaskIoU(painter))
    assert results["mask_iou_mean"] == pytest.approx(1, abs=1e-6)
    assert painter.seen == 0
    assert answer.mask is mask


def test_without_a_segmenter_only_answers_with_a_mask_count(make_trainer):
    whole = prediction("a", Answer(boxes=[[0, 0, 5, 5]], mask=painted(SQUARE, RIGHT)))
    half = prediction("b", Answer(mask=painted(RIGHT)))
    boxed = prediction("c", Answer(boxes=[[10, 10, 40, 30]]))
    results = measured(make_trainer, [whole, half, boxed], GroundingMaskIoU())
    assert results["mask_iou_mean"] == pytest.approx((1 + 800 / 1400) / 2, abs=1e-4)
    assert boxed.answer.mask is None


def test_it_is_silent_about_everything_else(make_trainer):
    """Targets without regions, other tasks, and answers without a mask where none are made."""
    painter = Painter()
    flat = GroundingTarget([[10, 10, 40, 30]], expression="it", image_size=SIZE)
    boxed = Answer(boxes=[[10, 10, 40, 30]])
    others = [prediction("a", boxed, flat), prediction("b", Answer(label="cat"), ClassTarget("cat"))]
    callback = GroundingMaskIoU(painter)
    results = measured(make_trainer, others, callback, GroundingIoU())
    assert painter.seen == 0
    assert boxed.mask is None
    assert callback.results == {}
    assert not [name for name in results if name.startswith("mask")]
    assert results["box_iou_mean"] == 1
    alone = GroundingMaskIoU()
    assert measured(make_trainer, [prediction("a", Answer(boxes=[[10, 10, 40, 30]]))], alone) == {}


def test_predictions_are_scored_outside_a_run(make_trainer):
    """As `rft score` does with rows of a file; the masks are those that a run made."""
    item = prediction("a", Answer(boxes=[[10, 10, 50, 30]]))
    in_run = GroundingMaskIoU(Painter())
    measured(make_trainer, [item], in_run)
    results, per_class = GroundingMaskIoU().score([item])
    assert results == in_run.results
    assert per_class == {}
