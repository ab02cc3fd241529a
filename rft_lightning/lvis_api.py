"""The one door to lvis-api: its classes LVIS, LVISResults and LVISEval, without OpenCV.

Two things keep a plain ``import lvis`` out of this package:

- lvis's ``__init__`` imports its drawing module and with it cv2, which needs the system's GL libraries. Most servers
  have none. The three classes need neither.
- lvis 0.5.3, the last release, still writes ``np.float``, which numpy 1.24 removed; its ``accumulate`` would fail.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from typing import Any, NamedTuple

import numpy as np


class LVISApi(NamedTuple):
    """The classes of lvis-api that read annotations, read results and evaluate.

    Attributes:
        LVIS: ``LVIS(annotation_path)``, the ground truth.
        LVISResults: ``LVISResults(lvis_gt, results, max_dets=300)``, detections in COCO's results format.
        LVISEval: ``LVISEval(lvis_gt, lvis_dt, iou_type)``; ``run()``, then ``get_results()``.
    """

    LVIS: type[Any]
    LVISResults: type[Any]
    LVISEval: type[Any]


@cache
def load_lvis() -> LVISApi:
    """The classes of lvis-api.

    Imports lvis's submodules and leaves its ``__init__`` unexecuted. A later ``import lvis`` elsewhere still runs it,
    and meets the same classes.

    Raises:
        ModuleNotFoundError: lvis is not installed.
    """
    spec = importlib.util.find_spec("lvis")
    if spec is None:
        raise ModuleNotFoundError(
            "LVIS evaluation needs the package lvis, which is not installed; run `pip install lvis`.", name="lvis"
        )
    bypass = "lvis" not in sys.modules
    if bypass:
        # A package object that knows where its submodules lie, but whose __init__ never ran.
        sys.modules["lvis"] = importlib.util.module_from_spec(spec)
    try:
        annotations = importlib.import_module("lvis.lvis")
        results = importlib.import_module("lvis.results")
        evaluation = importlib.import_module("lvis.eval")
    finally:
        if bypass:
            del sys.modules["lvis"]
    # Within that one module: numpy itself stays as it is.
    vars(evaluation)["np"] = _NumpyWithFloat()
    return LVISApi(annotations.LVIS, results.LVISResults, evaluation.LVISEval)


class _NumpyWithFloat:
    """Numpy as lvis 0.5.3 expects it: with ``np.float``, an alias of the builtin."""

    float = float

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


__all__ = ["LVISApi", "load_lvis"]
