"""`rft prepare`: look at the data of a configuration before training: download, check, summary, manifest, preview.

`rft prepare --estimate` looks at the memory instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import jsonargparse
from rich.console import Console
from rich.table import Table

from rft_lightning.errors import AnnotationError, ConfigConflictError, RFTError
from rft_lightning.policy_module import PolicyModule
from rft_lightning.report.contact_sheet import contact_sheet
from rft_lightning.sample import Sample
from rft_lightning.trainer import RFTTrainer

# What configurations of other commands state beside `data`, `model` and `trainer`.
_UNUSED = ("ckpt_path", "weights_only", "verbose", "run_dir")
# Options of --estimate, each in place of what the configuration says.
_OVERRIDES = ("devices", "num_nodes", "strategy", "precision", "prompt_tokens")
_LOOKED_AT = 64  # samples of a split among which those of the preview are chosen


def prepare(
    data: Any,
    *,
    download: bool = False,
    manifest: Path | None = None,
    default_manifest: Path | None = None,
    preview: Path | None = None,
    preview_samples: int = 4,
) -> None:
    """Make the data of a run ready and show what it is; builds no model.

    Args:
        data: the datamodule.
        download: fetch what its publisher offers first.
        manifest: where to write which rows the run uses, as JSON.
        default_manifest: the same for data that has a manifest; other data is left without one.
        preview: picture to write: some samples as the model sees them.
        preview_samples: how many of each task.

    Raises:
        RFTError: files are missing, or do not fit their annotations.
    """
    for part in data.parts().values():
        if download and (part.downloads or part is data):
            part.download()
        for split in part.splits:
            check_pictures(part.split(split), split)
    print_summary(data.summary())
    for name, part, file in _manifests(data, manifest, default_manifest):
        with _writing(file, "--manifest"):
            part.write_manifest(file)
        # The command line reaches no entry of a list.
        again = f"`manifest: {file}` in the init_args of member {name}" if name else f"--data.manifest {file}"
        print(f"The rows of this draw are in {file}; {again} uses them again.")
    if preview is not None:
        sheet = contact_sheet(preview_rows(data, preview_samples), data.encoder)
        with _writing(preview, "--preview"):
            preview.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(preview)
        print(f"Samples as the model sees them are in {preview}")


def check_pictures(samples: Sequence[Sample], split: str) -> None:
    """See that every picture is there and has the size its annotation states; headers only.

    Raises:
        AnnotationError: a picture has another size.
        DatasetNotFoundError: a picture is missing or is none.
    """
    from PIL import Image

    for position in _distinct(samples):
        sample = samples[position]
        if not isinstance(sample.image, Path):
            continue
        try:
            with Image.open(sample.image) as picture:
                size = picture.size
        except OSError:
            sample.load_image()  # raises the named error
            raise
        if size != tuple(sample.image_size):
            raise AnnotationError(
                f"{sample.image} has {size[0]}x{size[1]} pixels, but the annotations of {split} state "
                f"{sample.image_size[0]}x{sample.image_size[1]}: its boxes would be wrong. Restore the original."
            )


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """A line per split with its numbers, and the classes that have fewer examples than were asked for."""
    columns = list(dict.fromkeys(name for numbers in summary.values() for name in numbers if name != "short"))
    table = Table("split", *(name.replace("_", " ") for name in columns))
    for split, numbers in summary.items():
        table.add_row(split, *(_text(numbers.get(name)) for name in columns))
    console = console or Console()
    console.print(table)
    for split, numbers in summary.items():
        if numbers.get("short"):
            few = ", ".join(f"{name} ({count})" for name, count in numbers["short"].items())
            console.print(f"{split}: fewer examples than asked for: {few}", markup=False)


def preview_rows(data: Any, count: int) -> list[tuple[str, list[Sample]]]:
    """Up to `count` samples of every task of every part of the data, spread over the first split, under headings."""
    rows: dict[str, list[Sample]] = {}
    for name, part in data.parts().items():
        samples = part.split(part.splits[0])
        step = max(1, len(samples) // _LOOKED_AT)
        looked_at = [samples[i] for i in range(0, len(samples), step)]
        for task in dict.fromkeys(sample.task.name for sample in looked_at):
            mine = [sample for sample in looked_at if sample.task.name == task]
            heading = " / ".join(word for word in (name, task, part.splits[0]) if word)
            rows[heading] = mine[:: max(1, len(mine) // count)][:count]
    return list(rows.items())


def run_prepare(words: Sequence[str], data_class: type) -> None:
    """Parse the command line and prepare.

    Args:
        words: the command line after `prepare`.
        data_class: what the datamodule is a subclass of.
    """
    from lightning.pytorch import seed_everything

    parser = prepare_parser(data_class)
    config = parser.parse_args(list(words))
    overrides = {name: config[name] for name in _OVERRIDES}
    if config.estimate:
        from rft_lightning.report.estimate import print_estimate

        print_estimate(config, overrides=overrides)
        return
    if given := [f"--{name}" for name, value in overrides.items() if value is not None]:
        raise ConfigConflictError(f"{', '.join(given)} changes nothing but an estimate: add --estimate.")
    if config.data is None:
        raise ConfigConflictError("There is no data block. Name a file with one: rft prepare -c configs/coco.yaml")
    if config.seed_everything is not False:
        seed_everything(None if config.seed_everything is True else config.seed_everything, workers=True, verbose=False)
    del config["trainer"]  # else jsonargparse makes the objects that its block names
    with named_errors():
        data = parser.instantiate_classes(config).data
    if config.model is not None:
        settle_processor(data, config.model.init_args.policy)
    prepare(
        data,
        download=config.download,
        manifest=_path(config.manifest),
        default_manifest=_default_manifest(config.config),
        preview=_path(config.preview),
        preview_samples=config.preview_samples,
    )


def prepare_parser(data_class: type) -> jsonargparse.ArgumentParser:
    """Reads the files that `fit` reads, and overrides of their `data` and `model` blocks."""
    parser = jsonargparse.ArgumentParser(
        prog="rft prepare",
        description="Look at the data of a configuration before training: check it, print what it holds, write which "
        "rows are used, and draw samples as the model sees them. Builds no model.",
        usage="rft prepare --config FILE [options]",
    )
    parser.add_argument("-c", "--config", action="config", help="Configuration file of a run.")
    parser.add_argument("--download", type=bool, default=False, help="Fetch what the publisher offers into data.root.")
    parser.add_argument("--manifest", type=str | None, help="JSON file of the rows; TASK.manifest.json if not given.")
    parser.add_argument("--preview", type=str | None, help="Picture to write, such as preview.png.")
    parser.add_argument("--preview_samples", type=int, default=4, help="Samples per task in the preview.")
    parser.add_argument(
        "--estimate", action="store_true", help="Print the memory a run needs per device, and nothing else; no data."
    )
    for name, kind, text in (
        ("devices", list[int] | int | str, "devices per node, or which"),
        ("num_nodes", int, "nodes"),
        ("strategy", str, "strategy: auto, ddp or fsdp2"),
        ("precision", str, "precision: 32-true, bf16-mixed or bf16-true"),
        ("prompt_tokens", int, "longest prompt, image included"),
    ):
        parser.add_argument(f"--{name}", type=kind | None, help=f"With --estimate: {text}; the configuration's.")
    parser.add_argument("--seed_everything", type=bool | int, default=0, help="Seed of the run; data.seed follows.")
    parser.add_subclass_arguments(data_class, "data", fail_untyped=False)
    parser.add_subclass_arguments(PolicyModule, "model", fail_untyped=False, instantiate=False)
    # By its types, as `fit` reads it: what has none is replaced as a whole by the next file.
    parser.add_class_arguments(RFTTrainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True)
    for name in _UNUSED:
        parser.add_argument(f"--{name}", type=Any, help=jsonargparse.SUPPRESS)
    return parser


@contextmanager
def named_errors() -> Iterator[None]:
    """A named error of a constructor leaves as itself, not wrapped by jsonargparse."""
    try:
        yield
    except ValueError as error:
        named: BaseException | None = error
        while named is not None and not isinstance(named, RFTError):
            named = named.__cause__
        if named is None:
            raise
        raise named from named.__cause__


def settle_processor(data: Any, checkpoint: str) -> None:
    """The policy's checkpoint also sets up the datamodule's prompts.

    Not a jsonargparse link: that would silently overwrite a processor the user set as well.

    Raises:
        ConfigConflictError: the datamodule has another one.
    """
    if data.processor not in (None, checkpoint):
        raise ConfigConflictError(
            f"data.processor is {data.processor!r} and model.policy is {checkpoint!r}. Prompts are always encoded for "
            "the policy: leave data.processor out."
        )
    data.processor = checkpoint


def _distinct(samples: Sequence[Sample]) -> Iterator[int]:
    """Positions of one sample per picture, as far as the rows tell without making samples."""
    rows = getattr(samples, "rows", None)
    if rows is None or not all(hasattr(row, "image") for row in rows):
        yield from range(len(samples))
        return
    first: dict[Any, int] = {}
    for position, row in enumerate(rows):
        first.setdefault(row.image, position)
    yield from first.values()


def _manifests(data: Any, wanted: Path | None, default: Path | None) -> Iterator[tuple[str, Any, Path]]:
    """The parts of the data that have a manifest, with their names, and the file for each."""
    parts = {name: part for name, part in data.parts().items() if hasattr(part, "write_manifest")}
    file = wanted or default
    if wanted is not None and not parts:
        raise ConfigConflictError(
            f"{type(data).__name__} makes its rows of its settings and has no manifest; leave --manifest out."
        )
    for name, part in parts.items():
        if file is not None:
            yield name, part, file.with_stem(f"{file.stem}.{name}") if name else file


def _default_manifest(configs: Sequence[Any] | None) -> Path:
    """In the working directory, after the first configuration file: the task's; others lie over it."""
    return Path(f"{Path(str(configs[0])).stem}.manifest.json") if configs else Path("manifest.json")


@contextmanager
def _writing(file: Path, option: str) -> Iterator[None]:
    """What cannot be written is a matter of the option that names it; Pillow raises ValueError for unknown endings."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, RFTError):
            raise
        raise ConfigConflictError(f"{file} cannot be written ({error}). Name another file with {option}.") from error


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(chain(f"{name} {number}" for name, number in value.items()))
    return "" if value is None else str(value)


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value).expanduser()
