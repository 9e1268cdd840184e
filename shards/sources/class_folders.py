"""An image folder as a list: SRC/CLASS/FILE, one folder per class, sorted bytewise.

The listing does not depend on the locale, on the order in which the file system answers, or on where SRC lies: names
are handled as bytes and shown as UTF-8 (other bytes survive as surrogate escapes). Nothing is opened here. What
cannot be an image of the data set at all (a link that leaves SRC, a pipe, a folder named x.JPEG) is listed with the
reason why, so that every entry is either written or counted as rejected.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shards.layout import DataError, MissingData
from shards.sources.listing import Entry, Listing

IMAGE_SUFFIXES = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".gif", b".tif", b".tiff", b".avif", b".heic")
_LITTER = frozenset({b"Thumbs.db", b"desktop.ini", b"__MACOSX", b"lost+found"})
_LISTING_THREADS = 16  # the wait is for the file system, not for a core


def list_class_folders(
    root: Path, *, follow_symlinks: bool = False, progress: Callable[[int, int], None] | None = None
) -> Listing:
    """List SRC/CLASS/FILE. `progress(done, all)` counts class folders.

    Links that leave `root` are rejected unless `follow_symlinks`. Raises MissingData or DataError, saying what was
    found instead, when `root` is not a folder of class folders with images in them.
    """
    if not root.is_dir():
        raise MissingData(f"source={root}: no such folder; give the folder that holds the class folders")
    top = os.fsencode(root)
    names, ignored = _class_folders(top, follow_symlinks)
    boundary = None if follow_symlinks else os.path.realpath(top)
    classes = tuple(map(_text, names))
    entries: list[Entry] = []
    empty = []
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        folders = [os.path.join(top, name) for name in names]
        for label, (files, litter) in enumerate(pool.map(lambda folder: _list_class(folder, boundary), folders)):
            ignored += litter
            if not files:
                empty.append(classes[label])
            entries += [Entry(f"{classes[label]}/{_text(name)}", label, size, bad) for name, size, bad in files]
            if progress:
                progress(label + 1, len(folders))
    if not entries:
        raise DataError(f"source={root}: {len(classes)} class folders and not one image in them; check the path")
    return Listing(root, classes, tuple(entries), tuple(empty), ignored, walked=True)


def _class_folders(top: bytes, follow_symlinks: bool) -> tuple[list[bytes], int]:
    """The class folders in `top`, sorted bytewise, and how many other things are ignored there."""
    folders, ignored = [], 0
    boundary = os.path.realpath(top)
    for item in _scan(top):
        if _is_litter(item.name):
            ignored += 1
        elif item.is_dir():
            if item.is_symlink() and not follow_symlinks and not _inside(item.path, boundary):
                raise DataError(
                    f"source={_text(top)}: the class folder {_text(item.name)} is a link out of it; "
                    "add --follow-symlinks if that is meant"
                )
            folders.append(item.name)
        elif item.name.lower().endswith(IMAGE_SUFFIXES):
            raise DataError(
                f"source={_text(top)}: the image {_text(item.name)} lies beside the class folders; "
                "put every image into a folder named after its class"
            )
        else:
            ignored += 1
    if not folders:
        raise DataError(f"source={_text(top)}: no class folders in it; one folder per class is needed")
    return sorted(folders), ignored


def _list_class(folder: bytes, boundary: bytes | None) -> tuple[list[tuple[bytes, int, tuple[str, str] | None]], int]:
    """(name, size, problem) of the files of one class, sorted bytewise, and the number of ignored files."""
    files, litter = [], 0
    for item in _scan(folder):
        if _is_litter(item.name):
            litter += 1
            continue
        size, problem = _inspect(item, boundary)
        if problem == ("not-a-file", "folder") and not item.name.lower().endswith(IMAGE_SUFFIXES):
            raise DataError(
                f"source={_text(os.path.dirname(folder))}: the class folder {_text(os.path.basename(folder))} holds "
                f"the folder {_text(item.name)}; images must lie directly in class folders "
                f"(is the source {_text(folder)}?)"
            )
        files.append((item.name, size, problem))
    return sorted(files, key=lambda file: file[0]), litter


def _inspect(item: os.DirEntry[bytes], boundary: bytes | None) -> tuple[int, tuple[str, str] | None]:
    """Size of a regular file, or (0, why it is none that we may read)."""
    try:
        status = item.stat()
    except OSError as error:
        if item.is_symlink():
            return 0, ("link", "loop" if error.errno == errno.ELOOP else "leads nowhere")
        return 0, ("io", os.strerror(error.errno or 0))
    if item.is_symlink() and boundary is not None and not _inside(item.path, boundary):
        return 0, ("link", "leaves the source folder")
    if stat.S_ISDIR(status.st_mode):
        return 0, ("not-a-file", "folder")
    if not stat.S_ISREG(status.st_mode):
        return 0, ("not-a-file", "pipe, socket or device")
    return status.st_size, None


def _scan(folder: bytes) -> list[os.DirEntry[bytes]]:
    try:
        with os.scandir(folder) as items:
            return list(items)
    except OSError as error:
        raise DataError(f"source: cannot list {_text(folder)}: {error.strerror}; check its permissions") from error


def _inside(path: bytes, boundary: bytes) -> bool:
    return os.path.realpath(path).startswith(os.path.join(boundary, b""))


def _is_litter(name: bytes) -> bool:
    """Hidden files (.DS_Store, ._x) and what Windows and macOS leave behind."""
    return name.startswith(b".") or name in _LITTER


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
