"""MaskIoU: the numbers of LISA and of the published evaluation, restated here in float32 or pixel by pixel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageDraw

from rft_lightning.errors import ConfigConflictError
from rft_lightning.masks import Region
from rft_lightning.metrics.mask_iou import MaskIoU
from rft_lightning.sample import GroundingTarget

Masks = list[tuple[np.ndarray, np.ndarray]]


def random_masks(seed: int, count: int = 30) -> Masks:
    """Predictions and targets of all sizes: noise, blobs, ignored pixels, empty ones on either side."""
    rng = np.random.default_rng(seed)
    pairs = []
    for number in range(count):
        size = tuple(rng.integers(1, 40, 2))
        truth = (rng.random(size) < rng.choice([0.0, 0.1, 0.6])).astype(np.uint8)
        pred = (truth == 1) ^ (rng.random(size) < rng.choice([0.0, 0.2]))
        if number % 3 == 0:
            truth[rng.random(size) < rng.choice([0.3, 1.0])] = 255
        pairs.append((pred, truth))
    return pairs


def score(pairs: Masks, ids: list[int] | None = None, protocol: str = "lisa", batch: int = 4) -> dict[str, float]:
    metric = MaskIoU(protocol=protocol)
    ids = list(range(len(pairs))) if ids is None else ids
    for start in range(0, len(pairs), batch):
        preds, targets = zip(*pairs[start : start + batch], strict=True)
        metric.update(preds, targets, ids[start : start + batch])
    return {name: value.item() for name, value in metric.compute().items()}


def lisa(pairs: Masks, ranks: int, real: type = np.float32) -> tuple[float, float]:
    """LISA's validation: histograms of class 1 per mask, meters per rank, an all-reduce and its averages."""
    totals = np.zeros((ranks, 4), dtype=np.float64)  # intersection, union, IoU, masks
    for number, (pred, truth) in enumerate(pairs):
        output, target = pred.astype(np.int64).ravel(), truth.astype(np.int64).ravel()
        output[target == 255] = 255
        of_class_one = [np.bincount(x, minlength=2)[1] for x in (output[output == target], output, target)]
        intersection, union = real(of_class_one[0]), real(of_class_one[1] + of_class_one[2] - of_class_one[0])
        iou = intersection / (union + real(1e-5))
        if union == 0:
            iou += real(1)
        totals[number % ranks] += (intersection, union, iou, 1)
    intersection, union, iou, masks = totals.astype(real).sum(0, dtype=real)
    return float(iou / (float(masks) + 1e-5)), float(intersection / (union + real(1e-10)))


def published(pairs: Masks) -> tuple[float, float, int]:
    """Visual-RFT's mask_iou.py, one pixel at a time."""
    ious, all_i, all_u, skipped = [], 0, 0, 0
    for pred, truth in pairs:
        if pred.shape != truth.shape:
            skipped += 1
            continue
        bits = [(bool(a), bool(b)) for a, b in zip(pred.ravel().tolist(), truth.ravel().tolist(), strict=True)]
        intersection, union = sum(a and b for a, b in bits), sum(a or b for a, b in bits)
        ious.append(intersection / (union + 1e-6))
        all_i, all_u = all_i + intersection, all_u + union
    return sum(ious) / len(ious), all_i / (all_u + 1e-6), skipped


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ranks", [1, 3])
def test_equals_lisa(seed: int, ranks: int) -> None:
    pairs = random_masks(seed)
    result = score(pairs)
    expected = lisa(pairs, ranks)
    assert list(result) == ["mask_iou_mean", "mask_iou_cumulative"]
    assert list(result.values()) == pytest.approx(expected, abs=2e-6)
    mean, cumulative = lisa(pairs, ranks, np.float64)
    assert result["mask_iou_mean"] == pytest.approx(mean * (len(pairs) + 1e-5) / len(pairs), abs=1e-14)
    assert result["mask_iou_cumulative"] == pytest.approx(cumulative, abs=1e-14)


pairs_of_masks = st.integers(1, 4).flatmap(
    lambda side: st.lists(
        st.tuples(
            arrays.arrays(bool, (side, 3)), arrays.arrays(np.uint8, (side, 3), elements=st.sampled_from([0, 1, 255]))
        ),
        min_size=1,
        max_size=5,
    )
)


