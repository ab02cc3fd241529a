"""GroundingDINO: boxes of a class name or an expression, by an open-set detector.

Shape legend: B samples, K boxes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rft_lightning.baselines.base import BaselineModule, SampleBatch, asked
from rft_lightning.errors import ConfigConflictError
from rft_lightning.evaluation.rows import task_of
from rft_lightning.pretrained import check_dtype, load_pretrained
from rft_lightning.sample import Answer, Sample

MODELS = {"grounding-dino": ("GroundingDinoForObjectDetection", "GroundingDinoProcessor")}


class GroundingDINO(BaselineModule):
    """GroundingDINO (Liu et al. 2023, arXiv 2303.05499; Table 8 of Visual-RFT compares with its base model).

    Asks for one class or expression at a time, in lower case and with a full stop, as the model was trained: detection
    samples for all boxes with their scores as confidences, grounding samples for the box with the highest score,
    whatever it is. Boxes and scores are those of transformers' own post-processing.

    Args:
        checkpoint: hub id or folder, weights in safetensors files.
        box_threshold: detection leaves out boxes whose score is not above it. 0 keeps the whole ranking, which average
            precision needs; pictures to look at want about 0.25.
        text_threshold: detection leaves out boxes none of whose words is scored above it; 0 keeps them.
        max_boxes: most boxes of a detection answer, those with the highest scores (the model's authors: 300).
        dtype: float32, bfloat16 or float16, of weights and computation.

    Raises:
        ConfigConflictError: an argument is out of its range.
    """

    tasks: ClassVar[tuple[str, ...]] = ("detection", "grounding")
    checkpoint: str

    def __init__(
        self,
        checkpoint: str = "IDEA-Research/grounding-dino-base",
        *,
        box_threshold: float = 0.0,
        text_threshold: float = 0.0,
        max_boxes: int = 300,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        check_dtype(dtype)
        for name, value in (("box_threshold", box_threshold), ("text_threshold", text_threshold)):
            if not 0 <= value < 1:
                raise ConfigConflictError(f"Expected 0 <= {name} < 1, found {value}.")
        if max_boxes < 1:
            raise ConfigConflictError(f"Expected max_boxes >= 1, found {max_boxes}.")
        self.checkpoint, self.dtype_name = checkpoint, dtype
        self.box_threshold, self.text_threshold, self.max_boxes = box_threshold, text_threshold, max_boxes
        self.detector: Any = None
        self.processor: Any = None

    def configure_model(self) -> None:
        """Load the detector; Lightning may call this more than once."""
        if self.detector is None:
            detector, self.processor = load_pretrained(self.checkpoint, MODELS, dtype=self.dtype_name)
            self.detector = detector.to(self.device)

    def question(self, sample: Sample) -> str:
        """The prompt: "stop sign ." for the class stop_sign."""
        words = asked(sample, type(self).__name__).replace("_", " ").lower().split()
        return " ".join(words).rstrip(" .") + " ."

    def answers(self, batch: SampleBatch) -> list[Answer]:
        """See the base class."""
        answers: dict[int, Answer] = {}
        for rows in batch.by_size():
            part = batch.select(rows)
            found = zip(part.samples, self._detections(part), strict=True)
            answers |= dict(zip(rows, (self._answer(sample, *boxes) for sample, boxes in found), strict=True))
        return [answers[row] for row in range(len(batch))]

    def _answer(self, sample: Sample, boxes: Tensor, scores: Tensor, worded: Tensor) -> Answer:
        order = scores.argsort(descending=True, stable=True)
        if task_of(sample) == "grounding":
            order = order[:1]
        else:
            order = order[((scores > self.box_threshold) & worded)[order]][: self.max_boxes]
        return Answer(boxes=boxes[order], confidences=scores[order])

    def _detections(self, batch: SampleBatch) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per sample all boxes [K, 4] xyxy in pixels, their scores [K] and whether words of the prompt say so [K]."""
        inputs = self.processor(
            images=batch.images,
            text=[self.question(sample) for sample in batch.samples],
            padding=True,
            truncation=True,
            max_length=self.detector.config.max_text_len,
            return_tensors="pt",
        )
        pixels = inputs.pop("pixel_values").to(self.device, self.detector.dtype)
        moved = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        outputs = self.detector(pixel_values=pixels, **moved)
        # On the CPU: phrases are read token by token.
        found = self.processor.post_process_grounded_object_detection(
            SimpleNamespace(logits=outputs.logits.float().cpu(), pred_boxes=outputs.pred_boxes.float().cpu()),
            input_ids=inputs["input_ids"],
            threshold=0.0,
            text_threshold=self.text_threshold,
            target_sizes=[(image.height, image.width) for image in batch.images],
        )
        return [(item["boxes"], item["scores"], self._worded(item["text_labels"])) for item in found]

    def _worded(self, phrases: list[str]) -> Tensor:
        """[K] whether a phrase has a word beside the full stop and the tokens that frame every prompt."""
        special = self.processor.tokenizer.all_special_tokens
        left = [" ".join(word for word in phrase.split() if word not in special) for phrase in phrases]
        return torch.tensor([bool(words.strip(" .")) for words in left], dtype=torch.bool)


__all__ = ["GroundingDINO"]
