"""Downloads that survive a cut connection, and archives that cannot write outside their own folder."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from shared_core.data._files import archived, data_root, is_archive, reading
from shared_core.data._registry import algorithm_of, digest, entry_of
from shared_core.errors import InputError

Progress = Callable[[int, int | None], object]
_ATTEMPTS, _CHUNK = 4, 1 << 18
_MAGIC = {".gz": b"\x1f\x8b", ".tgz": b"\x1f\x8b", ".zip": b"PK", ".npz": b"PK"}


def fetch(
    what: str,
    *,
    root: str | Path | None = None,
    checksum: str = "",
    extract: bool = False,
    progress: Progress | None = None,
    timeout: float = 30.0,
) -> Path:
    """Download a registered data set, or the file at an address.

    A file is written to ``NAME.part`` and renamed when it is complete and its checksum is right, so no partial file is
    ever under its final name. A cut transfer goes on where it stopped, now or at the next call, when the server can do
    that and the file is still the same. A file that is there already is not fetched again.

    Parameters
    ----------
    what : a name of the registry, or an ``https://`` or ``http://`` address.
    root : where to put it; default: ``data_root()``. A registered set gets a folder of its own in there.
    checksum : for an address: ``"sha256:..."`` or ``"md5:..."``. Registered files have theirs.
    extract : unpack archives beside themselves; the readers do not need it.
    progress : called with bytes done and bytes in total (None if unknown), for each file.
    timeout : seconds without a byte after which a connection counts as cut.

    Returns
    -------
    Path : the folder of a registered set; of an address, the file, or what it was extracted to.

    Raises
    ------
    InputError : what was fetched from where and why it cannot be used.
    """
    base = data_root() if root is None else Path(root)
    if "://" in what:
        return _get(what, base, checksum, extract, progress, timeout)
    entry = entry_of(what)
    if not entry.downloads:
        reason = "it needs no files" if entry.embedded else f"its publisher asks for a visit: {entry.url}"
        raise InputError(f"{entry.name} cannot be fetched: {reason}")
    for url, official in entry.downloads:
        _get(url, base / entry.folders[0], official, extract, progress, timeout)
    return base / entry.folders[0]


def _get(url: str, folder: Path, checksum: str, unpack: bool, progress: Progress | None, timeout: float) -> Path:
    address = urllib.parse.urlsplit(url)
    name = urllib.parse.unquote(address.path).rsplit("/", 1)[-1]
    if address.scheme not in ("http", "https") or not name or name.startswith(".") or "\\" in name:
        raise InputError(f"{url}: expected an http:// or https:// address that ends in a file name")
    target, part = folder / name, folder / f"{name}.part"
    with reading(folder):
        folder.mkdir(parents=True, exist_ok=True)
    checksum = checksum.lower()
    if checksum:
        algorithm_of(checksum)
    if not target.is_file() or (checksum and digest(target, checksum) != checksum):
        _download(url, part, progress, timeout)
        found = ""
        # What cannot even be gunzipped has no checksum of its content, and is as wrong as what has another.
        with contextlib.suppress(InputError):
            found = digest(part, checksum) if checksum else ""
        with part.open("rb") as stream:
            start = stream.read(2)
        if found != checksum or not start.startswith(_MAGIC.get(target.suffix, b"")):
            part.unlink()
            what = (
                f"checksum {found or 'none'} instead of {checksum}"
                if checksum
                else f"not the start of a {target.suffix}"
            )
            raise InputError(f"{url}: the file received has {what}; it was deleted, try again or get it by hand")
        part.replace(target)
    return extract(target) if unpack and is_archive(target) else target


def _download(url: str, part: Path, progress: Progress | None, timeout: float) -> None:
    """Transfer to ``part`` in a few attempts, each going on where the last one stopped."""
    problem = ""
    for _ in range(_ATTEMPTS):
        try:
            done, total = _transfer(url, part, progress, timeout)
            if total in (None, done):
                part.with_suffix(".tag").unlink(missing_ok=True)
                return
            problem = f"the connection was cut after {done:,} of {total:,} bytes"
        except urllib.error.HTTPError as error:
            problem = f"the server answered {error.code} {error.reason}"
            if error.code == 416:
                part.unlink(missing_ok=True)
            elif error.code < 500:
                break
        except (OSError, http.client.HTTPException) as error:
            problem = " ".join(str(error).split()) or type(error).__name__
    raise InputError(f"{url}: {problem}; run it again to go on, or get the file by hand and put it in {part.parent}")


def _transfer(url: str, part: Path, progress: Progress | None, timeout: float) -> tuple[int, int | None]:
    """Make one request, for the rest of the file where there is a part; return bytes done and in total."""
    # The tag is what the server called this version of the file: without it, a rest could belong to another version.
    tag = part.with_suffix(".tag")
    done = part.stat().st_size if part.exists() and tag.exists() else 0
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "shared-core"})  # noqa: S310
    if done:
        request.add_header("Range", f"bytes={done}-")
        request.add_header("If-Range", tag.read_text(encoding="latin-1"))
    with urllib.request.urlopen(request, timeout=timeout) as response:  # noqa: S310
        goes_on = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        done = done if goes_on else 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length and length.isdigit() else None
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if validator and not validator.startswith("W/"):
            tag.write_text(validator, encoding="latin-1")
        else:
            tag.unlink(missing_ok=True)
        with part.open("ab" if goes_on else "wb") as stream:
            while chunk := response.read(_CHUNK):
                stream.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
    return done, total


def extract(archive: Path, limit: int = 64 << 30) -> Path:
    """Unpack an archive into a folder beside it, whole or not at all.

    Members with absolute or ``..`` paths, links and devices are refused, and so is content of more than ``limit`` bytes
    or of more than 250 times the archive's size (and 64 MiB): no honest data compresses that well.
    """
    target = archive.with_name(archive.name.split(".")[0])
    if target.is_dir():
        return target
    left = min(limit, max(64 << 20, 250 * archive.stat().st_size))
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".extract-") as scratch, reading(archive):
        content = Path(scratch, "content")
        content.mkdir()
        for member in archived(archive):
            name = PurePosixPath(member.name.replace("\\", "/"))
            if member.kind == "other" or name.is_absolute() or ".." in name.parts or ":" in member.name:
                raise InputError(
                    f"{archive}: member {member.name!r} is a link, a device or outside; nothing was extracted"
                )
            left -= member.size
            if left < 0:
                raise InputError(f"{archive}: unpacks to more than its size can explain; nothing was extracted")
            folder = content / (name if member.kind == "folder" else name.parent)
            folder.mkdir(parents=True, exist_ok=True)
            if member.kind == "file":
                with member.open() as stream, (content / name).open("xb") as out:
                    shutil.copyfileobj(stream, out)
        content.replace(target)
    return target
