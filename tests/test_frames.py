import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rft_lightning.frames import CoordinateFrame
from rft_lightning.tasks import DetectionTask

sizes = st.tuples(st.integers(28, 2000), st.integers(28, 2000))


@given(size=sizes, corners=st.tuples(*[st.floats(0, 0.9)] * 2), sides=st.tuples(*[st.floats(0.01, 0.1)] * 2))
def test_round_trip_is_off_by_at_most_half_a_unit_or_one_for_small_boxes(size, corners, sides):
    frame = CoordinateFrame()
    width, height = size
    x, y = corners[0] * width, corners[1] * height
    box = torch.tensor([[x, y, x + sides[0] * width, y + sides[1] * height]], dtype=torch.float64)
    back = frame.to_pixels(frame.from_pixels(box, size), size)
    assert (back - box).abs()[0, [0, 2]].max() <= width / 1000
    assert (back - box).abs()[0, [1, 3]].max() <= height / 1000


@given(size=sizes)
def test_written_boxes_are_integers_inside_the_frame_with_area(size):
    frame = CoordinateFrame()
    boxes = torch.tensor([[-5.0, -5.0, 1.0, 1.0], [0, 0, 0.001, 0.001], [size[0] - 0.001, 0, size[0] + 9, size[1] + 9]])
    written = frame.from_pixels(boxes, size)
    assert written.dtype == torch.int64
    assert frame.inside(written, size).all()
    assert (written[:, 2] > written[:, 0]).all()
    assert (written[:, 3] > written[:, 1]).all()


def test_relative_frame_known_numbers():
    """The published example: 1000 units over each side, whatever the picture's shape."""
    frame = CoordinateFrame()
    assert frame.from_pixels([[64.0, 96.0, 320.0, 480.0]], (640, 480)).tolist() == [[100, 200, 500, 1000]]
    assert frame.to_pixels([[100, 200, 500, 1000]], (640, 480)).tolist() == [[64.0, 96.0, 320.0, 480.0]]


def test_resized_frame_is_the_processors_image():
    """Qwen2.5-VL writes pixels of the image as resized; the sizes are those of the processor itself."""
    from PIL import Image
    from transformers import Qwen2VLImageProcessor

    limits = {"shortest_edge": 56 * 56, "longest_edge": 200 * 200}
    frame = CoordinateFrame("resized", min_pixels=56 * 56, max_pixels=200 * 200)
    processor = Qwen2VLImageProcessor(size=limits)
    for size in ((640, 480), (100, 333), (30, 30)):
        grid = processor(Image.new("RGB", size), return_tensors="pt")["image_grid_thw"][0]
        assert frame.size(size) == (int(grid[2]) * 14, int(grid[1]) * 14)


@pytest.mark.parametrize(
    ("frame", "words", "absent"),
    [
        (CoordinateFrame(), "(between 0 and 1000, integer)", "pixels"),
        (CoordinateFrame("resized"), "(in pixels of the image, integer)", "1000"),
        (CoordinateFrame("pixel"), "(in pixels of the image, integer)", "1000"),
    ],
)
def test_the_question_states_the_frames_own_range(frame, words, absent):
    from rft_lightning.sample import DetectionTarget

    question = DetectionTask().question(DetectionTarget([], category="bus"), frame)
    assert words in question
    assert absent not in question


def test_errors():
    with pytest.raises(ValueError, match="relative, resized or pixel"):
        CoordinateFrame("absolute")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="image size"):
        CoordinateFrame().to_pixels([[1, 2, 3, 4]], None)  # type: ignore[arg-type]
