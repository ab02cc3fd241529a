"""`rft score`: average precision of a results file, as pycocotools and lvis-api print it; metrics of predictions."""

from __future__ import annotations

import difflib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jsonargparse
from torch import Tensor

from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError
from rft_lightning.evaluation.results import SCORES, class_of, record_table, scores_of
from rft_lightning.evaluation.rows import read_predictions
from rft_lightning.metrics.ap_files import check_category_ids, load_json
from rft_lightning.metrics.coco_map import COCOMeanAveragePrecision
from rft_lightning.metrics.lvis_ap import LVISAveragePrecision
from rft_lightning.placing import write_whole

_ALL = "0.50:0.95"
# Key of the metric -> AP or AR, IoU thresholds, area range, detections per picture and category.
_COCO_LINES = {
    "map": ("AP", _ALL, "all", 100),
    "map_50": ("AP", "0.50", "all", 100),
    "map_75": ("AP", "0.75", "all", 100),
    "map_small": ("AP", _ALL, "small", 100),
    "map_medium": ("AP", _ALL, "medium", 100),
    "map_large": ("AP", _ALL, "large", 100),
    "mar_1": ("AR", _ALL, "all", 1),
    "mar_10": ("AR", _ALL, "all", 10),
    "mar_100": ("AR", _ALL, "all", 100),
    "mar_small": ("AR", _ALL, "small", 100),
    "mar_medium": ("AR", _ALL, "medium", 100),
    "mar_large": ("AR", _ALL, "large", 100),
}
# Key of the metric -> AP or AR, IoU thresholds, area range, group of categories; 300 detections per picture.
_LVIS_LINES = {
    "map": ("AP", _ALL, "all", "all"),
    "map_50": ("AP", "0.50", "all", "all"),
    "map_75": ("AP", "0.75", "all", "all"),
    "map_small": ("AP", _ALL, "s", "all"),
    "map_medium": ("AP", _ALL, "m", "all"),
    "map_large": ("AP", _ALL, "l", "all"),
    "map_rare": ("AP", _ALL, "all", "r"),
    "map_common": ("AP", _ALL, "all", "c"),
    "map_frequent": ("AP", _ALL, "all", "f"),
    "mar_300": ("AR", _ALL, "all", "all"),
    "mar_small": ("AR", _ALL, "s", "all"),
    "mar_medium": ("AR", _ALL, "m", "all"),
    "mar_large": ("AR", _ALL, "l", "all"),
}
_TITLES = {"AP": "Average Precision", "AR": "Average Recall"}


