"""Shards at a URL, fetched whole into a local cache before a run begins; from then on they are a folder like any other.

Any URL that fsspec understands names a folder that tools/make_shards.py made: the manifest is read first and says what
else there is, and every file is checked by size and sha256 before it gets its name. So a complete folder in the cache
is as good as the original, and what a broken fetch left is gone on with, file by file. The cache is addressed by the
manifest's hash: a set that changes at its URL becomes another folder. One process of a node fetches, the others wait
for its lock. All of the set is fetched, before the first step: there is no network in training.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from shards.layout import MANIFEST, DataError, Manifest, MissingData, parse_manifest, sha256_hex
from shards.redaction import USER_INFO
from shards.redaction import without_users as shown

Progress = Callable[[str], None]  # told what is going on, one line each

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_AT_ONCE = 8  # files
_CONNECT, _SILENCE = 30, 60  # seconds that an HTTP server may take to answer, and to send the next bytes
_LONGEST_PAUSE = 60.0  # seconds
_TOLD_EVERY = 10.0  # seconds
_SPARE = 2**30  # bytes of the disk that stay free

Result = TypeVar("Result")


def is_url(place: str) -> bool:
    """Whether this is `scheme://...` and not a folder."""
    return _URL.match(place) is not None


def cache_folder(setting: str) -> Path:
    """`data.cache`, or where it is empty $XDG_CACHE_HOME/maskwright/shards or ~/.cache/maskwright/shards."""
    if setting:
        return Path(setting).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maskwright" / "shards"


def fetch(url: str, cache: Path, *, setting: str, tries: int, say: Progress, pause: float = 1.0) -> Path:
    """The folder in `cache` that holds the shards of `url`, fetched if they are not there.

    A file is asked for `tries` times, with pauses of `pause`, 2 `pause`, 4 `pause`, ... seconds between. Messages name
    the URL as `setting`.

    Raises MissingData where there is no manifest, DataError naming the file's URL after the last try, ValueError for a
    URL that cannot be used here.
    """
    source = _Source(url.rstrip("/"), setting, tries, pause)
    raw = source.read(MANIFEST)
    try:
        manifest = parse_manifest(raw.decode("ascii", "replace"), Path(MANIFEST))
    except DataError as error:
        raise DataError(
            f"{setting}={shown(url)}: what came as {MANIFEST} is none ({len(raw):,} bytes, {error.__cause__}); see "
            "what the server answers, for example a page that asks for a login"
        ) from error
    folder = cache / f"{_slug(url)}-{sha256_hex(raw)[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f"{folder.name}.lock", say):
            if not (folder / MANIFEST).exists() or _missing(manifest, folder):  # caches are tidied by others, too
                _fetch_files(source, manifest, folder, say)
                _write(folder / MANIFEST, raw)
    except DataError:  # one kind of them is an OSError too
        raise
    except OSError as error:
        raise DataError(
            f"data.cache={cache}: {error.strerror}; choose a folder on a disk of this node that can be written"
        ) from error
    return folder


@dataclass(frozen=True)
class _File:
    name: str
    sha256: str
    size: int | None  # bytes, where the manifest says it


def _files(manifest: Manifest) -> list[_File]:
    """Everything that the manifest promises, the large files last."""
    tars = [_File(shard.file("tar"), shard.sha256["tar"], shard.bytes) for shard in manifest.shards]
    indexes = [_File(s.file(suffix), s.sha256[suffix], None) for s in manifest.shards for suffix in ("npz", "idx")]
    return [*(_File(name, digest, None) for name, digest in manifest.files.items()), *indexes, *tars]


def _missing(manifest: Manifest, folder: Path) -> list[_File]:
    """What is not there, or not whole: a file has its name only when it is, but later it may be cut or replaced."""
    return [file for file in _files(manifest) if not _is_there(folder / file.name, file.size)]


def _is_there(path: Path, size: int | None) -> bool:
    return path.is_file() and size in (None, path.stat().st_size)


def _fetch_files(source: _Source, manifest: Manifest, folder: Path, say: Progress) -> None:
    for left in folder.glob(".*.part"):
        left.unlink()
    missing = _missing(manifest, folder)
    needed, free = sum(file.size or 0 for file in missing), shutil.disk_usage(folder).free
    if needed > free - _SPARE:
        raise DataError(
            f"data.cache={folder.parent}: {needed:,} bytes are to be fetched from {shown(source.url)}, {free:,} are "
            "free; choose another folder"
        )
    told, done = time.monotonic(), 0
    say(f"fetching {shown(source.url)}: {len(missing):,} files, {needed / 1e9:.1f} GB, to {folder}")
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            for number, file in enumerate(pool.map(lambda file: source.fetch(file, folder), missing), 1):
                done += file.size or 0
                if time.monotonic() - told > _TOLD_EVERY:
                    told = time.monotonic()
                    say(f"fetching: {number:,} of {len(missing):,} files, {done / 1e9:.1f} of {needed / 1e9:.1f} GB")
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class _Source:
    """The files of one URL."""

    def __init__(self, url: str, setting: str, tries: int, pause: float) -> None:
        if "?" in url or "#" in url:
            raise ValueError(f"{setting}={shown(url)}: the URL of a folder is needed, without ? and #")
        self.url, self._setting, self._tries, self._pause = url, setting, tries, pause
        try:
            self._system, self._root = _file_system(url)
        except (ImportError, ValueError) as error:
            raise ValueError(
                f"{setting}={shown(url)}: {error}; `pip install maskwright[remote]` brings http and https, other "
                "protocols their own packages (s3fs, gcsfs, ...)"
            ) from error

    def place(self, name: str) -> str:
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        """A small file."""
        return self._persistently(name, lambda: self._system.cat_file(f"{self._root}/{name}"))

    def fetch(self, file: _File, folder: Path) -> _File:
        """Bring one file into `folder`; it has its name only when it is whole."""
        part = folder / f".{file.name}.part"

        def attempt() -> None:
            self._system.get_file(f"{self._root}/{file.name}", str(part))
            size = part.stat().st_size
            if file.size is not None and size != file.size:
                raise ValueError(f"{size:,} bytes came, the manifest says {file.size:,}")
            with open(part, "rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
                if found != file.sha256:
                    raise ValueError(f"its sha256 is {found[:12]}..., the manifest says {file.sha256[:12]}...")
                os.fsync(content.fileno())
            os.replace(part, folder / file.name)

        try:
            self._persistently(file.name, attempt)
        finally:
            part.unlink(missing_ok=True)
        return file

    def _persistently(self, name: str, action: Callable[[], Result]) -> Result:
        for number in range(self._tries):
            if number:
                time.sleep(min(_LONGEST_PAUSE, self._pause * 2 ** (number - 1)))
            try:
                return action()
            except FileNotFoundError as error:
                raise MissingData(
                    f"{self._setting}={shown(self.url)}: no {name} there; a folder made by tools/make_shards.py is "
                    "needed, with all its files"
                ) from error
            except Exception as error:  # every protocol's library has its own kinds
                reason = error
        raise DataError(
            f"{self._setting}={shown(self.url)}: {shown(self.place(name))} could not be fetched, {self._tries} "
            f"{'try' if self._tries == 1 else 'tries'}: {_told(reason)}; see whether the server answers and whether "
            "tools/verify_shards.py accepts the set where it lies, then start again: what has come is kept"
        ) from reason


def _file_system(url: str):
    """fsspec's file system for `url`, and the path in it. ImportError or ValueError where there is none."""
    from fsspec.core import url_to_fs

    options = {}
    if url.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        # Five minutes for a whole file, aiohttp's default, are too few for a shard; silence is what should end it.
        patience = ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=_SILENCE)
        options = {"client_kwargs": {"timeout": patience}}
    return url_to_fs(url, **options)


def _told(error: Exception) -> str:
    """An error in one line, without secrets."""
    return shown(" ".join(f"{error}".split())[:300]) or type(error).__name__


def _slug(url: str) -> str:
    """Host and path in the characters of a file name, for the reader of the cache."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", USER_INFO.sub("", url).partition("://")[2]).strip("-.")[-60:]


@contextmanager
def _lock(file: Path, say: Progress) -> Iterator[None]:
    """Hold the lock of a folder in the cache; it ends with the process. OSError on a file system without locks."""
    with open(file, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that fetches these shards ({file})")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(file: Path, content: bytes) -> None:
    """Write a file whole, or not at all."""
    part = file.with_name(f".{file.name}.part")
    with open(part, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, file)
