"""Average precision on several processes is that of one, to the last bit, however the pictures are dealt out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rft_lightning.metrics import COCOMeanAveragePrecision, LVISAveragePrecision
from tests.ap_cases import Picture, coco_case, lvis_case, pictures, segm_case

pytestmark = [
    pytest.mark.distributed,
    # From pycocotools' mask functions under numpy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

WORLDS = (1, 2, 4)
# Seeds of each kind: many pictures, with all scores equal and with few, and three pictures for four processes.
KINDS = {"bbox": (8, 25, 11), "segm": (5, 18), "lvis": (17, 21)}
DEALS = ("uneven", "one rank has nothing", "last rank has everything", "padded", "strings", "nothing anywhere")
IMAGE = 48151623


def content(kind: str, seed: int) -> tuple[list[Picture], dict[str, Any]]:
    """The pictures of a case and the arguments of its metric."""
    if kind == "lvis":
        gt, results = lvis_case(seed, exact=True)
        options: dict[str, Any] = {"frequency": {entry["id"]: entry["frequency"] for entry in gt["categories"]}}
    else:
        gt, results = coco_case(seed, exact=True) if kind == "bbox" else segm_case(seed, exact=True)
        options = {"iou_type": kind}
    selected = [gt["categories"][0]["id"]]
    return pictures(gt, results, masks=kind == "segm"), {**options, "selected": selected, "arrays": True}


def items(kind: str, seed: int, deal: str) -> list[Picture]:
    found = [] if deal == "nothing anywhere" else content(kind, seed)[0]
    if deal != "strings":
        return found
    return [(pred, {**target, "image_id": f"image {target['image_id']}.jpg"}) for pred, target in found]


def share(found: list[Picture], deal: str, rank: int, world: int) -> list[Picture]:
    """What a rank sees."""
    if deal == "last rank has everything":
        return found if rank == world - 1 else []
    if deal == "one rank has nothing" and world > 1:
        return found[rank - 1 :: world - 1] if rank else []
    if deal == "padded":  # as a distributed sampler deals them: every rank as many, the first ones repeated
        each = -(-len(found) // world)
        return [found[(rank + world * turn) % len(found)] for turn in range(each)]
    return [picture for number, picture in enumerate(found) if (number * number) % world == rank]


def evaluate(kind: str, seed: int, found: list[Picture], batch: int) -> dict[str, Tensor]:
    make = LVISAveragePrecision if kind == "lvis" else COCOMeanAveragePrecision
    metric = make(**content(kind, seed)[1])
    for start in range(0, len(found), batch):
        preds, targets = zip(*found[start : start + batch], strict=True)
        metric.update(preds, targets)
    return metric.compute()


def conflict(rank: int, world: int) -> str:
    """The message of an image whose content differs between the ranks."""
    box = torch.tensor([[0.0, 0.0, 9.0, 9.0 + rank]])
    pred = {"boxes": box, "scores": torch.tensor([0.5]), "labels": torch.tensor([1])}
    metric = COCOMeanAveragePrecision()
    metric.update([pred], [{"boxes": box[:, :4], "labels": torch.tensor([1]), "image_id": IMAGE}])
    try:
        metric.compute()
    except ValueError as error:
        return str(error)
    return ""


def cases() -> list[tuple[str, int, str]]:
    return [(kind, seed, deal) for kind, seeds in KINDS.items() for seed in seeds for deal in DEALS]


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = {
        "/".join(map(str, case)): evaluate(*case[:2], share(items(*case), case[2], rank, world), batch=1 + rank)
        for case in cases()
    }
    torch.save({"found": found, "conflict": conflict(rank, world)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found; they start once per number of processes, which takes most of the time."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    with pytest.MonkeyPatch.context() as patch:
        # The new processes import this file by its name, `tests.test_ap_processes`.
        patch.syspath_prepend(Path(__file__).parents[1])
        torch.multiprocessing.spawn(worker, (world, str(folder)), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
@pytest.mark.parametrize(("kind", "seed", "deal"), cases())
def test_every_process_has_the_result_of_one(ranks: list[dict[str, Any]], kind: str, seed: int, deal: str) -> None:
    expected = evaluate(kind, seed, items(kind, seed, deal), batch=2)
    assert float(expected["map"]) > 0 or deal == "nothing anywhere"
    for rank in ranks:
        found = rank["found"][f"{kind}/{seed}/{deal}"]
        assert found.keys() == expected.keys()
        for name in found:
            assert torch.equal(found[name], expected[name]), name


def test_a_conflict_between_processes_is_named_on_each(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert (str(IMAGE) in rank["conflict"]) == (len(ranks) > 1)
        assert rank["conflict"] == ranks[0]["conflict"]
