"""Box metrics against loops in plain Python and torchvision; all sample metrics on one, two and four processes."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import Metric
from torchvision import ops

from rft_lightning.metrics import BoxIoU, ClassificationAccuracy, MatchedIoU
from rft_lightning.metrics.mask_iou import MaskIoU
from rft_lightning.sample import Answer, ClassTarget, GroundingTarget

Box = list[float]
SYNCS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select"}


def plain(a: Box, b: Box) -> tuple[float, float]:
    """IoU and GIoU of two boxes, the first of which may be anything; without an area 0 and -1."""
    if not (all(map(math.isfinite, a)) and a[0] < a[2] and a[1] < a[3]):
        return 0.0, -1.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = width * height if width > 0 and height > 0 else 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return intersection / union, intersection / union - (hull - union) / hull


def values(metric: Metric) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


numbers = st.integers(-3, 8) | st.sampled_from([0.5, math.nan, math.inf, -math.inf])
corners = st.tuples(*[st.integers(0, 8)] * 2, *[st.integers(1, 6)] * 2).map(
    lambda b: [*b[:2], b[0] + b[2], b[1] + b[3]]
)
said = st.none() | corners | st.lists(numbers, min_size=4, max_size=4)


@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(said, corners), min_size=1, max_size=8), strict=st.booleans())
def test_box_iou_equals_a_loop(pairs: list[tuple[Box | None, Box]], strict: bool) -> None:
    metric = BoxIoU(strict=strict)
    metric.update([Answer(boxes=box) for box, _ in pairs], [GroundingTarget(boxes=truth) for _, truth in pairs])
    scores = [(0.0, -1.0) if box is None else plain(box, truth) for box, truth in pairs]
    right = [iou > 0.5 if strict else iou >= 0.5 for iou, _ in scores]
    result = values(metric)
    assert list(result) == ["box_iou_mean", "acc_50", "box_giou_mean"]
    assert result["box_iou_mean"] == pytest.approx(sum(iou for iou, _ in scores) / len(pairs), abs=1e-14)
    assert result["box_giou_mean"] == pytest.approx(sum(giou for _, giou in scores) / len(pairs), abs=1e-14)
    assert result["acc_50"] == sum(right) / len(pairs)


def test_box_iou_equals_torchvision_whatever_the_dtype() -> None:
    corner, size = torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(0)) * 300 + 1
    boxes = torch.cat([corner, corner + size], 1).bfloat16()
    truth = (boxes.double() + torch.linspace(-5, 40, 50)[:, None]).float()
    metric = BoxIoU()
    metric.update([{"boxes": box[None]} for box in boxes], list(truth[:, None]))
    result = values(metric)
    assert result["box_iou_mean"] == pytest.approx(ops.box_iou(boxes.double(), truth.double()).diag().mean().item())
    giou = ops.generalized_box_iou(boxes.double(), truth.double()).diag().mean()
    assert result["box_giou_mean"] == pytest.approx(giou.item())


def test_half_an_overlap_is_the_threshold() -> None:
    for strict in (False, True):
        metric = BoxIoU(strict=strict)
        metric.update([[[0, 0, 100, 50]]], [[[0, 0, 100, 100]]])
        assert values(metric)["acc_50"] == (not strict)


def test_numbers_beyond_floats_spoil_no_mean() -> None:
    metric = BoxIoU()
    metric.update([[[0, 0, 1e200, 1e200]], [[0, 0, 4, 4]]], [[[0, 0, 4, 4]]] * 2)
    assert list(values(metric).values()) == [0.5, 0.5, 0.0]


def test_nothing_is_absent() -> None:
    for metric in (BoxIoU(), MatchedIoU()):
        metric.update([], [])
        assert values(metric)["box_iou_mean"] == -1
    metric = BoxIoU()
    metric.update([None], [[[0, 0, 4, 4]]])  # no answer is an answer without a box
    assert values(metric)["box_iou_mean"] == 0


def items(count: int = 40) -> list[dict]:
    """Samples for all four metrics, some with a string as id."""
    rng = np.random.default_rng(3)
    found = []
    for number in range(count):
        corner, size = rng.integers(0, 50, (2, 2)), rng.integers(1, 40, 2)
        truth = [*corner[0], *(corner[0] + size)]
        box = [*(corner[0] + rng.integers(-6, 7, 2)), *(corner[0] + size + rng.integers(-6, 7, 2))]
        shape = tuple(rng.integers(5, 20, 2))
        mask = rng.choice([0, 1, 1, 255], shape).astype(np.uint8) * (number % 5 > 0)
        said = rng.choice(["rose", "tulip", ""])
        found.append(
            {
                "id": f"picture {number}" if number % 2 else 10**15 + number,
                "answer": Answer(boxes=[box] if number % 7 else [], parsed=bool(number % 7)),
                "target": GroundingTarget(boxes=[truth]),
                "masks": (rng.random(shape) < 0.7, mask.T if number % 9 == 8 and shape[0] != shape[1] else mask),
                "label": Answer(text=f"<answer>{said}</answer>", label=said or None),
                "class": ClassTarget(str(rng.choice(["rose", "primrose", "tulip"]))),
            }
        )
    return found


def everything(samples: list[dict], batch: int = 3) -> dict[str, object]:
    """What all metrics say of these samples."""
    metrics = [BoxIoU(), MatchedIoU(), MaskIoU(), MaskIoU(protocol="published_code"), ClassificationAccuracy()]
    for start in range(0, max(len(samples), 1), batch):
        part = samples[start : start + batch]
        ids = [item["id"] for item in part]
        square = [item for item in part if item["masks"][0].shape == item["masks"][1].shape]
        boxes = [item["answer"] for item in part], [item["target"] for item in part], ids
        labels = [item["label"] for item in part], [item["class"] for item in part], ids
        masks = [item["masks"][0] for item in part], [item["masks"][1] for item in part], ids
        metrics[0].update(*boxes)
        metrics[1].update(*boxes)
        metrics[2].update(*([item["masks"][k] for item in square] for k in (0, 1)), [item["id"] for item in square])
        metrics[3].update(*masks)
        metrics[4].update(*labels)
    results = {}
    for number, metric in enumerate(metrics):
        for name, value in metric.compute().items():
            results[f"{number}/{name}"] = value.tolist() if isinstance(value, torch.Tensor) else value
    return results


def test_order_batches_and_repeats_do_not_matter() -> None:
    samples = items()
    expected = everything(samples)
    assert expected["3/n_skipped"] > 0
    assert 0 < expected["0/acc_50"] < 1
    rng = np.random.default_rng(0)
    for batch in (1, 7, 100):
        order = [*rng.permutation(40), *rng.integers(0, 40, 11)]
        assert everything([samples[i] for i in order], batch) == expected


CASES = ("uneven with repeats", "one rank has nothing", "nothing anywhere")


def shares(case: str, ranks: int) -> list[list[dict]]:
    """What each rank sees."""
    samples = items()
    if case == "one rank has nothing":
        return [[], *(samples[rank :: ranks - 1] for rank in range(ranks - 1))]
    if case == "nothing anywhere":
        return [[]] * ranks
    return [samples[rank :: ranks + 1] + samples[ranks :: ranks + 1][rank * 2 :] for rank in range(ranks)]


def worker(rank: int, folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    results = {case: everything(shares(case, ranks)[rank]) for case in CASES}
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_number_of_processes_gives_the_same_bits(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest imports test files under names of its own; the new processes need one they can find.
    monkeypatch.syspath_prepend(Path(__file__).parent)
    target = importlib.import_module(Path(__file__).stem).worker
    torch.multiprocessing.spawn(target, (str(tmp_path), ranks), nprocs=ranks)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    for case in CASES:
        expected = everything([] if case == "nothing anywhere" else items())
        assert [result[case] for result in found] == [expected] * ranks


class Operations(TorchDispatchMode):
    """The names of all operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [BoxIoU, MatchedIoU])
