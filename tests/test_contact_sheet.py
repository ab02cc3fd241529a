"""What `plot` and `rft prepare --preview` draw: what the model gets, with the boxes of the solution text."""

import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.frames import CoordinateFrame
from rft_lightning.policy.families import FAMILIES
from rft_lightning.report.contact_sheet import contact_sheet, see, wrapped
from rft_lightning.report.drawing import font_of
from rft_lightning.sample import DetectionTarget, Sample, as_boxes
from rft_lightning.tasks import ClassificationTask, DetectionTask, GroundingTask

# Control and format characters, line and paragraph separators.
CONTROL = ("Cc", "Cf", "Zl", "Zp")
# A dark rectangle on white, off the middle, in a picture that is not square.
BOX, SIZE = (20.0, 60.0, 80.0, 100.0), (160, 112)


def dark_sample() -> Sample:
    image = Image.new("RGB", SIZE, "white")
    image.paste((20, 20, 120), tuple(map(int, BOX)))
    target = DetectionTarget(as_boxes(BOX), category="thing", category_id=1, image_size=SIZE)
    return Sample("dark", image, target, DetectionTask(), SIZE)


def data_of(policy: str, **kwargs) -> ShapesDataModule:
    settings = {"val_size": 2, "test_size": 2, "train_size": 4, "max_prompt_length": None, **kwargs}
    return ShapesDataModule(processor=policy, **settings)


def dark_box(image: Image.Image) -> list[float]:
    """The box of the dark pixels, in shares of the picture."""
    rows, columns = np.nonzero(np.asarray(image.convert("L")) < 128)
    height, width = image.height, image.width
    return [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_boxes_lie_on_what_the_model_gets(family, family_folder):
    seen = see(dark_sample(), data_of(family_folder(family)).encoder)
    shares = seen.boxes[0] / torch.tensor(seen.image.size * 2)
    pixel = 2 / min(seen.image.size)
    assert np.allclose(shares, dark_box(seen.image), atol=pixel)
    assert np.allclose(seen.boxes, seen.truth, atol=1)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "gemma3"])
def test_the_picture_is_the_processors_not_the_original(family, family_folder):
    seen = see(dark_sample(), data_of(family_folder(family)).encoder)
    assert seen.whole
    assert seen.image.size != SIZE
    assert np.asarray(seen.image)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("frame", [CoordinateFrame("relative", extent=500), CoordinateFrame("pixel")])
def test_another_frame_is_placed_by_its_own_numbers(frame, tiny_policy):
    seen = see(dark_sample(), data_of(tiny_policy, frame=frame).encoder)
    assert np.allclose(seen.boxes, seen.truth, atol=1)


def test_an_error_in_the_frame_is_seen(family_folder):
    """A frame that believes in another resized size than the processor's puts the boxes elsewhere."""
    wrong = CoordinateFrame("resized", factor=28, min_pixels=400 * 400, max_pixels=500 * 500)
    seen = see(dark_sample(), data_of(family_folder("qwen2_5_vl"), frame=wrong).encoder)
    assert (seen.boxes - seen.truth).abs().max() > 20


def test_a_solution_text_that_is_wrong_is_seen(tiny_policy):
    sample = dark_sample()
    sample.target.solution_text = "<answer>[{'Position': [0, 0, 100, 100], 'Confidence': 1}]</answer>"
    seen = see(sample, data_of(tiny_policy).encoder)
    assert (seen.boxes - seen.truth).abs().max() > 5


@pytest.mark.parametrize("task", [DetectionTask(), ClassificationTask(), GroundingTask()])
def test_plot_draws_every_task(task, tiny_policy):
    data = data_of(tiny_policy, task=task)
    sample = data.split("train")[1]
    drawn = data.plot(sample)
    assert drawn.width == 504
    assert drawn.height > 480
    seen = see(sample, data.encoder)
    if isinstance(task, ClassificationTask):
        assert seen.label == sample.target.label
    else:
        assert len(seen.boxes) == len(seen.truth) > 0
        colours = {tuple(colour) for colour in np.asarray(drawn).reshape(-1, 3)}
        assert {(0x2C, 0xA0, 0x2C), (0xFF, 0x7F, 0x0E)} <= colours


def test_unlabelled_samples_are_drawn_too(tiny_policy):
    data = data_of(tiny_policy)
    sample = Sample("mine", Image.new("RGB", (40, 30)), None, DetectionTask(), (40, 30), question="What?")
    assert data.plot(sample).width == 504


def test_a_sheet_has_a_row_for_each_heading(tiny_policy):
    data = data_of(tiny_policy)
    samples = list(data.split("train"))
    one = contact_sheet([("a", samples[:3])], data.encoder)
    two = contact_sheet([("a", samples[:3]), ("b", samples[:1])], data.encoder)
    assert one.width == two.width == 3 * 504
    assert two.height > 1.5 * one.height


def test_text_is_wrapped_to_the_width():
    font = font_of(14)
    text = "Detect all objects belonging to\nthe category " + "x" * 200 + " in the image\n\nend"
    lines = wrapped(text, font, 200)
    assert all(font.getlength(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("\n", "")
    assert lines[-2:] == ["", "end"]


def test_text_with_any_control_character_is_drawn():
    """A model may write every one of them; those that end a line end one here."""
    font, draw = font_of(14), ImageDraw.Draw(Image.new("RGB", (200, 40)))
    kinds = {kind: [chr(n) for n in range(0x10000) if unicodedata.category(chr(n)) == kind] for kind in CONTROL}
    assert all(kinds.values())
    for character in [c for characters in kinds.values() for c in characters]:
        lines = wrapped(f"{character}one {character} two{character}three{character}", font, 200)
        for line in lines:
            draw.text((0, 0), line, font=font)
        is_break = character.splitlines() == [""]
        expected = ["", "one ", "two", "three", ""]
        assert lines == expected if is_break else len(lines) == 1, hex(ord(character))
    assert wrapped("one\r\ntwo\r\n", font, 200) == ["one", "two", ""]
