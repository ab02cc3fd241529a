"""Checkpoints that lack weights, or whose files were cut short, are refused; every other layout of them is read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rft_lightning.baselines.grounding_dino import MODELS as DINO
from rft_lightning.baselines.ov_seg import CLIP_MODELS
from rft_lightning.baselines.ov_seg import MODELS as PROPOSERS
from rft_lightning.errors import CheckpointError
from rft_lightning.policy.families import FAMILIES
from rft_lightning.policy.loading import load_policy
from rft_lightning.pretrained import load_pretrained
from rft_lightning.segmenter import MODELS as SEGMENTERS
from tests.tiny_baselines import BUILDERS, baseline_folder

CLASSES = {**DINO, **PROPOSERS, **CLIP_MODELS, **SEGMENTERS}
NF4 = {"lora": {"r": 2}, "quantize": "nf4"}
Weights = dict[str, Tensor]


def rewritten(source: str, folder: Path, change: Callable[[Weights], Weights]) -> str:
    """A copy of a checkpoint with other weights in its file."""
    shutil.copytree(source, folder)
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("settings", [{}, NF4], ids=["whole", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_missing_weights_of_a_policy_are_refused(family, settings, family_folder, tmp_path):
    folder = rewritten(family_folder(family), tmp_path / "policy", without("layers.1.mlp.up_proj"))
    names = r"lacks 1 of the weights of a \w+, .*: model\.language_model\.layers\.1\.mlp\.up_proj\.weight\. Download"
    with pytest.raises(CheckpointError, match=names):
        load_policy(folder, **settings)
    load_policy(folder, skeleton=True, lora=settings.get("lora"))  # whoever reads them for it finds out


def test_only_the_first_missing_weights_are_named(tiny_policy, tmp_path):
    folder = rewritten(tiny_policy, tmp_path / "policy", without("layers."))
    absent = len(load_file(f"{tiny_policy}/model.safetensors")) - len(load_file(f"{folder}/model.safetensors"))
    with pytest.raises(
        CheckpointError, match=rf"lacks {absent} of .*random: (\S+layers\.0\.\S+, ){{3}}\.\.\.\. "
    ) as told:
        load_policy(folder)
    assert folder in str(told.value)


def test_weights_of_another_shape_are_refused(tiny_policy, tmp_path):
    def shorter(weights: Weights) -> Weights:
        name = next(name for name in weights if "layers.0.mlp.down_proj" in name)
        return weights | {name: weights[name][:-1].clone()}

    folder = rewritten(tiny_policy, tmp_path / "policy", shorter)
    with pytest.raises(CheckpointError, match=r"another shape, 1 of .*down_proj\.weight \(63, \d+\) for \(64, \d+\)"):
        load_policy(folder)


def test_a_head_of_its_own_may_not_be_missing(family_folder, tmp_path):
    folder = rewritten(family_folder("qwen3_vl"), tmp_path / "policy", without("lm_head"))
    with pytest.raises(CheckpointError, match=r"lacks 1 of .*: lm_head\.weight\."):
        load_policy(folder)


# Layouts in which nothing is missing


def _earlier_names(weights: Weights) -> Weights:
    return {name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
            for name, value in weights.items()}  # fmt: skip


def _present_names(weights: Weights) -> Weights:
    inner = {name.replace("model.", "model.language_model.", 1): value for name, value in weights.items()}
    return {f"model.{name}" if name.startswith("visual.") else name: value for name, value in inner.items()}


def _head_alone(weights: Weights) -> Weights:
    (name,) = [name for name in weights if "embed_tokens" in name]
    return {"lm_head.weight": weights[name], **without("embed_tokens")(weights)}


@pytest.mark.parametrize(
    "change",
    [_earlier_names, _present_names, _head_alone, lambda weights: weights | {"value_head.weight": torch.ones(3)}],
    ids=["earlier names", "present names", "tied head alone", "surplus weights"],
)
def test_other_layouts_are_read(change, tiny_policy, tmp_path):
    assert "model.embed_tokens.weight" in load_file(f"{tiny_policy}/model.safetensors")
    assert same(load_policy(rewritten(tiny_policy, tmp_path / "policy", change)), load_policy(tiny_policy))


def test_models_without_a_head_and_shards_are_read(tiny_policy, tmp_path):
    policy = load_policy(tiny_policy)
    policy.model.save_pretrained(tmp_path / "inner")
    shutil.copy(Path(tiny_policy, "config.json"), tmp_path / "inner")
    policy.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name in ("inner", "shards"):
        assert same(load_policy(str(tmp_path / name)), policy)


# Files that are not whole


@pytest.mark.parametrize(
    "cut",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"version https://git-lfs.github.com/spec/v1"],
    ids=["half", "empty", "pointer"],
)
def test_files_that_were_cut_short_are_refused(cut, tiny_policy, tmp_path):
    def broken(source: str, name: str) -> str:
        file = shutil.copytree(source, tmp_path / name) / "model.safetensors"
        file.write_bytes(cut(file.read_bytes()))
        return str(file.parent)

    message = r"weights of '.*' cannot be read \(.*header.*\)\. Expected complete files"
    with pytest.raises(CheckpointError, match=message):
        load_policy(broken(tiny_policy, "policy"))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(broken(baseline_folder("sam"), "sam"), SEGMENTERS)


def test_missing_files_are_refused(tiny_policy, tmp_path):
    load_policy(tiny_policy).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shard, *_ = (tmp_path / "shards").glob("*.safetensors")
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"No such file .*{shard.name}"):
        load_policy(str(tmp_path / "shards"))
    shard.write_bytes(content)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    index.write_text(index.read_text()[:300])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_policy(str(tmp_path / "shards"))
    for file in [index, *(tmp_path / "shards").glob("*.safetensors")]:
        file.unlink()
    with pytest.raises(CheckpointError, match="no file named"):
        load_policy(str(tmp_path / "shards"))


# Other models


@pytest.mark.parametrize("kind", BUILDERS)
def test_missing_weights_of_other_models_are_refused(kind, tmp_path):
    source = baseline_folder(kind)
    held = set(load_file(f"{source}/model.safetensors"))
    load_pretrained(source, CLASSES)
    # What SAM 2 remembers of videos is of no use for pictures.
    absent = next(name for name in sorted(held) if ".layers.0." in name and "memory" not in name)
    folder = rewritten(source, tmp_path / kind, without(absent))
    with pytest.raises(CheckpointError, match=r"lacks [1-4] of the weights of a \w+, which would be random: "):
        load_pretrained(folder, CLASSES)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("grounding-dino", "swin.layernorm"),  # of no use there: published checkpoints lack it
        ("maskformer", "relative_position_index"),
    ],
)
def test_what_is_not_used_or_computed_may_be_missing(kind, part, tmp_path):
    folder = rewritten(baseline_folder(kind), tmp_path / kind, without(part))
    found, whole = (load_pretrained(path, CLASSES)[0].state_dict() for path in (folder, baseline_folder(kind)))
    absent = {name for name in whole if part in name}
    assert absent
    assert not absent & load_file(f"{folder}/model.safetensors").keys()
    compared = whole.keys() - (absent if kind == "grounding-dino" else set())
    assert all(torch.equal(found[name], whole[name]) for name in compared)


def test_what_sam_encodes_places_by_may_not_be_missing(tmp_path):
    """A buffer that no training changes, but drawn at random."""
    folder = rewritten(baseline_folder("sam2"), tmp_path / "sam", without("positional_embedding"))
    with pytest.raises(CheckpointError, match=r"lacks 2 of .*positional_embedding"):
        load_pretrained(folder, SEGMENTERS)
