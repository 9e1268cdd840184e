"""Pictures of a folder of shards at a glance: a grid of images spread over it, each with its class and key."""

from __future__ import annotations

import io

from PIL import Image, ImageDraw, ImageFont

from shards.checking.folder_statistics import image_bytes, spread
from shards.dataset import Dataset
from shards.making.screener import Rules, kept_screener
from shards.making.screening import Rejected, Screened

IMAGES = 64
COLUMNS = 8
SIDE = 144  # pixels of a picture in the grid
CAPTION = 26  # pixels below it: two lines
_MARGIN = 6
_MOST_PIXELS = 178_956_970  # beyond, Pillow refuses an image
_LETTERS = 23  # of a caption's line
_BACKGROUND, _INK, _WARNING = "white", "black", "firebrick"


def contact_sheet(dataset: Dataset, number: int = IMAGES) -> Image.Image:
    """A grid of at most `number` images, `COLUMNS` in a row; damaged ones are named in their place.

    Images are decoded by the screening process: a hostile one costs its place only.
    """
    places = spread(dataset, number)
    rules = Rules(max_pixels=_MOST_PIXELS, short_side=SIDE)
    cell = SIDE + _MARGIN, SIDE + CAPTION + _MARGIN
    rows = -(-len(places) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * cell[0] + _MARGIN, rows * cell[1] + _MARGIN), _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for position, place in enumerate(places):
        x = _MARGIN + position % COLUMNS * cell[0]
        y = _MARGIN + position // COLUMNS * cell[1]
        (verdict,) = kept_screener().judge([image_bytes(dataset, place)], rules)
        if isinstance(verdict, Rejected):
            draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), outline=_WARNING)
            draw.text((x + 4, y + 4), verdict.reason, _WARNING, font)
        else:
            sheet.paste(_thumbnail(verdict), (x, y))
        for line, text in enumerate(_caption(dataset, place)):
            draw.text((x, y + SIDE + line * CAPTION // 2), text, _INK, font)
    return sheet


def _thumbnail(image: Screened) -> Image.Image:
    """The picture inside a square of `SIDE` pixels."""
    picture = Image.open(io.BytesIO(image.data)).convert("RGB")
    picture.thumbnail((SIDE, SIDE))
    return picture


def _caption(dataset: Dataset, place: int) -> tuple[str, str]:
    """Class and key, cut to the width of a cell; letters that the font has not become question marks."""
    label = int(dataset.label[place])
    name = (
        dataset.classes[label] if 0 <= label < len(dataset.classes) else f"label {label}" if label >= 0 else "no label"
    )
    texts = name, dataset.key[place].decode()
    return tuple(text.encode("latin-1", "replace").decode("latin-1")[:_LETTERS] for text in texts)
