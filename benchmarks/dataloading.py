"""Loading speed: our loaders beside those of `datasets` and of torchvision, alternating in one run.

    python benchmarks/dataloading.py --output dataloading.json

All loaders read the same generated JPEGs, ask the same questions and use the same processor in one worker process each;
what differs is who reads the rows and how they are put together. Printed are medians over rounds, and medians of the
ratios within each round, which stay comparable on a machine that does other things as well. Runs on Linux, without
network.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import pickle
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from rft_lightning.datamodules import COCODetectionDataModule, CustomClassificationDataModule
from rft_lightning.datamodules.base import RFTDataModule
from rft_lightning.policy.loading import load_processor
from rft_lightning.sample import ClassTarget, DetectionTarget
from rft_lightning.tasks import ClassificationTask, DetectionTask

CLASSES = [f"class {number:02}" for number in range(1, 81)]
OURS, DATASETS, TORCHVISION = "rft_lightning", "datasets", "torchvision"
MIB = 1024**2


# The generated data ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A JPEG and its (width, height)."""

    file: Path
    size: tuple[int, int]


def write_pictures(folder: Path, count: int, size: tuple[int, int], rng: np.random.Generator) -> list[Picture]:
    """JPEGs in a few shapes, as COCO has them, with detail at all scales: they decode like photographs."""
    folder.mkdir(parents=True)
    width, height = max(size), max(size)
    canvas = np.zeros((2 * height, 2 * width, 3), dtype=np.float32)
    for step in (1, 2, 4, 8, 16, 32, 64):
        shape = -(-2 * height // step), -(-2 * width // step), 3
        noise = rng.integers(0, 256, shape, dtype=np.uint8)
        layer = Image.fromarray(noise).resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
        canvas += (np.asarray(layer, dtype=np.float32) - 128) * step**0.5
    canvas = np.clip(128 + canvas * (50 / canvas.std()), 0, 255).astype(np.uint8)
    long, short = max(size), min(size)
    shapes = [size, (long, short * 8 // 9), size, (short, long), (long * 4 // 5, short * 4 // 5)]
    pictures = []
    for number in range(count):
        top, left = rng.integers(0, height), rng.integers(0, width)
        w, h = shapes[rng.integers(len(shapes))]
        pictures.append(Picture(folder / f"{number:012}.jpg", (w, h)))
        Image.fromarray(canvas[top : top + h, left : left + w]).save(pictures[-1].file, quality=90)
    return pictures


def write_coco(root: Path, split: str, pictures: Sequence[Picture], count: int, seed: int) -> Path:
    """One split of the official tree with `count` pictures, links to `pictures` in turn; 2 to 12 objects in each."""
    rng = np.random.default_rng(seed)
    (root / split).mkdir(parents=True)
    images, notes = [], []
    for image in range(1, count + 1):
        name = f"{image:012}.jpg"
        picture = pictures[image % len(pictures)]
        width, height = picture.size
        (root / split / name).symlink_to(picture.file)
        url, date = f"http://localhost/{split}/{name}", "2013-11-14 17:02:52"
        entry = {"license": 1, "file_name": name, "coco_url": url, "height": height, "width": width}
        images.append({**entry, "date_captured": date, "id": image})
        shown = rng.integers(0, len(CLASSES), rng.integers(1, 5))
        for category in rng.choice(shown, rng.integers(2, 13)).tolist():
            w, h = (rng.uniform(0.03, 0.6, 2) * picture.size).round(2).tolist()
            x, y = (rng.uniform(0, 1, 2) * (width - w, height - h)).round(2).tolist()
            # As long as COCO's polygons are: half a kilobyte each.
            polygon = (rng.uniform(0, 1, (rng.integers(8, 36), 2)) * (w, h) + (x, y)).round(2)
            note = {"segmentation": [polygon.ravel().tolist()], "area": round(w * h * 0.6, 4), "iscrowd": 0}
            place = {"image_id": image, "bbox": [x, y, w, h], "category_id": category + 1}
            notes.append({**note, **place, "id": len(notes) + 1})
    categories = [{"supercategory": "thing", "id": key, "name": name} for key, name in enumerate(CLASSES, start=1)]
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"info": {}, "images": images, "annotations": notes, "categories": categories}))
    return file


