"""The shared-prefix layouts against the plain route, for every family, layout and switch that is admitted."""

import json
import shutil
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from PIL import Image

from rft_lightning.errors import ConfigConflictError
from rft_lightning.policy import logprobs
from rft_lightning.policy.families import FAMILIES, base_model
from rft_lightning.policy.loading import frozen_copy, load_policy
from rft_lightning.policy.plain import plain_group_logprobs
from rft_lightning.policy.shared_prefix import (
    PLAIN,
    choose_layout,
    group_logprobs,
    group_logprobs_and_entropies,
    never_share_keys,
    shares_keys,
)
from rft_lightning.prompts import PromptEncoder
from rft_lightning.sample import Sample
from rft_lightning.self_check import layout_error, settle_layout
from rft_lightning.tasks import ClassificationTask

SHARING = [name for name, family in FAMILIES.items() if family.layouts]
# Questions and pictures of different sizes; the last prompt is the longest.
PICTURES = [((40, 64), "What?"), ((96, 48), "Which of the shapes is it?"), ((64, 64), "Please name the shape. " * 4)]
LENGTH = 6


def samples():
    pixels = np.random.default_rng(0)
    return [
        Sample(f"s{i}", Image.fromarray(pixels.integers(0, 255, (height, width, 3), dtype=np.uint8)), None,
               ClassificationTask(), (width, height), question=question)
        for i, ((width, height), question) in enumerate(PICTURES)
    ]  # fmt: skip


@cache
def encoded(folder):
    return PromptEncoder(folder)(samples())


def completions(groups, group_size, vocabulary=300):
    """Ragged: in every group one completion of a single token, and one of full length if there are two."""
    generator = torch.Generator().manual_seed(group_size)
    ids = torch.randint(20, vocabulary, (groups, group_size, LENGTH), generator=generator)
    lengths = torch.randint(2, LENGTH, (groups, group_size), generator=generator)
    lengths[:, 0] = torch.tensor([1, LENGTH, 3])[:groups]
    lengths[:, -1] = torch.tensor([LENGTH, 1, LENGTH - 1])[:groups]
    return ids, torch.arange(LENGTH) < lengths[..., None]


@cache
def policy(folder, lora, checkpointing):
    more = {"lora": {"r": 4}} if lora else {}
    model = load_policy(folder, **more, **({"gradient_checkpointing": True} if checkpointing else {}))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # begins at zero, where adapters change nothing and lora_A has no gradient
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def tower_parameters(model):
    tower = FAMILIES[base_model(model).config.model_type].parts["vision_tower"][0]
    return [(name, p) for name, p in model.named_parameters() if f"{tower.removeprefix('model.')}." in name]


def value_and_gradient(model, run, mask):
    model.zero_grad()
    logp = run()
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    (logp * weights * mask).sum().backward()
    return logp.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(found, expected, names):
    difference = sum((found[name] - expected[name]).square().sum() for name in names)
    return float((difference / sum(expected[name].square().sum() for name in names)).sqrt())


