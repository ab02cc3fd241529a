"""Loading, the prompt encoder, the plain forward and the rollout, on a tiny random Qwen2-VL."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from rft_lightning.datamodules import ShapesDataModule
from rft_lightning.errors import CheckpointError, ConfigConflictError, PromptTooLongError
from rft_lightning.policy.families import vision_token_ids
from rft_lightning.policy.loading import load_config, load_policy, load_processor, resolve_checkpoint
from rft_lightning.policy.plain import plain_group_logprobs
from rft_lightning.policy.rollout import completion_mask, sample_groups
from rft_lightning.prompts import PromptEncoder
from rft_lightning.sample import GroundingTarget
from rft_lightning.tasks import ClassificationTask, DetectionTask, GroundingTask


@pytest.fixture(scope="module")
def policy(tiny_policy):
    model = load_policy(tiny_policy)
    with torch.no_grad():  # random logits are nearly flat; a sharper model samples ends and repeats
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


@pytest.fixture(scope="module")
def data(tiny_policy):
    return ShapesDataModule(processor=tiny_policy, task=[DetectionTask(), GroundingTask(), ClassificationTask()])


@pytest.fixture(scope="module")
def batch(data):
    return data.encoder([data.sample("train", i) for i in range(4)])


# The prompt encoder


def test_prompt_is_the_chat_template_with_one_image(data, tiny_policy):
    sample = data.sample("train", 0)
    batch = data.encoder([sample])
    processor = AutoProcessor.from_pretrained(tiny_policy)
    text = processor.tokenizer.decode(batch.input_ids[0])
    completed = batch.samples[0]
    assert text.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    )
    assert text.endswith(f"<|vision_end|>{completed.question}<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|image_pad|>") == int(batch.vision["image_grid_thw"].prod()) // 4


def test_prompts_are_the_papers(data):
    target = data.sample("train", 0).target
    target.category = "kitchen_table"
    assert DetectionTask().question(target, data.encoder.frame) == (
        "Detect all objects belonging to the category 'kitchen_table' in the image, and provide the bounding boxes "
        "(between 0 and 1000, integer) and confidence (between 0 and 1, with two decimal places).\n"
        "If no object belonging to the category 'kitchen_table' in the image, return 'No Objects'.\n"
        "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
        "The output answer format should be as follows:\n"
        "<think> ... </think> <answer>[{'Position': [x1, y1, x2, y2], 'Confidence': number}, ...]</answer>\n"
        "Please strictly follow the format."
    )
    aircraft = ClassificationTask(subject="an aircraft", noun="the model of the aircraft")
    assert aircraft.question(None, data.encoder.frame) == (
        "This is an image containing an aircraft. Please identify the model of the aircraft based on the image.\n"
        "Output the thinking process in <think> </think> and final answer in <answer> </answer> tags."
        "The output answer format should be as follows:\n"
        "<think> ... </think> <answer>species name</answer>\n"
        "Please strictly follow the format."
    )


def test_the_grounding_prompt_is_the_published_one(data):
    target = GroundingTarget([[1.0, 2.0, 3.0, 4.0]], expression="the left cup")
    assert GroundingTask().question(target, data.encoder.frame) == (
        "Output the bounding box in the image corresponding to the instruction: the left cup Output the thinking "
        'process in <think> </think> and your grouding box. Following "<think> thinking process </think>\n'
        '<answer>(x1,y1),(x2,y2)</answer>)" format.'
    )


def test_a_solution_reads_back_as_its_target(data):
    for index in range(30):
        sample = data.encoder.complete(data.sample("train", index))
        answer = sample.task.read(
            f"<think>t</think> {sample.target.solution_text}", data.encoder.frame, sample.image_size
        )
        assert answer.parsed
        assert answer.well_formed
        rewards = sample.task.score(answer, sample.target)
        assert rewards.min() >= 0.9, (sample.target, answer)


def test_system_prompt_and_pixel_limits(tiny_policy, data):
    encoder = PromptEncoder(tiny_policy, system_prompt="Be brief.", min_pixels=28 * 28, max_pixels=28 * 28)
    batch = encoder([data.sample("train", 0)])
    assert encoder.processor.tokenizer.decode(batch.input_ids[0]).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert batch.vision["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_a_long_prompt_is_an_error_that_names_sample_length_and_limit(tiny_policy, data):
    encoder = PromptEncoder(tiny_policy, max_prompt_length=20)
    with pytest.raises(PromptTooLongError, match=r"shapes/0/train/0.*tokens.*max_prompt_length=20.*max_pixels"):
        encoder([data.sample("train", 0)])


def test_select_cuts_a_batch_without_changing_its_prompts(data, batch):
    for index, part in enumerate(batch.chunks(1)):
        alone = data.encoder([data.sample("train", index)])
        assert torch.equal(part.input_ids, alone.input_ids)
        assert torch.equal(part.vision["pixel_values"], alone.vision["pixel_values"])
        assert torch.equal(part.vision["mm_token_type_ids"], alone.vision["mm_token_type_ids"])


# Loading


def test_errors_of_checkpoints(tmp_path, tiny_policy):
    with pytest.raises(CheckpointError, match="No checkpoint folder at"):
        resolve_checkpoint("./nowhere/at/all")
    with pytest.raises(CheckpointError, match="no policy named 'asset:none'"):
        resolve_checkpoint("asset:none")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(CheckpointError, match=r"'gpt2' model, which is no vision-language model.*Qwen2-VL"):
        load_config(str(tmp_path))
    with pytest.raises(ConfigConflictError, match="dtype"):
        load_policy(tiny_policy, dtype="int8")
    with pytest.raises(ConfigConflictError, match="min_pixels"):
        load_processor(tiny_policy, min_pixels=10_000, max_pixels=100)


def test_the_family_is_read_from_the_config_not_from_the_folders_name(tmp_path, tiny_policy):
    shutil.copytree(tiny_policy, tmp_path / "my-renamed-model")
    assert PromptEncoder(str(tmp_path / "my-renamed-model")).frame.kind == "relative"


def test_policy_is_trainable_and_in_training_mode(policy):
    assert policy.training
    assert all(parameter.requires_grad for parameter in policy.parameters())


# The plain forward


def random_completions(batch, group_size=3, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(batch), group_size, length)
    ids = torch.randint(10, 200, shape, generator=generator)
    lengths = torch.randint(1, length + 1, shape[:2], generator=generator)
    return ids, torch.arange(length) < lengths[..., None]


def test_plain_logprobs_equal_the_model_on_each_conversation_alone(policy, data, batch):
    ids, mask = random_completions(batch)
    logp, _ = plain_group_logprobs(policy, batch, ids, mask, temperature=0.7)
    for b in range(len(batch)):
        alone = data.encoder([data.sample("train", b)])
        for g in range(ids.shape[1]):
            completion = ids[b, g][mask[b, g]]
            row = torch.cat([alone.input_ids[0], completion])[None]
            types = torch.cat([alone.vision["mm_token_type_ids"], torch.zeros(1, len(completion), dtype=torch.long)], 1)
            vision = {**alone.vision, "mm_token_type_ids": types}
            logits = policy(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False, **vision).logits[0]
            start = alone.input_ids.shape[1]
            expected = (logits[start - 1 : -1] / 0.7).log_softmax(-1).gather(1, completion[:, None])[:, 0]
            torch.testing.assert_close(logp[b, g][mask[b, g]], expected, atol=1e-5, rtol=0)


def test_plain_logprobs_reach_the_vision_tower(policy, batch):
    ids, mask = random_completions(batch)
    logp, _ = plain_group_logprobs(policy, batch, ids, mask)
    policy.zero_grad()
    logp[mask].sum().backward()
    assert policy.model.visual.patch_embed.proj.weight.grad.abs().max() > 0
    policy.zero_grad()


def test_entropy_is_that_of_the_distribution(policy, batch):
    ids, mask = random_completions(batch)
    _, entropy = plain_group_logprobs(policy, batch, ids, mask, with_entropy=True)
    vocabulary = policy.config.text_config.vocab_size
    assert (entropy[mask] > 0).all()
    assert (entropy[mask] <= torch.log(torch.tensor(float(vocabulary))) + 1e-4).all()


# The rollout


@pytest.fixture(scope="module")
def tokenizer(data):
    return data.encoder.processor.tokenizer


def test_greedy_equals_generate_on_each_prompt_alone(policy, data, batch, tokenizer):
    rollouts = sample_groups(policy, batch, 1, tokenizer=tokenizer, max_completion_length=12, temperature=0)
    for b in range(len(batch)):
        alone = data.encoder([data.sample("train", b)])
        ids = policy.generate(
            input_ids=alone.input_ids,
            attention_mask=alone.attention_mask,
            **alone.vision,
            do_sample=False,
            max_new_tokens=12,
            suppress_tokens=vision_token_ids(policy.config),
        )[0, alone.input_ids.shape[1] :]
        found = rollouts.completion_ids[b, 0][rollouts.completion_mask[b, 0]]
        assert found.tolist() == ids[: len(found)].tolist()


def test_sampling_is_seeded_and_leaves_the_global_state_alone(policy, batch, tokenizer):
    settings = {"tokenizer": tokenizer, "max_completion_length": 8}
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = sample_groups(policy, batch, 4, seed=1, **settings)
    assert torch.equal(before, torch.random.get_rng_state())
    again = sample_groups(policy, batch, 4, seed=1, **settings)
    other = sample_groups(policy, batch, 4, seed=2, **settings)
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert first.texts != other.texts
    assert len({text for texts in first.texts for text in texts}) > 4
    assert policy.training


def test_samples_follow_the_policy(policy, data, tokenizer):
    """Frequencies of the first token against the softmax of the plain forward; no hidden top-k or min-p."""
    batch = data.encoder([data.sample("train", 0)])
    sharp = {"temperature": 0.3}  # at 1 hardly a token of a random policy is likely enough to count
    rollouts = sample_groups(policy, batch, 4000, tokenizer=tokenizer, max_completion_length=1, seed=0, **sharp)
    counts = torch.bincount(rollouts.completion_ids.flatten(), minlength=policy.config.text_config.vocab_size)
    ids = torch.arange(policy.config.text_config.vocab_size)
    never = torch.isin(ids, torch.tensor(vision_token_ids(policy.config)))
    ids = ids.masked_fill(never, 0)[None, :, None]
    with torch.no_grad():
        logp, _ = plain_group_logprobs(policy, batch, ids, torch.ones_like(ids).bool(), **sharp)
    probabilities = logp.exp().flatten()
    probabilities[never] = 0
    probabilities /= probabilities.sum()
    likely = probabilities * 4000 >= 20
    assert likely.sum() >= 5
    spread = (probabilities[likely] * (1 - probabilities[likely]) / 4000).sqrt()
    assert ((counts[likely] / 4000 - probabilities[likely]).abs() / spread).max() < 4.5


def test_the_checkpoints_generation_settings_do_not_reach_the_rollout(policy, batch, tokenizer):
    settings = {"tokenizer": tokenizer, "max_completion_length": 8, "seed": 3}
    expected = sample_groups(policy, batch, 4, **settings)
    before = policy.generation_config.to_dict()
    policy.generation_config.update(
        top_k=1, temperature=0.01, repetition_penalty=5.0, min_new_tokens=8, do_sample=False
    )
    found = sample_groups(policy, batch, 4, **settings)
    assert policy.generation_config.top_k == 1
    policy.generation_config.update(**before)
    assert torch.equal(found.completion_ids, expected.completion_ids)


def test_image_placeholders_are_never_sampled(tiny_policy, batch, tokenizer):
    model = load_policy(tiny_policy)
    image, start = model.config.image_token_id, model.config.vision_start_token_id
    with torch.no_grad():  # tied embeddings: a long row makes a token likely everywhere
        model.lm_head.weight[[image, start]] = 20 * model.lm_head.weight[100]
    rollouts = sample_groups(model, batch, 4, tokenizer=tokenizer, max_completion_length=6, seed=0)
    assert not torch.isin(rollouts.completion_ids, torch.tensor([image, start])).any()


def test_completion_mask_ends_with_the_first_end_token():
    ids = torch.tensor([[5, 2, 7, 2], [5, 6, 7, 8], [2, 2, 2, 2]])
    mask, truncated = completion_mask(ids, [2])
    assert mask.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert truncated.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1}, "temperature >= 0"),
        ({"engine": "vllm"}, "engine to be one of native, hf"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_completion_length": 0}, "max_completion_length"),
    ],
)
def test_sampling_errors(policy, batch, tokenizer, settings, words):
    with pytest.raises(ConfigConflictError, match=words):
        sample_groups(policy, batch, 2, tokenizer=tokenizer, **settings)


def test_saved_policies_load_with_plain_transformers(tiny_policy, tmp_path):
    from rft_lightning.checkpointing import export_policy

    policy, processor = load_policy(tiny_policy), load_processor(tiny_policy)
    (tmp_path / "out").mkdir()
    for name in ("config.json", "stale"):  # an earlier export
        (tmp_path / "out" / name).write_text("{}")
    export_policy(policy, processor, tmp_path / "out")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    AutoProcessor.from_pretrained(tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "stale").exists()
    for (name, a), (_, b) in zip(policy.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
