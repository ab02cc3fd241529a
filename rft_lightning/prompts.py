"""PromptEncoder: the one prompt builder of training, validation and prediction."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from rft_lightning.errors import CheckpointError, ConfigConflictError, PromptTooLongError
from rft_lightning.frames import CoordinateFrame
from rft_lightning.policy.families import coordinate_frame
from rft_lightning.policy.loading import load_config, load_processor
from rft_lightning.sample import TOKEN_TENSORS, PromptBatch, Sample


class PromptEncoder:
    """Samples -> PromptBatch, by the chat template and the image processor of a checkpoint.

    Every sample is encoded alone, so that a prompt never depends on the others of its batch.

    Args:
        checkpoint: hub id, folder or ``asset:NAME`` of the policy.
        min_pixels: fewest pixels of an image after resizing; the checkpoint's own when None.
        max_pixels: most pixels of an image after resizing; the checkpoint's own when None (the paper: 401408).
        system_prompt: text of a system turn; None leaves it to the chat template.
        max_prompt_length: most tokens of a prompt, image tokens included; a longer one is an error, since a truncated
            prompt loses image tokens or the question. None for no limit.
        frame: how the model writes boxes; None for the convention of its family.

    Raises:
        CheckpointError: the checkpoint is no vision-language model, or its family's frame is not known.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        system_prompt: str | None = None,
        max_prompt_length: int | None = 1024,
        frame: CoordinateFrame | None = None,
    ) -> None:
        if max_prompt_length is not None and max_prompt_length < 1:
            raise ConfigConflictError(f"Expected max_prompt_length >= 1 or null, found {max_prompt_length}.")
        self.checkpoint = checkpoint
        self.processor = load_processor(checkpoint, min_pixels=min_pixels, max_pixels=max_pixels)
        self.system_prompt = system_prompt
        self.max_prompt_length = max_prompt_length
        self.frame = frame if frame is not None else coordinate_frame(load_config(checkpoint), self.processor)

    def complete(self, sample: Sample) -> Sample:
        """The sample with its question, and its target with the solution text, filled in for this model's frame."""
        target = sample.target
        if target is not None and target.solution_text is None:
            target = replace(target, solution_text=sample.task.solution(target, self.frame))
        question = sample.question if sample.question is not None else sample.task.question(target, self.frame)
        return replace(sample, target=target, question=question)

    def messages(self, sample: Sample) -> list[dict[str, Any]]:
        """The conversation of a completed sample, as chat templates take it: one user turn, image before text."""
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}
        if self.system_prompt is None:
            return [user]
        return [{"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}, user]

    def __call__(self, samples: Sequence[Sample]) -> PromptBatch:
        """Encode B samples; left-padded to the longest of them.

        Raises:
            PromptTooLongError: a prompt has more than `max_prompt_length` tokens.
        """
        completed = [self.complete(sample) for sample in samples]
        with _pictures_once(self.processor) as load:
            encoded = [self.encode(sample, load(sample)) for sample in completed]
        lengths = [prompt["input_ids"].shape[1] for prompt in encoded]
        self._check_lengths(completed, lengths)
        pads = {"input_ids": self.processor.tokenizer.pad_token_id}
        tensors = {}
        for name in encoded[0]:
            pieces = [prompt[name] for prompt in encoded]
            if name in ("input_ids", "attention_mask", *TOKEN_TENSORS):
                pieces = [left_padded(piece, max(lengths), pads.get(name, 0)) for piece in pieces]
            tensors[name] = self._joined(name, pieces)
        return PromptBatch(
            input_ids=tensors.pop("input_ids"),
            attention_mask=tensors.pop("attention_mask"),
            vision=tensors,
            image_counts=[1] * len(completed),
            patch_counts=[len(prompt["pixel_values"]) for prompt in encoded],
            samples=completed,
            frame=self.frame,
        )

    def _joined(self, name: str, pieces: list[Tensor]) -> Tensor:
        shapes = {tuple(piece.shape[1:]) for piece in pieces}
        if len(shapes) > 1:
            found = ", ".join(map(str, sorted(shapes)))
            raise CheckpointError(
                f"{type(self.processor).__name__} gives {name} of different shapes ({found} per row), which cannot be "
                "put into one batch. Set data.batch_size and data.eval_batch_size to 1, or add the family "
                "(docs/adding-a-model.md)."
            )
        return torch.cat(pieces)

    def encode(self, sample: Sample, image: Image.Image | None = None) -> dict[str, Tensor]:
        """The tensors of one completed sample: what the processor makes of it, as the model takes it.

        Args:
            sample: the sample.
            image: its picture, where it was loaded already.
        """
        image = sample.load_image() if image is None else image
        tokenizer = self.processor.tokenizer
        text = self.processor.apply_chat_template(self.messages(sample), add_generation_prompt=True, tokenize=False)
        settings: dict[str, Any] = {}
        if tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token):
            settings["add_special_tokens"] = False  # the tokenizer would begin the text a second time
        if "mm_token_type_ids" in self.processor.model_input_names:
            settings["return_mm_token_type_ids"] = True
        encoded = dict(self.processor(text=[text], images=[[image]], return_tensors="pt", **settings))
        encoded.pop("labels", None)  # PaliGemma's processor makes them of the prompt
        if "image_sizes" in encoded and encoded["pixel_values"].ndim == 5:
            # LLaVA's tiles [1, tiles, 3, H, W]: its models take them as rows too, and rows need no padding in a batch.
            encoded["pixel_values"] = encoded["pixel_values"][0]
        return encoded

    def _check_lengths(self, samples: list[Sample], lengths: list[int]) -> None:
        if self.max_prompt_length is None:
            return
        for sample, length in zip(samples, lengths, strict=True):
            if length > self.max_prompt_length:
                raise PromptTooLongError(
                    f"The prompt of sample {sample.id!r} ({sample.image_size[0]}x{sample.image_size[1]} pixels) has "
                    f"{length} tokens, more than max_prompt_length={self.max_prompt_length}. Prompts are never "
                    "truncated: lower data.max_pixels or raise data.max_prompt_length."
                )


class _PicturesOnce:
    """An image processor that processes every picture object once; in all else the one it stands for."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        # With the picture: were it gone, another one could have its id.
        self._results: dict[int, tuple[Any, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        image = images
        while isinstance(image, list | tuple):  # families nest a single picture differently
            (image,) = image
        if id(image) not in self._results:
            self._results[id(image)] = image, self._processor(images, *args, **kwargs)
        return copy.copy(self._results[id(image)][1])


def picture_loader() -> Callable[[Sample], Image.Image]:
    """What loads the picture of a sample; samples that show one picture are given one object, which is read once.

    It keeps the pictures, and the samples have to outlive it.
    """
    loaded: dict[Any, Image.Image] = {}

    def load(sample: Sample) -> Image.Image:
        key = sample.image if isinstance(sample.image, Path) else id(sample.image)
        if key not in loaded:
            loaded[key] = sample.load_image()
        return loaded[key]

    return load


@contextmanager
def _pictures_once(processor: Any) -> Iterator[Callable[[Sample], Image.Image]]:
    """Inside, a picture that several samples show is read and processed once; gives what loads the picture of a sample.

    Reading and resizing are nearly all of a prompt's cost, and evaluation asks for every category of a picture.
    """
    own = processor.image_processor
    processor.image_processor = _PicturesOnce(own)
    try:
        yield picture_loader()
    finally:
        processor.image_processor = own


def left_padded(tensor: Tensor, width: int, value: int) -> Tensor:
    """[rows, T] widened to [rows, width] by `value` on the left."""
    return nn.functional.pad(tensor, (width - tensor.shape[1], 0), value=value)
