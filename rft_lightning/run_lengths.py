"""Masks in COCO's run-length encoding, as JSON holds them: {"size": [height, width], "counts": ...}."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask [H, W] in COCO's run-length encoding, as JSON holds it."""
    from pycocotools import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


def read_mask(encoded: Mapping[str, Any]) -> Callable[[], np.ndarray]:
    """What makes the mask [H, W] bool of COCO's run-length encoding, compressed (a string) or not (a list of runs).

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    size, counts = [int(side) for side in encoded["size"]], encoded["counts"]
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"the size of a mask is {encoded['size']}, expected [height, width]")
    runs = np.asarray(_runs(counts) if isinstance(counts, str) else counts, dtype=np.int64)
    if runs.sum() != size[0] * size[1] or (runs < 0).any():
        raise ValueError(f"the runs of a mask cover {runs.sum()} pixels, expected {size[0]} x {size[1]}")
    return partial(_decode, runs, size)


def _decode(runs: np.ndarray, size: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size, order="F")


def _runs(counts: str) -> list[int]:
    """The runs of COCO's compressed encoding, so that they can be counted: pycocotools reads ones that do not add up.

    A run is written in characters of 5 bits, the lowest first, each 48 above its value with a sixth bit where more
    follow; the last one's highest bit is the sign. From the fourth run on it is the difference to the last but one.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"the counts of a mask hold {character!r}, which COCO's compressed encoding does not use")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


__all__ = ["encode_mask", "read_mask"]
