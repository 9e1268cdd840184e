"""Shards that somebody else made, used in place: every layout, every way to be wrong, the index, and training."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dying import die
from foreign_sets import (
    BLOCK,
    clip_set,
    data_end,
    jpeg_with_segments,
    numbered_set,
    patched,
    picture,
    samples,
    timm_set,
    write_tar,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from images import encode, jpeg_bytes, smooth_picture
from PIL import Image, PngImagePlugin
from runs import ROOT, TIMEOUT, environment, train
from tars import make_dataset

from engine.start_up import MissingInput, require_data
from recipes import registry
from recipes.schema import Data
from shards.augment import reference
from shards.augment.views import VIEWS
from shards.dataset import open_dataset
from shards.draws.masks import NO_MASK
from shards.foreign import grouping
from shards.foreign import samples as samples_of_tars
from shards.foreign.index_files import find_index, index_homes, parse_set
from shards.foreign.indexing import check_foreign, index_shards, look
from shards.foreign.samples import index_tar
from shards.foreign.tars import ForeignTar
from shards.image_headers import read_image_header
from shards.index import format_index
from shards.layout import DataError, MissingData, unescape_key
from shards.making.screening import Rejected
from shards.reading.loader import EvaluationLoader, TrainLoader


def index(place: Path, **options):
    return index_shards(place, **({"num_workers": 1} | options))


def opened(place: Path):
    index(place)
    return open_dataset(place)


def by_key(dataset) -> dict[str, tuple[int, bytes]]:
    return {
        key.decode(): (int(label), reference.read_image(dataset, number))
        for number, (key, label) in enumerate(zip(dataset.key, dataset.label, strict=True))
    }


def sizes_are_right(dataset) -> bool:
    stored = [Image.open(io.BytesIO(reference.read_image(dataset, n))).size for n in range(len(dataset))]
    return stored == list(zip(dataset.width.tolist(), dataset.height.tolist(), strict=True))


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- layouts --------------------------------------------------------------------------------------------------------


def test_timm_imagenet(tmp_path):
    place = timm_set(tmp_path / "wds")
    before = listing(place)
    dataset = opened(place)
    assert by_key(dataset) == {f"n{n % 5:08d}_{n}": (n % 5, picture(n)) for n in range(12)}
    assert dataset.classes == tuple(f"n{n:08d}" for n in range(5))  # from json's filename
    assert sizes_are_right(dataset) and [path.name for path in dataset.paths][-1] == "imagenet1k-train-0001.tar"
    after = listing(place)
    assert {name: after[name] for name in before} == before
    assert {Path(name).parts[0] for name in after.keys() - before.keys()} == {".maskwright"}


def test_timm_imagenet_with_both_splits_in_one_folder(tmp_path):
    """As the hub has it: mixing them would train on the validation set without a word."""
    place = timm_set(tmp_path / "wds", ("train", "validation"))
    with pytest.raises(DataError, match=r"several splits \(2 of train, 2 of validation\)") as caught:
        index(place)
    patterns = [place / "imagenet1k-train*.tar", place / "imagenet1k-validation*.tar"]
    assert all(repr(str(pattern)) in str(caught.value) for pattern in patterns)
    train_set, val_set = map(opened, patterns)
    assert (len(train_set), len(val_set)) == (12, 12)
    assert not set(by_key(train_set)) & set(by_key(val_set)) and train_set.fingerprint != val_set.fingerprint
    with pytest.raises(MissingData, match="without an index"):
        open_dataset(place)


def test_numbered_imagenet(tmp_path):
    dataset = opened(numbered_set(tmp_path / "wds"))
    assert [by_key(dataset)[f"n{n % 5:08d}_{n}"] for n in range(15)] == [(n % 5, picture(n)) for n in range(15)]
    assert dataset.classes == tuple("01234") and len(dataset.paths) == 3
    assert dataset.name(0) == "imagenet-train-000000.tar:n00000000_0"


def test_clip_benchmark(tmp_path):
    place = clip_set(tmp_path / "wds")
    with pytest.raises(MissingData, match="no tars in it, but in test, train"):
        index(place)
    dataset = opened(place / "train")
    assert by_key(dataset) == {f"s{n:07d}": (n % 5, picture(n, "WEBP")) for n in range(12)}
    assert dataset.classes == ("airplane", "great white shark", "cat", "deer", "tiger cat")
    assert sizes_are_right(dataset) and len(opened(place / "test")) == 12


@pytest.mark.parametrize(
    ("extension", "kind"),
    [("jpg", "JPEG"), ("jpeg", "JPEG"), ("JPEG", "JPEG"), ("JPG", "JPEG"), ("png", "PNG"), ("webp", "WEBP"),
     ("WebP", "WEBP"), ("jpg", "PNG"), ("png", "JPEG")],
)  # fmt: skip
def test_extensions_in_any_case_and_formats_by_content(tmp_path, extension, kind):
    write_tar(tmp_path / "a.tar", [(f"x{n}.{extension}", picture(n, kind)) for n in range(3)])
    found = index_tar(tmp_path / "a.tar").index.arrays["extension"].tolist()
    assert found == [{"JPEG": b"jpg", "PNG": b"png", "WEBP": b"webp"}[kind]] * 3
    assert sizes_are_right(opened(tmp_path))


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1700000000.25])  # with a fraction: pax headers before every member
def test_formats_of_tar_and_odd_names(tmp_path, tar_format, mtime):
    """Folders, long names, spaces, other scripts, hidden files of macOS; a name may hold any byte but controls."""
    keys = ["plain", "in/folder.d/name", "two words", "\u043a\u043e\u0442", "deep/" * 18 + "x" * 60, "a-b--c_d"]
    if tar_format != tarfile.USTAR_FORMAT:
        keys.append("y" * 200)
    members = [("._plain.jpg", b"AppleDouble")]
    for n, key in enumerate(keys):
        members += [(f"{key}.jpg", picture(n)), (".DS_Store", b"x"), (f"{key}.cls", b" %d\n" % n)]
    write_tar(tmp_path / "0.tar", members, tar_format, mtime=int(mtime) if tar_format != tarfile.PAX_FORMAT else mtime)
    dataset = opened(tmp_path)
    assert [reference.read_image(dataset, n) for n in range(len(keys))] == [picture(n) for n in range(len(keys))]
    assert dataset.label.tolist() == list(range(len(keys)))
    assert [unescape_key(key.decode()) for key in dataset.key] == keys
    with tarfile.open(tmp_path / "0.tar") as tar:  # pax and long-name headers belong to the file behind them
        images = [member for member in tar if member.name.endswith(".jpg") and member.name[0] != "."]
    found = index_tar(tmp_path / "0.tar").index.arrays
    assert found["start"].tolist() == [member.offset for member in images]
    assert found["offset"].tolist() == [member.offset_data for member in images]


def test_gnu_tar_itself(tmp_path):
    """What the `tar` of every machine writes, folders and owners included."""
    source = tmp_path / "source" / "some folder"
    source.mkdir(parents=True)
    for name, data in samples(range(4)):
        (source / name).write_bytes(data)
    for tar_format in ("gnu", "pax", "ustar", "v7"):
        out = tmp_path / tar_format
        out.mkdir()
        command = ["tar", f"--format={tar_format}", "--sort=name", "-cf", str(out / "0.tar"), "some folder"]
        subprocess.run(command, cwd=tmp_path / "source", check=True)
        assert [data for _, data in by_key(opened(out)).values()] == [picture(n) for n in range(4)]


def test_labels_in_json(tmp_path):
    told = [b'{"label": 2}', b'{"label": 0, "x": [1]}', b'\xef\xbb\xbf{"label": 1}']
    members = [[(f"{n}.json", text), (f"{n}.png", picture(n, "PNG"))] for n, text in enumerate(told)]
    write_tar(tmp_path / "0.tar", sum(members, []))
    dataset = opened(tmp_path)
    assert dataset.label.tolist() == [2, 0, 1] and dataset.classes == tuple("012")
    assert find_index(tmp_path).index.labels == "json"


def test_no_labels(tmp_path):
    parts = (("jpg", picture(0)), ("txt", b"a caption"), ("json", b'{"url": "x"}'))
    write_tar(tmp_path / "0.tar", [(f"{n}.{end}", data) for n in range(3) for end, data in parts])
    dataset = opened(tmp_path)
    assert dataset.label.tolist() == [-1, -1, -1] and dataset.classes == ()
    assert find_index(tmp_path).index.labels == "none"


def test_class_names(tmp_path):
    """A file given > classnames.txt > json > numbers; a label beyond the names is refused with its key."""
    place = timm_set(tmp_path / "wds")
    assert index(place).index.named_by == "json"
    (place / "classnames.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(DataError, match=r"n00000004_4 has the label 4, 4 class names are given"):
        index(place)
    (place / "classnames.txt").write_text("a\nb\n\nd\ne\n")
    with pytest.raises(DataError, match=r"classnames\.txt: line 3 is empty"):
        index(place)
    (place / "classnames.txt").write_text("a\nb\nc\nd\ne\nf\n")
    assert open_dataset(place).classes[0] == "n00000000"  # still as it was indexed
    assert opened(place).classes == tuple("abcdef")
    (tmp_path / "names").write_text("1st\n2nd\n3rd\n4th\n5th")
    assert index(place, class_names=tmp_path / "names").index.classes[1] == "2nd"


def test_a_damaged_json_does_no_harm_beside_cls(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", picture(1)), ("a.cls", b"0"), ("a.json", b'{"filename": "cat/')])
    assert index(tmp_path).index.classes == ("0",)


@pytest.mark.parametrize(
    "text",
    [
        '{"filename": "n01/n01_1.JPEG", "label": 3}',
        '{"label": 3, "filename":"a/b/n02/x.jpg"}',
        '{"filename": "one/x.jpg", "label": 3, "filename": "two/x.jpg"}',
        '{"old_filename": "n/x.jpg", "filename": "x.jpg"}',
        '{"about": {"filename": "n01/x.jpg"}, "filename": "n02/x.jpg"}',
        '{"about": {"filename": "n01/x.jpg"}}',
        '{"filename": "n\\u00e9/x.jpg"}',
        '{"filename": "n\u00e9/x.jpg"}',
        '{"a": "\\"filename\\": \\"n01/x.jpg\\"", "filename": "n02/x.jpg"}',
        '{"filename": 7}',
        '{"filename": "/x.jpg"}',
        "[]",
        "{",
    ],
)
def test_the_short_way_to_a_class_name_finds_the_same(tmp_path, text):
    """A pattern finds it in plain objects, a parser in all others."""
    write_tar(tmp_path / "0.tar", [("a.jpg", picture(1)), ("a.cls", b"0"), ("a.json", text.encode())])
    try:
        filename = json.loads(text)["filename"]
        folder = filename.rpartition("/")[0].rpartition("/")[2]
    except (ValueError, TypeError, KeyError, AttributeError):
        folder = ""
    assert index_tar(tmp_path / "0.tar").class_names == {0: folder}


def test_json_that_names_a_class_twice_gives_numbers(tmp_path):
    members = []
    for n, (label, folder) in enumerate([(0, "cat"), (1, "dog"), (0, "cow")]):
        about = b'{"label": %d, "filename": "%s/x.jpg"}' % (label, folder.encode())
        members += [(f"{n}.jpg", picture(n)), (f"{n}.json", about)]
    write_tar(tmp_path / "0.tar", members[:4])
    assert index(tmp_path).index.classes == ("cat", "dog")
    write_tar(tmp_path / "1.tar", members[4:])
    assert index(tmp_path).index.classes == ("0", "1")


def test_shuffled_order_and_any_names_of_tars(tmp_path):
    """Members of a sample side by side are all that is needed; tars in links, as the hub's cache has them."""
    numbers = np.random.default_rng(0).permutation(9).tolist()
    (tmp_path / "blobs").mkdir()
    write_tar(tmp_path / "blobs" / "3f2a", samples(numbers[:5]))
    write_tar(tmp_path / "b l\u00f6b.tar", samples(numbers[5:]))
    (tmp_path / "a.tar").symlink_to("blobs/3f2a")
    dataset = opened(tmp_path)
    assert [key.decode() for key in dataset.key] == [f"s{n:07d}" for n in numbers]


