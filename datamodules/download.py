"""What a data set can download: files fetched with a checksum, archives unpacked with member checks."""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rft_lightning.errors import ChecksumError, DownloadError

_CHUNK = 1 << 20
_ATTEMPTS = 3  # how often a connection that breaks is taken up again
_TIMEOUT = 60  # seconds without a byte
# RuntimeError: a zip file with a password.
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError)
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Download:
    """One file that a data set is distributed as.

    Attributes:
        url: where it is fetched from, http or https.
        file: name it is kept under, in the data set's root.
        md5: its checksum: md5 (32 hexadecimal digits) or sha256 (64); None where its publisher states none.
        folder: folder below the root that the archive is unpacked into ("." is the root); None keeps the file as it is.
    """

    url: str
    file: str
    md5: str | None = None
    folder: str | None = None


def fetch_all(downloads: Iterable[Download], root: str | Path) -> None:
    """Fetch and unpack what is not there yet.

    An archive that was unpacked leaves ``.{file}.unpacked`` in the root, with its checksum (or url, where it has none),
    and is not needed any more: while that matches, it is neither fetched nor read again. To fetch it anew, remove
    ``.{file}.unpacked``.

    Raises:
        DownloadError: see :func:`fetch` and :func:`unpack`.
    """
    for download in downloads:
        if download.folder is None:
            fetch(download, root)
        else:
            _unpack_once(download, Path(root), download.folder)


def _unpack_once(download: Download, root: Path, folder: str) -> None:
    archive = root / download.file
    marker, content = archive.with_name(f".{archive.name}.unpacked"), download.md5 or download.url
    if marker.is_file() and marker.read_text(encoding="utf-8") == content:
        print(f"{archive} was unpacked before. To fetch it anew, remove {marker}", file=sys.stderr)
        return
    unpack(fetch(download, root), root / folder)
    marker.write_text(content, encoding="utf-8")


def fetch(download: Download, root: str | Path) -> Path:
    """The file of a download, fetched unless it is there; several processes of a machine fetch it once.

    What arrives goes into ``{file}.part``, which is kept when the connection breaks and continued by the next call (a
    file without a checksum is begun anew, since nothing could tell whether its halves belong together). The file gets
    its name when it is complete and verified.

    Raises:
        ChecksumError: the file, fetched or found, has another checksum.
        DownloadError: the server cannot be reached or refuses, or the disk is full.
    """
    target = Path(root) / download.file
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.parent):
        if target.exists():
            _verify(download, target, "It was there before and was left alone: delete it to fetch it again.")
            return target
        part = target.with_name(f"{target.name}.part")
        if download.md5 is None:
            part.unlink(missing_ok=True)
        _receive_all(download, part)
        try:
            _verify(download, part, "It was removed: call again, and if the checksum is wrong again, fetch it by hand.")
        except ChecksumError:
            part.unlink()
            raise
        os.replace(part, target)
    return target


def checksum(path: Path, algorithm: str = "md5") -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def unpack(archive: str | Path, folder: str | Path) -> None:
    """Unpack a .zip, .tar, .tar.gz or .tgz below `folder`: all of it or nothing.

    Unpacked beside its place first and then moved, so that no file there is ever incomplete. Files that exist are left
    alone; an archive of which every file exists is not read again.

    Raises:
        DownloadError: it is no such archive, it is damaged, a member lies or points outside of the folder or is a
            device (nothing is written then), or the disk is full.
    """
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder), _reported(archive, folder), _opened(archive) as opened:
        names = _checked(opened, archive)
        if all(os.path.lexists(folder / name) for name in names):
            return
        print(f"Unpacking {archive} ({len(names)} files) into {folder}", file=sys.stderr)
        workplace = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder))
        try:
            if isinstance(opened, tarfile.TarFile):
                opened.extractall(workplace, filter="data")
            else:
                opened.extractall(workplace)
            _move(workplace, folder)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process or thread of this machine at a time; the others wait and then find the work done."""
    with (folder / ".download.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _receive_all(download: Download, part: Path) -> None:
    """Fetch until the file is complete; a connection that breaks is taken up again."""
    if not download.url.startswith(("http://", "https://")):
        raise DownloadError(f"Expected an http or https address, found {download.url!r}.")
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _receive(download, part)
            return
        except HTTPError as error:
            problem = f"the server answers {error.code} {error.reason}"
            if error.code < 500:
                break
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                problem = f"no space left on the disk of {part.parent}"
                break
            problem = str(error) or type(error).__name__
        if attempt < _ATTEMPTS:
            print(f"\n{download.file}: {problem}; trying again", file=sys.stderr)
    kept = part.stat().st_size if part.exists() else 0
    raise DownloadError(
        f"{download.url} was not fetched: {problem}. {kept} bytes are kept in {part}; the same command continues "
        f"there. Or fetch the file by other means and put it at {part.with_suffix('')}."
    )


def _receive(download: Download, part: Path) -> None:
    """Append what is missing of a file to `part`."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "rft_lightning", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        response = urlopen(Request(download.url, headers=headers), timeout=_TIMEOUT)
    except HTTPError as error:
        if error.code != 416:
            raise
        # Nothing of the range is there: the part is the whole file, or is of another one.
        if error.headers.get("Content-Range", "").rpartition("/")[2] != str(start):
            part.unlink()
            _receive(download, part)
        return
    with response, part.open("ab") as file:
        if response.status != 206:
            file.truncate(0)
            start = 0
        _copy(response, file, start, download.file)


