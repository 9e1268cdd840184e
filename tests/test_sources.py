"""Every kind of source on a small set in exactly its official layout, and wrong layouts told in seconds."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from images import jpeg_bytes

from shards.augment.reference import read_image
from shards.checking.verify import verify
from shards.dataset import open_dataset
from shards.layout import DataError, MissingData
from shards.making.conversion import convert
from shards.making.planning import Options, make_plan
from shards.sources.find import list_source

WNIDS = ("n01440764", "n01443537", "n02105855")


def picture(number: int) -> bytes:
    return jpeg_bytes(number)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def train_tar(path: Path, per_class: int = 3) -> dict[str, bytes]:
    """ILSVRC2012_img_train.tar: a tar of class tars, classes and images in no particular order."""
    rng, images = random.Random(0), {}
    with tarfile.open(path, "w") as outer:
        for wnid in rng.sample(WNIDS, len(WNIDS)):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for number in rng.sample(range(per_class), per_class):
                    data = picture(10 * WNIDS.index(wnid) + number)
                    images[f"{wnid}_{number}"] = data
                    add(tar, f"{wnid}_{number}.JPEG", data)
            add(outer, f"{wnid}.tar", inner.getvalue())
    return images


def val_tar(path: Path, count: int = 6) -> dict[str, bytes]:
    images = {f"ILSVRC2012_val_{n:08d}": picture(n) for n in range(1, count + 1)}
    with tarfile.open(path, "w") as tar:
        for name, data in images.items():
            add(tar, f"{name}.JPEG", data)
    return images


def devkit(path: Path, truth: list[int], *, leaves: int = 3) -> None:
    """ILSVRC2012_devkit_t12.tar.gz: the challenge numbers classes in another order than their WordNet ids."""
    savemat = pytest.importorskip("scipy.io").savemat
    fields = [("ILSVRC2012_ID", float), ("WNID", object), ("words", object), ("num_children", float)]
    rows = [
        (3, WNIDS[0], "tench", 0),
        (1, WNIDS[1], "goldfish", 0),
        (2, WNIDS[2], "terrier", 0),
        (9, "n00000001", "all", 3),
    ]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=fields)[:, None]})
    with tarfile.open(path, "w:gz") as tar:
        folder = "ILSVRC2012_devkit_t12/data/"
        add(tar, f"{folder}meta.mat", meta.getvalue())
        add(tar, f"{folder}ILSVRC2012_validation_ground_truth.txt", "\n".join(map(str, truth)).encode())


def converted(listing, out: Path, **options):
    convert(make_plan(listing, Options(samples_per_shard=4, **options)), out, num_workers=1)
    assert verify(out) == []
    return open_dataset(out)


def by_key(dataset) -> dict[str, tuple[int, bytes]]:
    return {
        key.decode(): (int(label), read_image(dataset, number))
        for number, (key, label) in enumerate(zip(dataset.key, dataset.label, strict=True))
    }


# --- the official tars ----------------------------------------------------------------------------------------------


def test_the_train_tar_is_read_without_unpacking(tmp_path):
    tar = tmp_path / "ILSVRC2012_img_train.tar"
    images = train_tar(tar)
    listing = list_source(tar)
    assert listing.classes == tuple(sorted(WNIDS)) and len(listing.entries) == 9
    found = by_key(converted(listing, tmp_path / "shards"))
    assert {key: data for key, (_, data) in found.items()} == images
    assert all(WNIDS.index(key.partition("_")[0]) == label for key, (label, _) in found.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [tar.name, "shards"]


def test_the_validation_tar_with_the_development_kit(tmp_path):
    tar, kit = tmp_path / "ILSVRC2012_img_val.tar", tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    images, truth = val_tar(tar), [3, 1, 2, 2, 1, 3]
    devkit(kit, truth)
    found = by_key(converted(list_source(tar, labels=kit), tmp_path / "shards", shuffle=False))
    challenge = {3: 0, 1: 1, 2: 2}  # the kit's number -> place of the WordNet id in bytewise order
    assert {key: label for key, (label, _) in found.items()} == {
        name: challenge[number] for name, number in zip(images, truth, strict=True)
    }
    assert {key: data for key, (_, data) in found.items()} == images


@pytest.mark.parametrize("form", ["{} {}", "{}.JPEG\t{}", "{},{} 1 2 3 4"])
def test_the_validation_tar_with_a_list_of_labels(tmp_path, form):
    """Plain lines, and Kaggle's CSV with its header and boxes."""
    tar, labels = tmp_path / "ILSVRC2012_img_val.tar", tmp_path / "labels.csv"
    images = val_tar(tar)
    lines = [form.format(name, WNIDS[number % 3]) for number, name in enumerate(images)]
    labels.write_text("\n".join(["ImageId,PredictionString", *lines]))
    listing = list_source(tar, labels=labels)
    assert {entry.path: entry.label for entry in listing.entries} == {
        f"{WNIDS[number % 3]}/{name}.JPEG": number % 3 for number, name in enumerate(images)
    }


