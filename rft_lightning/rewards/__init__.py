"""Verifiable rewards: pure functions ``(answer, target, *, rules, step) -> float | None``.

Three rule sets: ``strict`` (hardened, the default), ``paper`` (the equations of arXiv 2503.01785) and
``published_code`` (what the authors' repository computes, quirks included). None means that a reward does not apply to
a target of this kind.
"""

from rft_lightning.rewards.accuracy import accuracy_reward
from rft_lightning.rewards.detection import detection_confidence_reward, detection_iou_reward
from rft_lightning.rewards.format import format_reward
from rft_lightning.rewards.grounding import giou_reward, grounding_iou_reward

__all__ = [
    "accuracy_reward",
    "detection_confidence_reward",
    "detection_iou_reward",
    "format_reward",
    "giou_reward",
    "grounding_iou_reward",
]
