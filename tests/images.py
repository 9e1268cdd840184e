"""Small picture folders for tests: smooth random content in varied sizes, the same bytes for the same seed.

A picture is a coarse random grid blown up bicubically, so it compresses like a photograph and resizing it makes sense
(white noise does neither). Every seventh file is a PNG and of every five pictures one is gray and one is progressive.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def smooth_picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """An RGB picture of `width` x `height` pixels."""
    grid = rng.integers(0, 256, size=(5, 5, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)


def encode(picture: Image.Image, image_format: str = "JPEG", **options: object) -> bytes:
    """The bytes of `picture` in one of Pillow's formats; `options` go to `Image.save`."""
    stream = io.BytesIO()
    picture.save(stream, image_format, **options)
    return stream.getvalue()


def jpeg_bytes(seed: int = 0, width: int = 64, height: int = 48, **options: object) -> bytes:
    """A valid JPEG of smooth content."""
    return encode(smooth_picture(np.random.default_rng(seed), width, height), "JPEG", **{"quality": 90, **options})


def make_class_folders(
    root: Path, classes: int = 3, per_class: int = 8, seed: int = 0, sides: tuple[int, int] = (40, 120)
) -> list[Path]:
    """Write root/n00000000/n00000000_0.JPEG ... with sides between `sides[0]` and `sides[1]` pixels.

    Returns the files in the order of their names. Classes n00000000, n00000001, ... hold `per_class` images each.
    """
    files = []
    for label in range(classes):
        folder = Path(root) / f"n{label:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            serial = label * per_class + number
            rng = np.random.default_rng([seed, serial])
            width, height = (int(side) for side in rng.integers(sides[0], sides[1] + 1, size=2))
            picture = smooth_picture(rng, width, height)
            if serial % 7 == 6:
                file, data = folder / f"{folder.name}_{number}.png", encode(picture, "PNG")
            else:
                if serial % 5 == 4:
                    picture = picture.convert("L")
                file = folder / f"{folder.name}_{number}.JPEG"
                data = encode(picture, "JPEG", quality=90, progressive=serial % 5 == 3)
            file.write_bytes(data)
            files.append(file)
    return files