def _copy(response: HTTPResponse, file: BinaryIO, start: int, name: str) -> None:
    length = response.headers.get("Content-Length")
    total = None if length is None else start + int(length)
    done = start
    while block := response.read(_CHUNK):
        file.write(block)
        done += len(block)
        _show(name, done, total)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if total is not None and done < total:
        raise ConnectionError(f"the connection broke after {done} of {total} bytes")


def _show(name: str, done: int, total: int | None) -> None:
    """Progress on one line of a terminal; a log gets the last state only."""
    if sys.stderr.isatty() or done == total:
        share = "" if not total else f" of {total / 2**20:.1f}"
        print(f"\r{name}: {done / 2**20:.1f}{share} MiB", end="" if sys.stderr.isatty() else "\n", file=sys.stderr)


def _verify(download: Download, path: Path, remedy: str) -> None:
    if download.md5 is None:
        return
    algorithm = "sha256" if len(download.md5) == 64 else "md5"
    found = checksum(path, algorithm)
    if found != download.md5.lower():
        raise ChecksumError(
            f"{path} from {download.url} has the {algorithm} {found}, expected {download.md5}. {remedy}"
        )


@contextmanager
def _opened(archive: Path) -> Iterator[tarfile.TarFile | zipfile.ZipFile]:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as opened:
            yield opened
    elif archive.name.endswith(ARCHIVES):
        with tarfile.open(archive) as opened:
            yield opened
    else:
        raise DownloadError(f"{archive} is no archive that can be unpacked; expected {', '.join(ARCHIVES)}.")


@contextmanager
def _reported(archive: Path, folder: Path) -> Iterator[None]:
    """Errors of an archive or of the disk, by name and with what to do."""
    try:
        yield
    except _DAMAGED as error:
        raise DownloadError(f"{archive} cannot be unpacked: {error}. Delete it and fetch it again.") from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DownloadError(
            f"No space left on the disk of {folder} to unpack {archive}; nothing of it was kept. Free some space and "
            "call again: the archive stays."
        ) from error


def _checked(opened: tarfile.TarFile | zipfile.ZipFile, archive: Path) -> list[str]:
    """The names of an archive's files, after a look at every member: the whole archive is refused for one bad one."""
    if isinstance(opened, zipfile.ZipFile):
        # Python writes a link in a zip as a small file, so names are all there is to check.
        problems = [f"{name!r} lies outside" for name in opened.namelist() if _leaves(name)]
        names = [name for name in opened.namelist() if not name.endswith("/")]
    else:
        members = opened.getmembers()
        links = {PurePosixPath(member.name) for member in members if member.issym()}
        problems = [problem for member in members if (problem := _problem(member, links))]
        names = [member.name for member in members if not member.isdir()]
    if problems:
        raise DownloadError(
            f"{archive} is not unpacked: {'; '.join(problems[:3])}{'; ...' if len(problems) > 3 else ''}. An archive "
            "of a data set has no such members: do not use it, and look where it came from."
        )
    return names


def _problem(member: tarfile.TarInfo, links: set[PurePosixPath]) -> str:
    """What is wrong with a member of a tar file; empty: nothing."""
    if _leaves(member.name):
        return f"{member.name!r} lies outside"
    if not links.isdisjoint(PurePosixPath(member.name).parents):
        return f"{member.name!r} lies behind a link"
    if member.issym() and _points_outside(member):
        return f"{member.name!r} is a link that leaves the folder ({member.linkname!r})"
    if member.islnk() and (_leaves(member.linkname) or PurePosixPath(member.linkname) in links):
        return f"{member.name!r} is a link that leaves the folder ({member.linkname!r})"
    if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
        return f"{member.name!r} is a device"
    return ""


def _leaves(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or name[1:2] == ":"


def _points_outside(member: tarfile.TarInfo) -> bool:
    """Whether a symbolic link may leave: ".." counts at its beginning only, since later it could follow other links."""
    parts = PurePosixPath(member.linkname).parts
    up = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    depth = len(PurePosixPath(member.name).parents) - 1
    return PurePosixPath(member.linkname).is_absolute() or ".." in parts[up:] or up > depth


def _move(source: Path, target: Path) -> None:
    """Move what a folder holds into another one; what exists there stays."""
    for path in source.iterdir():
        place = target / path.name
        if path.is_dir() and not path.is_symlink() and place.is_dir():
            _move(path, place)
        elif not os.path.lexists(place):
            path.rename(place)


__all__ = ["Download", "checksum", "fetch", "fetch_all", "unpack"]