def score(
    gt: str | Path,
    results: str | Path,
    *,
    lvis: bool = False,
    iou_type: Literal["bbox", "segm"] = "bbox",
    per_class: bool = False,
    classes: Sequence[int | str] | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate a results file and print the familiar table.

    Args:
        gt: ground truth in COCO's or LVIS's format.
        results: list of ``image_id, category_id, bbox`` (xywh; or ``segmentation``) and ``score``.
        lvis: evaluate by LVIS's federated rules.
        iou_type: compare boxes or masks.
        per_class: print the AP of each category as well.
        classes: names or ids of the categories to evaluate; None: all of the ground truth.
        output: JSON file to write the numbers to, not rounded; its folder is made.

    Returns:
        What `output` holds: the numbers by the metric's keys (-1 where absent) and ``per_class``, a list of ``id, name,
        ap`` in the order of the ids.

    Raises:
        DatasetNotFoundError: a file does not exist.
        AnnotationError: a file is not of its format, or the results name images that the ground truth does not have.
        ConfigConflictError: unknown classes, masks with `lvis`, or `output` cannot be written.
    """
    if lvis and iou_type != "bbox":
        raise ConfigConflictError("LVIS evaluation compares boxes only; leave out --iou_type, or --lvis.")
    _check_output(output)
    truth, found = _read(gt, "ground truth"), _read(results, "results")
    _check(truth, found, f"The ground truth {gt}", f"The results {results}", "bbox" if lvis else iou_type)
    names = {category["id"]: category.get("name", str(category["id"])) for category in truth["categories"]}
    chosen = sorted(names) if classes is None else sorted({_class_id(word, names) for word in classes})
    metric: COCOMeanAveragePrecision | LVISAveragePrecision
    if lvis:
        metric = LVISAveragePrecision.from_lvis_json(truth, found, classes=chosen)
    else:
        metric = COCOMeanAveragePrecision.from_coco_json(truth, found, iou_type=iou_type, classes=chosen)
    _warn_of_unknown(found, names)
    values = metric.compute()
    record = _record(values, names, lvis)
    print("\n".join(lvis_table(values) if lvis else coco_table(values)))
    if per_class:
        print("\n".join(_class_table(record["per_class"])))
    _write_output(record, output)
    return record


def _check_output(output: str | Path | None) -> None:
    """Refuse at once what could not be written after minutes of scoring."""
    if output is None:
        return
    with _named(output):
        if Path(output).is_dir():
            raise ConfigConflictError(f"--output {output} is a folder; expected the name of a JSON file.")
        folder = Path(output).resolve().parent
        if not _is_stream(output):
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _write_output(record: Mapping[str, Any], output: str | Path | None) -> None:
    if output is None:
        return
    text = json.dumps(record, indent=2) + "\n"
    with _named(output):
        if _is_stream(output):
            Path(output).write_text(text, encoding="utf-8")
        else:
            write_whole(Path(output).resolve(), text)


def _is_stream(output: str | Path) -> bool:
    """Whether it is a pipe or a device (/dev/stdout), which must not be replaced by a file."""
    return Path(output).exists() and not Path(output).is_file()


@contextmanager
def _named(output: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigConflictError(
            f"--output {output} cannot be written: {error.strerror}. Give another place, or make room there."
        ) from error


def coco_table(values: Mapping[str, Tensor]) -> list[str]:
    """The twelve lines of pycocotools for what :class:`COCOMeanAveragePrecision` computed."""
    return [
        f" {_TITLES[kind]:<18} ({kind}) @[ IoU={iou:<9} | area={area:>6} | maxDets={cap:>3} ] = "
        f"{_number(values, key):0.3f}"
        for key, (kind, iou, area, cap) in _COCO_LINES.items()
    ]


def lvis_table(values: Mapping[str, Tensor]) -> list[str]:
    """The thirteen lines of lvis-api for what :class:`LVISAveragePrecision` computed."""
    return [
        f" {_TITLES[kind]:<18} ({kind}) @[ IoU={iou:<9} | area={area:>6} | maxDets=300 catIds={group:>3}] = "
        f"{_number(values, key):0.3f}"
        for key, (kind, iou, area, group) in _LVIS_LINES.items()
    ]


def _number(values: Mapping[str, Tensor], key: str) -> float:
    """A number of the table; -1 for a frequency where the file states none."""
    return float(values[key]) if key in values else -1.0


def score_predictions(
    file: str | Path,
    callbacks: Iterable[Any],
    *,
    per_class: bool = False,
    classes: Sequence[int | str] | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Score a file of predictions with their right answers, of this package or another system, and print the numbers.

    Args:
        file: JSON lines as ``rft evaluate`` writes them; see :mod:`rft_lightning.evaluation.rows`.
        callbacks: metric callbacks.
        per_class: print the value of each class as well.
        classes: names of the classes whose questions count; None: all. The cap of LVIS holds over all classes.
        output: JSON file to write the numbers to, not rounded; its folder is made.

    Returns:
        what `output` holds: ``samples``, ``metrics``, ``per_class`` and ``parse_failures``.

    Raises:
        AnnotationError: the file is not of its format, or no row has a right answer.
        ConfigConflictError: unknown classes, or `output` cannot be written.
    """
    _check_output(output)
    predictions, callbacks = read_predictions(file), list(callbacks)
    if all(prediction.target is None for prediction in predictions):
        raise AnnotationError(f"{file} holds no right answers (`target`), so there is nothing to compare with.")
    if classes is not None:
        names = {class_of(prediction) for prediction in predictions} - {None}
        for name in classes:
            if name not in names:
                near = difflib.get_close_matches(str(name), map(str, names), n=3) or sorted(map(str, names))[:3]
                raise ConfigConflictError(f"{file} asks for no class {name!r}, but for such as {', '.join(near)}.")
        for callback in callbacks:
            callback.choose_from(predictions)
        predictions = [prediction for prediction in predictions if class_of(prediction) in classes]
    record = scores_of(predictions, callbacks)
    print("\n".join(record_table(record, per_class=per_class)))
    _write_output(record, output)
    return record


def run_score(words: Sequence[str], metric_callbacks: Callable[..., Iterable[Any]]) -> None:
    """Parse the command line after `score` and evaluate.

    Args:
        words: the command line.
        metric_callbacks: makes the callbacks that score a predictions file, given ``protocol``, ``score_from`` and
            ``mask_protocol``.
    """
    parser = score_parser()
    options = vars(parser.parse_args(list(words)))
    own = {name: options.pop(name) for name in ("score_from", "mask_protocol")}
    if options["results"] is not None:
        changed = [f"--{name}" for name, value in own.items() if value != parser.get_default(name)]
        if changed:
            raise ConfigConflictError(f"{' and '.join(changed)} is for predictions files; leave it out.")
        score(**options)
        return
    file = options.pop("gt")
    if Path(file).suffix != ".jsonl":
        raise ConfigConflictError(
            f"Found one file, {file}. Expected ground truth and results (rft score gt.json results.json), or "
            "predictions with their right answers (rft score predictions.jsonl)."
        )
    if options.pop("iou_type") != "bbox":
        raise ConfigConflictError("--iou_type is for results files; masks of predictions are compared without it.")
    protocol = "lvis" if options.pop("lvis") else "coco"
    options.pop("results")
    score_predictions(file, metric_callbacks(protocol=protocol, **own), **options)


def score_parser() -> jsonargparse.ArgumentParser:
    """The arguments of :func:`score`. By hand: from the signature, switches would need a value and classes brackets."""
    parser = jsonargparse.ArgumentParser(
        prog="rft score",
        description="Average precision of a results file, printed as pycocotools (or lvis-api) prints it; or all "
        "metrics of a predictions file, which holds its right answers: rft score predictions.jsonl.",
    )
    parser.add_argument("gt", type=str, help="Ground truth in COCO's or LVIS's format; or predictions (.jsonl).")
    parser.add_argument(
        "results", type=str, nargs="?", help="List of image_id, category_id, bbox (or segmentation) and score."
    )
    parser.add_argument("--lvis", action="store_true", help="Evaluate by LVIS's federated rules.")
    parser.add_argument("--iou_type", choices=("bbox", "segm"), default="bbox", help="Compare boxes or masks.")
    parser.add_argument("--per_class", action="store_true", help="Print the AP of each category as well.")
    parser.add_argument("--classes", type=str, nargs="+", help="Names (with ground truth: or ids) of the categories.")
    parser.add_argument("--output", type=str, help="JSON file to write the numbers to.")
    parser.add_argument("--score_from", choices=SCORES, default="confidence", help="Predictions: what ranks boxes.")
    parser.add_argument(
        "--mask_protocol", choices=("lisa", "published_code"), default="lisa", help="Predictions: which mask is right."
    )
    return parser


def _record(values: Mapping[str, Tensor], names: Mapping[int, str], lvis: bool) -> dict[str, Any]:
    ids = values["classes"].reshape(-1).tolist()  # torchmetrics squeezes a single class
    per_class = zip(ids, values["map_per_class"].reshape(-1).tolist(), strict=True)
    return {
        "protocol": "lvis" if lvis else "coco",
        **{key: _number(values, key) for key in (_LVIS_LINES if lvis else _COCO_LINES)},
        "per_class": [{"id": key, "name": names[key], "ap": ap} for key, ap in per_class],
    }


def _class_table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = [f"{'id':>8}  {'AP':>6}  category"]
    return lines + [f"{row['id']:>8}  {row['ap']:>6.3f}  {row['name']}" for row in rows]


def _class_id(word: int | str, names: Mapping[int, str]) -> int:
    if isinstance(word, int) and word in names:
        return word
    found = [key for key, name in names.items() if name == str(word)]
    if len(found) > 1:
        raise ConfigConflictError(f"The name {word!r} belongs to the categories {found}; name one by its id.")
    if found:
        return found[0]
    by_id = {str(key): key for key in names}
    if str(word) in by_id:
        return by_id[str(word)]
    near = difflib.get_close_matches(str(word), names.values(), n=3) or list(names.values())[:3]
    raise ConfigConflictError(
        f"The ground truth has no category {word!r} by name or id; it has {len(names)}, such as {', '.join(near)}."
    )


def _warn_of_unknown(found: Iterable[Mapping[str, Any]], names: Mapping[int, str]) -> None:
    """They are dropped, as by pycocotools, but not in silence: wrong ids look like a model that knows nothing."""
    unknown = [entry["category_id"] for entry in found if entry["category_id"] not in names]
    if unknown:
        print(
            f"rft: left out {len(unknown)} results of {len(set(unknown))} categories that the ground truth does not "
            f"have, such as {min(unknown, key=str)!r}",
            file=sys.stderr,
        )


def _read(file: str | Path, what: str) -> Any:
    if Path(file).is_dir():
        raise DatasetNotFoundError(f"The {what} {file} is a folder; expected a JSON file.")
    return load_json(file, what)


def _check(truth: Any, found: Any, truth_name: str, found_name: str, shape: str) -> None:
    """See that both files are of their kind, and every entry has what is read."""
    lists = ("images", "annotations", "categories")
    if not isinstance(truth, Mapping) or not all(isinstance(truth.get(name), list) for name in lists):
        kind = f"a dict with {sorted(truth)[:5]}" if isinstance(truth, Mapping) else f"a {type(truth).__name__}"
        raise AnnotationError(
            f"{truth_name} is {kind}; expected a dict with the lists {', '.join(lists)}. The order of the arguments is "
            "ground truth, results."
        )
    if not isinstance(found, list):
        raise AnnotationError(
            f"{found_name} is a {type(found).__name__}; expected a list of results with image_id, category_id, bbox "
            "and score."
        )
    geometry = "bbox" if shape == "bbox" else "segmentation"
    _check_entries(truth["images"], {"id"}, f"{truth_name}, image")
    _check_entries(truth["categories"], {"id"}, f"{truth_name}, category")
    check_category_ids(truth["categories"], truth_name)
    _check_entries(truth["annotations"], {"image_id", "category_id", geometry}, f"{truth_name}, annotation")
    _check_entries(found, {"image_id", "category_id", geometry, "score"}, f"{found_name}, entry")


def _check_entries(entries: Iterable[Any], keys: set[str], what: str) -> None:
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not keys <= entry.keys():
            kind = sorted(entry) if isinstance(entry, Mapping) else entry
            raise AnnotationError(f"{what} {number}: expected the keys {', '.join(sorted(keys))}, found {kind}.")
        if "bbox" in keys and (not isinstance(entry["bbox"], list) or len(entry["bbox"]) != 4):
            raise AnnotationError(f"{what} {number}: expected a bbox of four numbers (xywh), found {entry['bbox']}.")


__all__ = ["coco_table", "lvis_table", "run_score", "score", "score_parser", "score_predictions"]
