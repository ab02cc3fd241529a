"""Comparison systems as predict-only modules: the same samples, metrics and tables as for a policy."""

from rft_lightning.baselines.base import BaselineModule, SampleBatch
from rft_lightning.baselines.grounded_sam import GroundedSAM
from rft_lightning.baselines.grounding_dino import GroundingDINO
from rft_lightning.baselines.ov_seg import OVSegApproximation
from rft_lightning.baselines.predictions_file import PredictionsFile
from rft_lightning.baselines.sam import SAM

__all__ = [
    "SAM",
    "BaselineModule",
    "GroundedSAM",
    "GroundingDINO",
    "OVSegApproximation",
    "PredictionsFile",
    "SampleBatch",
]
