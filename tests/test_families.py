"""Every family of policy/families.py, on a tiny random model of its real classes: prompts and the plain route."""

from functools import cache

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from rft_lightning.errors import CheckpointError
from rft_lightning.frames import CoordinateFrame
from rft_lightning.policy.families import FAMILIES, coordinate_frame, position_ids, repeat_vision, vision_token_ids
from rft_lightning.policy.loading import load_policy, load_processor
from rft_lightning.policy.plain import plain_group_logprobs
from rft_lightning.prompts import PromptEncoder
from rft_lightning.sample import TOKEN_TENSORS, DetectionTarget, Sample
from rft_lightning.tasks import DetectionTask
from tests.tiny_families import BUILDERS, TILE

each_family = pytest.mark.parametrize("family", list(FAMILIES))
# Different shapes, so that families with tiles or patches give prompts of different lengths.
SIZES = ((40, 40), (90, 50), (50, 120))
CATEGORIES = ("cup", "a very small red star of many stars", "no")
PLACEHOLDERS = {
    "internvl": ("<IMG_CONTEXT>",),
    "llava_onevision": ("<image>", "<video>"),
    "gemma3": ("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
}
QWEN_PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def picture(index: int) -> Image.Image:
    noise = torch.randint(0, 256, (*SIZES[index][::-1], 3), generator=torch.Generator().manual_seed(index))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def sample(index: int) -> Sample:
    target = DetectionTarget([[1, 2, 30, 40]], category=CATEGORIES[index], image_size=SIZES[index])
    return Sample(str(index), picture(index), target, DetectionTask(), SIZES[index])


@pytest.fixture(scope="module")
def encoder(family_folder):
    return cache(lambda family: PromptEncoder(family_folder(family)))


def own_encoding(folder: str, encoder: PromptEncoder, indices: list[int]) -> dict[str, torch.Tensor]:
    """What Hugging Face makes of whole conversations with pictures, nothing of ours involved but the question."""
    processor = AutoProcessor.from_pretrained(folder)
    conversations = []
    for index in indices:
        text = {"type": "text", "text": encoder.complete(sample(index)).question}
        conversations.append([{"role": "user", "content": [{"type": "image", "image": picture(index)}, text]}])
    encoded = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    return dict(encoded)


def test_every_family_of_the_table_has_a_tiny_model():
    assert BUILDERS.keys() == FAMILIES.keys()


@each_family
def test_checkpoints_load_and_have_their_familys_peculiarity(family, family_folder, encoder):
    model, processor = load_policy(family_folder(family)), load_processor(family_folder(family))
    assert model.config.model_type == family
    assert processor.tokenizer.padding_side == "left"
    text, vision = model.config.get_text_config(), model.config.vision_config
    batch = encoder(family)([sample(i) for i in range(3)])
    if family == "qwen2_5_vl":
        assert (batch.vision["image_grid_thw"][:, 1:].amax(1) * vision.patch_size > vision.window_size).sum() >= 2
        assert len(vision.fullatt_block_indexes) < vision.depth
    if family == "qwen3_vl":
        assert len(vision.deepstack_visual_indexes) == 1
        assert text.rope_parameters["mrope_interleaved"]
    if family == "qwen3_5":
        assert set(text.layer_types) == {"linear_attention", "full_attention"}
    if family in ("internvl", "llava_onevision"):
        assert len(set(batch.patch_counts)) > 1
        assert batch.vision["pixel_values"].shape[1:] == (3, TILE, TILE)
    if family == "gemma3":
        assert set(text.layer_types) == {"sliding_attention", "full_attention"}
        assert text.sliding_window < batch.attention_mask.sum(1).min()


# Prompts


@each_family
def test_a_prompt_has_one_image_and_the_question_in_the_familys_template(family, family_folder, encoder):
    encode = encoder(family)
    tokenizer = encode.processor.tokenizer
    for index in range(3):
        ids = encode([sample(index)]).input_ids[0]
        image = (ids == AutoModelForImageTextToText.from_pretrained(family_folder(family)).config.image_token_id).int()
        assert image.sum() > 1
        assert image.diff().clamp(min=0).sum() == 1, "the placeholders of one image stand together"
        text = tokenizer.decode(ids)
        assert text.count(encode.complete(sample(index)).question) == 1
        turn = "<start_of_turn>model\n" if family == "gemma3" else "<|im_start|>assistant\n"
        assert text.endswith(turn)
    if family == "gemma3":
        assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        assert ids.tolist().count(tokenizer.bos_token_id) == 1


@each_family
def test_a_batch_is_what_the_processor_itself_makes_of_it(family, family_folder, encoder):
    batch = encoder(family)([sample(i) for i in range(3)])
    own = own_encoding(family_folder(family), encoder(family), [0, 1, 2])
    assert torch.equal(batch.input_ids, own.pop("input_ids"))
    assert torch.equal(batch.attention_mask, own.pop("attention_mask"))
    assert batch.attention_mask.sum(1).unique().numel() > 1
    if family == "llava_onevision":  # the processor fills images up with empty tiles, which the model cuts off
        tiles = list(zip(own["pixel_values"], batch.patch_counts, strict=True))
        assert not any(padded[count:].any() for padded, count in tiles)
        own["pixel_values"] = torch.cat([padded[:count] for padded, count in tiles])
    assert batch.vision.keys() == own.keys()
    for name, tensor in own.items():
        assert torch.equal(batch.vision[name], tensor), name


@each_family
def test_select_gives_each_sample_as_encoded_alone(family, encoder):
    encode = encoder(family)
    samples = [sample(i) for i in range(3)]
    batch = encode(samples)
    for found, expected in (
        *((part, encode([samples[i]])) for i, part in enumerate(batch.chunks(1))),
        (batch.select(1, 3), encode(samples[1:])),
    ):
        assert torch.equal(found.input_ids, expected.input_ids)
        assert torch.equal(found.attention_mask, expected.attention_mask)
        assert (found.image_counts, found.patch_counts) == (expected.image_counts, expected.patch_counts)
        assert found.vision.keys() == expected.vision.keys()
        for name, tensor in expected.vision.items():
            assert torch.equal(found.vision[name], tensor), name


@each_family
def test_repeating_vision_is_encoding_each_sample_repeatedly(family, encoder):
    samples = [sample(i) for i in range(3)]
    batch = encoder(family)(samples)
    twice = encoder(family)([one for one in samples for _ in range(2)])
    repeated = repeat_vision(batch.vision, batch.image_counts, batch.patch_counts, 2)
    assert repeated.keys() == twice.vision.keys()
    for name, tensor in twice.vision.items():
        assert torch.equal(repeated[name], tensor), name


@each_family
def test_placeholder_tokens_are_named(family, family_folder, encoder):
    tokenizer = encoder(family).processor.tokenizer
    expected = tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS.get(family, QWEN_PLACEHOLDERS)))
    assert vision_token_ids(load_policy(family_folder(family)).config) == sorted(expected)


