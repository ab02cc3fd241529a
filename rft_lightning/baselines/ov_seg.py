"""OVSegApproximation: mask proposals, and CLIP's choice among them.

Shape legend: E expressions about one picture, Q proposals, H rows and W columns of a picture.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from rft_lightning.baselines.base import BaselineModule, SampleBatch, asked
from rft_lightning.errors import ConfigConflictError
from rft_lightning.pretrained import check_dtype, load_pretrained
from rft_lightning.sample import Answer, Sample
from rft_lightning.segmenter import box_of_mask

MODELS = {"maskformer": ("MaskFormerForInstanceSegmentation", "MaskFormerImageProcessor")}
CLIP_MODELS = {"clip": ("CLIPModel", "CLIPProcessor")}


class OVSegApproximation(BaselineModule):
    """An approximation of OV-Seg (Liang et al. 2023, arXiv 2210.04150; Table 6 of Visual-RFT), in two stages as there.

    MaskFormer proposes masks; of those it does not call "no object" the answer is the one whose region CLIP finds most
    similar to the expression. A region is the box around the mask with what lies outside the mask in CLIP's mean
    colour, widened to a square in that colour. The box of the answer is the one around its mask.

    It differs from OV-Seg in what transformers carries: a MaskFormer trained on the classes of a data set instead of
    on CLIP's embeddings, and CLIP as published instead of fine-tuned on masked crops with mask prompts, which is what
    OV-Seg gains most from. Its numbers are no numbers of OV-Seg.

    Args:
        checkpoint: hub id or folder of a MaskFormer, weights in safetensors files.
        clip: hub id or folder of a CLIP, likewise.
        mask_threshold: probability above which a pixel belongs to a proposal.
        dtype: float32, bfloat16 or float16, of weights and computation.

    Raises:
        ConfigConflictError: an argument is out of its range.
    """

    tasks = ("grounding",)
    checkpoint: str

    def __init__(
        self,
        checkpoint: str = "facebook/maskformer-swin-base-coco",
        *,
        clip: str = "openai/clip-vit-large-patch14",
        mask_threshold: float = 0.5,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        check_dtype(dtype)
        if not 0 < mask_threshold < 1:
            raise ConfigConflictError(f"Expected 0 < mask_threshold < 1, found {mask_threshold}.")
        self.checkpoint, self.clip_checkpoint = checkpoint, clip
        self.mask_threshold, self.dtype_name = mask_threshold, dtype
        self.proposer: Any = None
        self.proposer_processor: Any = None
        self.clip: Any = None
        self.clip_processor: Any = None

    def configure_model(self) -> None:
        """Load both models; Lightning may call this more than once."""
        if self.clip is None:
            proposer, self.proposer_processor = load_pretrained(self.checkpoint, MODELS, dtype=self.dtype_name)
            clip, self.clip_processor = load_pretrained(self.clip_checkpoint, CLIP_MODELS, dtype=self.dtype_name)
            self.proposer, self.clip = proposer.to(self.device), clip.to(self.device)

    def question(self, sample: Sample) -> str:
        """The expression, as CLIP reads it."""
        return asked(sample, type(self).__name__)

    def answers(self, batch: SampleBatch) -> list[Answer]:
        """See the base class."""
        answers: dict[int, Answer] = {}
        for rows in batch.by_size():
            about: dict[int, list[int]] = {}
            for row in rows:
                about.setdefault(id(batch.images[row]), []).append(row)
            images = [batch.images[same[0]] for same in about.values()]
            for image, same, masks in zip(images, about.values(), self._proposals(images), strict=True):
                chosen = self._chosen([self.question(batch.samples[row]) for row in same], image, masks)
                answers |= {
                    row: Answer(boxes=box_of_mask(mask), mask=mask) for row, mask in zip(same, chosen, strict=True)
                }
        return [answers[row] for row in range(len(batch))]

    def _proposals(self, images: list[Image.Image]) -> list[np.ndarray]:
        """Per picture masks [Q, H, W], none of them empty; all pictures are of one size."""
        inputs = self.proposer_processor(images=images, return_tensors="pt")
        pixels = inputs["pixel_values"].to(self.device, self.proposer.dtype)
        outputs = self.proposer(pixel_values=pixels, pixel_mask=inputs["pixel_mask"].to(self.device))
        found = []
        for classes, logits in zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True):
            objects = logits[classes.argmax(-1) != classes.shape[-1] - 1].float()
            # Pictures of one size are not padded: the logits cover the picture and nothing else.
            size = (images[0].height, images[0].width)
            whole = torch.nn.functional.interpolate(objects[None], size=size, mode="bilinear")[0]
            masks = whole.sigmoid() > self.mask_threshold
            found.append(masks[masks.flatten(1).any(1)].cpu().numpy())
        return found

    def _chosen(self, expressions: list[str], image: Image.Image, masks: np.ndarray) -> np.ndarray:
        """[E, H, W]: of masks [Q, H, W] those whose regions are most similar to the expressions; empty for none."""
        if len(masks) == 0:
            return np.zeros((len(expressions), image.height, image.width), dtype=bool)
        colour = tuple(round(255 * value) for value in self.clip_processor.image_processor.image_mean)
        inputs = self.clip_processor(
            text=expressions,
            images=[region(image, mask, colour) for mask in masks],
            padding=True,
            truncation=True,
            max_length=self.clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        pixels = inputs.pop("pixel_values").to(self.device, self.clip.dtype)
        moved = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        similarity = self.clip(pixel_values=pixels, **moved).logits_per_text
        chosen: np.ndarray = masks[similarity.argmax(-1).tolist()]
        return chosen


def region(image: Image.Image, mask: np.ndarray, colour: tuple[int, ...]) -> Image.Image:
    """What a mask [H, W] shows of a picture, alone on a square of one colour that is as small as it can be."""
    left, top, right, bottom = (int(value) for value in box_of_mask(mask)[0])
    side = max(right - left, bottom - top)
    square = Image.new("RGB", (side, side), colour)
    corner = ((side - (right - left)) // 2, (side - (bottom - top)) // 2)
    square.paste(image.crop((left, top, right, bottom)), corner, Image.fromarray(mask[top:bottom, left:right]))
    return square


__all__ = ["OVSegApproximation", "region"]
