"""What is worked out once per rollout batch: rope positions, and features of pictures that no training changes."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from rft_lightning import GRPOModule, GRPOObjective
from rft_lightning.policy.families import FAMILIES, base_model, prompt_positions
from rft_lightning.policy.loading import frozen_copy, load_policy
from rft_lightning.policy.plain import plain_group_logprobs
from rft_lightning.policy.prompt_inputs import can_keep_graph, has_fixed_features, image_features, prepared
from rft_lightning.policy.rollout import sample_groups
from rft_lightning.policy.shared_prefix import group_logprobs
from rft_lightning.rollout_batches import join_rollouts
from tests.test_grpo import data, grpo, weights
from tests.test_rollout import setting
from tests.test_shared_prefix import completions, relative, value_and_gradient

VISION = ["vision_tower", "projector"]
SHARING = [name for name, family in FAMILIES.items() if family.layouts]


def count_towers(model, calls):
    tower = FAMILIES[base_model(model).config.model_type].parts["vision_tower"][0]
    module = base_model(model).get_submodule(tower)
    return module.register_forward_pre_hook(lambda *_: calls.append(tower))


@pytest.mark.parametrize(
    ("options", "fixed"),
    [
        ({}, False),
        ({"freeze": VISION}, True),
        ({"freeze": ["vision_tower"]}, False),
        ({"lora": {"r": 4}}, False),
        ({"lora": {"r": 4}, "freeze": VISION}, True),
    ],
    ids=["full", "frozen", "a trained projector", "lora", "lora on the language model"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_fixed_where_nothing_that_makes_them_is_trained(family_folder, family, options, fixed):
    assert has_fixed_features(load_policy(family_folder(family), **options)) == fixed


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_reference_and_update_share_one_pass_of_the_tower(family_folder, family, lora):
    folder = family_folder(family)
    _, encoder, rows = setting(folder)
    model = load_policy(folder, freeze=VISION, lora=lora)
    reference = frozen_copy(model)
    calls = []
    hooks = [count_towers(model, calls), count_towers(reference, calls)]
    rollouts = sample_groups(model, encoder(rows), 3, tokenizer=encoder.processor.tokenizer, max_completion_length=6)
    ids, mask = rollouts.completion_ids, rollouts.completion_mask
    with torch.no_grad():
        of_reference = group_logprobs(reference, rollouts.prompts, ids, mask)
    found, gradient = value_and_gradient(model, lambda: group_logprobs(model, rollouts.prompts, ids, mask), mask)
    assert len(calls) == 1
    for hook in hooks:
        hook.remove()
    untouched = encoder(rows)
    expected, expected_gradient = value_and_gradient(
        model, lambda: plain_group_logprobs(model, untouched, ids, mask)[0], mask
    )
    assert (found - expected)[mask].abs().max() < 2e-5
    assert (of_reference - expected)[mask].abs().max() < 2e-5
    assert relative(gradient, expected_gradient, gradient) < 1e-4


@pytest.mark.parametrize("layout", ["prefix_cache", "packed", "plain"])
@pytest.mark.parametrize("family", SHARING)
def test_parts_of_a_prepared_batch(family_folder, family, layout):
    """Features and positions follow their prompts into micro-batches, in any order."""
    folder = family_folder(family)
    _, encoder, rows = setting(folder)
    model = load_policy(folder, freeze=VISION).eval()
    batch = prepared(model, encoder(rows))
    assert batch.features is not None
    assert batch.positions is not None
    for part, numbers in ((batch.select(1, 3), [1, 2]), (batch.take([3, 0]), [3, 0])):
        alone = encoder([rows[i] for i in numbers])
        assert torch.equal(part.input_ids, alone.input_ids)
        assert part.lengths == alone.attention_mask.sum(1).tolist()
        ids, mask = completions(2, 3)
        with torch.no_grad():
            expected = plain_group_logprobs(model, alone, ids, mask)[0]
            found = group_logprobs(model, part, ids, mask, forward=layout)
        assert (found - expected)[mask].abs().max() < 2e-5


def test_positions_are_worked_out_once(family_folder, monkeypatch):
    folder = family_folder("qwen2_vl")
    _, encoder, rows = setting(folder)
    model = load_policy(folder)
    batch = prepared(model, encoder(rows))
    assert batch.features is None
    assert torch.equal(batch.positions, prompt_positions(model, encoder(rows))[0])
    monkeypatch.setattr(type(model.model), "get_rope_index", None)
    ids, mask = torch.full((4, 2, 3), 30), torch.ones(4, 2, 3, dtype=torch.bool)
    with torch.no_grad():
        group_logprobs(model, batch, ids, mask)
        sample_groups(model, batch, 2, tokenizer=encoder.processor.tokenizer, max_completion_length=3)


def test_a_batch_that_moves_forgets_its_features(family_folder):
    """They lie where they were made."""
    folder = family_folder("qwen2_vl")
    _, encoder, rows = setting(folder)
    model = load_policy(folder, freeze=VISION).eval()
    batch = replace(encoder(rows), features=image_features(model, encoder(rows)))
    assert batch.to("cpu").features is None
    assert batch.to("cpu").lengths == batch.lengths


def test_frozen_adapters_in_the_tower_are_no_fixed_features(family_folder):
    """The reference model is without them."""
    model = load_policy(family_folder("qwen2_vl"), lora={"r": 4}).requires_grad_(False)
    assert not has_fixed_features(model)


def test_the_tower_sees_no_more_pictures_at_once_than_the_rollout(family_folder):
    folder = family_folder("qwen2_vl")
    _, encoder, rows = setting(folder)
    model = load_policy(folder, freeze=VISION)
    calls = []
    hook = count_towers(model, calls)
    tokenizer = encoder.processor.tokenizer
    chunked = sample_groups(model, encoder(rows), 2, tokenizer=tokenizer, rollout_prompts=1, seed=0)
    assert len(calls) == len(rows)
    together = sample_groups(model, encoder(rows), 2, tokenizer=tokenizer, seed=0)
    hook.remove()
    assert len(calls) == len(rows) + 1
    assert chunked.texts == together.texts


def test_waves_of_dynamic_sampling_keep_what_was_worked_out(family_folder):
    folder = family_folder("qwen2_vl")
    _, encoder, rows = setting(folder)
    model = load_policy(folder, freeze=VISION).eval()
    batch = encoder(rows)
    tokenizer = encoder.processor.tokenizer
    parts = [sample_groups(model, part, 2, tokenizer=tokenizer, max_completion_length=4) for part in batch.chunks(3)]
    joined = join_rollouts(batch, parts, tokenizer.pad_token_id)
    calls = []
    hook = count_towers(model, calls)
    ids, mask = joined.completion_ids, joined.completion_mask
    with torch.no_grad():
        found = group_logprobs(model, joined.prompts, ids, mask)
        hook.remove()
        expected = plain_group_logprobs(model, batch, ids, mask)[0]
    assert not calls
    assert (found - expected)[mask].abs().max() < 2e-5


def learned(tiny_policy, make_trainer, **options):
    """Weights after two steps, and how often the policy's tower ran in the second."""
    module = grpo(tiny_policy, objective=GRPOObjective(beta=0.04), **options)
    module.configure_model()
    calls, counts = [], []
    count_towers(module.policy, calls)

    class Count(Callback):
        def on_train_batch_start(self, *_):
            calls.clear()

        def on_train_batch_end(self, *_):
            counts.append(len(calls))

    make_trainer(2, callbacks=[Count()]).fit(module, datamodule=data(tiny_policy))
    return weights(module), counts[-1]


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
def test_rollout_and_update_share_one_pass_of_a_trained_tower(tiny_policy, make_trainer, monkeypatch, lora):
    """With its graph: the update is that of a tower that runs twice. The reference model's are not counted."""
    shared, once = learned(tiny_policy, make_trainer, lora=lora)
    monkeypatch.setattr(GRPOModule, "_keeps_graph", lambda self, batch: False)
    apart, twice = learned(tiny_policy, make_trainer, lora=lora)
    with_adapters_off = 0 if lora is None else 1
    assert (once, twice) == (1 + with_adapters_off, 2 + with_adapters_off)
    start = grpo(tiny_policy, lora=lora)
    start.configure_model()
    before = weights(start)
    moved = {name: apart[name] - before[name] for name in before}
    tower = [name for name in moved if ".visual." in name and moved[name].abs().max() > 0]
    assert tower
    for names in (tower, list(moved)):
        error = sum((shared[name] - apart[name]).square().sum() for name in names)
        assert float((error / sum(moved[name].square().sum() for name in names)).sqrt()) < 1e-3


@pytest.mark.parametrize(
    "options",
    [{"micro_batch_prompts": 2}, {"num_iterations": 2}, {"mini_batch_prompts": 2}, {"gradient_checkpointing": True}],
    ids=str,
)
def test_the_graph_is_kept_only_for_one_backward(tiny_policy, options):
    module = grpo(tiny_policy, **options)
    module.configure_model()
    samples = data(tiny_policy)
    assert not module._keeps_graph(samples.encoder([samples.sample("train", i) for i in range(4)]))


def test_features_that_drop_out_are_not_kept(tiny_policy):
    assert can_keep_graph(load_policy(tiny_policy))
    assert not can_keep_graph(load_policy(tiny_policy, lora={"r": 4, "lora_dropout": 0.1}))
