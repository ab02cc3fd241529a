"""Boxes through a model's own text: pixels -> frame -> solution -> read -> pixels, whatever the picture and the box."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2VLImageProcessor

from rft_lightning.boxes import valid_boxes
from rft_lightning.frames import CoordinateFrame
from rft_lightning.sample import DetectionTarget, GroundingTarget
from rft_lightning.tasks import DetectionTask, GroundingTask

# (patch size times merge size, fewest pixels, most pixels): Qwen2.5-VL as published, with the paper's limit, with the
# least and the most it can be given, and processors with larger and smaller patches.
LIMITS = [
    (28, 56 * 56, 28 * 28 * 1280),
    (28, 56 * 56, 401408),
    (28, 28 * 28, 28 * 28),
    (28, 256 * 28 * 28, 16384 * 28 * 28),
    (32, 65536, 16777216),
    (14, 784, 3136),
]
FRAMES = [
    CoordinateFrame(),
    CoordinateFrame(extent=999),
    *[CoordinateFrame("resized", factor=f, min_pixels=low, max_pixels=high) for f, low, high in LIMITS],
    CoordinateFrame("pixel"),
]
Box = tuple[float, float, float, float]


@st.composite
def image_sizes(draw) -> tuple[int, int]:
    """(width, height), any that a processor takes: one side less than 200 times the other."""
    short = draw(st.integers(1, 20_000))
    sides = [short, draw(st.integers(short, min(short * 200 - 1, 65_500)))]
    return tuple(draw(st.permutations(sides)))


@st.composite
def spans(draw, length: int) -> tuple[float, float]:
    """The part of an axis that a box takes: of any size down to hardly anything, often at a border."""
    size = draw(st.floats(1e-3, length) | st.floats(1e-6, 1).map(lambda share: share * length))
    start = draw(st.sampled_from([0.0, length - size]) | st.floats(0, 1).map(lambda share: share * (length - size)))
    return start, min(start + size, float(length))


@st.composite
def pictures(draw) -> tuple[tuple[int, int], list[Box]]:
    """A size, and boxes with an area inside."""
    size = draw(image_sizes())
    boxes = []
    for _ in range(draw(st.integers(1, 3))):
        (left, right), (top, bottom) = draw(spans(size[0])), draw(spans(size[1]))
        boxes.append((left, top, right, bottom))
    return size, boxes


def check(written: torch.Tensor, boxes: list[Box], frame: CoordinateFrame, size: tuple[int, int]) -> None:
    """The boxes as read have an area, lie in the picture, and are off by at most one frame unit and one pixel."""
    assert written.shape == (len(boxes), 4)
    assert valid_boxes(written).all()
    units = torch.tensor([side / extent for side, extent in zip(size, frame.size(size), strict=True)] * 2)
    assert ((written - torch.tensor(boxes, dtype=torch.float64)).abs() <= units + 1).all()
    assert (written >= 0).all()
    assert (written <= torch.tensor(size * 2)).all()


@given(picture=pictures(), frame=st.sampled_from(FRAMES))
# Narrower than a unit of ten pixels, and closer to its upper end.
@example(picture=((10_000, 100), [(16.0, 3.0, 16.5, 4.0)]), frame=CoordinateFrame())
@example(picture=((1, 199), [(0.999, 198.999, 1.0, 199.0)]), frame=FRAMES[2])
def test_boxes_survive_being_written_and_read(picture, frame):
    size, boxes = picture
    detection, grounding = DetectionTask(), GroundingTask()
    target = DetectionTarget(boxes, category="cat", image_size=size)
    check(detection.read(detection.solution(target, frame), frame, size).boxes, boxes, frame, size)
    for box in boxes:
        text = grounding.solution(GroundingTarget([box], image_size=size), frame)
        answer = grounding.read(text, frame, size)
        check(answer.boxes, [box], frame, size)
        assert not [problem for problem in answer.problems if "frame" in problem]


@pytest.mark.parametrize("size", [(1, 1), (1, 199), (199, 1), (27, 29), (3, 400), (1333, 800)])
@pytest.mark.parametrize("limits", [LIMITS[1], LIMITS[2], LIMITS[5]])
def test_the_frame_is_the_picture_as_processors_resize_it(size, limits):
    factor, fewest, most = limits
    frame = CoordinateFrame("resized", factor=factor, min_pixels=fewest, max_pixels=most)
    processor = Qwen2VLImageProcessor(
        size={"shortest_edge": fewest, "longest_edge": most}, patch_size=factor // 2, merge_size=2
    )
    grid = processor(Image.new("RGB", size), return_tensors="pt")["image_grid_thw"][0].tolist()
    assert frame.size(size) == (grid[2] * factor // 2, grid[1] * factor // 2)
