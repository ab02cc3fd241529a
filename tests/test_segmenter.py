"""Segmenter: the masks are those of transformers' models, at the size of the pictures, whatever batch they are in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rft_lightning.errors import CheckpointError, ConfigConflictError
from rft_lightning.sample import Answer
from rft_lightning.segmenter import Segmenter, add_masks, box_of_mask
from tests.tiny_baselines import SAM_SIDE, baseline_folder

SIZES = [(80, 60), (50, 90), (80, 60), (64, 64), (33, 20)]
BOXES = [
    [5.0, 5.0, 40.0, 30.0],
    [10.0, 20.0, 30.5, 80.0],
    [40.0, 10.0, 70.0, 50.0],
    [0.0, 0.0, 64.0, 64.0],
    [3, 3, 9, 9],
]


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]


@torch.no_grad()
def sam_mask(image: Image.Image, prompt: dict[str, torch.Tensor]) -> np.ndarray:
    """SAM's mask of one picture: resized, padded to a square, segmented, cut and resized back, step by step."""
    from transformers import SamImageProcessor, SamModel

    model = SamModel.from_pretrained(baseline_folder("sam"))
    pixels = SamImageProcessor.from_pretrained(baseline_folder("sam"))(image, return_tensors="pt")["pixel_values"]
    scale = SAM_SIDE / max(image.size)
    width, height = (int(side * scale + 0.5) for side in image.size)
    factors = torch.tensor([width / image.width, height / image.height])
    scaled = {name: (marks.unflatten(-1, (-1, 2)) * factors).flatten(-2) for name, marks in prompt.items()}
    if "input_points" in scaled:
        scaled["input_labels"] = torch.ones(1, 1, 1, dtype=torch.long)
    logits = model(pixel_values=pixels, multimask_output=False, **scaled).pred_masks[0]
    resize = torch.nn.functional.interpolate
    square = resize(logits, (SAM_SIDE, SAM_SIDE), mode="bilinear")[..., :height, :width]
    return (resize(square, (image.height, image.width), mode="bilinear")[0, 0] > 0).numpy()


def test_masks_are_those_of_sam_with_one_box_and_one_mask():
    found = Segmenter(baseline_folder("sam"), batch_size=2).masks(pictures(), BOXES)
    for image, box, mask in zip(pictures(), BOXES, found, strict=True):
        expected = sam_mask(image, {"input_boxes": torch.tensor([[box]], dtype=torch.float32)})
        assert mask.dtype == np.bool_
        assert mask.shape == (image.height, image.width)
        assert np.mean(mask != expected) < 0.002
        assert 0 < mask.mean() < 1


def test_points_mark_as_well():
    points = [(image.width / 3, image.height / 2) for image in pictures()]
    found = Segmenter(baseline_folder("sam")).masks(pictures(), points=points)
    for image, point, mask in zip(pictures(), points, found, strict=True):
        assert np.mean(mask != sam_mask(image, {"input_points": torch.tensor([[[point]]])})) < 0.002