def write_class_folders(root: Path, pictures: Sequence[Picture]) -> None:
    """train/<class>/*.jpg and val/<class>/*.jpg, links to `pictures`."""
    for number, picture in enumerate(pictures):
        for split in ("train", "val") if number % 8 == 0 else ("train",):
            link = root / split / CLASSES[number % 8] / picture.file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(picture.file)


# The loaders ----------------------------------------------------------------------------------------------------------


class Collate:
    """What trainers do with rows of picture and question: chat template, then the processor on the whole batch.

    Args:
        processor: the processor.
        read: a row -> its picture and its question.
    """

    def __init__(self, processor: Any, read: Callable[[Any], tuple[Image.Image, str]]) -> None:
        self.processor, self.read = processor, read

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        images, texts = [], []
        for row in rows:
            image, question = self.read(row)
            user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
            texts.append(self.processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False))
            images.append([image.convert("RGB")])
        settings = {"padding": True, "return_tensors": "pt", "return_mm_token_type_ids": True}
        return {**self.processor(text=texts, images=images, **settings), "rows": rows}


def read_hub_row(row: dict[str, Any]) -> tuple[Image.Image, str]:
    return row["image"], row["question"]


@dataclass
class ReadCOCO:
    """Rows of torchvision's CocoDetection: asks for the category of the first annotation."""

    frame: Any
    names: dict[int, str]

    def __call__(self, row: tuple[Image.Image, list[dict[str, Any]]]) -> tuple[Image.Image, str]:
        image, notes = row
        target = DetectionTarget([], category=self.names[notes[0]["category_id"]])
        return image, DetectionTask().question(target, self.frame)


@dataclass
class ReadClass:
    """Rows of class folders, by torchvision or `datasets`: the same question for all."""

    question: str

    def __call__(self, row: Any) -> tuple[Image.Image, str]:
        return (row["image"] if isinstance(row, dict) else row[0]), self.question


@dataclass
class Loader:
    """A data set and how its batches are made; `make` gives a loader for one round."""

    make: Callable[[], Any]
    dataset: Any


def peer(dataset: Any, collate: Collate, batch_size: int, seed: int = 0) -> Loader:
    def make() -> DataLoader:
        order = torch.Generator().manual_seed(seed)
        return DataLoader(
            dataset, batch_size, shuffle=True, generator=order, drop_last=True, num_workers=1, collate_fn=collate
        )

    return Loader(make, dataset)


def ours(data: RFTDataModule) -> Loader:
    data.setup("fit")
    return Loader(data.train_dataloader, data.split("train"))


def detection_loaders(root: Path, arguments: argparse.Namespace) -> dict[str, Loader]:
    """COCO detection: our few-shot module, a parquet file of question and picture, CocoDetection."""
    from datasets import Dataset, Features, Value, load_dataset
    from datasets import Image as ImageFeature
    from torchvision.datasets import CocoDetection

    data = COCODetectionDataModule(root=root / "coco", max_rows=arguments.pictures, **encoder_settings(arguments))
    mine = ours(data)
    processor, frame = peer_processor(arguments), data.encoder.frame
    file = root / "coco.parquet"
    samples = [data.encoder.complete(sample) for sample in mine.dataset]
    columns = {
        "image": [str(sample.image) for sample in samples],
        "question": [sample.question for sample in samples],
        "solution": [sample.target.solution_text for sample in samples],
    }
    features = Features({"image": ImageFeature(), "question": Value("string"), "solution": Value("string")})
    Dataset.from_dict(columns, features=features).to_parquet(file)
    hub = load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(root / "cache"))
    with quiet():
        coco = CocoDetection(root / "coco/train2017", root / "coco/annotations/instances_train2017.json")
    names = {entry["id"]: entry["name"] for entry in coco.coco.dataset["categories"]}
    return {
        OURS: mine,
        DATASETS: peer(hub, Collate(processor, read_hub_row), arguments.batch_size),
        TORCHVISION: peer(coco, Collate(processor, ReadCOCO(frame, names)), arguments.batch_size),
    }