# --- what is refused (most of it: tests/corpus_tars.py) ---------------------------------------------------------------

GOOD = [("a.jpg", picture(1)), ("a.cls", b"1"), ("b.jpg", picture(2)), ("b.cls", b"2")]


def test_a_sparse_file_in_pax_is_refused(tmp_path):
    """GNU tar's modern form: a regular file, whose data are a map and then the parts."""
    with open(tmp_path / "a.jpg", "wb") as file:
        file.truncate(2**20)
        file.seek(2**19)
        file.write(picture(1))
    command = ["tar", "--sparse", "--format=pax", "-cf", "0.tar", "a.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(DataError, match="sparse"):
        index(tmp_path)


def tar_bytes(path: Path) -> bytes:
    return write_tar(path, samples(range(4))).read_bytes()


HEADER = 2 * BLOCK  # of the second file, s0000000.jpg


def test_a_folder_or_a_pipe_called_tar_is_refused(tmp_path):
    (tmp_path / "0.tar").mkdir()
    with pytest.raises(DataError, match=r"0\.tar: not a file"):
        index(tmp_path)
    (tmp_path / "0.tar").rmdir()
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(DataError, match=r"0\.tar: not a file"):
        index(tmp_path)
    (tmp_path / "0.tar").unlink()
    (tmp_path / "0.tar").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"0\.tar: No such file"):
        index(tmp_path)


