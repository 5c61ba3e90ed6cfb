from __future__ import annotations

import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from dataclasses import dataclass, field, replace

import pytest

from shared_core.data import _registry as registry
from shared_core.data import extract, fetch, load
from shared_core.errors import InputError

CONTENT = bytes(range(256)) * 4096  # 1 MiB


@dataclass
class Site:
    """What the server of a test does, and the requests that it got."""

    content: bytes = CONTENT
    tag: str | None = '"one"'
    ranges: bool = True
    cut_after: int | None = None  # bytes of each answer after which the connection is closed
    status: int = 200
    length: bool = True
    requests: list[dict[str, str]] = field(default_factory=list)
    address: str = ""


@pytest.fixture
def site():
    state = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests.append({"path": self.path, **self.headers})
            start, unchanged = 0, self.headers.get("If-Range", state.tag) == state.tag
            if state.ranges and unchanged and "Range" in self.headers:
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(state.content) > 0 and "Range" in self.headers:
                self.send_error(416)
                return
            body = state.content[start:]
            self.send_response(state.status if state.status != 200 else 206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.content) - 1}/{len(state.content)}")
            if state.length:
                self.send_header("Content-Length", str(len(body)))
            if state.tag:
                self.send_header("ETag", state.tag)
            self.end_headers()
            self.wfile.write(body[: state.cut_after])

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def sha256(content: bytes = CONTENT) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def fails(expected: str, call, *arguments, **options) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_plain(site, tmp_path):
    seen = []
    path = fetch(
        f"{site.address}/set.bin", root=tmp_path / "new", checksum=sha256(), progress=lambda *p: seen.append(p)
    )
    assert path == tmp_path / "new/set.bin"
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["set.bin"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    fetch(f"{site.address}/set.bin", root=tmp_path / "new", checksum=sha256())
    assert len(site.requests) == 1, "a file that is there and right is not fetched again"


def test_a_file_that_is_there_but_wrong_is_replaced(site, tmp_path):
    (tmp_path / "set.bin").write_bytes(b"old")
    assert fetch(f"{site.address}/set.bin", root=tmp_path, checksum=sha256()).read_bytes() == CONTENT


def test_goes_on_after_a_cut_connection(site, tmp_path):
    site.cut_after = 400_000
    path = fetch(f"{site.address}/set.bin", root=tmp_path, checksum=sha256())
    assert path.read_bytes() == CONTENT
    assert [request.get("Range") for request in site.requests] == [None, "bytes=400000-", "bytes=800000-"]
    assert {request["If-Range"] for request in site.requests[1:]} == {'"one"'}
    assert names(tmp_path) == ["set.bin"]


def test_goes_on_at_the_next_call(site, tmp_path):
    site.cut_after = 100_000
    fails(
        "cut after 400,000 of 1,048,576 bytes; run it again to go on", fetch, f"{site.address}/set.bin", root=tmp_path
    )
    assert names(tmp_path) == ["set.bin.part", "set.bin.tag"]
    site.cut_after = None
    site.requests.clear()
    assert fetch(f"{site.address}/set.bin", root=tmp_path).read_bytes() == CONTENT
    assert [request.get("Range") for request in site.requests] == ["bytes=400000-"]


def test_starts_anew_when_the_file_changed(site, tmp_path):
    site.cut_after = 100_000
    fails("cut after", fetch, f"{site.address}/set.bin", root=tmp_path)
    site.cut_after, site.tag, site.content = None, '"two"', CONTENT[::-1]
    assert fetch(f"{site.address}/set.bin", root=tmp_path).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("change", [{"ranges": False}, {"tag": None}, {"tag": 'W/"weak"'}])
def test_server_that_cannot_go_on(site, tmp_path, change):
    for key, value in change.items():
        setattr(site, key, value)
    site.cut_after = 500_000
    fails("cut after 500,000 of 1,048,576 bytes", fetch, f"{site.address}/set.bin", root=tmp_path)
    site.cut_after = None
    assert fetch(f"{site.address}/set.bin", root=tmp_path).read_bytes() == CONTENT


def test_part_that_is_longer_than_the_file(site, tmp_path):
    (tmp_path / "set.bin.part").write_bytes(CONTENT + b"more")
    (tmp_path / "set.bin.tag").write_text('"one"')
    assert fetch(f"{site.address}/set.bin", root=tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("checksum", [sha256(b"other"), "md5:" + "0" * 32, "sha256-gunzipped:" + "0" * 64])
def test_wrong_checksum(site, tmp_path, checksum):
    fails(
        f"instead of {checksum}; it was deleted",
        fetch,
        f"{site.address}/a.bin",
        root=tmp_path,
        checksum=checksum,
    )
    assert names(tmp_path) == []


def test_unknown_checksum_algorithm(site, tmp_path):
    fails("checksum: expected md5:", fetch, f"{site.address}/a.bin", root=tmp_path, checksum="crc:12")
    assert not site.requests


def test_body_shorter_than_announced_never_gets_the_name(site, tmp_path):
    site.cut_after, site.tag = 0, None
    fails("cut after 0 of 1,048,576 bytes", fetch, f"{site.address}/set.bin", root=tmp_path)
    assert "set.bin" not in names(tmp_path)


def test_page_in_place_of_an_archive(site, tmp_path):
    site.content = b"<html>please log in</html>"
    for name in ("set.zip", "set.tar.gz", "x.npz"):
        fails("has not the start of a", fetch, f"{site.address}/{name}", root=tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (403, 1), (503, 4)])
def test_server_errors(site, tmp_path, status, attempts):
    site.status = status
    fails(f"the server answered {status}", fetch, f"{site.address}/set.bin", root=tmp_path)
    assert len(site.requests) == attempts
    assert "set.bin" not in names(tmp_path)


def test_no_server(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        address = f"http://127.0.0.1:{server.server_address[1]}/set.bin"
    fails("refused", fetch, address, root=tmp_path)


def test_unknown_length(site, tmp_path):
    site.length = False
    seen = []
    fetch(f"{site.address}/set.bin", root=tmp_path, progress=lambda *p: seen.append(p))
    assert seen[-1] == (len(CONTENT), None)


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://host/x", "http://host/", "http://host/a/..", "http://host/.x", "http://h/a%5Cb"],
)
def test_addresses_that_are_refused(tmp_path, url):
    fails("expected an http", fetch, url, root=tmp_path)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    fails("file", fetch, "http://127.0.0.1:1/x.bin", root=tmp_path / "file")


def test_registered_set(site, tmp_path, monkeypatch):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("ml-100k/u.data", "1\t2\t3\t4\n5\t2\t1\t4\n")
    site.content = packed.getvalue()
    entry = registry._REGISTRY["movielens-100k"]
    downloads = ((f"{site.address}/ml-100k.zip", sha256(site.content)),)
    monkeypatch.setitem(registry._REGISTRY, entry.name, replace(entry, downloads=downloads))
    assert fetch("ml-100k", root=tmp_path) == tmp_path / "ml-100k"
    assert len(load("ml-100k", root=tmp_path)) == 2
    assert registry.verify("ml-100k", root=tmp_path).checks[0].status == "official"
    fetch("ml-100k", root=tmp_path, extract=True)
    assert (tmp_path / "ml-100k/ml-100k/ml-100k/u.data").exists()
    assert len(load("ml-100k", root=tmp_path)) == 2
    assert len(site.requests) == 1
    fails("cannot be fetched: it needs no files", fetch, "digits", root=tmp_path)
    fails("cannot be fetched: its publisher asks for a visit", fetch, "mini-imagenet", root=tmp_path)


def tar_of(*members: tuple[str, bytes, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "../../outside"
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def zip_of(name: str, content: bytes, mode: int = 0) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
        archive.writestr(info, content)
    return stream.getvalue()


GOOD = ("good.txt", tarfile.REGTYPE, b"good")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.tar.gz", tar_of(GOOD, ("../outside", tarfile.REGTYPE, b"x")), "member '../outside'"),
        ("a.tar.gz", tar_of(GOOD, ("b/../../outside", tarfile.REGTYPE, b"x")), "member 'b/../../outside'"),
        ("a.tar.gz", tar_of(GOOD, ("/tmp/outside", tarfile.REGTYPE, b"x")), "member '/tmp/outside'"),
        ("a.tar.gz", tar_of(GOOD, ("link", tarfile.SYMTYPE, b"")), "member 'link' is a link"),
        ("a.tar.gz", tar_of(GOOD, ("link", tarfile.LNKTYPE, b"")), "member 'link' is a link"),
        ("a.tar.gz", tar_of(GOOD, ("pipe", tarfile.FIFOTYPE, b"")), "member 'pipe' is a link, a device"),
        ("a.tar.gz", tar_of(GOOD, GOOD), "cannot be read"),
        ("a.tar.gz", tar_of(GOOD, ("big", tarfile.REGTYPE, bytes(70 << 20))), "more than its size can explain"),
        ("a.tar.gz", tar_of(GOOD)[:-20], "cannot be read"),
        ("a.zip", zip_of("../outside", b"x"), "member '../outside'"),
        ("a.zip", zip_of("..\\outside", b"x"), r"outside"),
        ("a.zip", zip_of("C:/outside", b"x"), "member 'C:/outside'"),
        ("a.zip", zip_of("link", b"/etc/passwd", 0o120777), "member 'link' is a link"),
        ("a.zip", zip_of("big", bytes(70 << 20)), "more than its size can explain"),
        ("a.zip", zip_of("file", b"content" * 999)[:-40], "cannot be read"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_hostile_archives_leave_nothing(tmp_path, name, content, expected):
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / name).write_bytes(content)
    fails(expected, extract, folder / name)
    assert names(folder) == [name]
    assert names(tmp_path) == ["inner"]


def test_extract(tmp_path, site):
    site.content = tar_of(("deep/er", tarfile.DIRTYPE, b""), ("deep/er/file", tarfile.REGTYPE, b"text"), GOOD)
    path = fetch(f"{site.address}/set.tar.gz", root=tmp_path, extract=True)
    assert path == tmp_path / "set"
    assert (path / "deep/er/file").read_bytes() == b"text"
    assert names(tmp_path) == ["set", "set.tar.gz"]
    assert extract(tmp_path / "set.tar.gz") == path
    fails("more than its size can explain", extract, (tmp_path / "set.tar.gz").rename(tmp_path / "b.tar.gz"), limit=5)
