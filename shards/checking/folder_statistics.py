"""What is in a folder of shards, from its indexes, and from the headers of some images spread over it."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from shards.dataset import Dataset

LOOKED_AT = 1000  # images whose headers are read
_SHARES = (0.0, 0.05, 0.5, 0.95, 1.0)
_KINDS = {"L": "gray", "1": "gray", "LA": "gray", "I": "gray", "I;16": "gray", "CMYK": "CMYK", "P": "palette"}


@dataclass(frozen=True)
class Statistics:
    """Numbers about N samples; quantiles are the minimum, 5 %, the median, 95 % and the maximum."""

    samples: int
    unlabelled: int
    classes: int  # with a name or a sample
    per_class: tuple[int, float, int]  # samples of a class: minimum, median, maximum (0, 0, 0 without labels)
    pixels: dict[str, tuple[int, ...]]  # quantiles of height, width, shorter side
    bytes: tuple[int, ...]  # quantiles of the images' sizes in bytes
    looked_at: int  # images whose headers were read, spread evenly; the rest is about them
    formats: Counter[str]  # JPEG, PNG, WEBP, or "unreadable"
    colors: Counter[str]  # RGB, RGBA, gray, CMYK, palette


def statistics_of(dataset: Dataset) -> Statistics:
    """Statistics of all samples, and formats and colors of at most `LOOKED_AT` images."""
    labels = dataset.label[dataset.label >= 0]
    number = max(len(dataset.classes), int(labels.max(initial=-1)) + 1)
    counts = np.bincount(labels, minlength=number) if number else np.zeros(1, int)
    sides = {"height": dataset.height, "width": dataset.width}
    sides["shorter side"] = np.minimum(dataset.height, dataset.width)
    places = spread(dataset, LOOKED_AT)
    headers = [_header(image_bytes(dataset, place)) for place in places]
    return Statistics(
        samples=len(dataset),
        unlabelled=len(dataset) - len(labels),
        classes=number,
        per_class=(int(counts.min()), float(np.median(counts)), int(counts.max())),
        pixels={name: _quantiles(values) for name, values in sides.items()},
        bytes=_quantiles(dataset.size),
        looked_at=len(places),
        formats=Counter(image_format for image_format, _ in headers),
        colors=Counter(color for _, color in headers if color),
    )


def spread(dataset: Dataset, number: int) -> list[int]:
    """At most `number` sample ids, spread evenly over the classes and, inside each, over the tars."""
    by_class = np.argsort(dataset.label, kind="stable")
    number = min(number, len(dataset))
    return by_class[np.arange(number) * len(dataset) // max(number, 1)].tolist()


def image_bytes(dataset: Dataset, sample_id: int) -> bytes:
    """The stored bytes of one image."""
    with open(dataset.paths[dataset.tar[sample_id]], "rb") as stream:
        stream.seek(int(dataset.offset[sample_id]))
        return stream.read(int(dataset.size[sample_id]))


def _quantiles(values: np.ndarray) -> tuple[int, ...]:
    return tuple(np.quantile(values, _SHARES, method="nearest").astype(int).tolist())


def _header(data: bytes) -> tuple[str, str]:
    """Format and kind of color; nothing is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"]) as image:
            return str(image.format), _KINDS.get(image.mode, image.mode)
    except Exception:  # Pillow's parsers raise many kinds on damaged bytes
        return "unreadable", ""
