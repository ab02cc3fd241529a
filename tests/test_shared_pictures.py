"""Several questions about one picture: its features are worked out once per rollout, and nothing else changes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rft_lightning.policy.families import FAMILIES
from rft_lightning.policy.loading import load_policy
from rft_lightning.policy.prompt_inputs import picture_owners, prepared, with_features
from rft_lightning.policy.rollout import sample_groups
from rft_lightning.sample import PromptBatch
from tests.test_prompt_inputs import VISION, count_towers
from tests.test_rollout import setting

QUESTIONS = ["Is there a dog?", "Is there a stop sign in it?", "A cat?"]


def asked(rows):
    """Three questions about the first picture, one about the second, and one more about the first."""
    first, second = rows[:2]
    of_first = [replace(first, id=f"a{i}", question=question) for i, question in enumerate(QUESTIONS)]
    return [*of_first, replace(second, id="b"), replace(first, id="c", question="What?")]


def seen_pixels(model, family, rows):
    """Rows of pixels that the vision tower gets."""
    name = FAMILIES[family].parts["vision_tower"][0]
    tower = model.get_submodule(name)

    def note(_, args, kwargs):
        pixels = args[0] if args else kwargs.get("pixel_values", kwargs.get("hidden_states"))
        rows.append(len(pixels))

    return tower.register_forward_pre_hook(note, with_kwargs=True)


def roll_out(model, encoder, batch, **settings):
    settings = {"max_completion_length": 8, "seed": 3, **settings}
    return sample_groups(model, batch, 2, tokenizer=encoder.processor.tokenizer, **settings)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1.0}, {"rollout_prompts": 2}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_each_question_alone(family_folder, family, settings):
    folder = family_folder(family)
    _, encoder, rows = setting(folder)
    model, questions = load_policy(folder), asked(rows)
    pixels: list[int] = []
    hook = seen_pixels(model, family, pixels)
    together = roll_out(model, encoder, encoder(questions), **settings)
    hook.remove()
    batch = encoder(questions)
    assert sum(pixels) == batch.patch_counts[0] + batch.patch_counts[3], "each of the two pictures once"
    assert together.prompts.features is None, "training changes them: what follows works out its own"
    alone = [roll_out(model, encoder, encoder([question]), **settings) for question in questions]
    assert together.texts == [rollouts.texts[0] for rollouts in alone]
    for i, rollouts in enumerate(alone):
        assert together.lengths[i] == rollouts.lengths[0]
        width = max(together.lengths[i])
        assert (together.logprobs[i, :, :width] - rollouts.logprobs[0, :, :width]).abs().max() < 1e-4


def test_pictures_that_differ_go_through_the_tower_as_ever(family_folder):
    folder = family_folder("qwen2_vl")
    _, encoder, rows = setting(folder)
    model, calls = load_policy(folder), []
    hook = count_towers(model, calls)
    roll_out(model, encoder, encoder(rows), rollout_prompts=1)
    assert len(calls) == len(rows)
    hook.remove()


def test_processes_that_decode_together_share_nothing(family_folder):
    """One with fewer pictures than the others would make fewer passes, and all would wait for it."""
    folder = family_folder("qwen2_vl")
    _, encoder, rows = setting(folder)
    model, pixels = load_policy(folder, freeze=VISION), []
    batch = encoder(asked(rows))
    hook = seen_pixels(model, "qwen2_vl", pixels)
    roll_out(model, encoder, batch, anyone=lambda any_here: any_here)
    assert sum(pixels) == sum(batch.patch_counts)
    hook.remove()


@pytest.mark.parametrize("freeze", [[], VISION], ids=["live", "frozen"])
def test_features_of_one_picture_are_one_object(family_folder, freeze):
    folder = family_folder("qwen2_vl")
    _, encoder, rows = setting(folder)
    model = load_policy(folder, freeze=freeze).eval()
    batch = with_features(model, encoder(asked(rows)))
    assert batch.features is not None
    first, second, third, other, again = batch.features
    assert first is second is third is again
    assert other is not first
    apart = with_features(model, encoder(asked(rows)), share=False)
    for shared, own in zip(batch.features, apart.features, strict=True):
        assert torch.allclose(shared.pooled[0], own.pooled[0], atol=1e-5)
    assert (prepared(model, encoder(asked(rows))).features is None) == (not freeze)


def test_what_counts_as_the_same_picture(family_folder):
    """A file, or one object in memory; not an id, which may be the same for all, nor an equal copy."""
    _, encoder, rows = setting(family_folder("qwen2_vl"))
    template, picture = encoder(rows[:1]), rows[0].image
    images = [Path("a.png"), Path("b.png"), picture, Path("a.png"), picture.copy(), picture]
    samples = [replace(rows[0], image=image, image_id=0) for image in images]
    batch = PromptBatch(**{**vars(template), "samples": samples})
    assert picture_owners(batch) == [0, 1, 2, 0, 4, 2]
