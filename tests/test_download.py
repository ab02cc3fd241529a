"""Downloads from a server of the test's own: resumed, verified, unpacked with member checks."""

import contextlib
import errno
import hashlib
import io
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rft_lightning.datamodules.download import Download, fetch, fetch_all, unpack
from rft_lightning.errors import ChecksumError, DownloadError

CONTENT = bytes(range(256)) * 40


class Server(ThreadingHTTPServer):
    """Serves CONTENT; `cuts`: how many answers break in the middle; `ranges`: whether it knows Range."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cuts, self.ranges, self.asked = CONTENT, 0, True, []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file.bin"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        if self.path != "/file.bin":
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if start >= len(self.server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.server.content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.cuts:
            self.server.cuts -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)
        return None

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server():
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield made
        made.shutdown()


def offered(server: Server, **kwargs) -> Download:
    return Download(server.url, "file.bin", **{"md5": hashlib.md5(CONTENT).hexdigest(), **kwargs})


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.name != ".download.lock")


def test_a_file_is_fetched_once(server, tmp_path):
    assert fetch(offered(server), tmp_path).read_bytes() == CONTENT
    fetch(offered(server), tmp_path)
    assert server.asked == [None]
    assert leftovers(tmp_path) == ["file.bin"]


def test_sha256_is_told_by_its_length(server, tmp_path):
    fetch(offered(server, md5=hashlib.sha256(CONTENT).hexdigest()), tmp_path)
    with pytest.raises(ChecksumError, match="sha256"):
        fetch(offered(server, md5="0" * 64), tmp_path)


def test_a_cut_connection_is_taken_up_again(server, tmp_path):
    server.cuts = 2
    assert fetch(offered(server), tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={len(CONTENT) // 2}-", f"bytes={len(CONTENT) * 3 // 4}-"]


def test_what_arrived_is_kept_for_the_next_call(server, tmp_path):
    server.cuts = 3
    with pytest.raises(DownloadError, match=r"broke after .* bytes are kept in .*file.bin.part; the same command"):
        fetch(offered(server), tmp_path)
    assert leftovers(tmp_path) == ["file.bin.part"]
    assert fetch(offered(server), tmp_path).read_bytes() == CONTENT
    assert server.asked[-1] == f"bytes={len(CONTENT) * 7 // 8}-"


def test_a_server_that_ignores_ranges_starts_anew(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:99])
    server.ranges = False
    assert fetch(offered(server), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("left", [CONTENT, CONTENT + b"more"])
def test_a_part_that_is_complete_or_too_long(left, server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(left)
    assert fetch(offered(server), tmp_path).read_bytes() == CONTENT


def test_without_a_checksum_nothing_is_continued(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(b"of another file")
    assert fetch(offered(server, md5=None), tmp_path).read_bytes() == CONTENT


def test_a_wrong_checksum_says_what_was_found(server, tmp_path):
    server.content = b"something else"
    found = hashlib.md5(server.content).hexdigest()
    with pytest.raises(ChecksumError, match=rf"{found}, expected {hashlib.md5(CONTENT).hexdigest()}.*removed"):
        fetch(offered(server), tmp_path)
    assert leftovers(tmp_path) == []
    (tmp_path / "file.bin").write_bytes(b"mine")
    with pytest.raises(ChecksumError, match="left alone"):
        fetch(offered(server), tmp_path)
    assert leftovers(tmp_path) == ["file.bin"]


def test_a_refusal_is_named(server, tmp_path):
    with pytest.raises(DownloadError, match=r"answers 404.*fetch the file by other means"):
        fetch(Download(f"{server.url}x", "file.bin"), tmp_path)
    with pytest.raises(DownloadError, match="http or https"):
        fetch(Download("file:///etc/passwd", "file.bin"), tmp_path)


def test_many_callers_fetch_once(server, tmp_path):
    threads = [threading.Thread(target=fetch, args=(offered(server), tmp_path)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked == [None]
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def zipped(path: Path, names: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            member.size = 3 if member.isfile() else 0
            archive.addfile(member, io.BytesIO(b"abc") if member.isfile() else None)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


def test_fetch_and_unpack_into_the_root(server, tmp_path):
    archive = zipped(tmp_path / "a.zip", {"images/1.jpg": b"1", "images/2.jpg": b"2"})
    server.content = archive.read_bytes()
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    (root / "images" / "1.jpg").write_bytes(b"mine")
    fetch_all([Download(server.url, "a.zip", None, ".")], root)
    assert leftovers(root) == [".a.zip.unpacked", "1.jpg", "2.jpg", "a.zip", "images"]
    assert (root / "images" / "1.jpg").read_bytes() == b"mine"
    fetch_all([Download(server.url, "a.zip", None, ".")], root)
    assert len(server.asked) == 1


@pytest.mark.parametrize("with_checksum", [True, False])
def test_what_was_unpacked_is_not_fetched_again(with_checksum, server, tmp_path, capsys):
    server.content = zipped(tmp_path / "a.zip", {"images/1.jpg": b"1"}).read_bytes()
    md5 = hashlib.md5(server.content).hexdigest() if with_checksum else None
    offers, root = [Download(server.url, "a.zip", md5, ".")], tmp_path / "root"
    fetch_all(offers, root)
    marker = root / ".a.zip.unpacked"
    assert marker.read_text() == (md5 or server.url)
    (root / "a.zip").unlink()
    fetch_all(offers, root)
    assert len(server.asked) == 1
    assert f"remove {marker}" in capsys.readouterr().err
    marker.write_text("of another version")
    fetch_all(offers, root)
    (root / "a.zip").unlink()
    marker.unlink()
    fetch_all(offers, root)
    assert len(server.asked) == 3


def test_what_was_not_unpacked_leaves_no_marker(server, tmp_path):
    with pytest.raises(DownloadError):
        fetch_all([Download(server.url, "a.zip", None, ".")], tmp_path)
    assert leftovers(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("ending", [".tar.gz", ".tgz"])
def test_tar_files_with_links_inside(ending, tmp_path):
    link = member("images/b.jpg", tarfile.SYMTYPE, "../other/a.jpg")
    archive = tarred(tmp_path / f"a{ending}", member("images", tarfile.DIRTYPE), member("other/a.jpg"), link)
    unpack(archive, tmp_path / "out")
    assert (tmp_path / "out" / "images" / "b.jpg").read_bytes() == b"abc"


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "..\\evil", "C:\\evil"])
def test_a_zip_that_leaves_the_folder_writes_nothing(name, tmp_path):
    archive = zipped(tmp_path / "a.zip", {"good": b"1", name: b"2"})
    with pytest.raises(DownloadError, match=r"evil' lies outside"):
        unpack(archive, tmp_path / "deep" / "out")
    assert leftovers(tmp_path / "deep") == ["out"]
    assert leftovers(tmp_path) == ["a.zip", "deep", "out"]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ([member("../x")], "lies outside"),
        ([member("/x")], "lies outside"),
        ([member("x", tarfile.SYMTYPE, "/etc")], "leaves the folder"),
        ([member("x", tarfile.SYMTYPE, "../y")], "leaves the folder"),
        ([member("a/x", tarfile.SYMTYPE, "../../y")], "leaves the folder"),
        ([member("x", tarfile.SYMTYPE, "a/../../y")], "leaves the folder"),
        ([member("x", tarfile.SYMTYPE, "."), member("x/y", tarfile.SYMTYPE, "../z")], "behind a link"),
        ([member("x", tarfile.LNKTYPE, "../y")], "leaves the folder"),
        ([member("x", tarfile.CHRTYPE)], "is a device"),
        ([member("x", tarfile.FIFOTYPE)], "is a device"),
    ],
)
def test_a_tar_that_leaves_the_folder_writes_nothing(bad, problem, tmp_path):
    archive = tarred(tmp_path / "a.tar.gz", member("good"), *bad)
    with pytest.raises(DownloadError, match=problem):
        unpack(archive, tmp_path / "out")
    assert leftovers(tmp_path / "out") == []


def test_a_full_disk_leaves_no_half_tree(tmp_path, monkeypatch):
    archive = zipped(tmp_path / "a.zip", {f"images/{i}": b"1" for i in range(5)})
    real, calls = zipfile.ZipFile._extract_member, []

    def full(self, *args):
        calls.append(args)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args)

    monkeypatch.setattr(zipfile.ZipFile, "_extract_member", full)
    with pytest.raises(DownloadError, match=r"No space left.*the archive stays"):
        unpack(archive, tmp_path / "out")
    assert leftovers(tmp_path / "out") == []
    monkeypatch.undo()
    unpack(archive, tmp_path / "out")
    assert len(leftovers(tmp_path / "out" / "images")) == 5


def test_a_full_disk_keeps_what_was_fetched(server, tmp_path, monkeypatch):
    import rft_lightning.datamodules.download as module

    monkeypatch.setattr(module, "_show", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(DownloadError, match="no space left on the disk"):
        fetch(offered(server), tmp_path)
    monkeypatch.undo()
    assert leftovers(tmp_path) == ["file.bin.part"]
    fetch(offered(server), tmp_path)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar", "a.rar"])
def test_what_is_no_archive_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(b"<html>not found</html>")
    with pytest.raises(DownloadError, match=name):
        unpack(tmp_path / name, tmp_path / "out")
    with contextlib.suppress(FileNotFoundError):
        assert leftovers(tmp_path / "out") == []
