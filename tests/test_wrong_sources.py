"""Sources that look right and are not: nothing of them may be lost, doubled or numbered otherwise in silence."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from images import jpeg_bytes

from shards.foreign.hints import parse_class_names
from shards.layout import DataError
from shards.making.screening import Rejected
from shards.sources.find import list_source
from shards.sources.reading import read_image
from tools import make_shards, verify_shards

IMAGE = jpeg_bytes(0)
NAMES = ("n01440764_1.JPEG", "n01440764_2.JPEG", "n01440764_3.JPEG")


def packed(files: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def of_class(names=NAMES) -> bytes:
    return packed([(name, IMAGE) for name in names])


def second_header(tar: bytes) -> int:
    return 512 + int(tar[124:135], 8) // 512 * 512 + 512 * (int(tar[124:135], 8) % 512 > 0)


def damaged_header(tar: bytes) -> bytes:
    place = second_header(tar)
    return tar[: place + 100] + b"XXXX" + tar[place + 104 :]


# --- the official tars: Python's tarfile takes a header that it cannot read for the end ------------------------------


@pytest.mark.parametrize(
    ("harm", "fragment"),
    [
        (damaged_header, "the header after the last readable file is damaged"),
        (lambda tar: tar[: second_header(tar)], "cut: no end-of-archive mark"),
        (lambda tar: tar[: second_header(tar)] + bytes(512) + tar[second_header(tar) + 512 :], "is damaged"),
        (lambda tar: tar[: second_header(tar)] + bytes(20480), "20,480 bytes after the last file"),
        (lambda tar: tar + tar, "is damaged|after the last file"),
        (lambda tar: tar[:900], "cut inside"),
        (lambda tar: bytes(10240), "no image in it"),
        (lambda tar: b"", "cut: no end-of-archive mark"),
        (lambda tar: of_class((NAMES[0], NAMES[0])), f"'{NAMES[0]}' is in it twice"),
        (lambda tar: of_class((NAMES[0], "../x.JPEG")), "lies in a folder"),
    ],
)
def test_a_class_tar_that_lost_images_is_refused(tmp_path, harm, fragment):
    whole, place = of_class(), tmp_path / "train.tar"
    place.write_bytes(packed([("n01440764.tar", whole), ("n01443537.tar", whole)]))
    assert len(list_source(place).entries) == 6
    for classes in (
        (("n01440764.tar", harm(whole)), ("n01443537.tar", whole)),
        (
            ("n01440764.tar", whole),
            ("n01443537.tar", harm(whole)),
        ),
    ):
        place.write_bytes(packed(list(classes)))
        with pytest.raises(DataError, match=fragment):
            list_source(place)


def test_a_train_tar_that_lost_classes_is_refused(tmp_path):
    place, whole = tmp_path / "train.tar", packed([("n01440764.tar", of_class()), ("n01443537.tar", of_class())])
    for harm, fragment in (
        (damaged_header, "damaged"),
        (lambda tar: tar[: second_header(tar)], "no end-of-archive mark"),
    ):
        place.write_bytes(harm(whole))
        with pytest.raises(DataError, match=fragment):
            list_source(place)
    place.write_bytes(packed([("n01440764.tar", of_class()), ("n01440764.tar", of_class())]))
    with pytest.raises(DataError, match=r"'n01440764.tar' is in it twice"):
        list_source(place)


def test_a_validation_image_twice_does_not_stand_for_a_lost_one(tmp_path):
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 2)]
    (tmp_path / "val.tar").write_bytes(packed([(name, IMAGE) for name in names]))
    labels = "".join(f"ILSVRC2012_val_{number:08d}.JPEG n0144{number:04d}\n" for number in (1, 2, 3))
    (tmp_path / "labels.txt").write_text(labels)
    with pytest.raises(DataError, match="is in it twice"):
        list_source(tmp_path / "val.tar", labels=tmp_path / "labels.txt")


def test_labels_as_windows_writes_them_and_labels_that_are_no_text(tmp_path):
    (tmp_path / "val.tar").write_bytes(packed([("ILSVRC2012_val_00000001.JPEG", IMAGE)]))
    labels = tmp_path / "labels.txt"
    labels.write_bytes(b"\xef\xbb\xbfILSVRC2012_val_00000001.JPEG n01440764\r\n")
    assert list_source(tmp_path / "val.tar", labels=labels).classes == ("n01440764",)
    labels.write_bytes(b"\xff\xfeI\x00")
    with pytest.raises(DataError, match=r"--labels=.*labels.txt: no text in UTF-8"):
        list_source(tmp_path / "val.tar", labels=labels)


def test_options_of_another_kind_of_source_are_refused(tmp_path):
    (tmp_path / "train.tar").write_bytes(packed([("n01440764.tar", of_class())]))
    (tmp_path / "list.txt").write_text("a.jpg 0\n")
    for source, options, fragment in (
        ("train.tar", {"labels": tmp_path / "list.txt"}, "the train tar .* has its labels in it"),
        ("list.txt", {"labels": tmp_path / "list.txt"}, "only ILSVRC2012_img_val.tar takes labels"),
        (".", {"labels": tmp_path / "list.txt"}, "only ILSVRC2012_img_val.tar takes labels"),
        (".", {"root": tmp_path}, "only a list .* has a root"),
    ):
        with pytest.raises(DataError, match=fragment):
            list_source(tmp_path / source, **options)


# --- lists ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("path,label\na.jpg,3\nb.jpg,1\n", "begins with 'path', no file in .*: remove the header line"),
        ("filename\na.jpg\n", "begins with 'filename', no file"),
        ("a.jpg,3\n\nb.jpg,label\n", "line 3 has the label 'label', 1 of 2 lines have class numbers"),
        ("a.jpg -2\nb.jpg 10\nc.jpg 2\n", "line 1 has the label '-2', 2 of 3 lines"),
        ("a.jpg -1\nb.jpg 10\nc.jpg 2\n", "1 of 3 lines have no label"),
        ("a.jpg 1.0\nb.jpg 10.0\n", r"line 1 has the label '1.0', 0 of 2 lines"),
    ],
)
def test_numbers_of_a_list_are_never_sorted_as_names(tmp_path, text, fragment):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=fragment):
        list_source(tmp_path / "list.csv")


def test_minus_one_in_a_list_is_no_label_and_no_class(tmp_path):
    (tmp_path / "list.txt").write_text("a.jpg -1\nb.jpg -1\n")
    listing = list_source(tmp_path / "list.txt")
    assert listing.classes == () and {entry.label for entry in listing.entries} == {-1}


def test_a_list_as_windows_writes_it_and_names_with_odd_line_ends(tmp_path):
    (tmp_path / "list.txt").write_bytes("\ufeffa\u2028b.jpg cat\r\nc.jpg dog\r\n".encode())
    listing = list_source(tmp_path / "list.txt")
    assert listing.classes == ("cat", "dog") and [entry.path for entry in listing.entries] == ["a\u2028b.jpg", "c.jpg"]


def test_class_names_as_windows_writes_them(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n")
    assert parse_class_names(tmp_path / "names.txt") == ("cat", "dog")


# --- parquet --------------------------------------------------------------------------------------------------------


def parquet(file: Path, labels: list | None, *, names=(), cells: list | None = None, column: str = "label") -> None:
    arrow, write = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet").write_table
    count = len(labels) if labels is not None else len(cells or ())
    cells = cells if cells is not None else [{"bytes": IMAGE, "path": f"{row}.jpg"} for row in range(count)]
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    table = arrow.table({"image": arrow.array(cells, kind)} | ({column: labels} if labels is not None else {}))
    about = {"info": {"features": {"label": {"names": list(names)}}}}
    file.parent.mkdir(parents=True, exist_ok=True)
    write(table.replace_schema_metadata({"huggingface": json.dumps(about)}), file, row_group_size=2)


@pytest.mark.parametrize(
    ("labels", "names", "fragment"),
    [
        ([0, 10**9], (), "class number 1,000,000,000 for 2 images"),
        ([0.0, 1.5], (), "the column label is of the kind double"),
        (["cat", "dog"], (), "the column label is of the kind string"),
        ([[0], [1]], (), "the column label is of the kind list"),
        ([0, -5], (), "the label -5; class numbers"),
        ([0, None, 1], (), "1 of 3 rows have no label"),
        ([0, 1, 2], ("a", "b"), "the label 2, and only 2 class names"),
        ([0, 1], ("a", "a"), "2 class names, 'a' more than once"),
    ],
)
def test_parquet_labels_that_are_no_class_numbers_are_refused(tmp_path, labels, names, fragment):
    parquet(tmp_path / "train-00000-of-00001.parquet", labels, names=names)
    with pytest.raises(DataError, match=fragment):
        list_source(tmp_path)


def test_parquet_files_of_two_sets_or_not_all_of_one(tmp_path):
    for folder in ("one", "two"):
        parquet(tmp_path / folder / "train-00000-of-00002.parquet", [0, 1])
    with pytest.raises(DataError, match="no images in its folders, but one/train-00000-of-00002.parquet; give the"):
        list_source(tmp_path)
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1])
    with pytest.raises(DataError, match="in 3 folders .*: several sets; give one of these folders"):
        list_source(tmp_path)
    assert list_source(tmp_path / "one").notes == ("2 files train-*.parquet are promised by their names, 1 are here",)
    parquet(tmp_path / "one" / "train-00000-of-00003.parquet", [0, 1])
    with pytest.raises(DataError, match="files of a set of 2 and of one of 3"):
        list_source(tmp_path / "one")


def test_parquet_files_without_rows_are_refused(tmp_path):
    parquet(tmp_path / "train-0.parquet", None, cells=[])
    with pytest.raises(DataError, match="no rows in 1 files"):
        list_source(tmp_path)


def test_parquet_labels_under_another_name_are_told(tmp_path, capfd):
    parquet(tmp_path / "hub" / "train-0.parquet", [0, 1], column="fine_label")
    assert make_shards.main([str(tmp_path / "hub"), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "no column label, so no image has one (columns: fine_label, image)" in capfd.readouterr().err


def test_parquet_images_of_one_name_and_images_that_are_not_there(tmp_path):
    cells = [
        {"bytes": IMAGE, "path": "x.jpg"},
        {"bytes": IMAGE, "path": "x.jpg"},
        {"bytes": None, "path": "y.jpg"},
        None,
    ]
    parquet(tmp_path / "train-0.parquet", None, cells=cells)
    listing = list_source(tmp_path)
    paths = ["train-0-000000-x.jpg", "train-0-000001-x.jpg", "y.jpg", "train-0-000003.jpg"]
    assert [entry.path for entry in listing.entries] == paths
    assert [read_image(tmp_path, entry) for entry in listing.entries[:2]] == [IMAGE, IMAGE]
    for entry in listing.entries[2:]:
        with pytest.raises(Rejected, match="holds no image bytes"):
            read_image(tmp_path, entry)


def test_a_damaged_parquet_file_is_named_and_not_the_shard(tmp_path):
    parquet(tmp_path / "train-0.parquet", [0, 1])
    file = tmp_path / "train-0.parquet"
    (_, second) = list_source(tmp_path).entries
    data = file.read_bytes()
    file.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
    with pytest.raises(DataError, match=r"source=.*train-0.parquet: row 1 cannot be read: .*; download the file again"):
        read_image(tmp_path, second)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--workers=0", "--workers=-3", "--max-bad-fraction=2", "--max-bad-fraction=nan"])
def test_a_dry_run_refuses_what_the_conversion_would_refuse(tmp_path, capfd, option):
    (tmp_path / "list.txt").write_text("a.jpg 0\n")
    assert make_shards.main([str(tmp_path / "list.txt"), str(tmp_path / "out"), "--dry-run", option]) == 2
    assert "is needed" in capfd.readouterr().err


def test_a_file_in_the_place_of_the_output_is_told(tmp_path, capfd):
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "1.jpg").write_bytes(IMAGE)
    (tmp_path / "out").write_text("")
    for out in ("out", "out/below"):
        assert make_shards.main([str(tmp_path / "images"), str(tmp_path / out), "--workers=1"]) == 2
        assert "a file lies where a folder is needed" in capfd.readouterr().err


def test_a_contact_sheet_without_a_folder_is_told_before_the_tars_are_read(tmp_path, capfd):
    assert verify_shards.main([str(tmp_path), "--contact-sheet", str(tmp_path / "no" / "sheet.png")]) == 2
    assert "no folder for it" in capfd.readouterr().err
