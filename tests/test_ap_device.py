"""What an evaluation asks of a device: how many operations it starts, and how often the host waits for it.

Counted on the CPU by a dispatch mode, since the same operations run on every device.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rft_lightning.metrics import COCOMeanAveragePrecision

# Their results have a size, or are a value, that the host must know.
WAITS = (
    "_local_scalar_dense", "nonzero", "unique_consecutive", "unique_dim", "_unique2", "masked_select", "equal",
    "bincount", "item",
)  # fmt: skip


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.operations[name] += 1
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        of_unknown_size = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in WAITS or by_mask or of_unknown_size:
            self.waits[name] += 1
        return function(*args, **(kwargs or {}))


def pictures(images, classes, objects, detections):
    """Random objects, half of the detections near one and half anywhere."""
    generator = torch.Generator().manual_seed(0)

    def boxes(count):
        low, side = torch.rand(count, 2, generator=generator) * 400, torch.rand(count, 2, generator=generator) * 150 + 5
        return torch.cat([low, low + side], 1).double()

    truth, image = boxes(objects), torch.randint(images, (objects,), generator=generator)
    label = torch.randint(classes, (objects,), generator=generator)
    near = torch.randint(objects, (detections // 2,), generator=generator)
    found = torch.cat([truth[near] + torch.randn(len(near), 4, generator=generator) * 8, boxes(detections - len(near))])
    found_image = torch.cat([image[near], torch.randint(images, (detections - len(near),), generator=generator)])
    found_label = torch.cat([label[near], torch.randint(classes, (detections - len(near),), generator=generator)])
    scores = torch.rand(detections, generator=generator).double()
    by_image = [[(i == n).nonzero()[:, 0] for n in range(images)] for i in (found_image, image)]
    preds = [{"boxes": found[rows], "scores": scores[rows], "labels": found_label[rows]} for rows in by_image[0]]
    targets = [
        {"boxes": truth[rows], "labels": label[rows], "image_id": number} for number, rows in enumerate(by_image[1])
    ]
    return preds, targets


@pytest.mark.parametrize(
    "sizes", [(60, 8, 300, 4_000), pytest.param((2000, 80, 36_000, 500_000), marks=pytest.mark.slow)]
)
def test_few_operations_and_fewer_waits(sizes, monkeypatch):
    preds, targets = pictures(*sizes)
    metric = COCOMeanAveragePrecision()
    with Counting() as update:
        for start in range(0, len(preds), 8):
            metric.update(preds[start : start + 8], targets[start : start + 8])
    assert sum(update.waits.values()) == 0
    assert sum(update.operations.values()) <= 10 * len(preds)
    read = Counter()
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda self, tolist=torch.Tensor.tolist: read.update(["tolist"]) or tolist(self)
    )
    with Counting() as compute:
        result = metric.compute()
    assert result["map"] > 0.05
    assert sum(compute.operations.values()) <= 1100
    assert sum(compute.waits.values()) + read["tolist"] <= 40
