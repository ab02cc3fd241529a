"""Lists of picture ids: what `exclude_image_ids` may be given as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rft_lightning.errors import AnnotationError, DatasetNotFoundError


def read_ids(file: Path) -> list[Any]:
    """The picture ids of a JSON file.

    Raises:
        DatasetNotFoundError: there is no such file.
        AnnotationError: it holds no ids.
    """
    if not file.is_file():
        raise DatasetNotFoundError(
            f"data.exclude_image_ids: no file at {file} (seen from {Path.cwd()}). Expected JSON: a list of ids, or an "
            "annotation file with `images`."
        )
    try:
        content = json.loads(file.read_bytes())
        listed = [entry["id"] for entry in content["images"]] if isinstance(content, dict) else list(content)
        if not all(isinstance(entry, int | str) for entry in listed):
            raise TypeError("entries are no ids")
    except (ValueError, KeyError, TypeError) as error:
        raise AnnotationError(
            f"data.exclude_image_ids: {file} is not usable ({error!r}). Expected JSON: a list of ids (numbers or "
            "text), or an annotation file with `images` (id)."
        ) from error
    return listed


__all__ = ["read_ids"]
