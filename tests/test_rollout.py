"""The native rollout, for every family: greedy as `generate`, the same completions in any batch, the prompt once."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from rft_lightning.policy.families import FAMILIES, base_model, vision_token_ids
from rft_lightning.policy.loading import load_policy
from rft_lightning.policy.plain import plain_group_logprobs
from rft_lightning.policy.rollout import sample_groups
from rft_lightning.prompts import PromptEncoder
from rft_lightning.sample import Sample
from rft_lightning.tasks import ClassificationTask

PICTURES = [((40, 64), "What?"), ((96, 48), "Which of the shapes is it?"), ((64, 64), "Name it. " * 6), ((64, 40), "?")]
LENGTH = 12


@cache
def setting(folder):
    """Policy, encoder and four samples of different lengths and picture sizes."""
    pixels = np.random.default_rng(0)
    rows = [
        Sample(f"s{i}", Image.fromarray(pixels.integers(0, 255, (height, width, 3), dtype=np.uint8)), None,
               ClassificationTask(), (width, height), question=question)
        for i, ((width, height), question) in enumerate(PICTURES)
    ]  # fmt: skip
    return load_policy(folder), PromptEncoder(folder), rows


def roll_out(folder, rows, group_size=3, **settings):
    model, encoder, _ = setting(folder)
    settings = {"max_completion_length": LENGTH, "seed": 5, **settings}
    return sample_groups(model, encoder(rows), group_size, tokenizer=encoder.processor.tokenizer, **settings)


def tokens(rollouts, prompt, completion):
    mask = rollouts.completion_mask[prompt, completion]
    return rollouts.completion_ids[prompt, completion][mask].tolist()


def end_often(monkeypatch, model):
    """A random policy hardly ever writes its one end token."""
    ends = list(range(100, 160))
    monkeypatch.setattr(base_model(model).generation_config, "eos_token_id", ends)
    return ends


@pytest.mark.parametrize("engine", ["native", "hf"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_on_each_prompt_alone(family_folder, family, engine):
    folder = family_folder(family)
    model, encoder, rows = setting(folder)
    rollouts = roll_out(folder, rows, 2, temperature=0, engine=engine)
    answers = set()
    model.eval()
    for i, sample in enumerate(rows):
        alone = encoder([sample])
        ids = model.generate(
            input_ids=alone.input_ids, attention_mask=alone.attention_mask, **alone.vision, do_sample=False,
            max_new_tokens=LENGTH, suppress_tokens=vision_token_ids(model.config),
        )[0, alone.input_ids.shape[1] :]  # fmt: skip
        for completion in range(2):
            found = tokens(rollouts, i, completion)
            assert found == ids[: len(found)].tolist()
            assert len(found) == len(ids)
        answers.add(tuple(found))
    model.train()
    assert len(answers) > 2  # the prompts are told apart


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_logprobs_are_those_of_the_plain_forward(family_folder, family):
    folder = family_folder(family)
    model, _, rows = setting(folder)
    rollouts = roll_out(folder, rows, temperature=0.8, top_k=50)
    with torch.no_grad():
        expected, _ = plain_group_logprobs(
            model, rollouts.prompts, rollouts.completion_ids, rollouts.completion_mask, temperature=0.8
        )
    mask = rollouts.completion_mask
    assert (rollouts.logprobs - expected)[mask].abs().max() < 2e-5
    assert (rollouts.logprobs[~mask] == 0).all()


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 20, "top_p": 0.95, "min_p": 0.01}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_completions_in_any_batch_and_order(family_folder, family, settings):
    folder = family_folder(family)
    _, _, rows = setting(folder)
    together = roll_out(folder, rows, **settings)
    assert len({tuple(tokens(together, i, g)) for i in range(4) for g in range(3)}) > 6
    by_id = {sample.id: [tokens(together, i, g) for g in range(3)] for i, sample in enumerate(together.prompts.samples)}
    for order in ([[3], [0], [2], [1]], [[2, 0], [1, 3]], [[3, 1, 0, 2]]):
        for batch in order:
            part = roll_out(folder, [rows[i] for i in batch], **settings)
            for place, i in enumerate(batch):
                assert [tokens(part, place, g) for g in range(3)] == by_id[rows[i].id]


def test_a_larger_group_begins_with_the_smaller_one(family_folder):
    folder = family_folder("qwen2_vl")
    rows = setting(folder)[2]
    small, large = roll_out(folder, rows, 2), roll_out(folder, rows, 5)
    assert small.texts == [texts[:2] for texts in large.texts]


def test_ids_of_any_characters(family_folder):
    """A file name need not be text."""
    folder = family_folder("qwen2_vl")
    sample = setting(folder)[2][0]
    names = ["ünï 漢.png", b"caf\xe9.png".decode("utf-8", "surrogateescape")]
    texts = [roll_out(folder, [replace(sample, id=name)]).texts[0] for name in names]
    assert texts[0] != texts[1]


def test_occurrences_steps_and_seeds_change_the_completions(family_folder):
    folder = family_folder("qwen2_vl")
    sample = setting(folder)[2][0]
    twice = roll_out(folder, [sample, replace(sample, occurrence=1)])
    others = [roll_out(folder, [sample], step=1), roll_out(folder, [sample], seed=6)]
    distinct = [twice.texts[0], twice.texts[1], *(other.texts[0] for other in others)]
    assert all(a != b for i, a in enumerate(distinct) for b in distinct[:i])
    assert roll_out(folder, [sample]).texts[0] == twice.texts[0]


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.layouts])
def test_the_prompt_is_computed_once_per_group_and_finished_rows_are_dropped(family_folder, monkeypatch, family):
    folder = family_folder(family)
    model, _, rows = setting(folder)
    end_often(monkeypatch, model)
    shapes, patches = [], []
    inner = base_model(model).model

    def count(module, args, kwargs, output):
        shapes.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2]))

    def count_patches(module, args, kwargs):
        patches.append(len(args[0] if args else kwargs.get("pixel_values", kwargs.get("hidden_states"))))

    tower = inner.get_submodule(FAMILIES[family].parts["vision_tower"][0].removeprefix("model."))
    hooks = [
        inner.language_model.layers[0].register_forward_hook(count, with_kwargs=True),
        tower.register_forward_pre_hook(count_patches, with_kwargs=True),
    ]
    rollouts = roll_out(folder, rows[:2], 4, temperature=1.5, max_completion_length=64)
    for hook in hooks:
        hook.remove()
    width = rollouts.prompts.input_ids.shape[1]
    assert shapes[0] == (2, width)
    assert patches == [len(rollouts.prompts.vision["pixel_values"])]
    lengths = rollouts.completion_mask.sum(-1).flatten()
    assert len(set(lengths.tolist())) > 1
    growing = [int((lengths > step).sum()) for step in range(1, int(lengths.max()))]
    assert shapes[1:] == [(rows, 1) for rows in growing]


def test_it_stops_when_all_have_ended_and_marks_what_was_cut(family_folder, monkeypatch):
    folder = family_folder("qwen2_vl")
    model, _, rows = setting(folder)
    ends = torch.tensor(end_often(monkeypatch, model))
    rollouts = roll_out(folder, rows, 8, temperature=1.5, max_completion_length=20)
    last = rollouts.completion_ids.gather(-1, rollouts.completion_mask.sum(-1, keepdim=True) - 1)[..., 0]
    assert torch.equal(rollouts.truncated, ~torch.isin(last, ends))
    assert not torch.isin(rollouts.completion_ids[..., 0], ends).all()
    assert rollouts.truncated.any()
    assert not rollouts.truncated.all()
    assert model.training