def classification_loaders(root: Path, arguments: argparse.Namespace) -> dict[str, Loader]:
    """Class folders: our module, the `imagefolder` builder, ImageFolder."""
    from datasets import load_dataset
    from torchvision.datasets import ImageFolder

    folder = root / "classes"
    data = CustomClassificationDataModule(root=folder, **encoder_settings(arguments))
    mine, processor = ours(data), peer_processor(arguments)
    question = ClassificationTask().question(ClassTarget(""), data.encoder.frame)
    hub = load_dataset("imagefolder", data_dir=str(folder / "train"), split="train", cache_dir=str(root / "cache"))
    collate = Collate(processor, ReadClass(question))
    return {
        OURS: mine,
        DATASETS: peer(hub, collate, arguments.batch_size),
        TORCHVISION: peer(ImageFolder(folder / "train"), collate, arguments.batch_size),
    }


def encoder_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "processor": arguments.processor,
        "batch_size": arguments.batch_size,
        "num_workers": 1,
        "seed": 0,
        "min_pixels": arguments.min_pixels,
        "max_pixels": arguments.max_pixels,
        "max_prompt_length": None,
    }


def peer_processor(arguments: argparse.Namespace) -> Any:
    return load_processor(arguments.processor, min_pixels=arguments.min_pixels, max_pixels=arguments.max_pixels)


# What is measured -----------------------------------------------------------------------------------------------------


def timed_pass(loader: Any, batches: int) -> tuple[float, float]:
    """Seconds until a running worker has delivered `batches` batches, and how long it used a processor for them."""
    before = set(active_children())
    iterator = iter(loader)
    next(iterator)  # the start of the worker is not counted
    (worker,) = set(active_children()) - before
    start, used = time.perf_counter(), processor_time(worker.pid)
    for _ in range(batches):
        next(iterator)
    return time.perf_counter() - start, processor_time(worker.pid) - used


