"""PNG and WebP in all their kinds, and pictures of impossible sizes: each with what becomes of it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from corpus_bytes import (
    chunks,
    deep_png,
    flipped,
    interlaced_png,
    orientation_exif,
    pixel_stream,
    png_of,
    put,
    raw_png,
    with_chunk,
    with_pixel_stream,
)  # fmt: skip
from corpus_entries import BROKEN, KEPT, MORE, PICTURE, PNG, WEBP, BadImage, image, noise
from images import encode
from PIL import Image, ImageCms


def pngs_and_webps() -> Iterator[BadImage]:
    """All of them."""
    yield from _sizes()
    yield from _pngs()
    yield from _bad_pngs()
    yield from _webps()


def _sizes() -> Iterator[BadImage]:
    for width, height in ((1, 1), (1, 4000), (8000, 2), (65500, 1), (1, 65500)):
        yield image(f"{width}x{height}.jpg", encode(PICTURE.resize((width, height)), "JPEG"), KEPT, 25)
    yield image("1x1.png", encode(PICTURE.resize((1, 1)), "PNG"), KEPT, 25)
    yield image("1x1.webp", encode(PICTURE.resize((1, 1)), "WEBP"), KEPT, 25)
    yield image("16383x1.webp", encode(PICTURE.resize((16383, 1)), "WEBP"), KEPT, 25)
    yield image("30000.png", encode(Image.new("1", (30000, 30000)), "PNG"), "too-large", 14)
    for side in (2**31 - 1, 2**31, 2**32 - 1):
        ihdr = struct.pack(">II", side, side) + chunks(PNG)[0][1][8:]
        yield image(f"ihdr_{side}.png", png_of([(b"IHDR", ihdr), *chunks(PNG)[1:]]), "too-large|header", 15)


def _pngs() -> Iterator[BadImage]:
    for mode in ("RGB", "P", "LA", "RGBA", "1", "L"):
        yield image(f"png_{mode}.JPEG", encode(PICTURE.convert(mode), "PNG"), KEPT, 19)
    for channels, name in {1: "gray", 2: "gray_alpha", 3: "rgb", 4: "rgba"}.items():
        yield image(f"png_16_{name}.png", deep_png(noise(40, 60, channels, levels=65536)), KEPT, 20)
    rows = [row.tobytes() for row in noise(40, 60)]
    for depth in (1, 2, 4):
        packed = [row[: 60 * depth // 8 + 1][: -(-60 * depth // 8)] for row in rows]
        palette = (b"PLTE", noise(3 * 2**depth).tobytes())
        yield image(f"png_gray_{depth}.png", raw_png(packed, (60, 40), depth, 0))
        yield image(f"png_palette_{depth}.png", raw_png(packed, (60, 40), depth, 3, palette))
    yield image("png_gray_trns.png", raw_png(rows, (60, 40), 8, 0, (b"tRNS", b"\0\x80")))
    rgb = [row.tobytes() for row in noise(40, 60, 3)]
    yield image("png_rgb_trns.png", raw_png(rgb, (60, 40), 8, 2, (b"tRNS", b"\0\x80" * 3)))
    yield image("png_palette_trns.png", encode(PICTURE.convert("P"), "PNG", transparency=bytes(range(256))))
    alpha = Image.fromarray(np.dstack([np.asarray(PICTURE), noise(40, 60)]))
    yield image("png_alpha.png", encode(alpha, "PNG"))
    yield image("png_alpha_bkgd.png", with_chunk(encode(alpha, "PNG"), b"bKGD", bytes(6)))
    yield image("png_interlaced.png", interlaced_png(PICTURE))
    for name, gamma in {"dark": 20000, "linear": 100000, "none": 0}.items():
        yield image(f"png_gamma_{name}.png", with_chunk(PNG, b"gAMA", struct.pack(">I", gamma)))
    yield image("png_srgb.png", with_chunk(PNG, b"sRGB", b"\0"))
    yield image("png_primaries.png", with_chunk(PNG, b"cHRM", struct.pack(">8I", *range(10000, 90000, 10000))))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    yield image("png_icc_lab.png", encode(PICTURE, "PNG", icc_profile=lab))
    yield image("png_exif_6.png", encode(PICTURE, "PNG", exif=orientation_exif(6)[6:]), KEPT, 23)
    yield image("png_many_idat.png", with_pixel_stream(PNG, *(bytes([byte]) for byte in pixel_stream(PNG))))
    yield image("png_followed.png", PNG + b"garbage" * 9)
    yield image("png_named.webp", PNG)


def _bad_pngs() -> Iterator[BadImage]:
    stream, pixels = pixel_stream(PNG), zlib.decompress(pixel_stream(PNG))
    yield image("png_cut.png", PNG[: len(PNG) // 2], BROKEN)
    cut = interlaced_png(PICTURE)
    yield image("png_interlaced_cut.png", cut[: len(cut) * 6 // 10], BROKEN)
    yield image("png_no_iend.png", PNG[:-12], BROKEN)
    yield image("png_no_idat.png", png_of([chunks(PNG)[0], (b"IEND", b"")]), BROKEN)
    for name, at in {"ihdr": 29, "idat": len(PNG) - 13}.items():
        yield image(f"png_crc_{name}.png", flipped(PNG, at), BROKEN)
    yield image("png_crc_iend.png", flipped(PNG, len(PNG) - 1))
    yield image("png_iend_name.png", flipped(PNG, len(PNG) - 6), BROKEN)
    yield image("png_zlib_header.png", with_pixel_stream(PNG, b"\x79\x9d" + stream[2:]), BROKEN)
    yield image("png_zlib_checksum.png", with_pixel_stream(PNG, stream[:-4] + bytes(4)), BROKEN)
    yield image("png_too_few_pixels.png", with_pixel_stream(PNG, zlib.compress(pixels[:3000])), BROKEN)
    yield image("png_too_many_pixels.png", with_pixel_stream(PNG, zlib.compress(pixels + bytes(3000))))
    rows = [row.tobytes() for row in noise(40, 60, 3)]
    yield image("png_filter_9.png", raw_png(rows, (60, 40), 8, 2, filter_type=9), BROKEN)
    yield image("png_0x0.png", raw_png([], (0, 0), 8, 2), BROKEN)
    yield image("png_depth_3.png", raw_png(rows, (60, 40), 3, 0), BROKEN)
    yield image("png_colour_5.png", raw_png(rows, (60, 40), 8, 5), BROKEN)
    yield image("png_no_palette.png", raw_png([bytes(60)] * 40, (60, 40), 8, 3), BROKEN)
    beyond = (b"PLTE", bytes(range(12)))
    yield image("png_beyond_palette.png", raw_png([b"\xc8" * 60] * 40, (60, 40), 8, 3, beyond))
    yield image("png_unknown_chunk.png", with_chunk(PNG, b"ABCD", b"x"), BROKEN)
    bomb = zlib.compress(bytes(200_000_000))
    yield image("png_text_bomb.png", with_chunk(PNG, b"zTXt", b"k\0\0" + bomb), BROKEN, unseen=True)
    yield image("png_icc_bomb.png", with_chunk(PNG, b"iCCP", b"k\0\0" + bomb), BROKEN, unseen=True)
    yield image("apng.png", encode(PICTURE, "PNG", **MORE), "animated")
    yield image("apng_of_one.png", with_chunk(PNG, b"acTL", struct.pack(">II", 1, 0)), "animated")
    yield image("apng_that_lies.png", with_chunk(PNG, b"acTL", struct.pack(">II", 7, 0)), "animated")


def _webps() -> Iterator[BadImage]:
    lossless = encode(PICTURE, "WEBP", lossless=True)
    alpha = Image.fromarray(np.dstack([np.asarray(PICTURE), noise(40, 60)]))
    yield image("webp.webp", WEBP, KEPT, 21)
    yield image("webp_named.jpg", WEBP, KEPT, 21)
    yield image("webp_lossless.webp", lossless)
    yield image("webp_alpha.webp", encode(alpha, "WEBP", quality=90))
    yield image("webp_alpha_lossless.webp", encode(alpha, "WEBP", lossless=True, exact=True))
    yield image("webp_exif_6.webp", encode(PICTURE, "WEBP", exif=orientation_exif(6)), KEPT, 23)
    yield image("webp_animated.webp", encode(PICTURE, "WEBP", **MORE), "animated", 21)
    yield image("webp_followed.webp", WEBP + b"garbage" * 9)
    yield image("webp_cut.webp", WEBP[:-40], BROKEN)
    yield image("webp_half.webp", WEBP[: len(WEBP) // 2], BROKEN)
    yield image("webp_lossless_cut.webp", lossless[:-40], BROKEN)
    yield image("webp_riff_longer.webp", put(WEBP, 4, struct.pack("<I", len(WEBP) + 5000)), BROKEN)
    yield image("webp_riff_shorter.webp", put(WEBP, 4, struct.pack("<I", 10)), BROKEN)
    yield image("webp_other_size.webp", put(WEBP, 26, bytes([WEBP[26] ^ 3])), KEPT, 9)