@pytest.mark.parametrize("frozen_tower", [False, True], ids=["tower", "frozen"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("group_size", [1, 2, 8])
@pytest.mark.parametrize("layout", ["prefix_cache", "packed"])
@pytest.mark.parametrize("family", SHARING)
def test_equals_the_plain_route(family_folder, family, layout, group_size, lora, checkpointing, frozen_tower):
    folder = family_folder(family)
    model, prompt = policy(folder, lora, checkpointing), encoded(folder)
    ids, mask = completions(len(prompt), group_size)
    if layout == "prefix_cache" and checkpointing:
        with pytest.raises(ConfigConflictError, match=r"'prefix_cache', but gradient checkpointing is on"):
            group_logprobs(model, prompt, ids, mask, forward=layout)
        return
    tower = [(name, p) for name, p in tower_parameters(model) if p.requires_grad]
    for _, parameter in tower if frozen_tower else ():
        parameter.requires_grad_(False)
    try:
        expected, expected_gradient = value_and_gradient(
            model, lambda: plain_group_logprobs(model, prompt, ids, mask)[0], mask
        )
        found, gradient = value_and_gradient(
            model, lambda: group_logprobs(model, prompt, ids, mask, forward=layout), mask
        )
    finally:
        for _, parameter in tower:
            parameter.requires_grad_(True)
    assert (found - expected)[mask].abs().max() < 1e-5
    assert (found[~mask] == 0).all()
    assert gradient.keys() == expected_gradient.keys()
    assert relative(gradient, expected_gradient, gradient) < 1e-4
    in_tower = [name for name, _ in tower if name in gradient]
    assert bool(in_tower) == (not frozen_tower)
    if in_tower:
        assert relative(gradient, expected_gradient, in_tower) < 1e-4


@pytest.mark.parametrize("layout", ["prefix_cache", "packed"])
@pytest.mark.parametrize("family", SHARING)
def test_entropies_and_temperature(family_folder, family, layout):
    folder = family_folder(family)
    model, prompt = policy(folder, False, False), encoded(folder)
    ids, mask = completions(len(prompt), 3)
    with torch.no_grad():
        expected = plain_group_logprobs(model, prompt, ids, mask, temperature=0.6, with_entropy=True)
        found = group_logprobs_and_entropies(model, prompt, ids, mask, temperature=0.6, forward=layout)
    for ours, plain in zip(found, expected, strict=True):
        assert (ours - plain)[mask].abs().max() < 2e-5
        assert (ours[~mask] == 0).all()


@pytest.mark.parametrize("layout", ["prefix_cache", "packed"])
def test_entropies_have_a_gradient_where_it_is_asked_for(family_folder, layout):
    folder = family_folder("qwen2_vl")
    model, prompt = policy(folder, False, False), encoded(folder)
    ids, mask = completions(len(prompt), 3)
    settings = {"temperature": 0.6, "with_entropy": True, "entropy_gradient": True}
    expected, expected_gradient = value_and_gradient(
        model, lambda: plain_group_logprobs(model, prompt, ids, mask, **settings)[1], mask
    )
    found, gradient = value_and_gradient(
        model, lambda: group_logprobs_and_entropies(model, prompt, ids, mask, forward=layout, **settings)[1], mask
    )
    assert (found - expected)[mask].abs().max() < 2e-5
    assert relative(gradient, expected_gradient, gradient) < 1e-4
    assert not group_logprobs_and_entropies(model, prompt, ids, mask, forward=layout)[1].requires_grad


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", SHARING)
def test_eager_attention_takes_a_dense_mask(family_folder, family, lora, checkpointing):
    """An additive one: a bool mask would be added as 0 and 1."""
    folder = family_folder(family)
    options = {"lora": {"r": 4}} if lora else {}
    model = load_policy(folder, attn_implementation="eager", gradient_checkpointing=checkpointing, **options)
    prompt = encoded(folder)
    assert not shares_keys(model)
    ids, mask = completions(len(prompt), 3)
    expected, expected_gradient = value_and_gradient(
        model, lambda: plain_group_logprobs(model, prompt, ids, mask)[0], mask
    )
    for layout in ("packed",) if checkpointing else ("prefix_cache", "packed"):
        run = partial(group_logprobs, model, prompt, ids, mask, forward=layout)
        found, gradient = value_and_gradient(model, run, mask)
        assert (found - expected)[mask].abs().max() < 1e-5
        assert relative(gradient, expected_gradient, gradient) < 1e-4


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl"])
def test_one_row_has_no_padding(family_folder, family):
    folder = family_folder(family)
    model, prompt = policy(folder, False, False), encoded(folder)
    ids, mask = completions(len(prompt), 3)
    widths = []
    layer = base_model(model).model.language_model.layers[0]
    hook = layer.register_forward_hook(lambda _, args, kwargs, output: widths.append(args[0].shape), with_kwargs=True)
    with torch.no_grad():
        group_logprobs(model, prompt, ids, mask)
    hook.remove()
    assert [tuple(shape[:2]) for shape in widths] == [(1, int(prompt.attention_mask.sum() + mask.sum()))]


@pytest.mark.parametrize("layout", ["prefix_cache", "packed"])
@pytest.mark.parametrize("family", SHARING)
def test_a_group_costs_its_prompt_once(family_folder, family, layout):
    """Tokens that pass through the first decoder block, and pictures that pass through the tower."""
    folder = family_folder(family)
    model = policy(folder, False, False)
    batch = encoded(folder)
    prompt = batch.select(1, 2)
    ids = torch.randint(20, 300, (1, 8, LENGTH))
    counted = {"tokens": 0, "patches": 0}
    inner = base_model(model).model

    def count_tokens(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        counted["tokens"] += hidden.shape[0] * hidden.shape[1]

    def count_patches(module, args, kwargs):
        pixels = args[0] if args else kwargs.get("pixel_values", kwargs.get("hidden_states"))
        counted["patches"] += len(pixels)

    tower = inner.get_submodule(FAMILIES[family].parts["vision_tower"][0].removeprefix("model."))
    hooks = [
        inner.language_model.layers[0].register_forward_hook(count_tokens, with_kwargs=True),
        tower.register_forward_pre_hook(count_patches, with_kwargs=True),
    ]
    try:
        with torch.no_grad():
            group_logprobs(model, prompt, ids, torch.ones_like(ids).bool(), forward=layout)
    finally:
        for hook in hooks:
            hook.remove()
    patches = len(prompt.vision["pixel_values"])
    assert counted == {"tokens": prompt.input_ids.shape[1] + ids.numel(), "patches": patches}


@pytest.mark.parametrize("layout", ["prefix_cache", "packed"])
def test_logits_never_exist_in_full(family_folder, monkeypatch, layout):
    """No tensor of the forward or backward has more rows of the vocabulary than a chunk."""
    folder = family_folder("qwen2_vl")
    model, prompt = policy(folder, False, False), encoded(folder)
    ids, mask = completions(len(prompt), 8)
    vocabulary = base_model(model).config.text_config.vocab_size
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 5 * vocabulary)
    rows = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.ndim and result.shape[-1] == vocabulary:
                rows.append(result.numel() // vocabulary)
            return result

    weight = model.lm_head.weight
    assert weight.shape[0] == vocabulary
    with Watch():
        logp = group_logprobs(model, prompt, ids, mask, forward=layout)
        logp.sum().backward()
    model.zero_grad()
    assert max(rows) == 5
    torch.testing.assert_close(
        logp.detach(), group_logprobs(model, prompt, ids, mask, forward=PLAIN), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("window", [4, 30])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "internvl", "llava_onevision", "gemma3"])
def test_layers_that_see_a_window_only(family_folder, tmp_path, family, window):
    """Some checkpoints of these families have such layers; Gemma3 here has none or smaller windows than its images."""
    folder = tmp_path / family
    shutil.copytree(family_folder(family), folder)
    config = json.loads((folder / "config.json").read_text())
    text, kinds = config["text_config"], ["full_attention", "sliding_attention", "full_attention"]
    text |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 1}
    text["layer_types"] = (
        ["full_attention"] * 3 if family == "gemma3" and window == 30 else kinds[: text["num_hidden_layers"]]
    )
    (folder / "config.json").write_text(json.dumps(config))
    model, prompt = load_policy(str(folder)), encoded(str(folder))
    ids, mask = completions(len(prompt), 3)
    with torch.no_grad():
        expected, _ = plain_group_logprobs(model, prompt, ids, mask)
        for layout in ("prefix_cache", "packed"):
            assert (group_logprobs(model, prompt, ids, mask, forward=layout) - expected)[mask].abs().max() < 1e-5


def test_what_stands_in_the_padding_does_not_matter(family_folder):
    folder = family_folder("qwen2_vl")
    model, prompt = policy(folder, False, False), encoded(folder)
    ids, mask = completions(len(prompt), 3)
    with torch.no_grad():
        for layout in ("prefix_cache", "packed", "plain"):
            expected = group_logprobs(model, prompt, ids, mask, forward=layout)
            for filler in (-100, model.config.image_token_id):
                found = group_logprobs(model, prompt, ids.masked_fill(~mask, filler), mask, forward=layout)
                assert torch.equal(found, expected)


# Which layout


def test_auto_takes_the_cheapest_layout_that_is_possible(family_folder):
    """Packed where its attention is computed part by part; else the prefix cache, which needs no dense mask."""
    folder = family_folder("qwen2_vl")
    assert choose_layout(policy(folder, False, False)) == "packed"
    assert choose_layout(policy(folder, False, True)) == "packed"
    eager = load_policy(folder, attn_implementation="eager", gradient_checkpointing=True)
    assert choose_layout(eager) == "packed"
    assert choose_layout(eager.eval()) == "prefix_cache"
    dropping = load_policy(folder)
    dropping.config.text_config.attention_dropout = 0.1
    assert choose_layout(dropping) == "prefix_cache"
    assert choose_layout(dropping.eval()) == "packed"
    assert choose_layout(load_policy(family_folder("gemma3"))) == "prefix_cache"
    assert choose_layout(load_policy(family_folder("qwen3_5"))) == PLAIN


def test_the_head_is_itself_again_after_a_failed_forward(family_folder):
    folder = family_folder("qwen2_vl")
    model, prompt = policy(folder, False, False), encoded(folder)
    ids, mask = completions(len(prompt), 2)
    with pytest.raises(IndexError):
        group_logprobs(model, prompt, ids + 10_000_000, mask, forward="packed")
    assert "forward" not in vars(model.lm_head)


def test_a_layout_that_cannot_be_exact_is_refused_by_name(family_folder):
    folder = family_folder("qwen2_vl")
    with pytest.raises(ConfigConflictError, match=r"'packed'.*'qwen3_5' \(known: none.*docs/adding-a-model.md"):
        choose_layout(load_policy(family_folder("qwen3_5")), "packed")
    with pytest.raises(ConfigConflictError, match="Expected forward to be one of auto, prefix_cache, packed, plain"):
        choose_layout(policy(folder, False, False), "cached")
    model = load_policy(folder)
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigConflictError, match="'flash_attention_2' takes no dense mask"):
        choose_layout(model, "packed")
    assert choose_layout(model) == "prefix_cache"


