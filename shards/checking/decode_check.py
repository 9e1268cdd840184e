"""Does every stored image still decode as training decodes it? Asked of the converter's own screening process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shards.index import ShardIndex
from shards.making.screener import Rules, kept_screener
from shards.making.screening import Rejected, Screened

_TOGETHER = 64  # images


def undecodable(tar: Path, index: ShardIndex, max_pixels: int) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of each image of `tar` that does not decode, or not to what the index says of it."""
    rows = {name: index.arrays[name].tolist() for name in ("key", "offset", "size", "extension", "height", "width")}
    with open(tar, "rb") as stream:
        for first in range(0, len(index), _TOGETHER):
            places = range(first, min(first + _TOGETHER, len(index)))
            images = []
            for place in places:
                stream.seek(rows["offset"][place])
                images.append(stream.read(rows["size"][place]))
            for place, verdict in zip(places, kept_screener().judge(images, Rules(max_pixels=max_pixels)), strict=True):
                told = rows["extension"][place].decode(), rows["height"][place], rows["width"][place]
                if problem := _problem(verdict, told):
                    yield rows["key"][place].decode(), problem


def _problem(verdict: Screened | Rejected, told: tuple[str, int, int]) -> str:
    """What is wrong with one image, or nothing; `told`: extension, height and width of the index."""
    if isinstance(verdict, Rejected):
        return f"does not decode: {verdict}"
    found = verdict.extension, verdict.height, verdict.width
    return "" if found == told else f"is a {found[0]} of {found[1]} x {found[2]} pixels, the index has {told}"
