"""Shards as others make them: small sets in exactly the layouts that are in use, and tars written byte by byte."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from images import encode, jpeg_bytes, smooth_picture
from webdataset.writer import TarWriter

Members = Iterable[tuple[str, bytes]]
BLOCK = 512


def picture(number: int, kind: str = "JPEG") -> bytes:
    """A small picture of a size of its own."""
    rng = np.random.default_rng(number)
    return encode(smooth_picture(rng, 20 + number % 13, 30 - number % 7), kind)


def write_tar(path: Path, members: Members, tar_format: int = tarfile.USTAR_FORMAT, **about: object) -> Path:
    """A tar by Python's tarfile; `about` are fields of every TarInfo."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in about.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(numbers: Iterable[int], extension: str = "jpg", classes: int = 5) -> list[tuple[str, bytes]]:
    """Members of plain samples: the label of n is n % classes."""
    return [
        member
        for n in numbers
        for member in ((f"s{n:07d}.cls", str(n % classes).encode()), (f"s{n:07d}.{extension}", picture(n)))
    ]


def timm_set(folder: Path, splits: tuple[str, ...] = ("train",), tars: int = 2, per_tar: int = 6) -> Path:
    """timm/imagenet-1k-wds: cls, jpg, json; all splits in one folder, `_info.json` beside."""
    folder.mkdir(parents=True)
    info = {"name": "imagenet1k", "splits": {}}
    for place, split in enumerate(splits):
        names = [f"imagenet1k-{split}-{number:04d}.tar" for number in range(tars)]
        for number, name in enumerate(names):
            first = (place * tars + number) * per_tar
            with TarWriter(str(folder / name), encoder=False) as writer:
                for n in range(first, first + per_tar):
                    writer.write(_timm_sample(n))
        info["splits"][split] = {
            "name": split,
            "num_samples": tars * per_tar,
            "filenames": names,
            "shard_lengths": [per_tar] * tars,
        }
    (folder / "_info.json").write_text(json.dumps(info))
    return folder


def _timm_sample(n: int) -> dict[str, object]:
    wnid = f"n{n % 5:08d}"
    height, width = 30 - n % 7, 20 + n % 13
    about = {"filename": f"{wnid}/{wnid}_{n}.JPEG", "label": n % 5, "height": height, "width": width}
    files = {"jpg": picture(n), "cls": str(n % 5).encode(), "json": json.dumps(about).encode()}
    return {"__key__": f"{wnid}_{n}", **files}


def numbered_set(folder: Path, tars: int = 3, per_tar: int = 5) -> Path:
    """imagenet-train-{000000..001281}.tar, as the WebDataset documentation has it: jpg and cls."""
    folder.mkdir(parents=True)
    for number in range(tars):
        with TarWriter(str(folder / f"imagenet-train-{number:06d}.tar"), encoder=False) as writer:
            for n in range(number * per_tar, (number + 1) * per_tar):
                writer.write({"__key__": f"n{n % 5:08d}_{n}", "jpg": picture(n), "cls": str(n % 5).encode()})
    return folder


def clip_set(folder: Path, tars: int = 2, per_tar: int = 6) -> Path:
    """CLIP-benchmark: train/0.tar and test/0.tar with webp and cls, nshards.txt in each, classnames.txt beside."""
    for place, split in enumerate(("train", "test")):
        (folder / split).mkdir(parents=True)
        for number in range(tars):
            with TarWriter(str(folder / split / f"{number}.tar"), encoder=False) as writer:
                for n in range(number * per_tar, (number + 1) * per_tar):
                    image = picture(100 * place + n, "WEBP")
                    writer.write({"__key__": f"s{n:07d}", "webp": image, "cls": str(n % 5).encode()})
        (folder / split / "nshards.txt").write_text(f"{tars}\n")
    (folder / "classnames.txt").write_text("airplane\ngreat white shark\ncat\ndeer\ntiger cat\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    return folder


def with_checksum(header: bytes) -> bytes:
    """A header whose checksum is right again."""
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    return header[:148] + b"%06o\0 " % total + header[156:]


def patched(tar: bytes, header_at: int, field: int, value: bytes, *, checksum: bool = True) -> bytes:
    """A tar with other bytes in one of its headers."""
    header = bytearray(tar[header_at : header_at + BLOCK])
    header[field : field + len(value)] = value
    new = with_checksum(bytes(header)) if checksum else bytes(header)
    return tar[:header_at] + new + tar[header_at + BLOCK :]


def data_end(path: Path) -> int:
    """Where the end-of-archive blocks of a tar begin."""
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    return last.offset_data + -(-last.size // BLOCK) * BLOCK


def jpeg_with_segments(segments: Iterable[bytes]) -> bytes:
    """A JPEG with more APP1 segments before its tables than fit into what is read at first."""
    plain = jpeg_bytes(7, 33, 21)
    added = b"".join(b"\xff\xe1" + (len(data) + 2).to_bytes(2, "big") + data for data in segments)
    return plain[:2] + added + plain[2:]