# The self-check


@pytest.mark.parametrize("family", SHARING)
def test_the_self_check_admits_what_is_exact(family_folder, family):
    folder = family_folder(family)
    encoder, half = PromptEncoder(folder), load_policy(folder, dtype="bfloat16")
    for layout in FAMILIES[family].layouts:
        assert layout_error(policy(folder, False, False), encoder, layout)[0] < 1e-5
        assert settle_layout(half, layout, encoder) == layout


def planted_bool_mask(monkeypatch, family_folder):
    """Eager attention that gets the bool mask as it is."""
    from rft_lightning.policy import packing

    monkeypatch.setattr(packing, "_for_kernel", lambda model, seen: seen[:, None])
    return family_folder("qwen2_vl"), {"attn_implementation": "eager"}


def planted_linear_attention(monkeypatch, family_folder):
    """A family in the table that does not belong there."""
    monkeypatch.setitem(FAMILIES, "qwen3_5", replace(FAMILIES["qwen3_5"], layouts=("packed",)))
    return family_folder("qwen3_5"), {}


def planted_leak(monkeypatch, family_folder):
    """Completions that see those before them."""
    from rft_lightning.policy import packing

    init = packing.PackedRows.__init__

    def leaking(self, *arguments):
        init(self, *arguments)
        self.segments = self.segments.clamp(max=0)

    monkeypatch.setattr(packing.PackedRows, "__init__", leaking)
    return family_folder("internvl"), {"attn_implementation": "eager"}


