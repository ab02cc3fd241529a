"""Tasks: a question, its solution text, how a completion is read and rewarded."""

from rft_lightning.tasks.base import Task
from rft_lightning.tasks.classification import ClassificationTask
from rft_lightning.tasks.detection import DetectionTask
from rft_lightning.tasks.grounding import GroundingTask
from rft_lightning.tasks.presence import PresenceTask

__all__ = ["ClassificationTask", "DetectionTask", "GroundingTask", "PresenceTask", "Task"]
