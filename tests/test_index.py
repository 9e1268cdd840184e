"""Indexes and manifests: what is written is read back, and nothing else is believed."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.array_archives import read_array, read_arrays
from shards.dali_index import Member, format_dali_index, parse_dali_index
from shards.dataset import open_dataset
from shards.index import ShardIndex, format_index, parse_index
from shards.layout import DataError, MissingData, Rejection, parse_manifest
from shards.making.conversion import convert
from shards.making.planning import Options, make_plan
from shards.sources.class_folders import list_class_folders
from tests.folders import contents
from tests.foreign_sets import patched
from tests.images import make_class_folders


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make_class_folders(folder, classes=3, per_class=5)
    return folder


@pytest.fixture
def shards(source: Path, tmp_path: Path, made: dict[str, bytes]) -> Path:
    """A fresh copy that a test may damage."""
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("made")
    convert(make_plan(list_class_folders(source), Options(samples_per_shard=4)), folder, num_workers=1)
    return contents(folder)


# --- our index ---


def example() -> ShardIndex:
    arrays = {
        "start": np.array([0, 4096], "<i8"),
        "offset": np.array([1536, 5632], "<i8"),
        "size": np.array([1000, 513], "<i8"),
        "label": np.array([3, 0], "<i4"),
        "height": np.array([10, 20], "<i4"),
        "width": np.array([30, 40], "<i4"),
        "crc32": np.array([1, 2**32 - 1], "<u4"),
        "key": np.array([b"a", b"long-key_2"]),
        "extension": np.array([b"jpg", b"webp"]),
    }
    return ShardIndex(10240, "0" * 64, "1" * 64, "2" * 64, arrays, (Rejection("a/\udcff.jpg", "empty", "0 bytes", ""),))


def test_index_round_trip():
    data = format_index(example())
    again = parse_index(data, Path("x.npz"))
    assert (again.tar_size, again.tar_sha256, again.rejected) == (10240, "0" * 64, example().rejected)
    assert all((again.arrays[name] == array).all() for name, array in example().arrays.items())
    assert format_index(again) == data


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("offset", 1537),
        ("offset", -512),
        ("offset", 2**62),
        ("size", 0),
        ("size", -5),
        ("size", 2**62),
        ("start", -512),
        ("start", 2048),
        ("label", -2),
        ("height", 0),
        ("width", -3),
        ("key", b"a b"),
        ("key", b""),
        ("extension", b"gif"),
    ],
)
def test_impossible_numbers_name_the_sample(name, value):
    arrays = {key: array.copy() for key, array in example().arrays.items()}
    arrays[name][0] = value
    with pytest.raises(DataError, match=r"x\.npz: .* sample 0, key") as caught:
        parse_index(format_index(replace(example(), arrays=arrays)), Path("x.npz"))
    assert "make_shards" in str(caught.value)


def repacked(**changes: np.ndarray | None) -> bytes:
    with np.load(io.BytesIO(format_index(example()))) as archive:
        arrays = {**archive, **changes}
    stream = io.BytesIO()
    np.savez(stream, **{name: array for name, array in arrays.items() if array is not None})
    return stream.getvalue()


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": None},
        {"meta": None},
        {"extra": np.zeros(2)},
        {"offset": np.array([1536.0, 5632.0])},
        {"offset": np.array([1536, 5632], ">i8")},
        {"label": np.array([1, 2, 3], "<i4")},
        {"offset": np.zeros((2, 1), "<i8")},
        {"key": np.array([b"a", None], dtype=object)},
        {"meta": np.frombuffer(b'{"tar_size": "7"}', np.uint8)},
        {"meta": np.frombuffer(b"[" * 100_000, np.uint8)},
        {"rejected": np.frombuffer(b"[[1, 2, 3, 4]]", np.uint8)},
        {"rejected": np.frombuffer(b"7", np.uint8)},
    ],
)
def test_foreign_arrays_are_refused(changes):
    with pytest.raises(DataError, match=r"x\.npz"):
        parse_index(repacked(**changes), Path("x.npz"))


@given(st.data())
def test_any_bytes_give_an_index_or_our_error(data):
    good = format_index(example())
    at = data.draw(st.integers(0, len(good) - 1))
    changed = data.draw(st.sampled_from([good[:at], good[:at] + data.draw(st.binary(max_size=9)) + good[at + 1 :]]))
    try:
        parse_index(changed, Path("x.npz"))
    except DataError as error:
        assert "x.npz" in str(error)


# --- DALI's index ---

words = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="./"), min_size=1, max_size=8)


@st.composite
def dali_samples(draw: st.DrawFn) -> list[tuple[Member, ...]]:
    samples = []
    for key in draw(st.lists(words, min_size=1, max_size=4)):
        extensions = draw(st.lists(words, min_size=1, max_size=3, unique=True))
        numbers = st.tuples(st.integers(0, 10**9), st.integers(1, 10**9))
        samples.append(tuple(Member(e, 512 * n, size, f"{key}.{e}") for e in extensions for n, size in [draw(numbers)]))
    return samples


@given(dali_samples(), st.sampled_from(["v1.0", "v1.1", "v1.2"]))
def test_dali_index_round_trip(samples, version):
    text = format_dali_index(samples)
    if version != "v1.2":
        samples = [tuple(member._replace(name="") for member in sample) for sample in samples]
        lines = [" ".join(f"{m.extension} {m.offset} {m.size}" for m in sample) for sample in samples]
        text = "\n".join([f"{version} {len(lines)}", *lines, ""])
    assert parse_dali_index(text) == samples


@given(st.text() | st.text(st.sampled_from("v1.20 \nacls5-jpg\x00"), max_size=40).map(lambda tail: f"v1.2 1\n{tail}\n"))
def test_dali_index_of_any_text(text):
    try:
        for sample in parse_dali_index(text, "some.idx", tar_size=10**6):
            assert all(m.size > 0 and 0 <= m.offset <= 10**6 - m.size and m.offset % 512 == 0 for m in sample)
    except DataError as error:
        assert str(error).startswith("some.idx: ")


GOOD = "v1.2 1\ncls 512 1 a.cls jpg 1536 900 a.jpg\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        GOOD.replace("v1.2", "v9.9"),
        GOOD.replace("v1.2 1", "v1.2 2"),
        GOOD.replace("v1.2 1", "v1.2 -1"),
        GOOD.replace("v1.2 1", "v1.2 100000000000000"),
        "v1.2 0\n",
        GOOD[:-1],
        GOOD[:-8] + "\n",
        GOOD.replace("900", "-900"),
        GOOD.replace("900", "0"),
        GOOD.replace("900", "100000000000"),
        GOOD.replace("900", "9" * 40),
        GOOD.replace("900", "٩٠٠"),
        GOOD.replace("1536", "-512"),
        GOOD.replace("1536", "1537"),
        GOOD.replace("1536", "9728"),
        GOOD.replace("a.jpg", "a b.jpg"),
        GOOD.replace("a.jpg", "b.jpg"),
        GOOD.replace("a.jpg", "a.png"),
        GOOD.replace("a.jpg", "a\0.jpg"),
        GOOD.replace("jpg", "cls"),
        GOOD.replace("cls 512", "cls  512"),
        "v1.1 1\ncls 512 1 a.cls\n",
    ],
)
def test_dali_index_refuses(text):
    assert len(parse_dali_index(GOOD, "a.idx", 10240)[0]) == 2
    with pytest.raises(DataError, match=r"^a\.idx: "):
        parse_dali_index(text, "a.idx", 10240)


# --- the manifest ---


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"samples": 15', '"samples": 16'),
        ('"samples": 15', '"samples": -15'),
        ('"samples": 15', '"samples": 15, "samples": 15'),
        ('"samples": 15', '"samples": NaN'),
        ('"version": 1', '"version": 2'),
        ('"version": 1', '"version":  1'),
        ("shard-000001", "../../etc/x"),
        ('"n00000001"', '"n00000002"'),
        ('"split": "train"', '"split": 5'),
        ('"split": "train",', ""),
        ("{", "[" * 100_000),
        ("\n}\n", "\n}"),
    ],
)
def test_manifest_is_read_strictly(made, old, new):
    text = made["manifest.json"].decode()
    assert parse_manifest(text, Path("manifest.json")).samples == 15
    assert old in text
    with pytest.raises(DataError, match=r"^manifest\.json: not a usable manifest"):
        parse_manifest(text.replace(old, new, 1), Path("manifest.json"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ("split", "samples", "classes", "shards", "quarantined", "source", "plan", "files", "format", "checksum")


@given(st.text() | st.tuples(st.sampled_from(FIELDS), json_values))
def test_manifest_of_anything_is_our_error(made_text, change):
    if isinstance(change, tuple):
        change = json.dumps({**json.loads(made_text), change[0]: change[1]})
    with pytest.raises(DataError):
        parse_manifest(change, Path("manifest.json"))


@pytest.fixture(scope="module")
def made_text(made) -> str:
    return made["manifest.json"].decode()


# --- opening ---


def test_dataset_is_the_source(source, shards):
    calls = []
    dataset = open_dataset(shards, progress=lambda *counts: calls.append(counts))
    assert len(dataset) == 15 and len(dataset.paths) == 4 and calls[-1] == (4, 4)
    assert dataset.classes == ("n00000000", "n00000001", "n00000002")
    files = {path.stem: path for path in source.glob("*/*")}
    for position in range(len(dataset)):
        file = files.pop(dataset.key[position].decode())
        with open(dataset.paths[dataset.tar[position]], "rb") as tar:
            tar.seek(int(dataset.offset[position]))
            assert tar.read(int(dataset.size[position])) == file.read_bytes()
        assert Image.open(file).size == (dataset.width[position], dataset.height[position])
        assert dataset.classes[dataset.label[position]] == file.parent.name
    assert not files and dataset.name(0).startswith("shard-000000.tar:n0000000")
    types = {name: getattr(dataset, name).dtype.str for name in ("tar", "offset", "size", "label", "height", "width")}
    assert types == dict(tar="<i4", offset="<i8", size="<i8", label="<i4", height="<i4", width="<i4")


def test_fingerprint_is_of_the_data(source, shards, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "seed1"
    convert(make_plan(list_class_folders(source), Options(samples_per_shard=4, seed=1)), other, num_workers=1)
    assert open_dataset(shards).fingerprint == open_dataset(shards, check="full").fingerprint
    assert open_dataset(other).fingerprint != open_dataset(shards).fingerprint


def test_missing_data_says_what_to_do(shards, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.train=.*no such folder.*make_shards"):
        open_dataset(tmp_path / "nowhere", setting="data.train")
    (shards / "manifest.json").unlink()
    with pytest.raises(MissingData, match="conversion was not finished"):
        open_dataset(shards)
    (shards / "plan.json").unlink()
    with pytest.raises(MissingData, match="no finished shards"):
        open_dataset(shards)


def damage_tar(shards: Path) -> None:
    (shards / "shard-000001.tar").write_bytes((shards / "shard-000001.tar").read_bytes()[:-512])


def another_tar(shards: Path) -> None:
    """Of the same size: as if two shards were exchanged, and all labels wrong."""
    tar = shards / "shard-000001.tar"
    tar.write_bytes(patched(tar.read_bytes(), 0, 0, b"x"))


def swap_indexes(shards: Path) -> None:
    one, two = shards / "shard-000001.npz", shards / "shard-000002.npz"
    (first, second) = one.read_bytes(), two.read_bytes()
    one.write_bytes(second), two.write_bytes(first)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: (s / "shard-000001.tar").unlink(), r"hold 11 \(1 shards short: 000001: shard-000001.tar No such"),
        (lambda s: (s / "shard-000003.npz").unlink(), r"hold 12 \(1 shards short: 000003: shard-000003.npz No such"),
        (damage_tar, r"hold 11 \(1 shards short: 000001: shard-000001.tar has [\d,]+ bytes, not"),
        (another_tar, r"hold 11 \(1 shards short: 000001: shard-000001.tar is another tar .*: no n0\d+_\d+ at byte 0"),
        (swap_indexes, r"hold 7 \(2 shards short: 000001: shard-000001.npz is another index"),
    ],
)
def test_quick_check_names_the_shard(shards, damage, message):
    damage(shards)
    with pytest.raises(DataError, match=rf"^data\.val=.*manifest promises 15 samples, indexes {message}") as caught:
        open_dataset(shards, setting="data.val")
    assert str(caught.value).endswith(f"run tools/verify_shards.py {shards}")


def test_full_check_reads_the_tars(shards):
    tar = shards / "shard-000002.tar"
    data = bytearray(tar.read_bytes())
    data[2000] ^= 1
    tar.write_bytes(data)
    open_dataset(shards)
    with pytest.raises(DataError, match=r"shard-000002\.tar:n0000000"):
        open_dataset(shards, check="full")


# --- archives of arrays ---


def test_arrays_are_read_as_numpy_reads_them():
    data = format_index(example())
    with np.load(io.BytesIO(data)) as archive:
        theirs = {name: archive[name] for name in archive.files}
    ours = read_arrays(data)
    assert list(ours) == list(theirs)
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape)
        assert (ours[name] == array).all() and (read_array(data, name) == array).all()


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2)), np.array(7), np.array([None]), np.array(["é"]), np.zeros(2, ">i8")]
)
def test_arrays_of_another_form_are_refused(array):
    stream = io.BytesIO()
    np.savez(stream, good=np.arange(3), bad=array)
    with pytest.raises(ValueError, match="bad.npy: not an array of one dimension"):
        read_arrays(stream.getvalue())
    assert read_array(stream.getvalue(), "good").tolist() == [0, 1, 2]


def test_compressed_arrays_are_refused():
    stream = io.BytesIO()
    np.savez_compressed(stream, good=np.arange(3))
    with pytest.raises(ValueError, match="good.npy: an array stored without compression"):
        read_arrays(stream.getvalue())


@pytest.mark.parametrize("length", [2, 4, 10**12])
def test_an_array_of_another_length_than_its_header_says_is_refused(length):
    content = io.BytesIO()
    np.save(content, np.arange(3))
    header = content.getvalue().replace(b"(3,), }" + b" " * len(str(length)), b"(%d,), } " % length)
    assert header != content.getvalue()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x.npy", header)
    with pytest.raises(ValueError, match=f"x.npy: 24 bytes, not {length:,} of int64"):
        read_arrays(stream.getvalue())


def test_indexes_are_read_without_the_parser_of_python(monkeypatch):
    """`ast.literal_eval` of CPython 3.11 fails now and then in several threads; a good index then looked damaged."""
    data = format_index(example())

    def fails(text: str) -> None:
        raise SystemError("AST constructor recursion depth mismatch (before=45, after=42)")

    monkeypatch.setattr("ast.literal_eval", fails)
    with pytest.raises(SystemError), np.load(io.BytesIO(data)) as archive:
        archive["label"]
    assert len(parse_index(data, Path("x.npz"))) == 2