def test_update_reads_nothing_back(kind: type[Metric]) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 20]])
    preds = [{"boxes": boxes}, {"boxes": boxes[:0]}, []]
    with Operations() as operations:
        kind().update(preds, [boxes, boxes[1:], boxes], ["a", "b", "c"])
    assert "cat" in operations.names or "stack" in operations.names
    assert not operations.names & SYNCS
    with Operations() as operations:
        bool(boxes.any())
    assert operations.names & SYNCS
    metric = kind().to("meta")  # where there are no numbers to read
    metric.update([boxes.to("meta"), []], [boxes.to("meta"), boxes.to("meta")], ["a", "b"])
    assert metric.values[-1].device.type == "meta"


BOXES = torch.tensor([[0.0, 0, 10, 10]])


@pytest.mark.parametrize("kind", [BoxIoU, MatchedIoU])
@pytest.mark.parametrize(
    ("answer", "target", "match"),
    [
        (torch.zeros(2, 3), BOXES, r"'late': the boxes of the answer .* \[2, 3\]"),
        (BOXES, [[1, 2], [3]], "'late': the boxes of the target cannot be read"),
        ({"box": BOXES}, BOXES, r"'late': expected 'boxes' in the answer, found the keys \['box'\]"),
        ("four", BOXES, "'late': the boxes of the answer cannot be read"),
        (BOXES.to("meta"), BOXES, "'late': expected both on one device, .* on meta and the target on cpu"),
    ],
)
def test_errors_name_the_sample_and_leave_no_trace(
    kind: type[Metric], answer: object, target: object, match: str
) -> None:
    metric = kind()
    with pytest.raises(ValueError, match=match):
        metric.update([BOXES, answer], [BOXES, target], ["early", "late"])
    metric.update([], [])
    assert values(metric)["box_iou_mean"] == -1


def test_a_target_without_a_box_is_named() -> None:
    with pytest.raises(ValueError, match=r"Number 1 of the batch: expected a box .* found none"):
        BoxIoU().update([BOXES, BOXES], [BOXES, BOXES[:0]])
    with pytest.raises(ValueError, match="one target per answer, found 1 for 2"):
        MatchedIoU().update([BOXES, BOXES], [BOXES])