def worker_memory(loader: Any, batches: int) -> float:
    """MiB that a worker shares with no other process after some batches, those that it has ready included."""
    before = set(active_children())
    iterator = iter(loader)
    for _ in range(1 + batches):
        next(iterator)
    (worker,) = set(active_children()) - before
    while True:  # until it has nothing more to do
        used = processor_time(worker.pid)
        time.sleep(0.2)
        if processor_time(worker.pid) - used < 0.03:
            break
    lines = Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def processor_time(process: int | None) -> float:
    """Seconds that a process used a processor for itself and in the kernel."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def compare(loaders: dict[str, Loader], arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Speed of every loader, in turns that begin with another one in every round."""
    # This also fills the caches of the disk.
    memory = {name: worker_memory(loader.make(), arguments.batches) for name, loader in loaders.items()}
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    used: dict[str, list[float]] = {name: [] for name in loaders}
    names, rows = list(loaders), arguments.batches * arguments.batch_size
    for turn in range(arguments.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds, processor = timed_pass(loaders[name].make(), arguments.batches)
            rates[name].append(rows / seconds)
            used[name].append(processor / rows)
    return {
        name: {
            "rows_per_second": statistics.median(rates[name]),
            "ours_to_this": statistics.median(a / b for a, b in zip(rates[OURS], rates[name], strict=True)),
            "processor_ms_per_row": 1000 * statistics.median(used[name]),
            "worker_private_mib": memory[name],
            "dataset_pickled_mib": len(pickle.dumps(loaders[name].dataset)) / MIB,
        }
        for name in loaders
    }


def compare_starts(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds until rows of a large annotation file can be read: without and with our cache, and by torchvision."""
    from torchvision.datasets import CocoDetection

    file = root / "annotations" / "instances_train2017.json"
    settings = encoder_settings(arguments)

    def start(**which: Any) -> COCODetectionDataModule:
        data = COCODetectionDataModule(root=root, **{"classes": CLASSES[:8]} | which, **settings)
        data.setup("fit")
        return data

    def coco() -> CocoDetection:
        with quiet():
            return CocoDetection(root / "train2017", file)

    seconds: dict[str, list[float]] = {"first": [], "second": [], TORCHVISION: []}
    for _ in range(arguments.start_rounds):
        for cache in file.parent.glob(".*.npz"):
            cache.unlink()
        for name, begin in (("first", lambda: start(shots=4)), ("second", lambda: start(shots=4)), (TORCHVISION, coco)):
            gc.collect()
            begun = time.perf_counter()
            begin()
            seconds[name].append(time.perf_counter() - begun)
    held = {
        f"{OURS}, 4 shots of 8 classes": start(shots=4).split("train"),
        f"{OURS}, all rows of 8 classes": start().split("train"),
        f"{OURS}, all rows": start(classes=None).split("train"),
        TORCHVISION: coco(),
    }
    return {
        "file_mib": file.stat().st_size / MIB,
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "dataset_pickled_mib": {name: len(pickle.dumps(dataset)) / MIB for name, dataset in held.items()},
    }


def quiet() -> contextlib.AbstractContextManager[Any]:
    """Without pycocotools' messages."""
    return contextlib.redirect_stdout(io.StringIO())


# The run --------------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file of the results")
    parser.add_argument("--pictures", type=int, default=192, help="JPEGs that are generated")
    parser.add_argument("--size", type=int, nargs=2, default=(640, 480), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=6, help="batches of each loader in each round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--large", type=int, default=12_000, help="pictures in the large annotation file")
    parser.add_argument("--start-rounds", type=int, default=2)
    parser.add_argument("--processor", default="asset:tiny-qwen2-vl")
    parser.add_argument("--min-pixels", type=int, default=3136)
    parser.add_argument("--max-pixels", type=int, default=401408)
    found = parser.parse_args(arguments)
    if found.pictures < (found.batches + 1) * found.batch_size:
        parser.error(
            f"Expected at least {(found.batches + 1) * found.batch_size} pictures, (batches + 1) * batch size."
        )
    return found


def run(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All measurements on data generated below `root`."""
    pictures = write_pictures(root / "pictures", arguments.pictures, tuple(arguments.size), np.random.default_rng(0))
    for folder, count in (("coco", arguments.pictures), ("large", arguments.large)):
        write_coco(root / folder, "train2017", pictures, count, seed=1)
        write_coco(root / folder, "val2017", pictures, min(count, 16), seed=2)
    write_class_folders(root / "classes", pictures)
    return {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
        "settings": {name: value for name, value in vars(arguments).items() if name != "output"},
        "picture_kib": statistics.mean(picture.file.stat().st_size for picture in pictures) / 1024,
        "detection": compare(detection_loaders(root, arguments), arguments),
        "classification": compare(classification_loaders(root, arguments), arguments),
        "large_file": compare_starts(root / "large", arguments),
    }


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    lines = []
    for kind in ("detection", "classification"):
        lines.append(f"{kind:<38}{'rows/s':>8}{'ours to this':>14}{'CPU ms/row':>12}{'worker MiB':>12}{'data MiB':>10}")
        for name, found in results[kind].items():
            lines.append(
                f"  {name:<36}{found['rows_per_second']:>8.1f}{found['ours_to_this']:>14.2f}"
                f"{found['processor_ms_per_row']:>12.1f}{found['worker_private_mib']:>12.0f}"
                f"{found['dataset_pickled_mib']:>10.2f}"
            )
    large = results["large_file"]
    lines.append(f"start on an annotation file of {large['file_mib']:.0f} MiB, seconds")
    labels = {"first": f"{OURS}, first", "second": f"{OURS}, second", TORCHVISION: TORCHVISION}
    lines += [f"  {labels[name]:<36}{seconds:>8.2f}" for name, seconds in large["seconds"].items()]
    lines.append("what a worker is given of it (pickled), MiB")
    lines += [f"  {name:<36}{size:>8.2f}" for name, size in large["dataset_pickled_mib"].items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    settings = parse(arguments)
    torch.set_num_threads(1)
    # With threads of its own the tokenizer would be measured against the other core, and only in some loaders.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), settings)
    print(table(results))
    if settings.output is not None:
        settings.output.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
