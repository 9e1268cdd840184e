"""Looking into a folder of shards: decoding all of it, statistics, a contact sheet; ours and somebody else's."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.checking.contact_sheet import COLUMNS, contact_sheet
from shards.checking.decode_check import undecodable
from shards.checking.folder_statistics import spread, statistics_of
from shards.checking.verify import verify
from shards.dataset import open_dataset
from shards.foreign.indexing import index_shards
from shards.index import parse_index
from shards.making.conversion import convert
from shards.making.planning import Options, make_plan
from shards.sources.class_folders import list_class_folders
from tests.images import encode, jpeg_bytes, make_class_folders
from tools.verify_shards import main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 8, 8 and 1 images; the last is a CMYK image of 90 x 30 pixels."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("made")
    make_class_folders(source, classes=2, per_class=8, sides=(40, 60))
    (source / "z").mkdir()
    (source / "z" / "ink.jpg").write_bytes(encode(Image.new("CMYK", (90, 30), (0, 255, 255, 0)), "JPEG"))
    convert(make_plan(list_class_folders(source), Options(samples_per_shard=6)), folder, num_workers=1)
    return folder


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """An indexed folder of somebody else's shards."""
    folder = tmp_path / "others"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(6):
            for name, data in ((f"{number}.jpg", jpeg_bytes(number, 50, 40)), (f"{number}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    index_shards(folder, num_workers=1)
    return folder


def test_statistics(made):
    found = statistics_of(open_dataset(made))
    assert (found.samples, found.unlabelled, found.classes) == (17, 0, 3)
    assert found.per_class == (1, 8.0, 8)
    assert found.pixels["width"][-1] == 90 and found.pixels["height"][0] == found.pixels["shorter side"][0] == 30
    dataset = open_dataset(made)
    assert found.bytes == tuple(np.quantile(dataset.size, [0, 0.05, 0.5, 0.95, 1], method="nearest"))
    assert found.formats == Counter(JPEG=15, PNG=2)
    assert found.colors == Counter(RGB=13, gray=3, CMYK=1)


def test_images_are_spread_over_classes_and_tars(made):
    dataset = open_dataset(made)
    assert sorted(spread(dataset, 100)) == list(range(17))
    assert Counter(dataset.label[spread(dataset, 9)].tolist()) == {0: 5, 1: 4}
    assert len(set(dataset.tar[spread(dataset, 9)].tolist())) > 1


def test_contact_sheet_shows_the_images(made):
    dataset = open_dataset(made)
    sheet = np.asarray(contact_sheet(dataset, 17)).astype(int)
    single = np.asarray(contact_sheet(dataset, 1))
    assert sheet.shape[1] == single.shape[1] and sheet.shape[0] > 2.5 * single.shape[0]
    step_x, step_y = sheet.shape[1] // COLUMNS, sheet.shape[0] // 3
    red = sheet[2 * step_y + 12, 12]  # the last image, in the third row: CMYK red
    assert red[0] > 200 and red[1:].max() < 60, red
    assert (sheet[:step_y, :step_x] != 255).any() and (sheet[2 * step_y :, step_x:] == 255).all()


def test_contact_sheet_names_the_damaged(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    dataset = open_dataset(tmp_path / "copy")
    place = spread(dataset, 1)[0]
    whole = np.asarray(contact_sheet(dataset, 1))
    tar = dataset.paths[dataset.tar[place]]
    tar.chmod(0o644)
    with open(tar, "r+b") as stream:
        stream.seek(int(dataset.offset[place]))
        stream.write(bytes(64))
    damaged = np.asarray(contact_sheet(dataset, 1))
    assert damaged.shape == whole.shape and (damaged != whole).any()
    assert (damaged[40:140, 20:140] == 255).all()  # an empty frame below the reason


def test_decoding_names_the_sample(made, tmp_path, monkeypatch):
    assert verify(made, decode=True) == []
    with pytest.raises(ValueError, match="^quick=True"):
        verify(made, quick=True, decode=True)
    tar = tmp_path / "shard-000001.tar"
    data = bytearray((made / tar.name).read_bytes())
    index = parse_index((made / "shard-000001.npz").read_bytes(), Path("x"))
    kind = index.arrays["extension"].tolist().index(b"jpg")
    at, size = int(index.arrays["offset"][kind]), int(index.arrays["size"][kind])
    data[at + size // 2 : at + size] = bytes(size - size // 2)
    tar.write_bytes(data)
    ((key, problem),) = undecodable(tar, index, 10**8)
    assert key == index.arrays["key"][kind].decode() and problem.startswith("does not decode: truncated: ")
    data[at : at + size] = jpeg_bytes(1, 32, 32).ljust(size, b"\0")[:size]
    tar.write_bytes(data)
    ((again, problem),) = undecodable(tar, index, 10**8)
    assert again == key and "32 x 32 pixels, the index has" in problem
    monkeypatch.setattr("shards.checking.verify.undecodable", lambda *_: iter([("k", "does not decode: crash: x")]))
    assert [finding.key for finding in verify(made, decode=True)] == ["k"] * 3
    assert main([str(made), "--decode"]) == 1 and main([str(made)]) == 0


def test_the_tool_shows_all_of_it(made, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main([str(made), "--decode", "--statistics", "--contact-sheet", str(sheet)]) == 0
    told = capsys.readouterr().out
    assert "every image decoded" in told and "1 / 8 / 8" in told and "CMYK 5.9%" in told
    assert Image.open(sheet).format == "PNG"
    assert main([str(made)]) == 0 and "samples per class" not in capsys.readouterr().out


def test_the_tool_takes_shards_of_others(others, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    for depth in ([], ["--quick"], ["--decode"]):
        assert main([str(others), *depth, "--statistics", "--contact-sheet", str(sheet)]) == 0
        assert "6 samples in 1 shards" in capsys.readouterr().out and sheet.exists()
    assert main([str(others), "--repair"]) == 2 and "tools/index_shards.py" in capsys.readouterr().err
    with open(others / "a.tar", "r+b") as stream:
        stream.truncate(5000)
    assert main([str(others)]) == 1 and main([str(others), "--quick"]) == 1