@settings(max_examples=60, deadline=None)
@given(pairs=pairs_of_masks)
def test_equals_counting_pixels(pairs: Masks) -> None:
    ious, all_i, all_u = [], 0, 0
    for pred, truth in pairs:
        pixels = [(p, t) for p, t in zip(pred.ravel().tolist(), truth.ravel().tolist(), strict=True) if t != 255]
        intersection = sum(1 for p, t in pixels if p and t == 1)
        union = sum(1 for p, t in pixels if p or t == 1)
        ious.append(intersection / (union + 1e-5) if union else 1.0)
        all_i, all_u = all_i + intersection, all_u + union
    result = score(pairs)
    assert result["mask_iou_mean"] == pytest.approx(sum(ious) / len(ious), abs=1e-15)
    assert result["mask_iou_cumulative"] == all_i / (all_u + 1e-10)
    assert list(score(pairs, protocol="published_code").values()) == pytest.approx(published(pairs), abs=1e-15)


def test_empty_targets() -> None:
    nothing, something = np.zeros((4, 5), np.uint8), np.zeros((4, 5), np.uint8)
    something[1, 1] = 1
    ignored = np.full((4, 5), 255, np.uint8)
    assert score([(nothing, nothing)]) == {"mask_iou_mean": 1, "mask_iou_cumulative": 0}
    assert score([(something, nothing)]) == {"mask_iou_mean": 0, "mask_iou_cumulative": 0}
    assert score([(something, ignored)])["mask_iou_mean"] == 1  # what was said is not scored
    assert score([(nothing, something)])["mask_iou_mean"] == 0
    assert score([(something, something)])["mask_iou_mean"] == 1 / (1 + 1e-5)
    assert score([(nothing, nothing)], protocol="published_code")["mask_iou_mean"] == 0
    assert score([(something, ignored)], protocol="published_code")["mask_iou_mean"] == pytest.approx(1 / 20)
    metric = MaskIoU()
    metric.update([], [])
    assert [value.item() for value in metric.compute().values()] == [-1, -1]


def test_published_code_skips_samples_of_another_size() -> None:
    pairs = [(pred, (truth == 1).astype(np.uint8)) for pred, truth in random_masks(1)]
    wrong = [(np.ones((3, 5), bool), np.ones((5, 3), np.uint8))]
    expected = published([*wrong, *pairs])
    result = score([*wrong, *pairs], protocol="published_code")
    assert list(result) == ["mask_iou_mean", "mask_iou_cumulative", "n_skipped"]
    assert list(result.values()) == pytest.approx(expected, abs=1e-14)
    assert result["n_skipped"] == 1
    assert score(wrong, protocol="published_code") == {"mask_iou_mean": -1, "mask_iou_cumulative": -1, "n_skipped": 1}


def test_a_target_is_painted_as_the_protocol_asks() -> None:
    regions = (Region(((2, 1), (17, 3), (9, 14))), Region(((5, 4), (8, 4), (8, 7)), 255), Region(((15, 15), (19, 19))))
    target = GroundingTarget([[2, 1, 17, 14]], image_size=(24, 20), regions=regions)
    pred = np.zeros((20, 24), bool)
    pred[3:12, 6:20] = True
    assert score([(pred, target)]) == score([(pred, target.mask())])
    first = Image.new("L", (24, 20))
    ImageDraw.Draw(first).polygon(
        [(2.7, 1.2), (17.9, 3.0), (9.5, 14.5)], fill=1, outline=1
    )  # as its floats are painted
    expected = score([(pred, np.asarray(first))], protocol="published_code")
    assert score([(pred, target)], protocol="published_code") == expected
    assert expected["mask_iou_mean"] != score([(pred, target.mask() > 0)], protocol="published_code")["mask_iou_mean"]


def test_order_batches_and_repeats_do_not_matter() -> None:
    pairs = [(pred, truth) for pred, truth in random_masks(2, 60)]
    expected = score(pairs)
    rng = np.random.default_rng(0)
    for batch in (1, 7, 100):
        order = [*rng.permutation(60).tolist(), *rng.integers(0, 60, 9).tolist()]
        assert score([pairs[i] for i in order], order, batch=batch) == expected
    metric = MaskIoU()
    metric.update(*zip(*pairs, strict=True))
    metric.update(*zip(*pairs[:9], strict=True))
    more = score([*pairs, *pairs[:9]])
    assert {name: value.item() for name, value in metric.compute().items()} == more != expected  # no ids: all count


def test_counts_do_not_round() -> None:
    truth = torch.ones(5000, 5001, dtype=torch.uint8)  # more pixels than float32 counts
    pred = truth.clone()
    pred[7, 7] = 0
    metric = MaskIoU()
    metric.update([pred] * 3, [truth] * 3)
    assert metric.compute()["mask_iou_cumulative"].item() == (3 * 25_005_000 - 3) / (3 * 25_005_000 + 1e-10)