def test_wrong_tars_say_what_was_found(tmp_path):
    val_tar(tmp_path / "ILSVRC2012_img_val.tar")
    with pytest.raises(DataError, match="add --labels"):
        list_source(tmp_path / "ILSVRC2012_img_val.tar")
    (tmp_path / "few.txt").write_text(f"ILSVRC2012_val_00000001.JPEG {WNIDS[0]}\n")
    with pytest.raises(DataError, match="6 images, --labels=.* names 1; 5 images have no label"):
        list_source(tmp_path / "ILSVRC2012_img_val.tar", labels=tmp_path / "few.txt")
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        add(tar, "000.jpg", picture(0))
    with pytest.raises(DataError, match=r"begins with '000.jpg'; expected a class tar .* tools/index_shards.py"):
        list_source(tmp_path / "other.tar")
    (tmp_path / "text.tar").write_text("no tar")
    with pytest.raises(DataError, match="not an uncompressed tar"):
        list_source(tmp_path / "text.tar")
    train_tar(tmp_path / "cut.tar")
    whole = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cut|damaged"):
        list_source(tmp_path / "cut.tar")


# --- parquet --------------------------------------------------------------------------------------------------------


def parquet(folder: Path, *, split: str = "train", files: int = 2, rows: int = 5, label: bool = True) -> list[bytes]:
    """Hugging Face's imagenet-1k: data/SPLIT-00000-of-00002.parquet, columns image {bytes, path} and label."""
    arrow, write = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet").write_table
    names = ["tench, Tinca tinca", "goldfish, Carassius auratus", "boxer"]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    images = []
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for number in range(files):
        data = [picture(100 * number + row) for row in range(rows)]
        cells = [{"bytes": d, "path": f"n0144_{number}_{row}.JPEG"} for row, d in enumerate(data)]
        columns = {"image": cells} | ({"label": [row % 3 for row in range(rows)]} if label else {})
        table = arrow.Table.from_pydict(columns).replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features if label else {}}})}
        )
        write(table, folder / "data" / f"{split}-{number:05d}-of-{files:05d}.parquet", row_group_size=2)
        images += data
    return images


def test_parquet_rows_keep_their_order_names_and_bytes(tmp_path):
    images = parquet(tmp_path / "hub")
    parquet(tmp_path / "hub", split="validation", files=1)
    listing = list_source(tmp_path / "hub")
    assert listing.classes[0] == "tench, Tinca tinca" and not listing.shuffled
    dataset = converted(listing, tmp_path / "shards", shuffle=False)
    assert [read_image(dataset, number) for number in range(len(dataset))] == images
    assert dataset.label.tolist() == [0, 1, 2, 0, 1] * 2 and dataset.key[0] == b"n0144_0_0"
    assert len(list_source(tmp_path / "hub", split="validation").entries) == 5


