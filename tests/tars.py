"""Small datasets for tests: images in tars and the `Dataset` that describes them, without the converter."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from shards.dataset import Dataset


def make_dataset(
    folder: Path, encoded: Sequence[bytes], per_tar: int, sizes: Sequence[tuple[int, int]] | None = None
) -> Dataset:
    """Write the images `per_tar` to a tar; sample i has label i % 5 and the key of its number.

    `sizes` (height, width) are given for images that PIL cannot open; otherwise PIL reads them.
    """
    columns: dict[str, list[int]] = {"tar": [], "offset": [], "size": []}
    paths = tuple(folder / f"set {number:03d}.tar" for number in range(-(-len(encoded) // per_tar)))
    for number, path in enumerate(paths):
        first = number * per_tar
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for serial, image in enumerate(encoded[first : first + per_tar], first):
                member = tarfile.TarInfo(f"{serial:05d}.jpg")
                member.size = len(image)
                columns["tar"].append(number)
                columns["offset"].append(tar.offset + 512)
                columns["size"].append(len(image))
                tar.addfile(member, io.BytesIO(image))
    height, width = np.array(sizes or [Image.open(io.BytesIO(image)).size[::-1] for image in encoded]).T
    return Dataset(
        folder=folder,
        paths=paths,
        tar=np.array(columns["tar"], np.int32),
        offset=np.array(columns["offset"], np.int64),
        size=np.array(columns["size"], np.int64),
        label=np.arange(len(encoded), dtype=np.int32) % 5,
        height=height.astype(np.int32),
        width=width.astype(np.int32),
        key=np.array([f"{serial:05d}".encode() for serial in range(len(encoded))]),
        classes=tuple("abcde"),
        fingerprint="test",
    )
