"""Conversion: what goes in comes out, with the same bytes on every way there, and nothing bad gets through."""

from __future__ import annotations

import fcntl
import io
import json
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.layout import MAX_KEY, DataError, MissingData, escape_key, read_manifest, unescape_key
from shards.making.conversion import ConversionFailed, convert
from shards.making.planning import Options, Plan, make_plan, sample_keys
from shards.making.screener import Rules, Screener
from shards.making.screening import Rejected, refused_by_training_decoder, screen
from shards.making.writer import make_shard
from shards.sources import class_folders
from shards.sources.class_folders import list_class_folders
from shards.sources.listing import Entry
from tests.corpus_bytes import ADOBE, put, without_segment
from tests.folders import contents
from tests.images import encode, jpeg_bytes, make_class_folders, smooth_picture
from tools.make_shards import main


def plan_of(source: Path, **options: object) -> Plan:
    return make_plan(list_class_folders(source), Options(**{"samples_per_shard": 4, **options}))


def quarantine(folder: Path) -> dict[str, str]:
    entries = map(json.loads, (folder / "quarantine.jsonl").read_text().splitlines())
    return {entry["path"]: entry["reason"] for entry in entries}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make_class_folders(folder, classes=3, per_class=6)
    return folder


@pytest.fixture(scope="module")
def shards(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "shards"
    convert(plan_of(source), folder, num_workers=2)
    return folder


# --- what readers of other people find in our shards ---


def originals(source: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in source.glob("*/*")}


def tars(folder: Path) -> list[str]:
    return [str(folder / record.file("tar")) for record in read_manifest(folder).shards]


def test_webdataset_reads_the_original_bytes(source, shards):
    import webdataset

    found = {}
    for sample in webdataset.WebDataset(tars(shards), shardshuffle=False, empty_check=False):
        (image,) = (sample[name] for name in ("jpg", "png", "webp") if name in sample)
        found[sample["__key__"]] = image
        about = json.loads(sample["json"])
        assert (source / about["filename"]).read_bytes() == image
        assert sorted(path.name for path in source.iterdir())[int(sample["cls"])] == about["filename"].split("/")[0]
        assert about["label"] == int(sample["cls"])
        assert Image.open(io.BytesIO(image)).size == (about["width"], about["height"])
    assert found == originals(source)


def test_timm_reads_the_folder(source, shards):
    from engine.models.vision_library import import_torchvision

    import_torchvision()  # timm needs it
    from timm.data import create_dataset

    dataset = create_dataset("wds/", root=str(shards), split="train")
    labels = Counter(label for _, label in dataset)
    assert len(dataset) == 18 and labels == {0: 6, 1: 6, 2: 6}


def test_dali_reads_with_our_idx(source, shards):
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=6, num_threads=1, device_id=None)
    def read():
        indexes = [name.removesuffix("tar") + "idx" for name in tars(shards)]
        return tuple(
            fn.readers.webdataset(
                paths=tars(shards), index_paths=indexes, ext=["jpg;png;webp", "cls"], missing_component_behavior="error"
            )
        )

    pipeline = read()
    found = []
    for _ in range(3):
        images, labels = pipeline.run()
        found += [(images.at(i).tobytes(), int(labels.at(i).tobytes())) for i in range(6)]
    wanted = [(path.read_bytes(), int(path.parent.name[1:])) for path in source.glob("*/*")]
    assert sorted(found) == sorted(wanted)


