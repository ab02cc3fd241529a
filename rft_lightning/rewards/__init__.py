"""Verifiable rewards: pure functions ``(answer, target, *, rules, step, ...) -> float | None``.

Three rule sets: ``strict`` (hardened, the default), ``paper`` (the equations of arXiv 2503.01785) and
``published_code`` (what the authors' repository computes, quirks included). Rewards that come from elsewhere compute
the same under all three. None means that a reward does not apply to a target of this kind. Further keyword options
have defaults; docs/rewards.md lists them, and says which reward is for what.
"""

from rft_lightning.rewards.accuracy import accuracy_reward
from rft_lightning.rewards.average_precision import ap50_reward, average_precision_reward, od_length_reward
from rft_lightning.rewards.completeness import completeness_reward, precision_reward, recall_reward
from rft_lightning.rewards.detection import detection_confidence_reward, detection_iou_reward
from rft_lightning.rewards.format import format_reward, soft_format_reward
from rft_lightning.rewards.grounding import (
    giou_reward,
    grounding_iou_reward,
    grounding_iou_squared_reward,
    point_in_box_reward,
)
from rft_lightning.rewards.length import cosine_length_reward, overlong_reward
from rft_lightning.rewards.presence import presence_reward
from rft_lightning.rewards.repetition import repetition_reward
from rft_lightning.rewards.with_options import RewardWithOptions

__all__ = [
    "RewardWithOptions",
    "accuracy_reward",
    "ap50_reward",
    "average_precision_reward",
    "completeness_reward",
    "cosine_length_reward",
    "detection_confidence_reward",
    "detection_iou_reward",
    "format_reward",
    "giou_reward",
    "grounding_iou_reward",
    "grounding_iou_squared_reward",
    "od_length_reward",
    "overlong_reward",
    "point_in_box_reward",
    "precision_reward",
    "presence_reward",
    "recall_reward",
    "repetition_reward",
    "soft_format_reward",
]
