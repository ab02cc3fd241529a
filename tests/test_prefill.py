"""Prompts that begin alike: their common beginning runs once, and what comes out is what each prompt alone gives."""

from dataclasses import replace

import pytest
import torch

from rft_lightning.policy.families import FAMILIES, base_model
from rft_lightning.policy.loading import load_policy
from rft_lightning.policy.prefill import common_beginnings, prefill
from rft_lightning.policy.prompt_inputs import prepared, with_features
from rft_lightning.policy.rollout import sample_groups
from rft_lightning.policy.shared_prefix import shares_keys
from tests.test_rollout import setting
from tests.test_shared_pictures import asked

SHARING = [family for family in FAMILIES if family not in ("qwen3_5", "gemma3")]


def policy(folder):
    return load_policy(folder).eval()


def columns_run(model):
    """Rows and columns of every pass of the decoder, [rows, columns]; and the hook to take away."""
    shapes: list[tuple[int, int]] = []

    def note(_, args, kwargs):
        shapes.append(tuple(kwargs["inputs_embeds"].shape[:2]))

    return shapes, base_model(model).model.language_model.register_forward_pre_hook(note, with_kwargs=True)


def test_which_families_share():
    """A family that joins the table says here whether its prompts can be cut in two."""
    assert set(SHARING) == {
        family for family, entry in FAMILIES.items() if entry.layouts and not entry.images_both_ways
    }


@pytest.mark.parametrize("live", [True, False], ids=["pixels", "features"])
@pytest.mark.parametrize("family", SHARING)
@torch.no_grad()
def test_logits_keys_and_values_are_those_of_one_pass(family_folder, family, live):
    folder = family_folder(family)
    _, encoder, rows = setting(folder)
    model = policy(folder)
    assert shares_keys(model)
    batch = encoder(asked(rows))
    if not live:
        batch = with_features(model, prepared(model, batch))
    shapes, hook = columns_run(model)
    found, stored = prefill(model, batch)
    hook.remove()
    expected, whole = prefill(model, batch, share=False)
    assert [count for count, _ in shapes] == [2, len(batch)], "two pictures, then the rest of every question"
    assert shapes[0][1] + shapes[1][1] < 1.5 * batch.input_ids.shape[1]
    assert torch.allclose(found, expected, atol=1e-4)
    seen = batch.attention_mask.bool()
    for ours, theirs in zip(stored, whole, strict=True):
        for each, other in zip(ours, theirs, strict=True):
            assert each.shape == other.shape
            assert torch.allclose(each.transpose(1, 2)[seen], other.transpose(1, 2)[seen], atol=1e-4)


def test_a_beginning_holds_the_picture_and_leaves_a_token(family_folder):
    folder = family_folder("qwen2_vl")
    _, encoder, rows = setting(folder)
    model = policy(folder)
    same = encoder([rows[0], replace(rows[0], id="again")])
    found = common_beginnings(model, same)
    assert found.first == [0]
    assert found.owner == [0, 0]
    assert found.lengths == [same.lengths[0] - 1]

    batch = encoder(asked(rows))
    found = common_beginnings(model, batch)
    assert found.owner == [0, 0, 0, 1, 0]
    own = [row[row.shape[0] - length :] for row, length in zip(batch.input_ids, batch.lengths, strict=True)]
    common = found.lengths[0]
    members = [own[number] for number, owner in enumerate(found.owner) if owner == 0]
    assert all(torch.equal(row[:common], members[0][:common]) for row in members)
    assert len({int(row[common]) for row in members}) > 1, "one token more, and they differ"
    assert found.lengths[1] == batch.lengths[3] - 1


def test_what_shares_no_beginning_runs_in_one_pass(family_folder):
    folder = family_folder("qwen2_vl")
    _, encoder, rows = setting(folder)
    model = policy(folder)
    assert common_beginnings(model, encoder(rows)) is None, "no picture twice"
    batch = encoder(asked(rows)[:3])
    # Something before the picture that differs.
    first = [row.shape[0] - length for row, length in zip(batch.input_ids, batch.lengths, strict=True)]
    for number, column in enumerate(first):
        batch.input_ids[number, column] = 40 + number
    assert common_beginnings(model, batch) is None


def test_one_group_shares_while_another_cannot(family_folder):
    folder = family_folder("qwen2_vl")
    _, encoder, rows = setting(folder)
    model = policy(folder)
    questions = ["Is there a dog?", "What is it?"]
    samples = [replace(row, id=f"{i}{q}", question=q) for i, row in enumerate(rows[:2]) for q in questions]
    batch = encoder(samples)
    start = batch.input_ids.shape[1] - batch.lengths[3]
    batch.input_ids[3, start] = 41
    found = common_beginnings(model, batch)
    assert found.owner == [0, 0, 1, 2]
    with torch.no_grad():
        ours, _ = prefill(model, batch)
        expected, _ = prefill(model, batch, share=False)
    assert torch.allclose(ours, expected, atol=1e-4)


def test_a_rollout_with_refills_shares_what_begins_together(family_folder):
    """And gives the completions of each question alone, which test_shared_pictures compares for every family."""
    folder = family_folder("qwen2_vl")
    _, encoder, rows = setting(folder)
    model = policy(folder)
    batch = encoder([replace(rows[0], id=f"q{i}", question=f"Is there a {i}?") for i in range(6)])
    shapes, hook = columns_run(model)
    sample_groups(model, batch, 2, tokenizer=encoder.processor.tokenizer, max_completion_length=2, rollout_prompts=3)
    hook.remove()
    assert [count for count, columns in shapes if columns > 1] == [1, 3, 1, 3]


def test_processes_that_decode_together_make_one_pass_each(family_folder):
    """One whose pictures differ would make one pass, and wait for ever for the second of the others."""
    folder = family_folder("qwen2_vl")
    _, encoder, rows = setting(folder)
    model = policy(folder)
    shapes, hook = columns_run(model)
    settings = {"tokenizer": encoder.processor.tokenizer, "max_completion_length": 2}
    sample_groups(model, encoder(asked(rows)), 2, anyone=lambda any_here: any_here, **settings)
    hook.remove()
    assert [count for count, columns in shapes if columns > 1] == [5]


@torch.no_grad()
def test_under_autocast_keys_and_values_agree(family_folder):
    folder = family_folder("qwen2_vl")
    _, encoder, rows = setting(folder)
    model, batch = policy(folder), encoder(asked(rows))
    expected, _ = prefill(model, batch, share=False)
    with torch.autocast("cpu", torch.bfloat16):
        found, stored = prefill(model, batch)
    assert all(keys.dtype == values.dtype for keys, values in stored)
    assert (found.float().log_softmax(1) - expected.log_softmax(1)).abs().mean() < 0.05