def test_parquet_without_labels_or_of_another_layout(tmp_path):
    parquet(tmp_path / "bare", label=False)
    dataset = converted(list_source(tmp_path / "bare"), tmp_path / "shards", shuffle=False)
    assert (dataset.label == -1).all() and dataset.classes == ()
    with pytest.raises(MissingData, match=r"no files test-\*.parquet \(splits found: train\)"):
        list_source(tmp_path / "bare", split="test")
    arrow, write = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet").write_table
    (tmp_path / "text").mkdir()
    write(arrow.Table.from_pydict({"text": ["a"]}), tmp_path / "text" / "train-0.parquet")
    with pytest.raises(DataError, match=r"columns \['text'\]; expected image"):
        list_source(tmp_path / "text")
    (tmp_path / "text" / "train-0.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a readable parquet file"):
        list_source(tmp_path / "text")


# --- lists ----------------------------------------------------------------------------------------------------------


def listed(folder: Path, lines: str, suffix: str = ".txt") -> Path:
    (folder / "a" / "b c").mkdir(parents=True)
    for number, name in enumerate(("a/1.jpg", "a/b c/2.jpg", "3.jpg")):
        (folder / name).write_bytes(picture(number))
    (folder / f"list{suffix}").write_text(lines)
    return folder / f"list{suffix}"


@pytest.mark.parametrize(
    ("lines", "classes", "labels"),
    [
        ("a/b c/2.jpg 1\n3.jpg 0\na/1.jpg 2\n", ("0", "1", "2"), [0, 2, 1]),
        ("a/b c/2.jpg\tdog\n3.jpg\tbig cat\na/1.jpg\tdog\n", ("big cat", "dog"), [0, 1, 1]),
        ("a/b c/2.jpg,dog\n\n3.jpg,cat\na/1.jpg,dog\n", ("cat", "dog"), [0, 1, 1]),
    ],
)
def test_lists(tmp_path, lines, classes, labels):
    listing = list_source(listed(tmp_path / "set", lines))
    assert listing.classes == classes and [entry.path for entry in listing.entries] == [
        "3.jpg",
        "a/1.jpg",
        "a/b c/2.jpg",
    ]
    assert [entry.label for entry in listing.entries] == labels
    dataset = converted(listing, tmp_path / "set" / "shards", shuffle=False)
    assert [read_image(dataset, number) for number in range(3)] == [picture(2), picture(0), picture(1)]


def test_a_list_without_labels_and_its_root(tmp_path):
    lines = listed(tmp_path / "set", "3.jpg\na/1.jpg\n")
    elsewhere = tmp_path / "elsewhere.lst"
    elsewhere.write_bytes(lines.read_bytes())
    dataset = converted(list_source(elsewhere, root=tmp_path / "set"), tmp_path / "shards")
    assert (dataset.label == -1).all() and len(dataset) == 2 and dataset.classes == ()


@pytest.mark.parametrize(
    ("lines", "fragment"),
    [
        ("", "an empty list"),
        ("a/1.jpg 0\n3.jpg\n", "1 of 2 lines have no label"),
        ("a/1.jpg 0\na/1.jpg 1\n", "'a/1.jpg' is listed twice"),
        ("../x.jpg 0\n", "line 1: '../x.jpg' leaves the root"),
        ("/etc/passwd 0\n", "line 1: '/etc/passwd' leaves the root"),
        ("a/1.jpg 123456\n", "class number 123,456 for 1 images"),
    ],
)
def test_wrong_lists_name_the_line(tmp_path, lines, fragment):
    with pytest.raises(DataError, match=fragment):
        list_source(listed(tmp_path / "set", lines))


def test_what_a_list_names_and_is_not_there_is_listed_as_rejected(tmp_path):
    (tmp_path / "list.txt").write_text("no.jpg 0\n")
    (entry,) = list_source(tmp_path / "list.txt").entries
    assert entry.problem[0] == "io"


# --- anything else --------------------------------------------------------------------------------------------------


def test_other_places_are_told_what_is_expected(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="a file of an unknown kind; expected one of"):
        list_source(tmp_path / "x.zip")
    with pytest.raises(MissingData, match="no such file or folder; expected one of"):
        list_source(tmp_path / "nowhere")
    (tmp_path / "wds").mkdir()
    with tarfile.open(tmp_path / "wds" / "0.tar", "w") as tar:
        add(tar, "s0.jpg", picture(0))
    with pytest.raises(DataError, match="1 tars; WebDataset shards are used where they are"):
        list_source(tmp_path / "wds")
