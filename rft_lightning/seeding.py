"""One seed for a run, and seeds that follow from it."""

from __future__ import annotations

import os

import numpy as np


def run_seed(seed: int | None) -> int:
    """`seed`; for None the run's own, set by `seed_everything` on the command line or from Python, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


def derived_seed(*words: int) -> int:
    """A 63-bit seed that depends on all of the non-negative `words` and on nothing else."""
    return int(np.random.SeedSequence(list(words)).generate_state(1, np.uint64)[0] >> 1)