def planted_causal_row(monkeypatch, family_folder):
    """The same where attention is computed part by part."""

    def attend(self, layer, query, key, value, scale):
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr("rft_lightning.policy.group_attention.PackedGroups.attend", attend)
    return family_folder("internvl"), {}


def planted_causal_images(monkeypatch, family_folder):
    """A family whose image tokens see each other both ways, treated as if they did not."""
    monkeypatch.setitem(FAMILIES, "gemma3", replace(FAMILIES["gemma3"], images_both_ways=False))
    return family_folder("gemma3"), {}


def planted_kernel(monkeypatch, family_folder, name, change):
    """A kernel of attention part by part that does something else."""
    from rft_lightning.policy import group_attention

    kernel = getattr(group_attention, name)
    monkeypatch.setattr(group_attention, name, lambda *given, **options: change(kernel, *given, **options))
    return family_folder("internvl"), {}


def planted_loss_of_padding(monkeypatch, family_folder):
    return planted_kernel(
        monkeypatch, family_folder, "part", lambda kernel, *x, **o: kernel(*x, **(o | {"bias": None}))
    )


def planted_gradient(monkeypatch, family_folder):
    """Right forward."""

    def turned(kernel, *given, **options):
        dq, dk, dv = kernel(*given, **options)
        return dq, -dk, dv

    return planted_kernel(monkeypatch, family_folder, "part_backward", turned)


