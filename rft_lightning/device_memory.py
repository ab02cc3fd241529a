"""A device without enough memory: rollouts go on with fewer prompts at a time, everything else ends with a remedy."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from rft_lightning.errors import DeviceMemoryError

T = TypeVar("T")

_log = logging.getLogger(__name__)


def halving(attempt: Callable[[int], T], prompts: int, *, option: str, remedies: str) -> tuple[T, int]:
    """Compute something for a batch so many prompts at a time, and if the device's memory runs out with fewer.

    Args:
        attempt: computes it for the whole batch, given the number of prompts at a time; its result must not depend on
            that number.
        prompts: the number to begin with.
        option: the setting that chooses this number, for the warning.
        remedies: what to do where one prompt is too many.

    Returns:
        the result, and the number of prompts at a time with which it was computed.

    Raises:
        DeviceMemoryError: there is not enough memory for one prompt.
    """
    while True:
        try:
            return attempt(prompts), prompts
        except torch.OutOfMemoryError as error:
            reason = _reason(error)
            if prompts == 1:
                raise DeviceMemoryError(f"Out of memory with one prompt at a time. {remedies} ({reason})") from error
        # Not inside `except`: the exception holds the frames of the failed attempt, and with them its tensors.
        release()
        _log.warning(
            "Out of memory with %d prompts at a time: the same batch is computed anew with %d, and so are those that "
            "follow. Set %s to %d to begin so. (%s)",
            prompts, prompts // 2, option, prompts // 2, reason,
        )  # fmt: skip
        prompts //= 2


def release() -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def out_of_memory_as(doing: str, remedies: str) -> Iterator[None]:
    """Inside, running out of memory becomes an error that says what to do.

    Raises:
        DeviceMemoryError: the device's memory ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(f"Out of memory in {doing}. {remedies} ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    """Torch's first two sentences: how much was asked for and is free."""
    return ". ".join(" ".join(str(error).split()).split(". ")[:3])