def test_masks_of_any_kind() -> None:
    pred, truth = random_masks(4)[4]
    expected = score([(pred, truth)])
    read_only = truth.copy()
    read_only.setflags(write=False)
    kinds = [
        (torch.from_numpy(pred), torch.from_numpy(truth)),
        (pred * np.uint8(255), read_only),
        (pred.astype(np.int64), torch.from_numpy(truth).int()),
        (pred[::-1], truth[::-1]),
        (np.asfortranarray(pred), truth.tolist()),
        (Image.fromarray(pred), Image.fromarray(truth)),
    ]
    for kind in kinds:
        assert score([kind]) == expected
    stacked = MaskIoU()
    stacked.update(torch.from_numpy(pred)[None], torch.from_numpy(truth)[None])
    assert stacked.compute()["mask_iou_mean"].item() == expected["mask_iou_mean"]
    assert score([(pred, truth == 1)]) == score([(pred, (truth == 1).astype(np.uint8))])


MASK = torch.zeros(4, 5, dtype=torch.bool)
TARGET = GroundingTarget([[0, 0, 1, 1]], image_size=(5, 4), regions=(Region(((0, 0), (3, 3))),))


@pytest.mark.parametrize(
    ("pred", "target", "match"),
    [
        (MASK, MASK.T, r"'late': expected masks of one size.* \[4, 5\] .* \[5, 4\]"),
        (MASK.float(), MASK, "'late': Expected a prediction mask .* float32.*logits > 0"),
        (MASK, MASK.double(), "'late': Expected a target mask .* float64"),
        (MASK[None], MASK, r"'late': .* found shape \[1, 4, 5\]"),
        (MASK, GroundingTarget([[0, 0, 1, 1]], image_size=(5, 4)), "'late': Expected a target with regions.* found 0"),
        (MASK, GroundingTarget([], regions=TARGET.regions), "'late': .*image size None"),
        (None, TARGET, "'late': "),
        (MASK.to("meta"), MASK, "'late': expected both on one device, .* on meta and the target on cpu"),
    ],
)
def test_errors_name_the_sample_and_leave_no_trace(pred: object, target: object, match: str) -> None:
    metric = MaskIoU()
    with pytest.raises(ValueError, match=match):
        metric.update([MASK, pred], [MASK, target], ["early", "late"])
    assert metric.compute()["mask_iou_mean"] == -1


def test_lists_must_fit_together() -> None:
    with pytest.raises(ValueError, match="one target per answer, found 0 for 1"):
        MaskIoU().update([MASK], [])
    with pytest.raises(ValueError, match="one id per sample, found 2 for 1"):
        MaskIoU().update([MASK], [MASK], [1, 2])
    with pytest.raises(ValueError, match="Number 1 of the batch"):
        MaskIoU().update([MASK, MASK], [MASK, MASK.T])
    with pytest.raises(ConfigConflictError, match="found 'paper'"):
        MaskIoU(protocol="paper")


@pytest.mark.parametrize("protocol", ["lisa", "published_code"])
def test_update_reads_nothing_back(protocol: str) -> None:
    """On the meta device there are no numbers: whatever wanted one would fail."""
    metric = MaskIoU(protocol=protocol).to("meta")
    mask = MASK.to("meta")
    metric.update([mask, mask, mask], [mask, TARGET, mask.byte()], ["a", "b", "c"])
    assert [rows.device.type for rows in getattr(metric, metric._counts)] == ["meta"] * 2
    with pytest.raises((NotImplementedError, RuntimeError)):
        bool(mask.any())


@pytest.mark.sample_data
def test_first_polygons_of_real_annotations(sample_data: Path) -> None:
    """Corners cut to whole pixels, as targets hold them, paint the same mask as the file's own numbers."""
    metric, expected = MaskIoU(protocol="published_code"), []
    for file in sorted((sample_data / "reasonseg_mini").rglob("val/*.json")):
        points = [tuple(point) for point in json.loads(file.read_text())["shapes"][0]["points"]]
        size = tuple(int(max(axis)) + 9 for axis in zip(*points, strict=True))
        canvas = Image.new("L", size)
        ImageDraw.Draw(canvas).polygon(points, fill=1, outline=1)
        region = Region(tuple((int(x), int(y)) for x, y in points))
        metric.update([np.asarray(canvas)], [GroundingTarget([], image_size=size, regions=(region,))], [file.stem])
        expected.append(np.asarray(canvas).sum())
    result = metric.compute()
    assert len(expected) == 3
    assert result["mask_iou_cumulative"].item() == sum(expected) / (sum(expected) + 1e-6)