@pytest.mark.parametrize("kind", ["sam2", "sam2_video"])
@torch.no_grad()
def test_masks_are_those_of_sam2(kind):
    from transformers import Sam2ImageProcessor, Sam2Model

    model = Sam2Model.from_pretrained(baseline_folder(kind))
    processor = Sam2ImageProcessor.from_pretrained(baseline_folder(kind))
    found = Segmenter(baseline_folder(kind), batch_size=3).masks(pictures(), BOXES)
    for image, box, mask in zip(pictures(), BOXES, found, strict=True):
        # Resized to a square, so that both sides have their own factor.
        scale = torch.tensor([SAM_SIDE / image.width, SAM_SIDE / image.height] * 2)
        outputs = model(
            pixel_values=processor(image, return_tensors="pt")["pixel_values"],
            input_boxes=(torch.tensor(box) * scale)[None, None],
            multimask_output=False,
        )
        logits = torch.nn.functional.interpolate(outputs.pred_masks[0], (image.height, image.width), mode="bilinear")
        assert np.mean(mask != (logits[0, 0] > 0).numpy()) < 0.002


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_masks_do_not_depend_on_the_batch(kind):
    together = Segmenter(baseline_folder(kind), batch_size=8).masks(pictures(), BOXES)
    alone = Segmenter(baseline_folder(kind), batch_size=1).masks(pictures(), BOXES)
    assert all(np.mean(a != b) < 0.002 for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_give_nearly_the_same_masks(dtype):
    exact = Segmenter(baseline_folder("sam")).masks(pictures(), BOXES)
    found = Segmenter(baseline_folder("sam"), dtype=dtype).masks(pictures(), BOXES)
    assert all(np.mean(a != b) < 0.1 for a, b in zip(exact, found, strict=True))


def test_nothing_to_segment_loads_nothing():
    segmenter = Segmenter("/no/such/folder")
    assert segmenter.masks([], []) == []
    answers = [Answer(text="?"), Answer(boxes=[[30, 30, 10, 10]])]
    add_masks(answers, pictures()[:2], segmenter)
    assert [answer.mask.shape for answer in answers] == [(60, 80), (90, 50)]
    assert not any(answer.mask.any() for answer in answers)


def test_answers_get_the_mask_of_their_first_box():
    segmenter = Segmenter(baseline_folder("sam"))
    answers = [Answer(boxes=[BOXES[0], BOXES[2]]), Answer(), Answer(boxes=[BOXES[2]])]
    images = [pictures()[0], pictures()[1], pictures()[2]]
    add_masks(answers, images, segmenter)
    expected = segmenter.masks([images[0], images[2]], [BOXES[0], BOXES[2]])
    assert (answers[0].mask == expected[0]).all()
    assert not answers[1].mask.any()
    assert (answers[2].mask == expected[1]).all()


def test_corners_can_be_cut_to_whole_pixels(monkeypatch):
    segmenter, asked = Segmenter("/no/such/folder"), []
    monkeypatch.setattr(segmenter, "masks", lambda images, boxes: asked.append(boxes.tolist()) or [np.ones((60, 80))])
    box = [5.9, 5.1, 40.99, 30.5]
    add_masks([Answer(boxes=[box])], pictures()[:1], segmenter)
    add_masks([Answer(boxes=[box])], pictures()[:1], segmenter, whole_pixels=True)
    assert asked == [[box], [[5.0, 5.0, 40.0, 30.0]]]


def test_other_models_are_refused_by_name():
    with pytest.raises(CheckpointError, match=r"is a 'clip' model\. Expected .* type sam or sam2"):
        Segmenter(baseline_folder("clip")).masks(pictures()[:1], BOXES[:1])
    with pytest.raises(CheckpointError, match="/no/such/folder"):
        Segmenter("/no/such/folder").masks(pictures()[:1], BOXES[:1])


def test_pickled_weights_are_refused(tmp_path):
    from transformers import SamModel, SamProcessor

    model = SamModel.from_pretrained(baseline_folder("sam"))
    model.config.save_pretrained(tmp_path)
    SamProcessor.from_pretrained(baseline_folder("sam")).save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        Segmenter(str(tmp_path)).masks(pictures()[:1], BOXES[:1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.masks(pictures()[:2], BOXES[:1]), "found 1 for 2 pictures"),
        (lambda s: s.masks(pictures()[:1], [[0, 0, float("nan"), 5]]), "finite"),
        (lambda s: s.masks(pictures()[:1]), "neither"),
        (lambda s: s.masks(pictures()[:1], BOXES[:1], points=[(1, 1)]), "both"),
    ],
)
def test_wrong_prompts_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(Segmenter("/no/such/folder"))


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"dtype": "int8"}])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ConfigConflictError, match=next(iter(arguments))):
        Segmenter(**arguments)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_the_box_of_a_mask_is_the_smallest_around_it(height, width, data):
    cells = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(cells).reshape(height, width)
    pixels = [(x, y) for y in range(height) for x in range(width) if mask[y, x]]
    if not pixels:
        assert box_of_mask(mask).shape == (0, 4)
        return
    xs, ys = zip(*pixels, strict=True)
    assert box_of_mask(mask).tolist() == [[min(xs), min(ys), max(xs) + 1, max(ys) + 1]]
