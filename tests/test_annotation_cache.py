"""What was parsed of annotation files is kept, used while the file is the same, and never trusted further."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from rft_lightning.datamodules import annotation_cache, coco_annotations
from rft_lightning.datamodules.coco_annotations import COCOAnnotations
from rft_lightning.errors import AnnotationError
from tests.fakes.coco import edit, write_coco


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(annotation_cache, "SMALLEST_SOURCE", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_coco(tmp_path / "coco", "val2017")


@pytest.fixture
def parsed(monkeypatch) -> list[str]:
    """The files that were parsed."""
    calls: list[str] = []
    monkeypatch.setattr(coco_annotations, "COCO", lambda path: calls.append(path) or COCO(path))
    return calls


def read(file: Path) -> COCOAnnotations:
    return COCOAnnotations(file.parent.parent, "val2017")


def content(data: COCOAnnotations):
    return data.categories, data.pictures, list(data.objects.items()), data.annotation_count


def cached(file: Path) -> Path:
    return file.with_name(f".{file.name}.rft.npz")


def test_the_second_start_parses_nothing_and_reads_the_same(file, parsed):
    first = content(read(file))
    assert cached(file).is_file()
    assert content(read(file)) == first
    assert len(parsed) == 1
    assert sum(objects.is_empty for _, objects in first[2]) == 1, "a pair that lost its only box is kept"
    assert sorted(path.name for path in file.parent.iterdir()) == [cached(file).name, file.name]


def test_nothing_in_it_is_pickled(file):
    read(file)
    with np.load(cached(file), allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)


def test_a_changed_file_is_parsed_again(file, parsed):
    read(file)
    edit(file, lambda found: found["annotations"].pop())
    assert read(file).annotation_count == 15
    os.utime(file, ns=(1, 1))
    read(file)
    read(file)
    assert len(parsed) == 3


def test_a_file_that_is_replaced_while_it_is_parsed_is_not_kept(file, monkeypatch):
    parse = coco_annotations._parse

    def replaced(source):
        found = parse(source)
        edit(source, lambda content: content["annotations"].pop())
        return found

    monkeypatch.setattr(coco_annotations, "_parse", replaced)
    assert read(file).annotation_count == 16
    assert not cached(file).exists()
    monkeypatch.setattr(coco_annotations, "_parse", parse)
    assert read(file).annotation_count == 15


def test_another_form_of_the_arrays_is_not_used(file, parsed, monkeypatch):
    read(file)
    monkeypatch.setattr(coco_annotations, "_CACHE_VERSION", -1)
    read(file)
    assert len(parsed) == 2


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 something", b"{}", "cut", "flipped"])
def test_a_damaged_cache_is_made_anew(file, parsed, damage):
    first = content(read(file))
    whole = cached(file).read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 40]) + whole[middle + 40 :]
    cached(file).write_bytes({"cut": whole[:middle], "flipped": flipped}.get(damage, damage))
    assert content(read(file)) == first
    assert len(parsed) == 2
    assert content(read(file)) == first
    assert len(parsed) == 2


def test_a_read_only_folder_sends_it_to_the_users_cache(file, parsed, tmp_path, monkeypatch):
    write = annotation_cache.write_atomically

    def refuse(path, content):
        if path.parent == file.parent:
            raise PermissionError(13, "read-only")
        write(path, content)

    monkeypatch.setattr(annotation_cache, "write_atomically", refuse)
    first = content(read(file))
    assert not cached(file).exists()
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1
    assert content(read(file)) == first
    assert len(parsed) == 1


def test_where_nothing_can_be_written_nothing_is(file, parsed, monkeypatch):
    def refuse(path, content):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(annotation_cache, "write_atomically", refuse)
    read(file)
    read(file)
    assert len(parsed) == 2


def test_ids_that_are_no_integers_are_not_kept(file):
    edit(file, lambda found: [note.update(id=f"note {note['id']}") for note in found["annotations"]])
    assert read(file).pictures[9].annotation == "note 1001"
    assert not cached(file).exists()


def test_small_files_are_left_alone(file, monkeypatch):
    monkeypatch.setattr(annotation_cache, "SMALLEST_SOURCE", 10**6)
    read(file)
    assert not cached(file).exists()


def test_unusable_files_are_not_kept(file):
    file.write_text(json.dumps({"images": [], "annotations": [{"id": 1}], "categories": []}))
    with pytest.raises(AnnotationError):
        read(file)
    assert not cached(file).exists()