@each_family
def test_the_frame_is_the_familys_and_only_a_relative_one_states_its_range(family, encoder):
    encode = encoder(family)
    question = encode.complete(sample(1)).question
    assert encode.frame.kind == ("resized" if family == "qwen2_5_vl" else "relative")
    assert ("between 0 and 1000" in question) == (encode.frame.kind == "relative")
    if encode.frame.kind == "resized":
        grid = encode([sample(1)]).vision["image_grid_thw"][0]
        patch = encode.processor.image_processor.patch_size
        assert encode.frame.size(SIZES[1]) == (int(grid[2]) * patch, int(grid[1]) * patch)


def test_an_unknown_family_needs_a_frame(family_folder):
    config = load_policy(family_folder("qwen3_vl")).config
    config.model_type = "glm4v"
    with pytest.raises(CheckpointError, match=r"'glm4v'.*--data\.frame\.kind relative"):
        coordinate_frame(config, None)
    given = CoordinateFrame("pixel")
    assert PromptEncoder(family_folder("qwen3_vl"), frame=given).frame is given


# The plain route


@each_family
def test_plain_logprobs_equal_the_hugging_face_model_on_each_conversation_alone(family, family_folder, encoder):
    model = AutoModelForImageTextToText.from_pretrained(family_folder(family))
    batch = encoder(family)([sample(i) for i in range(3)])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 300, (3, 2, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([[9, 4], [1, 7], [5, 8]])[..., None]
    with torch.no_grad():
        logp, _ = plain_group_logprobs(model, batch, ids, mask)
        assert logp[mask].std() > 1
        for b in range(3):
            prompt = own_encoding(family_folder(family), encoder(family), [b])
            for g in range(2):
                completion = ids[b, g][mask[b, g]][None]
                row = dict(prompt)
                row["input_ids"] = torch.cat([prompt["input_ids"], completion], 1)
                row["attention_mask"] = torch.ones_like(row["input_ids"])
                for name in row.keys() & TOKEN_TENSORS:  # completions are text
                    row[name] = torch.cat([prompt[name], torch.zeros_like(completion)], 1)
                logits = model(**row, use_cache=False).logits[0, -completion.shape[1] - 1 : -1]
                expected = logits.log_softmax(-1).gather(1, completion[0, :, None])[:, 0]
                torch.testing.assert_close(logp[b, g][mask[b, g]], expected, atol=1e-5, rtol=1e-5)


@each_family
def test_positions_leave_padding_out(family, family_folder, encoder):
    model = load_policy(family_folder(family))
    batch = encoder(family)([sample(i) for i in range(3)])
    positions = position_ids(model, batch.input_ids, batch.attention_mask, batch.vision)
    for b, part in enumerate(batch.chunks(1)):
        alone = position_ids(model, part.input_ids, part.attention_mask, part.vision)
        assert torch.equal(positions[..., b, -part.input_ids.shape[1] :], alone[..., 0, :])
        assert alone.min() == 0


def test_rows_that_make_no_batch_are_a_named_error(family_folder):
    encoder = PromptEncoder(family_folder("qwen2_vl"))
    with pytest.raises(
        CheckpointError, match=r"gives tiles of different shapes \(\(2,\), \(3,\) per row\).*eval_batch_size"
    ):
        encoder._joined("tiles", [torch.zeros(1, 2), torch.zeros(1, 3)])