def test_idx_is_what_wds2idx_writes(shards, tmp_path):
    from wds2idx import IndexCreator

    for tar in map(Path, tars(shards)):
        with IndexCreator(str(tar), str(tmp_path / "idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "idx").read_bytes() == tar.with_suffix(".idx").read_bytes()


# --- the same bytes on every way ---


def test_bytes_depend_on_the_content_only(source, shards, tmp_path, monkeypatch):
    scan = class_folders._scan
    monkeypatch.setattr(class_folders, "_scan", lambda folder: random.Random(5).sample(scan(folder), len(scan(folder))))
    moved = tmp_path / "elsewhere"
    make_class_folders(moved, classes=3, per_class=6)
    for path in moved.glob("*/*"):
        os.utime(path, (1, 1))
    convert(plan_of(moved), tmp_path / "one", num_workers=1)
    with ThreadPoolExecutor(1) as executor:
        convert(plan_of(moved), tmp_path / "borrowed", executor=executor)
    assert contents(tmp_path / "one") == contents(shards) == contents(tmp_path / "borrowed")


def test_order_is_a_shuffle_by_seed_or_sorted(source):
    def order(**options: object) -> list[str]:
        return [item.path for part in plan_of(source, **options).shards for item in part.items]

    everything = sorted(order())
    assert order() == order() != everything and sorted(order(seed=1)) == everything and order() != order(seed=1)
    assert order(shuffle=False) == everything


def test_rerun_makes_only_what_is_missing(source, shards, tmp_path):
    plan, out = plan_of(source), tmp_path / "out"
    convert(plan, out, num_workers=1)
    untouched = (out / "shard-000000.tar").stat().st_mtime_ns
    for name in ("shard-000001.tar", "shard-000002.npz", "shard-000003.idx", "manifest.json", "_info.json"):
        (out / name).unlink()
    (out / ".shard-000001.tar.0123.tmp").write_bytes(b"half")
    report = convert(plan, out, num_workers=1)
    assert report.made == 3 and contents(out) == contents(shards)
    assert (out / "shard-000000.tar").stat().st_mtime_ns == untouched
    assert convert(plan, out, num_workers=1).made == 0


def test_interrupted_leaves_nothing_hidden(source, tmp_path):
    def interrupt(kept: int, rejected: int) -> None:
        if kept:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan_of(source), tmp_path / "out", num_workers=2, progress=interrupt)
    assert not list((tmp_path / "out").glob(".*")) and not (tmp_path / "out" / "manifest.json").exists()


def test_failing_half_way_leaves_no_file(source, tmp_path):
    seen = []

    def tick(kept: bool) -> None:
        seen.append(kept)
        if len(seen) == 3:
            raise MemoryError

    with pytest.raises(MemoryError):
        make_shard(source, tmp_path, plan_of(source).shards[0], tick)
    assert not list(tmp_path.iterdir())


# --- what must not get in ---

GOOD = jpeg_bytes(1, 120, 90)
PICTURE = smooth_picture(np.random.default_rng(2), 60, 40)
PNG = encode(PICTURE, "PNG")
TWO_FRAMES = {"save_all": True, "append_images": [PICTURE.rotate(90)]}


def with_size(data: bytes, height: int, width: int) -> bytes:
    """A JPEG whose frame header claims another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 4 :]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


BAD = {
    "empty": {"zero": b""},
    "header": {
        "one": b"\xff",
        "soi": b"\xff\xd8",
        "soi_eoi": b"\xff\xd8\xff\xd9" * 4,
        "cut20": GOOD[:20],
        "size0": with_size(GOOD, 0, 0),
        "webp_cut": encode(PICTURE, "WEBP")[:-40],
    },
    "format": {"html": b"<!DOCTYPE html><h1>404</h1>", "zeros": bytes(4096), "noise": bytes(range(256)) * 16},
    "truncated": {
        "cut50": GOOD[: len(GOOD) // 2],
        "no_eoi": GOOD[:-2],
        "zero_tail": GOOD[:-300] + bytes(300),
        "progressive": jpeg_bytes(1, 120, 90, progressive=True)[:-400],
        "png_cut": PNG[: len(PNG) // 2],
    },
    "corrupt": {
        "no_dqt": GOOD.replace(b"\xff\xdb", b"\xff\xfe"),
        "soi_inside": put(GOOD, len(GOOD) - 500, b"\xff\xd8"),  # DALI makes gray of the rest
    },
    "ambiguous": {"cmyk": without_segment(encode(PICTURE.convert("CMYK"), "JPEG"), ADOBE)},
    "too-large": {
        "jpeg30000": with_size(GOOD, 30000, 30000),
        "jpeg9000": with_size(GOOD, 9000, 9000),
        "png": encode(Image.new("1", (30000, 30000)), "PNG"),
    },
    "animated": {"apng": encode(PICTURE, "PNG", **TWO_FRAMES), "webp": encode(PICTURE, "WEBP", **TWO_FRAMES)},
    "unsupported": {name: encode(PICTURE, name) for name in ("GIF", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO")},
    "decoder": {
        "no_iend": PNG[:-12],
        "iend_checksum": flipped(PNG, len(PNG) - 6),
        "idat_checksum": flipped(PNG, len(PNG) - 13),
    },
}
KEPT = {
    "cmyk.JPEG": encode(PICTURE.convert("CMYK"), "JPEG"),
    "gray.jpg": encode(PICTURE.convert("L"), "JPEG"),
    "progressive.jpg": jpeg_bytes(1, 120, 90, progressive=True),
    "png_named.JPEG": PNG,
    "palette.png": encode(PICTURE.convert("P"), "PNG"),
    "alpha.png": encode(PICTURE.convert("RGBA"), "PNG"),
    "one_bit.png": encode(PICTURE.convert("1"), "PNG"),
    "sixteen.png": encode(Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60)), "PNG"),
    "still.webp": encode(PICTURE, "WEBP"),
    "garbage_after.jpg": GOOD + b"garbage",
    "joined.jpg": GOOD + GOOD,
    "one_pixel.png": encode(PICTURE.resize((1, 1)), "PNG"),
    "narrow.jpg": encode(PICTURE.resize((1, 4000)), "JPEG"),
    "wide.jpg": encode(PICTURE.resize((8000, 2)), "JPEG"),
    "bad_exif.jpg": encode(PICTURE, "JPEG", exif=b"Exif\0\0" + bytes(40)),
    "rotated.jpg": encode(PICTURE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
    "bad_icc.jpg": encode(PICTURE, "JPEG", icc_profile=bytes(99)),
    "a name, with 'quotes'\n.jpg": GOOD,
    "ünïcode.jpg": GOOD,
    "-dash.v1.5.jpg": GOOD,
    "n" * 240 + ".jpg": GOOD,
}


def verdict(data: bytes) -> str:
    try:
        image = screen(data, max_pixels=64_000_000)
    except Rejected as rejected:
        return rejected.reason
    refusal = refused_by_training_decoder([image])[0]
    return refusal.reason if refusal else "kept"


@pytest.mark.parametrize("reason", BAD)
def test_bad_images_are_named(reason):
    assert {name: verdict(data) for name, data in BAD[reason].items()} == dict.fromkeys(BAD[reason], reason)


def test_decoding_once_finds_the_same():
    """The converter lets DALI decode and asks Pillow only for reasons."""
    bad = {name: (reason, data) for reason, kinds in BAD.items() for name, data in kinds.items()}
    images = [*(data for _, data in bad.values()), *KEPT.values()]
    verdicts = Screener().judge(images, Rules(max_pixels=64_000_000))
    found = [verdict.reason if isinstance(verdict, Rejected) else verdict.data for verdict in verdicts]
    assert found == [*(reason for reason, _ in bad.values()), *KEPT.values()]


@given(st.binary(max_size=300), st.sampled_from([b"", GOOD[:200], PNG[:60], b"RIFF\0\0\0\0WEBPVP8 "]))
def test_screening_any_bytes_ends_in_a_verdict(tail, head):
    assert verdict(head + tail) != "kept"


def test_a_whole_corpus_is_counted(tmp_path):
    """in = written + quarantined, reasons and original names survive, stored bytes are the original ones."""
    folder = tmp_path / "source" / "things"
    make_class_folders(tmp_path / "source", classes=1, per_class=2)
    folder.mkdir()
    for name, data in KEPT.items():
        (folder / name).write_bytes(data)
    wanted = {f"things/{reason}_{name}.JPEG": reason for reason, kinds in BAD.items() for name in kinds}
    for path in wanted:
        reason, name = Path(path).stem.split("_", 1)
        (tmp_path / "source" / path).write_bytes(BAD[reason][name])
    os.mkfifo(folder / "pipe.JPEG")
    (folder / "folder.JPEG").mkdir()
    (folder / "inside.jpg").symlink_to("gray.jpg")
    (folder / "outside.jpg").symlink_to("/etc/hostname")
    (folder / "nowhere.jpg").symlink_to("not there")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / ".DS_Store").write_bytes(b"litter")
    wanted |= {f"things/{name}.JPEG": "not-a-file" for name in ("pipe", "folder")}
    wanted |= {f"things/{name}.jpg": "link" for name in ("outside", "nowhere", "loop")}
    plan = plan_of(tmp_path / "source", samples_per_shard=20)
    report = convert(plan, tmp_path / "out", num_workers=2, max_bad_fraction=1.0)
    assert quarantine(tmp_path / "out") == wanted
    assert report.quarantined == Counter(wanted.values())
    assert report.written == len(KEPT) + 3 and report.images == report.written + len(wanted)
    stored = {}
    import webdataset

    for sample in webdataset.WebDataset(tars(tmp_path / "out"), shardshuffle=False, empty_check=False):
        (image,) = (sample[name] for name in ("jpg", "png", "webp") if name in sample)
        stored[json.loads(sample["json"])["filename"].removeprefix("things/")] = image
    assert {name: stored[name] for name in KEPT} == KEPT and stored["inside.jpg"] == KEPT["gray.jpg"]
    assert list_class_folders(tmp_path / "source", follow_symlinks=True).ignored == 1


def test_too_many_bad_images_fail(source, tmp_path, capsys):
    folder = tmp_path / "source" / "n0"
    make_class_folders(tmp_path / "source", classes=1, per_class=10)
    folder.mkdir()
    (folder / "bad.JPEG").write_bytes(b"<!DOCTYPE html>")
    command = [str(tmp_path / "source"), str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 1
    line = capsys.readouterr().err
    assert "n0/bad.JPEG" in line and "format 1" in line and "--max-bad-fraction" in line
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert main([*command, "--max-bad-fraction", "0.1"]) == 0
    assert quarantine(tmp_path / "out") == {"n0/bad.JPEG": "format"}
    assert main(command) == 0  # complete now


def test_a_shard_of_rejects_is_not_written(tmp_path):
    make_class_folders(tmp_path / "source", classes=2, per_class=4)
    for path in (tmp_path / "source" / "n00000000").iterdir():
        path.write_bytes(b"not an image")
    plan = plan_of(tmp_path / "source", shuffle=False)
    convert(plan, tmp_path / "out", num_workers=1, max_bad_fraction=0.5)
    assert [record.name for record in read_manifest(tmp_path / "out").shards] == ["shard-000001"]
    assert not (tmp_path / "out" / "shard-000000.tar").exists()
    assert convert(plan, tmp_path / "out", num_workers=1).written == 4
    for path in (tmp_path / "source" / "n00000001").iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(ConversionFailed, match="8 of the 8 images"):
        convert(plan_of(tmp_path / "source"), tmp_path / "none", num_workers=1, max_bad_fraction=1.0)


def test_source_that_changes_meanwhile(tmp_path):
    files = make_class_folders(tmp_path / "source", classes=1, per_class=4)
    plan = plan_of(tmp_path / "source")
    files[1].unlink()
    convert(plan, tmp_path / "gone", num_workers=1, max_bad_fraction=0.5)
    assert list(quarantine(tmp_path / "gone").values()) == ["io"]
    files[2].write_bytes(GOOD + b"longer")
    with pytest.raises(DataError, match="changed while it was converted"):
        convert(plan, tmp_path / "changed", num_workers=1)


# --- refusals ---


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda root: root.rmdir(), "no such folder"),
        (lambda root: None, "no class folders"),
        (lambda root: (root / "cats").mkdir(), "1 class folders and not one image"),
        (lambda root: (root / "cat.jpg").write_bytes(GOOD), "lies beside the class folders"),
        (lambda root: make_class_folders(root / "train"), r"is the source .*train\?"),
        (lambda root: (root / "cats").symlink_to("/etc"), "--follow-symlinks"),
    ],
)
def test_sources_that_are_none(tmp_path, capsys, build, message):
    root = tmp_path / "source"
    root.mkdir()
    build(root)
    with pytest.raises(DataError, match=message):
        list_class_folders(root)
    assert main([str(root), str(tmp_path / "out")]) == 2 and "error: source" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_source_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        list_class_folders(tmp_path / "nowhere")
    assert isinstance(caught.value, MissingData)


def test_empty_class_keeps_its_index(tmp_path, capsys):
    make_class_folders(tmp_path / "source", classes=2, per_class=2)
    (tmp_path / "source" / "a_first").mkdir()
    assert main([str(tmp_path / "source"), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "a_first" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert {entry.label for entry in list_class_folders(tmp_path / "source").entries} == {1, 2}


def test_folders_of_others_are_refused(source, shards, tmp_path):
    (tmp_path / "shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(DataError, match="other files"):
        convert(plan_of(source), tmp_path, num_workers=1)
    assert (tmp_path / "shard-000000.tar").read_bytes() == b"precious"
    for options in ({"seed": 3}, {"samples_per_shard": 5}, {"short_side": 50}, {"shuffle": False}):
        with pytest.raises(DataError, match="other options"):
            convert(plan_of(source, **options), shards, num_workers=1)
    with pytest.raises(DataError, match="lies in the source"):
        convert(plan_of(source), source / "shards", num_workers=1)


def test_no_room_is_said_before_the_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(DataError, match=r"about 0\.\d GB are needed, 0\.0 GB are free"):
        convert(plan_of(source), tmp_path / "out", num_workers=1)


def test_one_conversion_at_a_time(source, tmp_path):
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another conversion"):
        convert(plan_of(source), tmp_path, num_workers=1)
    os.close(holder)
    assert convert(plan_of(source), tmp_path, num_workers=1).written == 18


@pytest.mark.parametrize("options", [{"samples_per_shard": 0}, {"quality": 101}, {"short_side": -1}, {"split": ""}])
def test_impossible_options(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}="):
        Options(**options)


# --- keys ---


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("utf-8", "surrogateescape")))
def test_escaped_keys_can_be_undone(name):
    name = name.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    key = escape_key(name)
    assert unescape_key(key) == name and all(c.isascii() and (c.isalnum() or c in "_-") for c in key)


names = st.text(st.sampled_from("aAbB_-. é"), min_size=1, max_size=5)


@given(
    st.sets(st.tuples(st.sampled_from(["a", "b", "a_b"]), names, st.sampled_from(["jpg", "JPG", "png"])), max_size=30)
)
def test_keys_are_unique(files):
    entries = [Entry(f"{folder}/{stem}.{suffix}", 0, 1) for folder, stem, suffix in sorted(files)]
    keys = sample_keys(entries)
    assert len({key.lower() for key in keys}) == len(entries) and all(len(key) <= MAX_KEY for key in keys)


def test_keys_are_readable():
    paths = ["cat/1.jpg", "cat/my-cat.jpg", "dog/1.jpg", "dog/a b.jpg", "dog/rex.JPEG", "dog/rex.png"]
    keys = sample_keys([Entry(path, 0, 1) for path in paths])
    assert keys == ["cat_1", "my-cat", "dog_1", "a--20b", "dog_rex", "dog_rex_png"]


# --- re-encoding ---


def test_short_side_touches_only_larger_images(tmp_path):
    folder = tmp_path / "source" / "c"
    folder.mkdir(parents=True)
    large = encode(smooth_picture(np.random.default_rng(0), 301, 200), "PNG")
    (folder / "large.png").write_bytes(large)
    (folder / "small.jpg").write_bytes(GOOD)
    convert(plan_of(tmp_path / "source", short_side=100, quality=90), tmp_path / "out", num_workers=1)
    import webdataset

    stored = {s["__key__"]: s for s in webdataset.WebDataset(tars(tmp_path / "out"), shardshuffle=False)}
    assert stored["small"]["jpg"] == GOOD
    image = Image.open(io.BytesIO(stored["large"]["jpg"]))
    assert image.size == (150, 100)  # 301 * 100 / 200, rounded down
    wanted = Image.open(io.BytesIO(large)).resize((150, 100), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(wanted)).mean() < 4
    assert json.loads(stored["large"]["json"]) == {"filename": "c/large.png", "label": 0, "height": 100, "width": 150}


def test_sixteen_bit_gray_is_scaled_not_clipped():
    gray = np.linspace(0, 65535, 200 * 200).reshape(200, 200).astype(np.uint16)
    image = screen(encode(Image.fromarray(gray), "PNG"), max_pixels=10**6, short_side=100, quality=95)
    pixels = np.asarray(Image.open(io.BytesIO(image.data)))[..., 0]
    assert abs(pixels.mean() - 127.5) < 1 and pixels.min() < 5 and pixels.max() > 250
