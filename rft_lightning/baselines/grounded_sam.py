"""GroundedSAM: GroundingDINO's box, and SAM's mask of it."""

from __future__ import annotations

from rft_lightning.baselines.base import SampleBatch
from rft_lightning.baselines.grounding_dino import GroundingDINO
from rft_lightning.sample import Answer
from rft_lightning.segmenter import Segmenter, add_masks, as_segmenter


class GroundedSAM(GroundingDINO):
    """GroundedSAM (Ren et al. 2024, arXiv 2401.14159; Table 6 of Visual-RFT): a detector prompts a segmenter.

    The box of an expression is that of :class:`GroundingDINO` with the highest score, the mask what the segmenter makes
    of this box.

    Args:
        checkpoint: hub id or folder of the detector.
        segmenter: a :class:`~rft_lightning.segmenter.Segmenter`, or its checkpoint.
        dtype: float32, bfloat16 or float16, of the detector's weights and computation.

    Raises:
        ConfigConflictError: unknown dtype.
    """

    tasks = ("grounding",)

    def __init__(
        self,
        checkpoint: str = "IDEA-Research/grounding-dino-base",
        *,
        segmenter: str | Segmenter = "facebook/sam-vit-huge",
        dtype: str = "float32",
    ) -> None:
        super().__init__(checkpoint, dtype=dtype)
        self.segmenter = as_segmenter(segmenter)

    def answers(self, batch: SampleBatch) -> list[Answer]:
        """See the base class."""
        answers = super().answers(batch)
        add_masks(answers, batch.images, self.segmenter.to(self.device))
        return answers


__all__ = ["GroundedSAM"]
