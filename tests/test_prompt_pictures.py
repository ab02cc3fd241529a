"""A picture that several questions of a batch are about is read and processed once, and the prompts are the same."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from rft_lightning.policy.families import FAMILIES
from rft_lightning.prompts import PromptEncoder
from rft_lightning.sample import DetectionTarget, Sample
from rft_lightning.tasks import DetectionTask


def samples(image: Image.Image | Path, names: list[str]) -> list[Sample]:
    task = DetectionTask()
    return [Sample(name, image, DetectionTarget([], name, image_size=(56, 84)), task, (56, 84)) for name in names]


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_pictures_change_nothing(family: str, family_folder, tmp_path: Path, monkeypatch) -> None:
    encoder = PromptEncoder(family_folder(family), max_prompt_length=None)
    torch.manual_seed(0)
    pixels = torch.randint(0, 255, (84, 56, 3), dtype=torch.uint8).numpy()
    file = tmp_path / "picture.png"
    Image.fromarray(pixels).save(file)
    other = Image.fromarray(pixels[::-1].copy())
    asked = [*samples(file, ["a", "bird"]), *samples(other, ["cat", "dog"]), *samples(file, ["tree"])]
    opened: list[str] = []
    load = Sample.load_image
    monkeypatch.setattr(Sample, "load_image", lambda sample: (opened.append(sample.id), load(sample))[1])
    processor, calls = encoder.processor.image_processor, []
    plain = type(processor).__call__
    monkeypatch.setattr(type(processor), "__call__", lambda *a, **k: (calls.append(1), plain(*a, **k))[1])
    batch = encoder(asked)
    assert opened == ["a", "cat"]
    assert len(calls) == 2
    assert encoder.processor.image_processor is processor
    alone = [encoder([sample]) for sample in asked]
    for number, single in enumerate(alone):
        one = batch.select(number, number + 1)
        assert torch.equal(one.input_ids, single.input_ids)
        assert one.vision.keys() == single.vision.keys()
        for name, tensor in single.vision.items():
            assert torch.equal(one.vision[name], tensor), name
