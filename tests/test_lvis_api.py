"""The shim around lvis-api: no cv2, no numpy patched for others, and the evaluator's own numbers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rft_lightning import lvis_api
from rft_lightning.lvis_api import load_lvis

# The call in a new process without the seconds that the rest of the package takes to import.
SHIM_ALONE = f"runpy.run_path({lvis_api.__file__!r})['load_lvis']()"
BOXES = {1: [10.0, 10.0, 40.0, 30.0], 2: [5.0, 20.0, 60.0, 50.0]}  # image id -> x, y, width, height


def write_annotations(folder: Path) -> Path:
    """Two images with one object of the same category each, in LVIS v1 format."""
    images = [
        {"id": i, "width": 100, "height": 100, "neg_category_ids": [], "not_exhaustive_category_ids": []} for i in BOXES
    ]
    annotations = [
        {
            "id": i,
            "image_id": i,
            "category_id": 1,
            "bbox": [x, y, w, h],
            "area": w * h,
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        }
        for i, (x, y, w, h) in BOXES.items()
    ]
    categories = [{"id": 1, "name": "cup", "frequency": "f"}]
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def results(*image_ids: int) -> list[dict]:
    return [{"image_id": i, "category_id": 1, "bbox": BOXES[i], "score": 0.9} for i in image_ids]


def average_precision(annotations: Path, detections: list[dict]) -> float:
    api = load_lvis()
    truth = api.LVIS(str(annotations))
    evaluation = api.LVISEval(truth, api.LVISResults(truth, detections), "bbox")
    evaluation.run()
    return evaluation.get_results()["AP"]


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_perfect_result_without_cv2(tmp_path: Path) -> None:
    code = """
import json, sys
sys.modules["cv2"] = None  # any import of cv2 now fails
from rft_lightning.lvis_api import load_lvis

api = load_lvis()
truth = api.LVIS(sys.argv[1])
evaluation = api.LVISEval(truth, api.LVISResults(truth, json.loads(sys.argv[2])), "bbox")
evaluation.run()
print(evaluation.get_results()["AP"])
assert "lvis" not in sys.modules and "lvis.vis" not in sys.modules
"""
    output = run_python(code, str(write_annotations(tmp_path)), json.dumps(results(1, 2)))
    assert float(output.split()[-1]) == pytest.approx(1.0, abs=1e-12)


def test_missed_object_costs_the_recall_points_above_it(tmp_path: Path) -> None:
    # Recall ends at 1/2, so 51 of the 101 recall points (0.00 to 0.50) have precision 1 and the others 0.
    assert average_precision(write_annotations(tmp_path), results(1)) == pytest.approx(51 / 101, abs=1e-12)


def test_numpy_is_left_alone() -> None:
    load_lvis()
    assert not hasattr(np, "float")
    assert sys.modules["lvis.eval"].np.float is float
    assert sys.modules["lvis.eval"].np.cumsum is np.cumsum


@pytest.mark.parametrize("first", ["shim", "lvis"])
def test_lvis_imported_elsewhere_has_the_same_classes(first: str) -> None:
    shim, plain = f"api = {SHIM_ALONE}", "import lvis"
    lines = ["import runpy, sys, types", "sys.modules['cv2'] = types.ModuleType('cv2')"]
    lines += [shim, plain] if first == "shim" else [plain, shim]
    lines += ["assert (lvis.LVIS, lvis.LVISResults, lvis.LVISEval) == tuple(api), (lvis.LVIS, api)"]
    run_python("\n".join(lines))


def test_without_lvis_the_error_says_what_to_install() -> None:
    code = f"""
import runpy, sys
sys.modules["lvis"] = None
try:
    {SHIM_ALONE}
except ModuleNotFoundError as error:
    print(error)
"""
    assert "pip install lvis" in run_python(code)