def test_every_cut_is_found(tmp_path):
    """At every block and at odd places: no cut gives a shorter set."""
    tar = tmp_path / "0.tar"
    whole = tar_bytes(tar)
    end = data_end(tar) + 2 * BLOCK
    for length in [*range(0, end, BLOCK), *range(7, end, 389)]:
        tar.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"0\.tar"):
            index_tar(tar)
    tar.write_bytes(whole[:end])  # tarfile pads to 10,240 bytes; that is no part of a tar
    assert len(index_tar(tar).index) == 4


def test_every_changed_byte_of_a_header_is_found(tmp_path):
    tar = tmp_path / "0.tar"
    whole = tar_bytes(tar)
    rng = np.random.default_rng(0)
    for at in range(HEADER, HEADER + BLOCK):
        changed = bytearray(whole)
        changed[at] ^= int(rng.integers(1, 256))
        tar.write_bytes(changed)
        with pytest.raises(DataError, match=r"0\.tar"):
            index_tar(tar)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_give_an_index_or_our_error(tmp_path_factory, data):
    """Blocks cut, doubled, swapped and overwritten: an answer or a DataError, and never another exception."""
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    pax = data.draw(st.booleans())
    mtime = 0.5 if pax else 0
    tar = write_tar(folder / "0.tar", samples(range(2)), tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT, mtime=mtime)
    blocks = [tar.read_bytes()[at : at + BLOCK] for at in range(0, data_end(tar) + 2 * BLOCK, BLOCK)]
    for _ in range(data.draw(st.integers(1, 3))):
        one, other = (data.draw(st.integers(0, len(blocks) - 1)) for _ in range(2))
        blocks[one] = data.draw(st.sampled_from([b"", blocks[other], bytes(BLOCK), blocks[one] * 2, blocks[one][:-7]]))
    at, new = data.draw(st.integers(0, 3000)), data.draw(st.binary(max_size=14))
    content = b"".join(blocks)
    if data.draw(st.booleans()):
        content = content[:at] + new + content[at + len(new) :]
    tar.write_bytes(content)
    try:
        found = index_tar(tar).index
    except DataError as error:
        assert "0.tar" in str(error)
    else:
        with tarfile.open(tar) as plain:  # whatever is accepted, Python's tarfile reads the same
            images = [member for member in plain if member.name.endswith(".jpg")]
            assert {m.name: (m.offset_data, m.size) for m in images} == {
                f"{k.decode()}.jpg": (o, s)
                for k, o, s in zip(*(found.arrays[n].tolist() for n in ("key", "offset", "size")), strict=True)
            } | {m.name: (m.offset_data, m.size) for m in images if any(m.name == r.path for r in found.rejected)}


PLAIN = samples(range(20))
ODD = [("y.cls", b"1"), ("y.txt", b"y"), ("y.jpg", picture(1))]


def described(n: int) -> list[tuple[str, bytes]]:
    about = b'{"filename": "n%d/x.jpg"}' % (n % 2)
    return [(f"{n:03d}.cls", b"%d" % (n % 2)), (f"{n:03d}.jpg", picture(n)), (f"{n:03d}.json", about)]


