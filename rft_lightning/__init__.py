"""Visual reinforcement fine-tuning as PyTorch Lightning modules with a dataset zoo."""

from rft_lightning.grpo import GRPOModule
from rft_lightning.objectives import GRPOObjective
from rft_lightning.prompts import PromptEncoder
from rft_lightning.sample import Sample
from rft_lightning.sft import SFTModule

__version__ = "0.1.0"

__all__ = ["GRPOModule", "GRPOObjective", "PromptEncoder", "SFTModule", "Sample", "__version__"]
