"""Tars that somebody else made: damaged, odd or of more than one meaning, each with what indexing says or serves."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from corpus_entries import KEPT, BadTar
from foreign_sets import BLOCK, Members, patched, picture, samples, with_checksum, write_tar

HEADER = 2 * BLOCK  # of the second file of `_plain`, an image
END = bytes(2 * BLOCK)


def tars() -> Iterator[BadTar]:
    """All of them."""
    yield from _refused()
    yield from _damaged()
    yield from _kinds()
    yield from _odd_but_whole()
    yield from _labels()


def _plain() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in samples(range(4)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


GOOD = [("a.jpg", picture(1)), ("a.cls", b"1"), ("b.jpg", picture(2)), ("b.cls", b"2")]
FOUR = {f"s{n:07d}": (n % 5, picture(n)) for n in range(4)}


def _written(tar_format: int, path: Path) -> None:
    """With a fraction in the times: Python's pax writes a header of its own for it."""
    write_tar(path, samples(range(4)), tar_format, mtime=1e9 + (tar_format == tarfile.PAX_FORMAT) / 4)


def _of(members: Members) -> Callable[[Path], object]:
    kept = list(members)
    return lambda path: write_tar(path, kept)


def _bytes(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def member(
    name: bytes, data: bytes = b"", kind: bytes = b"0", *, size: bytes | None = None, magic: bytes = b"ustar\x0000"
) -> bytes:
    """A header with its data, all fields as given."""
    fields = ((0, name[:100]), (100, b"0000644\0"), (108, b"0000000\0"), (116, b"0000000\0"), (136, b"00000000000\0"))
    header = bytearray(BLOCK)
    for at, field in (*fields, (124, size or b"%011o\0" % len(data)), (156, kind), (257, magic)):
        header[at : at + len(field)] = field
    return with_checksum(bytes(header)) + data + bytes(-len(data) % BLOCK)


def pax(records: Mapping[str, bytes], kind: bytes = b"x") -> bytes:
    """A pax header with these records."""
    content = b""
    for name, value in records.items():
        line = b" " + name.encode() + b"=" + value + b"\n"
        length = len(line) + 1
        while len(str(length)) + len(line) != length:
            length = len(str(length)) + len(line)
        content += str(length).encode() + line
    return member(b"pax", content, kind)


def long_name(name: bytes) -> bytes:
    """GNU's header for a long name."""
    return member(b"././@LongLink", name, b"L")


def _refused() -> Iterator[BadTar]:
    """Whole tars whose samples could be read in more than one way, or in none."""
    gif = ("c.gif", b"GIF89a")
    cases: dict[str, tuple[list[tuple[str, bytes]], str, int]] = {
        "same key, adjacent": (GOOD + [("b.jpg", picture(3)), ("b.cls", b"3")], "b: two jpg, at bytes", 42),
        "same key, far": (GOOD + [("a.jpg", picture(3)), ("a.cls", b"3")], "a: the same key at bytes 0 and", 42),
        "a component twice": (GOOD + [("b.cls", b"3")], "b: two cls, at bytes", 42),
        "jpg and JPG": (GOOD + [("b.JPG", picture(3))], "b: two jpg, at bytes", 42),
        "images first": ([GOOD[0], GOOD[2], GOOD[1], GOOD[3]], "a: the same key .* not side by side", 43),
        "no image": (GOOD + [("c.cls", b"3")], "c: has no images, found are cls; expected are one image", 40),
        "two images": (GOOD + [("b.png", picture(3))], "b: has 2 images, found are cls jpg png", 0),
        "jpg and jpeg": (GOOD + [("b.jpeg", picture(3))], "b: has 2 images", 0),
        "two endings": (GOOD + [("c.jpg.jpg", picture(3)), ("c.cls", b"3")], "c: has no images", 0),
        "key with a dot": (GOOD + [("n2.v1.jpg", picture(3)), ("n2.v1.cls", b"3")], r"n2: has no images.*v1\.jpg", 43),
        "no extension": (GOOD + [("README", b"read me")], "README: a file without extension", 45),
        "a dot at the end": (GOOD + [("c.", b"")], "c: a file without extension", 45),
        "a gif": (GOOD + [gif, ("c.cls", b"0")], "c: has no images, found are cls gif", 22),
        "33 files": (GOOD + [(f"c.x{n}", b"") for n in range(32)] + [("c.jpg", picture(3))], "c: has 33 files", 0),
        "an empty image": (GOOD + [("c.jpg", b""), ("c.cls", b"0")], r":c\.jpg \(empty", 1),
        "text for an image": (GOOD + [("c.jpg", b"<html>404</html>"), ("c.cls", b"0")], r":c\.jpg \(format", 3),
        "not one usable image": ([("x.jpg", b"<html>404</html>"), ("x.cls", b"0")], "not one usable image", 0),
        "no label in one": (GOOD[:3], "a: label in cls, .*b: label in none", 40),
        "leads out": ([("../../x.jpg", picture(1))], r"b'\.\./\.\./x\.jpg': names must be relative", 44),
        "leads out later": ([("a/../x.jpg", picture(1))], "names must be relative", 44),
        "absolute": ([("/etc/x.jpg", picture(1))], "names must be relative", 44),
        "dot": ([("./x.jpg", picture(1))], "names must be relative", 44),
        "two slashes": ([("a//x.jpg", picture(1))], "names must be relative", 44),
        "a line end in the name": ([("a\nb.jpg", picture(1))], "names must be relative, .* control characters", 29),
        "an escape in the name": ([("a\x1b[2Jb.jpg", picture(1))], "control characters", 29),
        "a utf-16 name": ([("a\0.\0j\0p\0g\0", picture(1))], "a: a file without extension", 29),
        "no samples": ([(".hidden.jpg", b"x")], "no samples in it", 0),
        "nothing": ([], "no samples in it", 0),
    }  # fmt: skip
    for name, (members, fate, row) in cases.items():
        yield BadTar(name, rf"bad\.tar.*{fate}", row, _of(members))
    twice = [("x.jpg", picture(1)), ("x.cls", b"1")]
    yield BadTar("a key in two tars", r"same\.tar:x.*same key as in bad\.tar", 42, lambda path: [
        write_tar(path, twice), write_tar(path.with_name("same.tar"), twice)
    ])  # fmt: skip


def _damaged() -> Iterator[BadTar]:
    """Tars in which bytes are wrong, missing or too many."""
    plain = _plain()
    end = len(plain) - len(plain) % BLOCK
    while plain[end - BLOCK : end] == bytes(BLOCK):
        end -= BLOCK
    cases = {
        "cut in the data": (plain[: HEADER + BLOCK + 300], "was cut", 33),
        "cut in a header": (plain[: HEADER + 100], "cut inside the header at byte 1,024", 33),
        "cut in the padding": (plain[: BLOCK + 1], "cut in the padding at byte 513", 33),
        "cut between two files": (plain[:end], "without the end-of-archive blocks: it may have been cut", 33),
        "cut between two samples": (plain[:HEADER], "without the end-of-archive blocks", 33),
        "cut in the end": (plain[: end + BLOCK], "half of the end-of-archive mark", 33),
        "two tars in one": (plain + plain, "more data after its end", 34),
        "a block of zeros inside": (plain[:HEADER] + bytes(BLOCK) + plain[HEADER:], "more data after its end", 34),
        "two blocks of zeros inside": (plain[:HEADER] + END + plain[HEADER:], "more data after its end", 34),
        "garbage at the end": (plain + b"x", "more data after its end", 34),
        "ones at the end": (plain[:end] + END + b"\xff" * BLOCK, "more data after its end", 34),
        "ones inside": (plain[:HEADER] + b"\xff" * BLOCK + plain[HEADER:], "header is damaged", 35),
        "checksum": (patched(plain, HEADER, 0, b"t", checksum=False), "byte 1,024: .* header is damaged", 35),
        "kind, without checksum": (patched(plain, HEADER, 156, b"x", checksum=False), "header is damaged", 35),
        "size, without checksum": (patched(plain, HEADER, 126, b"7", checksum=False), "header is damaged", 35),
        "magic": (patched(plain, HEADER, 257, b"USTAR"), "header is damaged", 35),
        "negative size": (patched(plain, HEADER, 124, b"-0000000010\0"), "no number, or a negative one", 35),
        "negative size, binary": (patched(plain, HEADER, 124, b"\xff" * 12), "no number, or a negative one", 35),
        "huge size": (patched(plain, HEADER, 124, b"77777777777\0"), "8,589,934,591 bytes, .* it was cut", 35),
        "huge size, binary": (patched(plain, HEADER, 124, b"\x80" + b"\x7f" * 11), "it was cut", 35),
        "size one too large": (patched(plain, HEADER, 124, b"%011o\0" % (BLOCK + 3)), r"s0000000 .*damaged", 35),
        "size of zero": (patched(plain, HEADER, 124, b"00000000000\0"), "header is damaged", 35),
        "size with underscore": (patched(plain, HEADER, 128, b"_"), "not in octal digits", 35),
        "size with a prefix": (patched(plain, HEADER, 124, b"0o"), "not in octal digits", 35),
        "size with a nine": (patched(plain, HEADER, 126, b"9"), "no number", 35),
        "no size": (patched(plain, HEADER, 124, b" " * 12), "no number", 35),
        "compressed": (gzip.compress(plain, mtime=0), "compressed; unpack it once", 36),
        "zstd": (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed", 36),
        "no tar": (b"<html>404</html>" * 200, "header is damaged", 36),
        "a zip": (b"PK\3\4" + bytes(2000), "header is damaged", 36),
        "a few bytes": (b"<html>404</html>", "16 bytes are no tar", 36),
        "empty": (b"", "an empty file", 36),
    }
    for name, (data, fate, row) in cases.items():
        yield BadTar(name, rf"bad\.tar.*{fate}", row, _bytes(data))
    yield BadTar("a folder", r"bad\.tar: not a file", 36, lambda path: path.mkdir())
    yield BadTar("a link to nowhere", r"bad\.tar: No such file", 36, lambda path: path.symlink_to("nowhere"))


def _kinds() -> Iterator[BadTar]:
    """Members that are no regular files, and extended headers that are wrong."""
    one = member(b"a.jpg", picture(1))
    kinds = {
        "a hard link": b"1", "a symbolic link": b"2", "a device": b"3", "a pipe": b"6", "a sparse file": b"S",
        "a link": b"K",
    }  # fmt: skip
    kinds |= {f"of the unknown kind '{kind}'": kind.encode() for kind in "VMDX"}  # of GNU and Solaris
    for what, kind in kinds.items():
        bad = member(b"b.jpg", b"", kind)
        yield BadTar(what, rf"bad\.tar.*file b'b\.jpg' is {what}", 45, _bytes(one + bad + END))
    cases = {
        "a folder with data": (member(b"d/", b"x", b"5"), "is a folder with data"),
        "pax without a file": (pax({"path": b"x.jpg"}), "an extended header at the end"),
        "pax that leads out": (pax({"path": b"../../x.jpg"}) + one, "names must be relative"),
        "pax without a name": (pax({"path": b""}) + one, "names must be relative"),
        "pax of other lengths": (member(b"pax", b"99 path=x.jpg\n", b"x") + one, "a pax header that cannot be read"),
        "pax of garbage": (member(b"pax", b"\xff" * 90, b"x") + one, "a pax header that cannot be read"),
        "pax with a size beyond": (pax({"size": b"99999999999"}) + one, "a pax header with the size"),
        "pax with a size of words": (pax({"size": b"many"}) + one, "a pax header with the size"),
        "pax that is sparse": (pax({"GNU.sparse.major": b"1"}) + one, "the next file is sparse"),
        "pax of a megabyte": (pax({"comment": b"x" * 2**20}) + one, "an extended header of"),
        "a name for all files": (pax({"path": b"x.jpg"}, b"g") + one, "a global pax header with a name"),
        "a name of 1,100 bytes": (long_name(b"x" * 1100 + b".jpg") + one, "a name of 1,104 bytes"),
        "a long name without a file": (long_name(b"x" * 200 + b".jpg"), "an extended header at the end"),
    }
    for name, (data, fate) in cases.items():
        yield BadTar(name, rf"bad\.tar.*{fate}", 45, _bytes(data + END))


def _odd_but_whole() -> Iterator[BadTar]:
    """What must be read, however odd it is."""
    image, one = picture(1), member(b"a.jpg", picture(1))
    odd = b"00000000000%o" % len(image)
    alone = {"a": (-1, image)}
    renamed = {"n" * 150: (-1, image)}
    long = b"n" * 150 + b".jpg"
    yield BadTar("plain", KEPT, 0, _bytes(_plain()), FOUR)
    yield BadTar("padded with zeros", KEPT, 0, _bytes(_plain() + bytes(2**20)), FOUR)
    yield BadTar("odd end", KEPT, 0, _bytes(one + END + bytes(100)), alone)
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        yield BadTar(f"format {tar_format} of Python", KEPT, 0, partial(_written, tar_format), FOUR)
    attributes = {"path": long, "mtime": b"1.5", "SCHILY.xattr.user": b"\0\xff"}
    in_folder = {"d--2fa": (-1, image)}
    cases = {
        "v7": (member(b"a.jpg", image, b"\0", magic=b""), alone),
        "v7 with a folder": (
            member(b"d/", b"", b"\0", magic=b"") + member(b"d/a.jpg", image, b"\0", magic=b""), in_folder
        ),
        "contiguous": (member(b"a.jpg", image, b"7"), alone),
        "size with spaces before": (member(b"a.jpg", image, size=b"%11o " % len(image)), alone),
        "size with spaces behind": (member(b"a.jpg", image, size=b"%o" % len(image) + b" " * 6 + b"\0"), alone),
        "size without an end": (member(b"a.jpg", image, size=odd[-12:]), alone),
        "size in binary": (member(b"a.jpg", image, size=b"\x80" + len(image).to_bytes(11, "big")), alone),
        "size in pax": (pax({"size": b"%d" % len(image)}) + member(b"a.jpg", image, size=b"00000000000\0"), alone),
        "pax name": (pax({"path": long}) + member(b"short.jpg", image), renamed),
        "pax name and attributes": (pax(attributes) + member(b"s.jpg", image), renamed),
        "pax for all": (pax({"comment": b"git"}, b"g") + one, alone),
        "pax link name": (pax({"linkpath": b"nowhere"}) + one, alone),
        "gnu long name": (long_name(long + b"\0") + member(b"short.jpg", image), renamed),
        "gnu long name without an end": (long_name(long) + member(b"short.jpg", image), renamed),
        "folders": (member(b"d/", b"", b"5") + member(b"d/a.jpg", image), in_folder),
        "litter": (member(b".DS_Store", b"x") + member(b"._a.jpg", b"x") + one, alone),
        "Latin-1": (member(b"caf\xe9.jpg", image), {"caf--e9": (-1, image)}),
        "a space": (member(b"a b.jpg", image), {"a--20b": (-1, image)}),
        "two cases": (one + member(b"A.jpg", picture(2)), alone | {"A": (-1, picture(2))}),
        "other files beside": (one + member(b"a.txt", b"a cat") + member(b"a.npy", b""), alone),
    }  # fmt: skip
    for name, (data, found) in cases.items():
        yield BadTar(name, KEPT, 0, _bytes(data + END), found)
    composed, decomposed = member("é.jpg".encode(), image), member("e\u0301.jpg".encode(), picture(2))
    both = {"--c3--a9": (-1, image), "e--cc--81": (-1, picture(2))}
    yield BadTar("composed and decomposed", KEPT, 29, _bytes(composed + decomposed + END), both)


def _labels() -> Iterator[BadTar]:
    """What stands in `cls` and in json's `label`."""
    for text, label in {b"7": 7, b"07": 7, b" 7\n": 7, b"7\r\n": 7, b"\t7": 7, b"000007": 7}.items():
        found = {"a": (1, picture(1)), "b": (label, picture(2))}
        yield BadTar(f"cls is {text!r}", KEPT, 41, _of([*GOOD[:3], ("b.cls", text)]), found)
    words = (
        b"cat",
        b"C",
        b"",
        b" \n",
        b"3.0",
        b"-1",
        b"+1",
        b"1e3",
        b"0x7",
        b"1_0",
        b"1 2",
        b"7\0",
        b"1" * 30,
        b"1" * 99,
    )
    others = (b"\xef\xbb\xbf7", "\u0663".encode(), "\uff17".encode(), "7".encode("utf-16"), (7).to_bytes(8, "little"))
    for text in (*words, *others):
        fate = r"bad\.tar:b: cls (is b|has 99 bytes)"
        yield BadTar(f"cls is {text!r}", fate, 41, _of([*GOOD[:3], ("b.cls", text)]))
    wrong = (
        '"1"', "true", "-1", "1.0", "1e3", "NaN", "1000000", "[1]", "{}", '1, "label": 2', "1e999", "1" * 5000,
    )  # fmt: skip
    for text in wrong:
        fate = r"bad\.tar:a: json('s label is| cannot be read| has)"
        json_text = b'{"label": %s}' % text.encode()
        yield BadTar(f"json's label is {text[:20]}", fate, 41, _of([("a.jpg", picture(1)), ("a.json", json_text)]))
    right = {'{"label": 7}': 7, '{"label": null}': -1, "{}": -1, '\ufeff{"label": 7}': 7}
    right |= {'{"x": {"label": 1}, "label": 7}': 7}
    for text, label in right.items():
        found = {"a": (label, picture(1))}
        yield BadTar(f"json is {text}", KEPT, 41, _of([("a.jpg", picture(1)), ("a.json", text.encode())]), found)
    sizes = {"cut": b'{"label": 1', "deep": b"[" * 100_000, "a list": b"[1]", "large": b" " * 2**21, "nothing": b""}
    for what, text in sizes.items():
        yield BadTar(f"json is {what}", r"bad\.tar:a: json", 41, _of([("a.jpg", picture(1)), ("a.json", text)]))
    mixed = [*GOOD[:3], ("b.json", b'{"label": 2}')]
    yield BadTar("cls in one, json in another", "a: label in cls, .*b: label in json", 40, _of(mixed))
