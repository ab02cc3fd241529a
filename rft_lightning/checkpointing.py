"""Export of a policy to a Hugging Face folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn


def export_policy(policy: nn.Module, processor: Any, folder: str | Path) -> Path:
    """Write policy and processor so that ``from_pretrained(folder)`` loads them; safetensors, no pickle.

    Written beside the target and renamed: either the whole folder is there, or what was there before.

    Args:
        policy: a Hugging Face model.
        processor: its processor.
        folder: where to write; an earlier export there is replaced.

    Returns:
        the folder.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        policy.save_pretrained(partial)  # type: ignore[operator]
        processor.save_pretrained(partial)
        os.chmod(partial, 0o755)  # mkdtemp makes it private
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
