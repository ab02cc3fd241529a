"""The lean decode step against the model's own forward, and when it is not taken."""

import pytest
import torch

from rft_lightning.policy import decoding
from rft_lightning.policy.decoding import SharedDecoder
from rft_lightning.policy.families import base_model
from rft_lightning.policy.lean_step import LeanStep, fused, lean_step
from rft_lightning.policy.loading import load_policy
from tests.test_rollout import roll_out, setting

SHARED = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision"]


def both_steps(model, prompts, group_size=3):
    """Logits after two further tokens, by the lean step and by the model's own forward."""
    model.eval()
    found = []
    with torch.no_grad():
        for lean in (True, False):
            decoder = SharedDecoder(model, prompts, group_size, at_once=len(prompts))
            assert decoder.lean is not None
            if not lean:
                decoder.lean = None
            decoder.admit()
            for token in (30, 31):
                decoder.extend(torch.arange(token, token + len(prompts) * group_size))
            assert (decoder.lean is not None) == lean  # the comparison has not put it aside
            found.append(decoder.logits)
    model.train()
    return found


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("family", SHARED)
def test_equals_the_models_own_forward(family_folder, family, lora):
    folder = family_folder(family)
    _, encoder, rows = setting(folder)
    model = load_policy(folder, lora=lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # begins at zero, where adapters change nothing
            torch.nn.init.normal_(parameter, std=0.05)
    lean, own = both_steps(model, encoder(rows))
    torch.testing.assert_close(lean, own, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", SHARED)
def test_in_bfloat16_and_under_autocast(family_folder, family):
    folder = family_folder(family)
    _, encoder, rows = setting(folder)
    lean, own = both_steps(load_policy(folder, dtype="bfloat16"), encoder(rows))
    assert (lean.float().log_softmax(1) - own.float().log_softmax(1)).abs().mean() < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        lean, own = both_steps(load_policy(folder), encoder(rows))
    assert (lean.float().log_softmax(1) - own.float().log_softmax(1)).abs().mean() < 0.1


def test_it_is_not_taken_where_somebody_listens_or_the_decoder_is_of_another_kind(family_folder):
    model = load_policy(family_folder("qwen2_vl")).eval()
    layer = base_model(model).model.language_model.layers[0]
    assert isinstance(lean_step(model, 8), LeanStep)
    base = base_model(model)
    for module in (layer, layer.self_attn.q_proj, layer.mlp, base, base.model, base.lm_head):
        hook = module.register_forward_hook(lambda *_: None)
        assert lean_step(model, 8) is None
        hook.remove()
        module.forward = module.forward  # as libraries do that replace kernels
        assert lean_step(model, 8) is None
        del module.forward
    assert isinstance(lean_step(model, 8), LeanStep)
    layer.extra = torch.nn.Linear(2, 2)
    assert lean_step(model, 8) is None
    assert lean_step(load_policy(family_folder("gemma3")), 8) is None
    assert lean_step(load_policy(family_folder("qwen3_5")), 8) is None


def test_a_step_with_other_logits_is_noticed(family_folder, monkeypatch):
    folder = family_folder("qwen2_vl")
    rows = setting(folder)[2]
    expected = roll_out(folder, rows).texts
    monkeypatch.setattr(decoding, "_COMPARED", type(decoding._COMPARED)())
    call = LeanStep.__call__
    monkeypatch.setattr(
        LeanStep, "__call__", lambda self, tokens, positions, attend: call(self, tokens, positions + 7, attend)
    )
    with pytest.warns(UserWarning, match="lean decode step gives other log-probs than Qwen2VL"):
        assert roll_out(folder, rows).texts == expected
    calls = []
    monkeypatch.setattr(LeanStep, "__call__", lambda *given: calls.append(given))
    assert roll_out(folder, rows).texts == expected
    assert not calls  # and not tried again


def test_a_model_whose_parts_became_others_is_compared_again(family_folder, monkeypatch):
    folder = family_folder("qwen2_vl")
    _, encoder, rows = setting(folder)
    model = load_policy(folder)
    both_steps(model, encoder(rows))

    class Doubled(type(base_model(model).model.language_model.norm)):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    base_model(model).model.language_model.norm.__class__ = Doubled
    with pytest.warns(UserWarning, match="lean decode step gives other log-probs"), pytest.raises(AssertionError):
        both_steps(model, encoder(rows))


def test_weights_that_change_are_seen(family_folder):
    """Packed copies are made for one rollout."""
    folder = family_folder("internvl")
    model, encoder, rows = load_policy(folder), *setting(folder)[1:]
    before = both_steps(model, encoder(rows))[0]
    with torch.no_grad():
        for parameter in base_model(model).model.language_model.parameters():
            parameter.mul_(1.1)
    lean, own = both_steps(model, encoder(rows))
    assert not torch.allclose(lean, before, atol=1e-2)
    torch.testing.assert_close(lean, own, atol=2e-5, rtol=0)


@pytest.mark.parametrize("biases", [(True, True), (False, False), (True, False)], ids=str)
def test_linear_layers_as_one_product(biases):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 8 * (i + 1), bias=bias) for i, bias in enumerate(biases)]
    x = torch.randn(5, 16)
    with torch.no_grad():
        for pack in (0, 5, 64):
            for found, layer in zip(fused(layers, pack)(x), layers, strict=True):
                torch.testing.assert_close(found, layer(x), atol=1e-6, rtol=0)
    adapted = torch.nn.Sequential(layers[0])
    assert torch.equal(fused([adapted], 5)(x)[0], adapted(x))