ROW_PLANTS = [planted_causal_row, planted_loss_of_padding, planted_gradient]
PLANTS = [planted_bool_mask, planted_linear_attention, planted_leak, planted_causal_images, *ROW_PLANTS]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("plant", PLANTS)
def test_the_self_check_refuses_a_wrong_layout(monkeypatch, family_folder, plant, dtype):
    folder, settings = plant(monkeypatch, family_folder)
    model, encoder = load_policy(folder, dtype=dtype, **settings), PromptEncoder(folder)
    with pytest.raises(ConfigConflictError, match=r"packed gives other (log-probs|gradients).*auto or plain"):
        settle_layout(model, "packed", encoder)
    family = FAMILIES[model.config.model_type]
    monkeypatch.setitem(FAMILIES, model.config.model_type, replace(family, layouts=("packed",)))
    with pytest.warns(UserWarning, match="packed gives other (log-probs|gradients)"):
        layout = settle_layout(model, "auto", encoder)
    # Where attention part by part is what was wrong, a dense mask still is right.
    assert layout == ("packed" if plant in ROW_PLANTS else PLAIN)
    assert model.training


def test_auto_passes_over_a_layout_whose_kernel_refuses(monkeypatch, family_folder):
    folder = family_folder("qwen2_vl")
    model, encoder = load_policy(folder), PromptEncoder(folder)

    def refuse(self, *arguments):
        raise RuntimeError("no kernel for this device\nand a long trace")

    monkeypatch.setattr("rft_lightning.policy.group_attention.PackedGroups.attend", refuse)
    with pytest.warns(UserWarning, match=r"packed cannot be computed on this machine \(no kernel for this device\)"):
        assert settle_layout(model, "auto", encoder) == "prefix_cache"
    assert not shares_keys(model)  # nor in rollouts
    with pytest.raises(ConfigConflictError, match="packed cannot be computed"):
        settle_layout(load_policy(folder), "packed", encoder)


def test_a_family_without_a_layout_says_so(family_folder, caplog):
    folder = family_folder("qwen3_5")
    with caplog.at_level("INFO"):
        layout = settle_layout(load_policy(folder), "auto", PromptEncoder(folder))
    assert layout == PLAIN
    assert "forward: plain. No shared-prefix layout is known to be exact for qwen3_5" in caplog.text


def test_a_copy_of_a_model_that_failed_is_not_trusted_either(family_folder):
    model = load_policy(family_folder("qwen2_vl"))
    assert shares_keys(model)
    never_share_keys(model)
    assert not shares_keys(model)
    assert not shares_keys(frozen_copy(model))
    assert choose_layout(model) == "prefix_cache"


def test_decoders_that_attend_in_their_own_way_are_left_alone(family_folder):
    """InternVL and LLaVA take any text model."""
    model = load_policy(family_folder("internvl"))
    model.config.text_config.model_type = "granite"
    assert not shares_keys(model)
    model.config.text_config.model_type = "mistral"
    model.config.text_config.layer_types, model.config.text_config.sliding_window = None, 4
    with pytest.raises(ConfigConflictError, match="layers of mistral see a window"):
        choose_layout(model, "packed")


def test_a_kernel_that_does_not_know_our_mask_cannot_take_it(family_folder, monkeypatch):
    from rft_lightning.policy import group_attention

    folder = family_folder("qwen2_vl")
    model, prompt = load_policy(folder), encoded(folder)
    ids, mask = completions(len(prompt), 2)
    group_logprobs(model, prompt, ids, mask)
    as_mask = group_attention.as_mask
    monkeypatch.setattr(
        "rft_lightning.policy.shared_prefix.as_mask", lambda *given: as_mask(*given).as_subclass(torch.Tensor)
    )
    with pytest.raises((RuntimeError, IndexError)):
        group_logprobs(model, prompt, ids, mask)
