"""What lies in folders beside images: links, pipes, odd names, wrong layouts; and lists of images."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from corpus_entries import JPEG, KEPT, PNG, BadFile, BadFolder, BadText
from images import jpeg_bytes, make_class_folders


def files() -> Iterator[BadFile]:
    """What can lie in a class folder. Names may be any bytes."""
    makes: dict[str, tuple[Callable[[bytes], object], str, int]] = {
        "inside.jpg": (lambda path: os.symlink(b"target", path), KEPT, 26),
        "outside.jpg": (lambda path: os.symlink(b"/etc/hostname", path), "link: leaves the source", 26),
        "nowhere.jpg": (lambda path: os.symlink(b"not there", path), "link: leads nowhere", 26),
        "loop.jpg": (lambda path: os.symlink(b"loop.jpg", path), "link: loop", 26),
        "pipe.jpg": (os.mkfifo, "not-a-file: pipe", 27),
        "socket.jpg": (_socket, "not-a-file: pipe, socket or device", 27),
        "device.jpg": (lambda path: os.symlink(b"/dev/zero", path), "link: leaves the source", 27),
        "folder.jpg": (os.mkdir, "not-a-file: folder", 27),
        "linked_folder.jpg": (lambda path: os.symlink(b".", path), "not-a-file: folder", 27),
    }
    for name, (make, fate, row) in makes.items():
        yield BadFile(name, fate, row, make, JPEG)
    yield BadFile("target", KEPT, 26, _writing(JPEG), JPEG)
    names = (
        b"a space.jpg", b"line\nend.jpg", b"quote'\".jpg", b"-dash.jpg", b"dots.v1.5.jpg", b"n" * 251 + b".jpg",
        "é.jpg".encode(), "e\u0301.jpg".encode(), "日本.jpg".encode(), b"latin \xe9.jpg", b"\xff\xfe\xfd.jpg",
        b"esc\x1b[31m.jpg", b"tab\t.jpg", b"back\\slash.jpg", b"%s%d{}.jpg", b"--20.jpg", b"$(reboot).jpg", b"con.jpg",
        "a.jpg".encode("utf-16-be").replace(b"\0", b"\x01"), b"~.jpg", b"*.jpg", b"\xe2\x80\xae.jpg", b"two..dots.jpg",
    )  # fmt: skip
    for number, raw in enumerate(names):
        picture = jpeg_bytes(100 + number, 40, 30)
        yield BadFile(os.fsdecode(raw), KEPT, 29, _writing(picture), picture)
    same = ("same.JPEG", "same.jpeg", "same.jpg", "SAME.JPG", "same.png", "same", "same.tar.jpg")
    for number, name in enumerate(same):
        picture = PNG if name.endswith("png") else jpeg_bytes(200 + number, 40, 30)
        yield BadFile(name, KEPT, 30, _writing(picture), picture)


def _writing(data: bytes) -> Callable[[bytes], None]:
    def make(path: bytes) -> None:
        with open(path, "wb") as stream:
            stream.write(data)

    return make


def _socket(path: bytes) -> None:
    """Bound by a short name: a socket's address has little room."""
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{folder}/".encode() + os.path.basename(path))
    os.close(folder)


def folders() -> Iterator[BadFolder]:
    """Folders that are no source, or hardly one."""

    def with_images(change: Callable[[Path], object]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            make_class_folders(folder, classes=1, per_class=2)
            change(folder)

        return make

    def unreadable(folder: Path) -> None:
        (folder / "cats").mkdir()
        os.symlink("gone", folder / "cats" / "1.jpg")

    def nested(folder: Path) -> None:
        make_class_folders(folder / "train", classes=2, per_class=1)

    cases: dict[str, tuple[Callable[[Path], object], str, int]] = {
        "nothing": (lambda folder: None, "no class folders in it", 31),
        "an empty class": (lambda folder: (folder / "cats").mkdir(), "1 class folders and not one image", 31),
        "an image beside": (
            with_images(lambda f: (f / "x.jpg").write_bytes(JPEG)),
            "lies beside the class folders",
            31,
        ),
        "one folder too high": (nested, "is the source .*train", 31),
        "a class that is a link": (with_images(lambda f: (f / "d").symlink_to("/etc")), "a link out of it", 26),
        "not one can be read": (unreadable, "1 of the 1 images seen so far were rejected", 28),
        "tars": (lambda folder: (folder / "0.tar").write_bytes(b""), "WebDataset shards are used where they are", 31),
        "half of the images bad": (_half_bad, "rejected, .* are allowed .*format", 31),
        "no folder": (shutil.rmtree, "no such file or folder", 31),
    }
    for name, (make, fate, row) in cases.items():
        yield BadFolder(name, fate, row, make)
    yield BadFolder("an empty class beside", KEPT, 31, with_images(lambda folder: (folder / "cats").mkdir()))
    yield BadFolder("litter", KEPT, 32, with_images(_litter))


def _half_bad(folder: Path) -> None:
    for number, file in enumerate(make_class_folders(folder, classes=1, per_class=4)):
        if number % 2:
            file.write_bytes(b"<html>404 Not Found</html>")


def _litter(folder: Path) -> None:
    """Of macOS and Windows."""
    (inside,) = folder.iterdir()
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._x.jpg", ".hidden.jpg"):
        (inside / name).write_bytes(b"litter")
    (folder / ".DS_Store").write_bytes(b"litter")
    (folder / "__MACOSX").mkdir()


def lists() -> Iterator[BadText]:
    """Lists of lines `PATH LABEL`."""
    cases = {
        "empty": (b"", "an empty list"),
        "only lines": (b"\n\n\n", "an empty list"),
        "leads out": (b"../../etc/x.jpg\t1\n", "line 1: .* leaves the root"),
        "absolute": (b"/etc/x.jpg\t1\n", "line 1: .* leaves the root"),
        "some without": (b"a.jpg\t1\nb.jpg\n", "1 of 2 lines have no label"),
        "twice": (b"a.jpg\t1\na.jpg\t2\n", "'a.jpg' is listed twice"),
        "twice in other words": (b"a.jpg\t1\n./a.jpg\t2\n", "'a.jpg' is listed twice"),
        "a label of a billion": (b"a.jpg\t1000000000\n", "class number 1,000,000,000 for 1 images"),
        "zero bytes": (b"a\0.jpg\t1\n", "line 1: .* leaves the root"),
    }
    for name, (data, fate) in cases.items():
        yield BadText(f"list: {name}", fate, 0, "list", data)
    kept = {
        "lines of Windows": b"a.jpg,1\r\nb.jpg,2\r\n",
        "with a mark": b"\xef\xbb\xbfa.jpg\t1\n",
        "negative": b"a.jpg -1\n",
        "names": b"a.jpg cat\nb.jpg dog\n",
        "not UTF-8": b"\xff.jpg\t1\n",
        "a blank in a name": b"a b.jpg\t1\n",
        "no end": b"a.jpg\t1",
    }
    for name, data in kept.items():
        yield BadText(f"list: {name}", KEPT, 0, "list", data)