LAYOUTS = {
    "plain": PLAIN,
    "upper case": [(name.replace("jpg", "JPG"), data) for name, data in PLAIN],
    "with white space": [(name, b" 3\n" if name.endswith("cls") else data) for name, data in PLAIN],
    "hidden files": [member for one in PLAIN for member in (one, (".x", b"x"), (f"._{one[0]}", b"x"))],
    "another layout later": [*samples(range(9)), *ODD, *samples(range(10, 20))],
    "bad images": [(name, b"<html>404 Not Found" if name.endswith("5.jpg") else data) for name, data in PLAIN],
    "two classes": [member for n in range(20) for member in described(n)],
    "labels in json": [
        member for n in range(20) for member in ((f"{n}.jpg", picture(n)), (f"{n}.json", b'{"label": 3}'))
    ],
    "no labels": [member for member in PLAIN if member[0].endswith("jpg")],
    "folders": [(f"x/{name}", data) for name, data in PLAIN],
    "folders with dots": [(f"x.y/{name}", data) for name, data in PLAIN],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("most", [1, 5, 4096])
def test_samples_taken_together_and_one_by_one_are_the_same(tmp_path, monkeypatch, layout, most):
    """However the tar is cut into stretches."""
    tar = write_tar(tmp_path / "0.tar", LAYOUTS[layout])
    stretches = ForeignTar.stretches
    monkeypatch.setattr(ForeignTar, "stretches", lambda self, begin=0, _=0: stretches(self, begin, most))
    together = index_tar(tar)
    monkeypatch.setattr(grouping, "_run", lambda *_: None)
    alone = index_tar(tar)
    assert format_index(together.index) == format_index(alone.index) and len(alone.index) >= 16
    assert vars(together) | {"index": 0} == vars(alone) | {"index": 0}


def test_plain_samples_are_taken_together(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "0.tar", samples(range(20)), tarfile.PAX_FORMAT, mtime=0.5)
    monkeypatch.setattr(samples_of_tars, "_add", lambda *_: pytest.fail("one by one"))
    monkeypatch.setattr(grouping, "_begin_of_last", len)
    assert len(index_tar(tar).index) == 20


def test_binary_sizes_and_pax_sizes_are_read(tmp_path):
    """What programs write for files from 8 GiB on, in small: GNU's binary size, and pax's `size`."""
    tar = tmp_path / "0.tar"
    whole, image = tar_bytes(tar), picture(0)
    tar.write_bytes(patched(whole, HEADER, 124, b"\x80" + len(image).to_bytes(11, "big")))
    assert index_tar(tar).index.arrays["size"][0] == len(image)
    info = tarfile.TarInfo("a.jpg")
    info.size, info.pax_headers = len(image), {"size": str(len(image)), "comment": "x"}
    record = info.create_pax_header({**info.get_info(), "size": 0}, "utf-8")
    tar.write_bytes(record + image + bytes(-len(image) % BLOCK + 2 * BLOCK))
    found = index_tar(tar).index.arrays
    assert (found["size"][0], found["start"][0], found["offset"][0]) == (len(image), 0, len(record))


# --- images ---------------------------------------------------------------------------------------------------------


def header_of(image: bytes, head: int = 512) -> tuple[str, int, int]:
    return read_image_header(image[:head], len(image), lambda begin, length: image[begin : begin + length])


def still_images() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    colour = smooth_picture(rng, 37, 21)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned: it is not
    large = PngImagePlugin.PngInfo()
    large.add_text("comment", "x" * 5000)
    images = {
        f"jpeg {mode} {' '.join(options)}": encode(colour.convert(mode), "JPEG", **options)
        for mode in ("RGB", "L", "CMYK")
        for options in ({}, {"progressive": True}, {"quality": 100, "subsampling": 0}, {"exif": exif.tobytes()})
    }
    images |= {f"png {mode}": encode(colour.convert(mode), "PNG") for mode in ("RGB", "L", "P", "RGBA", "LA", "1")}
    images["png 16"] = encode(Image.fromarray(np.full((21, 37), 40000, np.uint16)), "PNG")
    images["png text"] = encode(colour, "PNG", pnginfo=large)
    images |= {
        f"webp {mode} {' '.join(options)}": encode(colour.convert(mode), "WEBP", **options)
        for mode in ("RGB", "RGBA")
        for options in ({}, {"lossless": True}, {"exif": exif.tobytes()})
    }
    images["jpeg far"] = jpeg_with_segments([b"Exif" + bytes(60_000), b"x" * 900, b"", b"ICC" * 300])
    images["jpeg comment"] = jpeg_with_segments([b"\xff\xc0\0\x11\x08\0\1\0\1\3" * 9])  # looks like another header
    images["jpeg tail"] = jpeg_bytes(1, 37, 21) + b"trailing garbage"
    images["jpeg fill"] = jpeg_bytes(1, 37, 21).replace(b"\xff\xdb", b"\xff\xff\xdb", 1)
    return images


@pytest.mark.parametrize("name", still_images())
def test_image_headers_say_what_pillow_says(name):
    image = still_images()[name]
    with Image.open(io.BytesIO(image)) as truth:
        expected = ({"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[truth.format], truth.height, truth.width)
    assert header_of(image) == expected
    assert header_of(image, 40) == expected and header_of(image, 3) == expected


def frames(kind: str) -> bytes:
    rng = np.random.default_rng(0)
    first, *others = (smooth_picture(rng, 20, 20) for _ in range(3))
    return encode(first, kind, save_all=True, append_images=others)


def frame_size(height: int, width: int) -> bytes:
    jpeg = jpeg_bytes(1)
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + jpeg[at + 4 :]


REJECTED = {
    "empty": (b"", "empty"),
    "a byte": (b"\xff", "header"),
    "two marks": (b"\xff\xd8\xff\xd9" + bytes(20), "header"),
    "text": (b"<html>404 Not Found</html>", "format"),
    "gif": (frames("GIF"), "unsupported"),
    "cut in the header": (jpeg_bytes(1)[:100], "header"),
    "no pixels": (frame_size(0, 0), "header"),
    "30,000 squared": (frame_size(30000, 30000), "too-large"),
    "png 30,000 squared": (encode(Image.new("1", (30000, 30000)), "PNG"), "too-large"),
    "png beyond": (picture(1, "PNG")[:16] + b"\x7f\xff\xff\xff" * 2 + picture(1, "PNG")[24:], "too-large"),
    "animated webp": (frames("WEBP"), "animated"),
    "animated png": (frames("PNG"), "animated"),
    "cut webp": (picture(1, "WEBP")[:25], "header"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_images_that_cannot_be_trained_on_are_left_out_and_listed(tmp_path, name):
    bad, reason = REJECTED[name]
    with pytest.raises(Rejected) as caught:
        header_of(bad)
    assert caught.value.reason == reason
    write_tar(tmp_path / "0.tar", [*GOOD, ("c.jpg", bad), ("c.cls", b"0"), ("d.jpg", picture(4)), ("d.cls", b"0")])
    with pytest.raises(DataError, match=rf"1 of 4 images are unusable, allowed are 0.001 .*0.tar:c.jpg \({reason}: "):
        index(tmp_path)
    report = index(tmp_path, max_bad_fraction=0.25)
    ((tar, rejection),) = report.rejected
    assert (tar, rejection.path, rejection.reason) == ("0.tar", "c.jpg", reason)
    assert report.index.rejected == {reason: 1} and report.samples == {"0.tar": 4}
    dataset = open_dataset(tmp_path)
    assert [key.decode() for key in dataset.key] == ["a", "b", "d"] and sizes_are_right(dataset)


def test_a_tar_without_one_usable_image_is_refused(tmp_path):
    write_tar(tmp_path / "0.tar", samples(range(30)))
    write_tar(tmp_path / "1.tar", [("x.jpg", b"<html>404 Not Found</html>"), ("x.cls", b"0")])
    with pytest.raises(DataError, match=r"1\.tar: not one usable image \(1 rejected, first x\.jpg: format"):
        index(tmp_path, max_bad_fraction=0.5)


# --- layouts that are no set of shards ------------------------------------------------------------------------------


def test_wrong_layouts_are_told_by_what_was_found(tmp_path):
    with pytest.raises(MissingData, match="no such folder"):
        look(tmp_path / "nowhere")
    (tmp_path / "n01").mkdir()
    for name in ("a.parquet", "b.parquet", "c.txt"):
        (tmp_path / name).touch()
    with pytest.raises(MissingData, match=r"no tars in it; found are 2 \.parquet, 1 \.txt and 1 folders; expected is"):
        look(tmp_path)
    with pytest.raises(MissingData, match=r"no tars that match x\*\.tar in it"):
        look(tmp_path / "x*.tar")
    write_tar(tmp_path / "f.tar", [("a.npy", b"1"), ("a.txt", b"2"), ("b.npy", b"1"), ("b.txt", b"2")])
    with pytest.raises(DataError, match="a: has no images, found are npy txt; expected are one image"):
        look(tmp_path)


def test_a_look_reads_only_the_beginning(tmp_path):
    """A wrong layout is named at once, however long the tar: here its end is not even there."""
    tar = write_tar(tmp_path / "0.tar", samples(range(200)))
    tar.write_bytes(tar.read_bytes()[:-20_000])
    _, components = look(tmp_path)
    assert components == ["cls jpg"] * 5
    with pytest.raises(DataError, match="cut"):
        index(tmp_path)


def test_shards_of_ours_need_no_index(shards, tmp_path):
    with pytest.raises(DataError, match="shards of ours"):
        look(shards / "train")
    (tmp_path / "plan.json").touch()
    with pytest.raises(DataError, match="not finished"):
        look(tmp_path)


def test_a_key_in_two_tars(tmp_path):
    write_tar(tmp_path / "0.tar", samples(range(4)))
    write_tar(tmp_path / "1.tar", samples(range(3, 6)))
    with pytest.raises(DataError, match=r"1\.tar:s0000003: the same key as in 0\.tar \(1 keys"):
        index(tmp_path)


def test_labels_in_one_tar_and_none_in_another(tmp_path):
    write_tar(tmp_path / "0.tar", samples(range(4)))
    write_tar(tmp_path / "1.tar", [("x.jpg", picture(1))])
    with pytest.raises(DataError, match=r"0\.tar:s0000000: label in cls, .*1\.tar:x: label in none"):
        index(tmp_path)


def test_a_process_that_dies_says_what_to_do(tmp_path, monkeypatch):
    place = numbered_set(tmp_path / "wds")
    index(place)
    monkeypatch.setattr("shards.foreign.indexing.make_index", die)
    with pytest.raises(RuntimeError, match="a worker process died .* fewer --workers"):
        index(place, num_workers=2)
    monkeypatch.setattr("shards.foreign.indexing.check_tar", die)
    findings = check_foreign(place, num_workers=2)
    assert [finding.file for finding in findings] == [path.name for path in sorted(place.glob("*.tar"))]
    assert all("the process died that read this tar" in finding.problem for finding in findings)


def test_all_damaged_tars_are_named_at_once(tmp_path):
    for number in range(5):
        write_tar(tmp_path / f"{number}.tar", samples(range(10 * number, 10 * number + 3)))
    for number in (1, 3, 4):
        (tmp_path / f"{number}.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"(?s)1\.tar: an empty.*3\.tar: an empty.*4\.tar: an empty") as caught:
        index(tmp_path, num_workers=2)
    assert str(caught.value).count("\n") == 2


# --- the index ------------------------------------------------------------------------------------------------------


def test_one_and_two_workers_write_the_same(tmp_path):
    place = numbered_set(tmp_path / "wds", tars=5)
    calls = []
    index(place, progress=lambda *counts: calls.append(counts))
    one = listing(place / ".maskwright")
    assert calls == [(done, 5) for done in range(1, 6)]
    shutil.rmtree(place / ".maskwright")
    index(place, num_workers=2)
    assert listing(place / ".maskwright") == one and len(one) == 6
    assert all(path.stat().st_mode & 0o777 == 0o444 for path in (place / ".maskwright").iterdir())


def test_a_rerun_writes_only_what_is_missing_or_stale(tmp_path):
    place = numbered_set(tmp_path / "wds", tars=4)
    assert index(place).made == 4
    home = place / ".maskwright"
    before = {path.name: path.stat().st_ino for path in home.iterdir()}
    assert index(place).made == 0
    (home / "imagenet-train-000002.tar.npz").unlink()
    (home / "imagenet-train-000003.tar.npz").chmod(0o644)
    (home / "imagenet-train-000003.tar.npz").write_bytes(b"half")
    tar = place / "imagenet-train-000001.tar"
    tar.write_bytes(patched(tar.read_bytes(), 0, 136, b"00000000007\0"))  # another time: same size, another header
    assert index(place).made == 3
    after = {path.name: path.stat().st_ino for path in home.iterdir()}
    assert {name for name in before if before[name] == after[name]} == {"imagenet-train-000000.tar.npz"}
    assert len(open_dataset(place)) == 20


def test_without_its_last_file_an_index_is_none(tmp_path):
    """As after kill -9: the JSON file is written last."""
    place = numbered_set(tmp_path / "wds")
    index(place)
    (place / ".maskwright" / "index.json").unlink()
    with pytest.raises(MissingData, match=r"3 tars without an index; run python tools/index_shards\.py"):
        open_dataset(place)


def test_a_folder_that_cannot_be_written_is_indexed_in_the_cache(tmp_path, monkeypatch):
    place = numbered_set(tmp_path / "wds")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (place / ".maskwright").touch()  # a file there: a folder cannot be made, by nobody
    report = index(place)
    assert report.home == index_homes(place)[1] and tmp_path / "cache" in report.home.parents
    assert len(open_dataset(place)) == 15
    (tmp_path / "link").symlink_to(place)
    assert len(open_dataset(tmp_path / "link")) == 15  # the same folder by another path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(MissingData, match="without an index"):
        open_dataset(place)
    (tmp_path / "elsewhere").touch()
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        index(place)


def test_the_newer_of_two_indexes_counts(tmp_path, monkeypatch):
    """Else a folder that was indexed and then became read-only could never be indexed again."""
    place = numbered_set(tmp_path / "wds")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own, cache = index_homes(place)
    index(place)
    write_tar(place / "imagenet-train-000000.tar", samples(range(7)))
    with pytest.raises(DataError, match="imagenet-train-000000.tar has"):
        open_dataset(place)
    own.rename(tmp_path / "kept")
    own.touch()
    index(place)
    own.unlink()
    (tmp_path / "kept").rename(own)
    os.utime(cache / "index.json")
    assert len(open_dataset(place)) == 17


def test_the_fingerprint_is_of_the_data(tmp_path):
    one, two = (numbered_set(tmp_path / name) for name in ("one", "two"))
    (two / "nshards.txt").write_text("3")
    for name in (path.name for path in one.iterdir()):
        shutil.copy(one / name, two / name)  # TarWriter writes the time
    assert opened(one).fingerprint == opened(two).fingerprint
    write_tar(two / "imagenet-train-000002.tar", samples(range(90, 95)))
    assert opened(one).fingerprint != opened(two).fingerprint


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_other_text_is_taken_for_an_index(tmp_path_factory, data):
    place = tmp_path_factory.getbasetemp() / "strict"
    if not place.exists():
        index(numbered_set(place))
    text = (place / ".maskwright" / "index.json").read_text()
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.sampled_from(["", "0", '"', "[", "\n", "nan", text[at] * 2])) + text[at + 1 :]
    if changed != text:
        with pytest.raises(DataError, match="x.json: not a usable index"):
            parse_set(changed, Path("x.json"), place)


@pytest.mark.parametrize("text", ["", "7", "[]", "[" * 100_000, "{}", '{"tars": [{"name": "../x.tar"}]}', "\xe4"])
def test_foreign_texts_are_refused(tmp_path, text):
    place = numbered_set(tmp_path / "wds")
    index(place)
    file = place / ".maskwright" / "index.json"
    file.chmod(0o644)
    file.write_text(text)
    with pytest.raises(DataError, match=r"index\.json: not a usable index.*tools/index_shards\.py"):
        open_dataset(place)


def test_names_in_the_index_do_not_lead_out(tmp_path):
    place = numbered_set(tmp_path / "wds")
    found = index(place).index
    for bad in (replace(found, tars=()), replace(found, classes=(1, 2))):
        with pytest.raises(DataError, match="tars, and names of classes"):
            parse_set(bad.text(), Path("x.json"), place)
    for change in ({"name": "../x.tar"}, {"name": "x"}, {"samples": -1}, {"bytes": 0}, {"npz_sha256": "f"}):
        bad = replace(found, tars=(replace(found.tars[0], **change), *found.tars[1:]))
        with pytest.raises(DataError, match="not a usable index"):
            parse_set(bad.text(), Path("x.json"), place)


# --- stale and foreign indexes --------------------------------------------------------------------------------------


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    for path, data in ((one, second), (other, first)):
        path.unlink()
        path.write_bytes(data)


def tars_of(place: Path) -> list[Path]:
    return sorted(place.glob("*.tar"))


def npz(tar: Path) -> Path:
    return tar.parent / ".maskwright" / f"{tar.name}.npz"


CHANGES = {
    "a tar more": (lambda t: write_tar(t[0].parent / "x.tar", samples(range(90, 92))), r"x\.tar: extra"),
    "a tar less": (lambda t: t[1].unlink(), r"imagenet-train-000001\.tar: missing"),
    "a tar cut": (lambda t: t[1].write_bytes(t[1].read_bytes()[:-512]), r"000001\.tar has [\d,]+ bytes, not"),
    "a tar grown": (lambda t: t[1].write_bytes(t[1].read_bytes() + bytes(512)), r"000001\.tar has [\d,]+ bytes, not"),
    "tars swapped": (lambda t: swap(t[0], t[1]), r"000000\.tar changed since it was indexed: no n00000000_0"),
    "another tar of the size": (
        lambda t: write_tar(t[1], [(f"z{name}", data) for name, data in samples(range(5, 10))]),
        r"000001\.tar changed since it was indexed",
    ),
    "an index less": (lambda t: npz(t[1]).unlink(), r"000001\.tar\.npz No such file"),
    "indexes swapped": (lambda t: swap(npz(t[0]), npz(t[1])), r"000000\.tar\.npz is another index"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_stale_and_foreign_indexes_are_refused(tmp_path, case):
    change, message = CHANGES[case]
    place = numbered_set(tmp_path / "wds")
    for tar in tars_of(place):  # of one size, so that only their content tells them apart
        tar.write_bytes(tar.read_bytes().ljust(40_960, b"\0"))
    index(place)
    change(tars_of(place))
    for tar in tars_of(place):
        if case == "another tar of the size":
            tar.write_bytes(tar.read_bytes().ljust(40_960, b"\0"))
    with pytest.raises(DataError, match=rf"(data\.train=)?.*{message}.*run python tools/index_shards\.py"):
        open_dataset(place, setting="data.train")
    assert check_foreign(place, num_workers=1)
    if case != "a tar cut":
        assert index(place) and check_foreign(place, num_workers=1) == []


@pytest.fixture
def checked(tmp_path) -> tuple[Path, Path, bytes]:
    place = numbered_set(tmp_path / "wds")
    index(place)
    assert check_foreign(place, num_workers=1) == [] == check_foreign(place, decode=True, num_workers=2)
    tar = tars_of(place)[1]
    return place, tar, tar.read_bytes()


def found(place: Path, **options) -> list[tuple[str, str]]:
    return [(finding.file, finding.key) for finding in check_foreign(place, num_workers=1, **options)]


def test_a_changed_label_is_found_with_its_key(checked):
    """The same headers and sizes; only the whole check sees it."""
    place, tar, whole = checked
    with tarfile.open(tar) as members:
        label = members.getmember("n00000002_7.cls")
    tar.write_bytes(whole[: label.offset_data] + b"4" + whole[label.offset_data + 1 :])
    assert found(place) == [(tar.name, "n00000002_7")]
    assert "label 2, the tar 4" in check_foreign(place, num_workers=1)[0].problem
    with pytest.raises(DataError, match="1 problems, first imagenet-train-000001.tar:n00000002_7"):
        open_dataset(place, check="full")


def test_changed_headers_are_found(checked):
    place, tar, whole = checked
    tar.write_bytes(patched(whole, 0, 136, b"00000000007\0"))
    assert [problem for *_, problem in check_foreign(place, num_workers=1)] == [
        "its headers changed since it was indexed, though not where its samples lie"
    ]
    tar.write_bytes(patched(whole, 0, 5, b"9", checksum=False))
    assert found(place)[-1] == (tar.name, "")


def test_a_damaged_image_is_found_by_decoding(checked):
    """Zeros in the place of the last third of one image."""
    place, tar, whole = checked
    with tarfile.open(tar) as members:
        image = members.getmember("n00000003_8.jpg")
    middle, end = image.offset_data + image.size * 2 // 3, image.offset_data + image.size
    tar.write_bytes(whole[:middle] + bytes(end - middle) + whole[end:])
    assert found(place) == []
    assert found(place, decode=True) == [(tar.name, "n00000003_8")]


def test_an_index_that_is_damaged_is_a_finding(checked):
    place, tar, _ = checked
    npz(tar).unlink()
    npz(tar).write_bytes(b"PK")
    assert found(place) == [(tar.name, "")]
    file = place / ".maskwright" / "index.json"
    file.unlink()
    with pytest.raises(MissingData):
        check_foreign(place)
    file.write_text("{}")
    assert found(place) == [("index.json", "")]


# --- hints ----------------------------------------------------------------------------------------------------------


def tool(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "index_shards.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(cwd), timeout=TIMEOUT)


def test_the_tool_says_what_it_found_and_what_is_missing(tmp_path):
    place = timm_set(tmp_path / "wds", tars=4)
    (place / "imagenet1k-train-0001.tar").unlink()
    other = [*samples(range(50, 53)), ("x.jpg", b"<html>404 Not Found</html>"), ("x.cls", b"1")]
    write_tar(place / "imagenet1k-train-0002.tar", other)
    (place / "nshards.txt").write_text("7\n")
    done = tool(place, "--max-bad-fraction", "0.1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in (
        "3 tars, the first samples hold [cls jpg json]", "samples     15 in 3 tars (3 indexed now",
        "components  [cls jpg json] 12, [cls jpg] 4", "5 classes from cls, their names from json",
        "left out    1 of 16 images (format 1)", "left out    imagenet1k-train-0002.tar:x.jpg: format: not an image",
        f"index       {place}/.maskwright", f"deepspeed engine/train.py --recipe vit_b_mae data.train={place}",
        "1 numbers are missing between the tars: imagenet1k-train-0001.tar",
        "nshards.txt promises 7 tars, 3 are here",
        "_info.json names 1 more tars of this split: imagenet1k-train-0001.tar",
        "_info.json promises 6 samples in imagenet1k-train-0002.tar, it holds 4",
    ):  # fmt: skip
        assert text in done.stdout, done.stdout
    assert tool(place, "--check", "--decode", cwd=tmp_path).returncode == 0
    (place / "imagenet1k-train-0003.tar").unlink()
    done = tool(place, "--check", cwd=tmp_path)
    assert done.returncode == 1 and "imagenet1k-train-0003.tar: missing" in done.stdout


def test_the_tool_refuses_in_one_line(tmp_path):
    place = timm_set(tmp_path / "wds", ("train", "validation"))
    for arguments, message in (
        ([place], "holds several splits"),
        ([tmp_path / "nowhere"], "no such folder"),
        ([place / "*train*.tar", "--workers", "0"], "workers=0: at least 1"),
        ([place / "*train*.tar", "--max-bad-fraction", "2"], "max_bad_fraction=2.0"),
        ([place, "--decode"], "--check only"),
        ([place, "--check"], "without an index"),
    ):
        done = tool(*arguments, cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (place / ".maskwright").exists() or not list((place / ".maskwright").iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user for a folder that cannot be written")
def test_the_tool_as_a_user_who_may_only_read(tmp_path):
    place = numbered_set(tmp_path / "wds")
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    before = listing(place)
    script = f"import os, sys; os.environ['XDG_CACHE_HOME'] = {str(cache)!r}; sys.argv = ['x', {str(place)!r}];"
    script += f"sys.path.insert(0, {str(ROOT)!r}); from tools.index_shards import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, user=65534, group=65534, cwd="/"
    )
    if "ModuleNotFoundError" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("another user may not read this repository")
    assert done.returncode == 0 and str(cache) in done.stdout, done.stderr
    assert listing(place) == before


# --- training -------------------------------------------------------------------------------------------------------


def test_the_loader_serves_the_pixels_of_the_reference(tmp_path):
    """DALI reads the tars in place, through lines of ours: pax headers, odd names and all."""
    members = []
    for n in range(23):
        members += [(f"d/{n} x.JPG", jpeg_bytes(n, 40 + n, 60 - n)), (f"d/{n} x.cls", b"%d" % (n % 3))]
    write_tar(tmp_path / "a b.tar", members[:24], tarfile.PAX_FORMAT, mtime=0.5)
    write_tar(tmp_path / "b.tar", members[24:], tarfile.GNU_FORMAT)
    dataset, data = opened(tmp_path), Data(image_size=32, threads=1)
    options = {"view": "pretrain_mae", "data": data, "seed": 3, "global_batch": 8, "micro_batch": 4, "rank": 0}
    loader = TrainLoader(
        dataset, **options, world_size=1, masks=NO_MASK, device=torch.device("cpu"), total_steps=4, check_sources=True
    )
    seen = set()
    with loader:
        for number, batch in enumerate(loader):
            ids = batch.sample_ids.numpy()
            (expected,) = VIEWS["pretrain_mae"].referenced(dataset, data, 3, loader.order.epoch(number // 2), ids)
            assert np.abs(batch.views[0].numpy() - expected).mean() < 0.02
            assert batch.labels.tolist() == [int(dataset.key[i].split(b"--2f")[1].split(b"--20")[0]) % 3 for i in ids]
            seen |= set(ids.tolist())
    assert len(seen) >= 16 and {0, 1} == set(dataset.tar[list(seen)])


def test_foreign_and_own_indexes_of_one_tar_agree(tmp_path):
    """Against offsets that Python's tarfile gives."""
    encoded = [jpeg_bytes(n, 30 + n, 50 - n) for n in range(9)]
    plain = make_dataset(tmp_path, encoded, per_tar=4)
    dataset = opened(tmp_path)
    for name in ("tar", "offset", "size", "height", "width", "key"):
        np.testing.assert_array_equal(getattr(dataset, name), getattr(plain, name), err_msg=name)
    data = Data(image_size=32, threads=1)
    with EvaluationLoader(dataset, np.arange(9), data=data, batch=4, device=torch.device("cpu")) as served:
        assert [i for batch in served for i in batch.sample_ids.tolist()] == list(range(9))


def test_a_run_asks_for_an_index_and_takes_a_pattern(tmp_path):
    place = timm_set(tmp_path / "wds", ("train", "validation"))
    pattern = place / "imagenet1k-train*.tar"
    plain = registry.load("vit_ti_mae_demo")
    recipe = replace(plain, data=replace(plain.data, train=str(pattern)))
    with pytest.raises(MissingInput, match=r"(?s)2 tars without.*index_shards\.py '.*imagenet1k-train\*\.tar'"):
        require_data("x", recipe)
    index(pattern)
    assert require_data("x", recipe) == recipe
    (place / "plan.json").touch()  # a conversion of ours that was not finished is no set of somebody else
    with pytest.raises(MissingInput, match="holds no shards of ours"):
        require_data("x", replace(plain, data=replace(plain.data, train=str(place))))


@pytest.mark.long  # the loader's tests have a short form
def test_training_on_foreign_shards(tmp_path):
    """The whole program: refused with the command, indexed by that command, trained, k-NN on the other split."""
    place = clip_set(tmp_path / "wds", tars=3, per_tar=16)
    (place / "test").rename(place / "val")
    refused = train(tmp_path / "refused", f"data.train={place}/train", "run.steps=2", succeeds=False)
    assert refused.returncode == 2 and "3 tars without an index" in refused.output
    line = next(line for line in refused.output.splitlines() if "tools/index_shards.py" in line)
    for split in ("train", "val"):
        command = line.replace(str(place / "train"), str(place / split)).split()
        subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, timeout=TIMEOUT, cwd="/")
    run = train(
        tmp_path / "run", f"data.train={place}/train", "run.steps=4", "run.eval_every=4", launcher="deepspeed", ranks=2
    )
    assert f"data        {place}/train: 48 samples in 3 shards" in run.output
    assert f"k-NN        {place}/val: 48 samples" in run.output
    assert len(run.losses) == 4 and {line["step"] for line in run.evaluations} == {0, 4}
