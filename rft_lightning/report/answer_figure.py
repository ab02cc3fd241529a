"""`rft table --figure 4|5`: the answers of two evaluations to the same questions, side by side with their thoughts.

Figure 4 of the paper shows fine-grained classification, Figure 5 reasoning grounding. Drawn with Pillow, like the
contact sheet: thoughts are long, and their lines have to be measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

from rft_lightning.boxes import box_iou
from rft_lightning.errors import AnnotationError, ConfigConflictError, DatasetNotFoundError, RFTError
from rft_lightning.evaluation.rows import read_predictions
from rft_lightning.report.contact_sheet import wrapped
from rft_lightning.report.drawing import Drawn, draw_boxes, font_of
from rft_lightning.rewards import accuracy_reward
from rft_lightning.sample import ClassTarget, GroundingTarget, Prediction

FIGURES: dict[int, type] = {4: ClassTarget, 5: GroundingTarget}
RIGHT_IOU = 0.5  # a box counts as right from here on
RIGHT, BEFORE, AFTER, WRONG = "#2ca02c", "#ff7f0e", "#1f77b4", "#d62728"
_SIDE, _COLUMN, _MARGIN, _LETTERS, _LINE = 480, 440, 14, 14, 19  # pixels
_LONGEST = 900  # letters of a text; what is longer is cut in the drawing


@dataclass(frozen=True)
class Pair:
    """The answers of two evaluations to one question.

    Attributes:
        before: of the first.
        after: of the second.
        scores: of both, in [0, 1]: right or not, or the IoU of the answered box with the right one.
    """

    before: Prediction
    after: Prediction
    scores: tuple[float, float]

    @property
    def right(self) -> tuple[bool, bool]:
        """Whether the answers are right."""
        return self.scores[0] >= RIGHT_IOU, self.scores[1] >= RIGHT_IOU


def answer_figure(figure: int, before: str | Path, after: str | Path, *, samples: int = 4) -> Image.Image:
    """A picture of the questions that two evaluations answer most differently.

    First those that were wrong before and are right after, then the others, each by how much the scores differ; among
    equals in the order of the data.

    Args:
        figure: 4 (classification) or 5 (grounding).
        before: folder of an evaluation.
        after: folder of another one of the same data.
        samples: how many questions.

    Raises:
        ConfigConflictError: there are no common questions of this kind, or an argument is out of its range.
        AnnotationError: predictions cannot be read.
        DatasetNotFoundError: a picture cannot be had.
    """
    if figure not in FIGURES:
        raise ConfigConflictError(f"Expected --figure 4 (classification) or 5 (grounding), found {figure}.")
    if samples < 1:
        raise ConfigConflictError(f"Expected --samples >= 1, found {samples}.")
    folders = Path(before), Path(after)
    pairs = chosen_pairs(pairs_of(folders, FIGURES[figure]), samples)
    pictures = _pictures(pairs, folders)
    rows = [_draw_row(pair, picture) for pair, picture in zip(pairs, pictures, strict=True)]
    return _stack(rows, [_name(folder) for folder in folders])


def pairs_of(folders: tuple[Path, Path], kind: type) -> list[Pair]:
    """The questions of a kind of target that both evaluations answered, in the order of the second."""
    first, second = (
        {p.sample.id: p for p in read_predictions(folder / "predictions.jsonl") if isinstance(p.target, kind)}
        for folder in folders
    )
    common = [name for name in second if name in first]
    if not common:
        raise ConfigConflictError(
            f"{folders[0]} has {len(first)} and {folders[1]} {len(second)} answers to questions of this figure "
            f"({kind.__name__}), and none are to the same question. Expected evaluations of the same data and split."
        )
    return [Pair(first[n], second[n], (_score(first[n]), _score(second[n]))) for n in common]


def chosen_pairs(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """The pairs to show, see :func:`answer_figure`."""

    def key(pair: Pair) -> tuple[bool, float]:
        return pair.right != (False, True), -abs(pair.scores[1] - pair.scores[0])

    return sorted(pairs, key=key)[:count]


def _score(prediction: Prediction) -> float:
    target, answer = prediction.target, prediction.answer
    if isinstance(target, ClassTarget):
        return float(accuracy_reward(answer, target) or 0.0)
    assert isinstance(target, GroundingTarget)
    if len(answer.boxes) == 0 or len(target.boxes) == 0:
        return 0.0
    return float(box_iou(answer.boxes[:1], target.boxes[:1]))


def _pictures(pairs: Sequence[Pair], folders: tuple[Path, Path]) -> list[Image.Image]:
    """The pictures of some pairs: files, or rendered by the data of the second evaluation."""
    files = [pair.after.sample.image for pair in pairs]
    rendered: Mapping[str, Any] = {}
    if Path(".") in files:  # what a row without a file is read as
        wanted = {pair.after.sample.id for pair in pairs}
        rendered = {s.id: s for s in _samples(folders[1]) if s.id in wanted}
    found = []
    for pair, file in zip(pairs, files, strict=True):
        sample = pair.after.sample if file != Path(".") else rendered.get(pair.after.sample.id)
        if sample is None:
            raise DatasetNotFoundError(
                f"Sample {pair.after.sample.id!r} of {folders[1]} has no picture file, and the data of its config.yaml "
                "has no such sample. Was it changed after the evaluation?"
            )
        found.append(sample.load_image())
    return found


def _samples(folder: Path) -> Any:
    """The samples that an evaluation asked about, by its configuration."""
    import jsonargparse
    from lightning.pytorch import LightningDataModule

    from rft_lightning.prepare import named_errors, settle_processor

    file = folder / "config.yaml"
    if not file.is_file():
        raise DatasetNotFoundError(
            f"The pictures of {folder} are no files but were rendered, and it has no config.yaml to make them again. "
            "Evaluate again with `rft evaluate`, which writes it."
        )
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False)
    try:
        if config["data"]["init_args"].get("seed") is None:  # it follows the run's
            config["data"]["init_args"]["seed"] = config.get("seed_everything")
        with named_errors():
            data = parser.instantiate_classes(parser.parse_object({"data": config["data"]})).data
        settle_processor(data, config["model"]["init_args"]["policy"])
        return data.split(_experiment(folder).get("split", "test"))
    except RFTError:
        raise
    except (jsonargparse.ArgumentError, KeyError, TypeError, ValueError) as error:
        raise AnnotationError(f"{file} names no data that can be made again: {error}") from error


def _experiment(folder: Path) -> Mapping[str, Any]:
    from rft_lightning.report.table_runs import read_run

    file = folder / "metrics.json"
    return read_run(file).experiment if file.is_file() else {}


def _name(folder: Path) -> str:
    """What an evaluation is called at the head of its column."""
    facts = _experiment(folder)
    shots = f", {facts['shots']} shots" if facts.get("shots") and facts.get("seed") is not None else ""
    return f"{facts['method']}{shots}" if facts.get("method") else str(folder)


def _draw_row(pair: Pair, image: Image.Image) -> Image.Image:
    """Picture and question, and beside them both answers."""
    font = font_of(_LETTERS)
    picture = draw_boxes(image, _boxes(pair), side=_SIDE)
    question = wrapped(_short(pair.after.sample.question or ""), font, _SIDE)
    texts = [
        [(line, colour) for text, colour in _texts(prediction, score) for line in wrapped(_short(text), font, _COLUMN)]
        for prediction, score in zip((pair.before, pair.after), pair.scores, strict=True)
    ]
    lines = max(map(len, texts))
    height = max(picture.height + _MARGIN + _LINE * len(question), _LINE * lines) + 2 * _MARGIN
    row = Image.new("RGB", (_width(), height), "white")
    row.paste(picture, (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(row)
    for number, line in enumerate(question):
        place = (_MARGIN, picture.height + 2 * _MARGIN + number * _LINE)
        draw.text(place, line, font=font, fill="black")
    for column, answer in enumerate(texts):
        for number, (line, colour) in enumerate(answer):
            draw.text((_left(column), _MARGIN + number * _LINE), line, font=font, fill=colour)
    return row


def _boxes(pair: Pair) -> list[Drawn]:
    drawn = []
    if isinstance(pair.after.target, GroundingTarget):
        drawn = [Drawn(box, "right", RIGHT, width=2) for box in pair.after.target.boxes[:1].tolist()]
    for prediction, name, colour in ((pair.before, "before", BEFORE), (pair.after, "after", AFTER)):
        drawn += [Drawn(box, name, colour) for box in prediction.answer.boxes[:1].tolist()]
    return drawn


def _texts(prediction: Prediction, score: float) -> list[tuple[str, str]]:
    """Thought and answer with their colours; what cannot be read is shown as it was written."""
    answer, target = prediction.answer, prediction.target
    if isinstance(target, ClassTarget):
        said, verdict = answer.label, "right" if score else f"right: {target.label}"
    else:
        said = "({:.0f}, {:.0f}), ({:.0f}, {:.0f})".format(*answer.boxes[0].tolist()) if len(answer.boxes) else None
        verdict = f"IoU {score:.2f}"
    said = said or ("none that can be read" if prediction.text else "none")
    colour = RIGHT if score >= RIGHT_IOU else WRONG
    thought = answer.thought if answer.thought is not None else prediction.text
    return [(f"Thought: {thought.strip() or 'none'}", "black"), ("", "black"), (f"Answer: {said} ({verdict})", colour)]


def _stack(rows: Sequence[Image.Image], names: Sequence[str]) -> Image.Image:
    bar = 2 * _LINE + _MARGIN
    sheet = Image.new("RGB", (_width(), bar + sum(row.height for row in rows)), "white")
    draw, font = ImageDraw.Draw(sheet), font_of(_LETTERS + 2)
    draw.rectangle((0, 0, sheet.width, bar - 6), fill="#dddddd")
    for column, (which, name) in enumerate(zip(("Before", "After"), names, strict=True)):
        for number, line in enumerate(wrapped(f"{which}: {name}", font, _COLUMN)[:2]):
            draw.text((_left(column), 6 + number * _LINE), line, font=font, fill=(BEFORE, AFTER)[column])
    top = bar
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
        draw.line((0, top - 1, sheet.width, top - 1), fill="#dddddd")
    return sheet


def _left(column: int) -> int:
    return _SIDE + 2 * _MARGIN + column * (_COLUMN + _MARGIN)


def _width() -> int:
    return _left(2)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


__all__ = ["FIGURES", "Pair", "answer_figure", "chosen_pairs", "pairs_of"]
