"""The shared decoder: rows that come and go, grow out of their room, or decode beside others of another age."""

import pytest
import torch

from rft_lightning.policy import decoding
from rft_lightning.policy.decoding import SharedDecoder
from rft_lightning.policy.families import base_model
from tests.test_rollout import end_often, roll_out, setting, tokens

SHARED = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision"]


def written(rollouts):
    return [[tokens(rollouts, b, g) for g in range(len(texts))] for b, texts in enumerate(rollouts.texts)]


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("family", SHARED)
def test_waiting_prompts_take_the_place_of_finished_rows(family_folder, monkeypatch, family, at_once):
    folder = family_folder(family)
    model, _, rows = setting(folder)
    end_often(monkeypatch, model)
    settings = {"temperature": 1.5, "max_completion_length": 24}
    together = roll_out(folder, rows, 4, **settings)
    most, prefilled = [], []
    forward, prefill = SharedDecoder._forward, SharedDecoder._prefill

    def counting(self, tokens_n, *arguments):
        most.append(len(tokens_n))
        return forward(self, tokens_n, *arguments)

    def prefilling(self, prompts):
        prefilled.append((len(prompts), len(most)))
        return prefill(self, prompts)

    monkeypatch.setattr(SharedDecoder, "_forward", counting)
    monkeypatch.setattr(SharedDecoder, "_prefill", prefilling)
    refilled = roll_out(folder, rows, 4, rollout_prompts=at_once, **settings)
    assert written(refilled) == written(together)
    torch.testing.assert_close(refilled.logprobs, together.logprobs, atol=2e-5, rtol=0)
    assert max(most) <= 4 * at_once
    assert sum(count for count, _ in prefilled) == len(rows)
    assert len(prefilled) > 1
    lengths = together.completion_mask.sum(-1)
    if at_once < 3:  # not one batch after another: a prompt begins as soon as there is room
        assert len(most) < sum(int(lengths[b : b + at_once].max()) for b in range(0, len(rows), at_once))


def test_a_prompt_begins_while_others_are_half_done(family_folder, monkeypatch):
    """Rows of different ages decode in one step."""
    folder = family_folder("qwen2_vl")
    model, _, rows = setting(folder)
    end_often(monkeypatch, model)
    ages = []
    forward = SharedDecoder._forward

    def watching(self, *arguments):
        ages.append(len(set(self.born)))
        return forward(self, *arguments)

    monkeypatch.setattr(SharedDecoder, "_forward", watching)
    roll_out(folder, rows, 4, rollout_prompts=2, temperature=1.5, max_completion_length=24)
    assert max(ages) > 1


@pytest.mark.parametrize("family", SHARED)
def test_room_for_own_keys_grows(family_folder, monkeypatch, family):
    folder = family_folder(family)
    rows = setting(folder)[2]
    expected = roll_out(folder, rows, max_completion_length=20)
    monkeypatch.setattr(decoding, "FIRST_ROOM", 3)
    assert written(roll_out(folder, rows, max_completion_length=20)) == written(expected)


@pytest.mark.parametrize("family", SHARED)
def test_a_step_of_static_shapes_is_the_same_step(family_folder, monkeypatch, family):
    """What a CUDA graph would record: all columns there is room for, each row writing to its own."""
    folder = family_folder(family)
    model, _, rows = setting(folder)
    end_often(monkeypatch, model)
    settings = {"temperature": 1.5, "max_completion_length": 24, "rollout_prompts": 2}
    expected = roll_out(folder, rows, 4, **settings)
    calls = []

    def replayed(run, device, pool):
        calls.append(run)
        run()
        return run

    init = SharedDecoder.__init__
    monkeypatch.setattr(SharedDecoder, "__init__", lambda self, *a, **k: init(self, *a, **(k | {"capture": True})))
    monkeypatch.setattr(decoding, "captured", replayed)
    monkeypatch.setattr("rft_lightning.policy.rollout.CHECK_EVERY", {"cpu": 5})
    found = roll_out(folder, rows, 4, **settings)
    assert written(found) == written(expected)
    assert len(calls) > 1


def test_a_static_step_waits_for_no_device(family_folder):
    """No operation in it reads a value back, which a recording would refuse."""
    from torch.utils._python_dispatch import TorchDispatchMode

    folder = family_folder("qwen2_vl")
    model, encoder, rows = setting(folder)
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            asked.append(str(function))
            return function(*args, **(kwargs or {}))

    model.eval()
    with torch.no_grad():
        decoder = SharedDecoder(model, encoder(rows), 3, at_once=4)
        decoder.admit()
        decoder.extend(torch.full((12,), 30))
        with Watch():
            decoder._forward(torch.full((12,), 31), decoder.room, None)
    model.train()
    assert len(asked) > 50
    assert not [name for name in asked if "local_scalar_dense" in name or "nonzero" in name or "masked_select" in name]


def test_each_prompts_keys_are_stored_once(family_folder):
    folder = family_folder("qwen2_vl")
    model, encoder, rows = setting(folder)
    prompts = encoder(rows)
    config = base_model(model).config.get_text_config()
    model.eval()
    with torch.no_grad():
        decoder = SharedDecoder(model, prompts, 8, at_once=4)
        decoder.admit()
    model.train()
    assert len(decoder.layers) == config.num_hidden_layers
    for layer in decoder.layers:
        assert layer.prompt_keys.shape[0] == len(rows)
        assert layer.prompt_keys.shape[2] == prompts.input_ids.shape[1]
        assert layer.own_keys.shape[0] == 8 * len(rows)


@pytest.mark.parametrize("engine", ["native", "hf"])
@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "qwen3_5"])
def test_no_completion_is_shorter_than_the_least_length(family_folder, monkeypatch, family, engine):
    folder = family_folder(family)
    model, _, rows = setting(folder)
    end_often(monkeypatch, model)
    settings = {"temperature": 1.5, "max_completion_length": 16, "engine": engine}
    free = roll_out(folder, rows, 6, **settings).completion_mask.sum(-1)
    assert int(free.min()) < 5
    held = roll_out(folder, rows, 6, min_completion_length=5, **settings).completion_mask.sum(-1)
    assert 5 <= int(held.min()) < 10
    assert int(roll_out(folder, rows, 6, min_completion_length=16, **settings).completion_mask.sum(-1).min()) == 16


@pytest.mark.gpu
@pytest.mark.parametrize("family", SHARED)
def test_recorded_steps_write_what_launched_ones_do(family_folder, monkeypatch, family):
    from rft_lightning.policy.loading import load_policy
    from rft_lightning.policy.rollout import sample_groups

    folder = family_folder(family)
    _, encoder, rows = setting(folder)
    model = load_policy(folder).cuda()
    end_often(monkeypatch, model)
    settings = {"temperature": 1.5, "max_completion_length": 100, "seed": 5, "rollout_prompts": 2}
    recorded = []
    captured = decoding.captured
    monkeypatch.setattr(decoding, "captured", lambda *given: recorded.append(captured(*given)) or recorded[-1])
    found = [
        sample_groups(
            model, encoder(rows).to("cuda"), 4, tokenizer=encoder.processor.tokenizer, cuda_graphs=graphs, **settings
        )
        for graphs in (True, False)
    ]
    assert written(found[0]) == written(found[1])
    assert recorded
