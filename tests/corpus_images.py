"""Images that are none, and JPEGs of all kinds, as they come in the wild: each with what becomes of it."""

from __future__ import annotations

import base64
import gzip
import pickle
import struct
from collections.abc import Iterator
from functools import cache

import numpy as np
from corpus_bytes import (
    ADOBE,
    APP0,
    APP1,
    APP2,
    DHT,
    DQT,
    SOF,
    frame,
    in_scan,
    orientation_exif,
    put,
    scan,
    segment,
    thumbnail_exif,
    with_component_ids,
    with_sampling,
    with_segment,
    with_size,
    without_segment,
)  # fmt: skip
from corpus_entries import BROKEN, JPEG, KEPT, MORE, PICTURE, BadImage, image, noise
from corpus_pngs import pngs_and_webps
from damage import no_header, no_tables
from images import encode, jpeg_bytes
from PIL import ImageCms


@cache
def images() -> tuple[BadImage, ...]:
    """All images of the corpus; the same bytes at every call."""
    return (*_no_images(), *_other_formats(), *_jpegs(), *_jpeg_colours(), *pngs_and_webps())


def _no_images() -> Iterator[BadImage]:
    yield image("zero_len.jpg", b"", "empty", 1)
    yield image("one_byte.jpg", b"\xff", "header", 2)
    yield image("soi_only.jpg", b"\xff\xd8", "header", 2)
    yield image("soi_eoi.jpg", b"\xff\xd8\xff\xd9" * 4, "header", 2)
    yield image("html404.JPEG", b"<!DOCTYPE html><h1>404 Not Found</h1>", "format", 3)
    yield image("access_denied.jpg", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "format", 3)
    yield image("random.jpg", np.random.default_rng(0).bytes(4096), "format", 4)
    yield image("zeros.jpg", bytes(4096), "format", 4)
    yield image("ones.jpg", b"\xff" * 4096, "format", 4)
    yield image("svg.jpg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "format")
    yield image("pdf.jpg", b"%PDF-1.4\n" + bytes(99), "format")
    yield image("gzip.jpg", gzip.compress(JPEG, mtime=0), "format")
    yield image("base64.jpg", base64.b64encode(JPEG), "format")
    yield image("data_url.jpg", b"data:image/jpeg;base64," + base64.b64encode(JPEG), "format")
    yield image("git_lfs.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "format")
    yield image("utf16.jpg", "<html></html>".encode("utf-16"), "format")
    yield image("pickle.jpg", pickle.dumps(np.asarray(PICTURE)), "format")
    yield image("numpy.jpg", b"\x93NUMPY\1\0" + bytes(99), "format")
    yield image("line_before.jpg", b"\n" + JPEG, "format")
    yield image("zeros_before.jpg", bytes(512) + JPEG, "format")
    yield image("bytes_swapped.jpg", np.frombuffer(JPEG[: len(JPEG) // 2 * 2], ">u2").byteswap().tobytes(), "format")
    yield image("as_text.jpg", JPEG.decode("utf-8", "replace").encode(), "format")
    yield image("line_ends_changed.jpg", JPEG.replace(b"\n", b"\r\n").replace(b"\0", b"\r\n"), BROKEN)


def _other_formats() -> Iterator[BadImage]:
    gif = encode(PICTURE, "GIF", **MORE)
    made = {"bmp": "BMP", "gif": "GIF", "tiff": "TIFF", "jp2": "JPEG2000", "avif": "AVIF", "ppm": "PPM", "ico": "ICO"}
    for name, kind in made.items():
        yield image(f"{name}.jpg", encode(PICTURE, kind), "unsupported", 22)
    yield image("gif_animated.jpg", gif, "unsupported", 22)
    yield image("j2k.jpg", encode(PICTURE, "JPEG2000", no_jp2=True), "unsupported")
    yield image("bmp_2_30.jpg", put(encode(PICTURE, "BMP"), 18, struct.pack("<ii", 2**30, 2**30)), "unsupported", 15)
    magic = {
        "heic": b"\0\0\0\x18ftypheic",
        "jxl": b"\xff\x0a",
        "jxl_box": b"\0\0\0\x0cJXL \r\n\x87\n",
        "bigtiff": b"II+\0\x08\0\0\0",
        "psd": b"8BPS\0\1",
    }
    for name, begin in magic.items():
        yield image(f"{name}.jpg", begin + bytes(99), "unsupported")
    for name, begin in {
        "exr": b"v/1\1",
        "hdr": b"#?RADIANCE\n",
        "dds": b"DDS ",
        "riff": b"RIFF\x24\0\0\0WAVEfmt ",
    }.items():
        yield image(f"{name}.jpg", begin + bytes(99), "format")


def _jpegs() -> Iterator[BadImage]:
    """Whole, damaged and odd ones, in one and the same colours."""
    yield image("cut_10.jpg", JPEG[: len(JPEG) // 10], BROKEN, 5)
    yield image("cut_50.jpg", JPEG[: len(JPEG) // 2], BROKEN, 6)
    yield image("cut_95.jpg", JPEG[: len(JPEG) * 95 // 100], BROKEN, 6)
    yield image("no_eoi.jpg", JPEG[:-2], BROKEN, 7)
    yield image("half_eoi.jpg", JPEG[:-1], BROKEN, 7)
    yield image("zero_tail.jpg", JPEG[:-300] + bytes(300), BROKEN, 8)
    yield image("zero_after_header.jpg", no_header(JPEG), BROKEN)
    changed = bytearray(JPEG)
    for at in np.random.default_rng(5).integers(scan(JPEG), len(JPEG) - 2, 12):
        changed[at] ^= 4
    yield image("entropy_flips.jpg", bytes(changed), KEPT, 9)
    yield image("eoi_inside.jpg", in_scan(JPEG, b"\xff\xd9"), KEPT, 9)  # as bits changed: all decode it alike
    yield image("restart_inside.jpg", in_scan(JPEG, b"\xff\xd0"), KEPT, 9)
    yield image("app0_inside.jpg", in_scan(JPEG, b"\xff\xe0"), KEPT, 9)
    yield image("soi_inside.jpg", in_scan(JPEG, b"\xff\xd8"), "corrupt", unseen=True)
    yield image("sos_inside.jpg", in_scan(JPEG, b"\xff\xda"), "corrupt", unseen=True)
    for name, after in {"garbage": b"garbage" * 9, "zeros": bytes(5000), "itself": JPEG}.items():
        yield image(f"followed_by_{name}.jpg", JPEG + after, KEPT, 11)
    yield image("bad_dht.jpg", no_tables(JPEG), BROKEN, 12)
    yield image("no_dht.jpg", JPEG.replace(DHT, b"\xff\xfe"))  # the usual tables hold, as in motion JPEG
    yield image("no_dqt.jpg", JPEG.replace(DQT, b"\xff\xfe"), "corrupt", 12)
    at = JPEG.index(DQT) + 5
    yield image("dqt_of_zeros.jpg", JPEG.replace(JPEG[at : at + 64], bytes(64)))
    yield image("sof_0x0.jpg", with_size(JPEG, 0, 0), "header", 12)
    yield image("height_told_later.jpg", with_size(JPEG, 0, 120)[:-2] + b"\xff\xdc\0\4\0\x5a\xff\xd9", "header")
    yield image("sof_taller.jpg", with_size(JPEG, 180, 120), KEPT, 9)
    yield image("sof_shorter.jpg", with_size(JPEG, 45, 120), KEPT, 9)
    yield image("sof_wider.jpg", with_size(JPEG, 90, 240), KEPT, 9)
    yield image("sof_twice.jpg", put(JPEG, JPEG.index(SOF), JPEG[JPEG.index(SOF) :][:19] * 2), BROKEN)
    yield image("sof_30000.jpg", with_size(JPEG, 30000, 30000), "too-large", 13)
    yield image("sof_65500.jpg", with_size(JPEG, 65500, 65500), "too-large", 13)
    yield image("sof_8001.jpg", with_size(JPEG, 8001, 8000), "too-large", 13)
    for kind in (0xC3, 0xC5, 0xC6, 0xC7, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7):
        yield image(f"sof_{kind:x}.jpg", frame(JPEG, marker=kind), BROKEN)  # lossless, hierarchical, arithmetic, LS
    yield image("sof_c9.jpg", frame(JPEG, marker=0xC9), KEPT)  # arithmetic: any bits are a picture
    yield image("sof_c1.jpg", frame(JPEG, marker=0xC1), KEPT)
    for bits in (2, 12, 16):
        yield image(f"bits_{bits}.jpg", frame(JPEG, precision=bits), "header|corrupt|decoder")
    for number, factors in enumerate(((0x33, 0x11, 0x11), (0, 0x11, 0x11), (0x55,) * 3, (0x31, 0x21, 0x11))):
        yield image(f"sampling_{number}.jpg", with_sampling(JPEG, factors), BROKEN)
    restart = jpeg_bytes(3, 200, 150, restart_marker_blocks=4)
    mark, following = restart.index(b"\xff\xd3", scan(restart)), restart.index(b"\xff\xd4", scan(restart))
    yield image("restarts.jpg", restart)
    yield image("restart_cut.jpg", restart[:mark] + restart[mark + 2 :], KEPT, 9)
    yield image("restart_other.jpg", put(restart, mark, b"\xff\xd5"), KEPT, 9)
    yield image("restart_interval_lost.jpg", restart[:mark] + restart[following:], KEPT, 9)
    yield image("progressive.jpg", jpeg_bytes(1, 120, 90, progressive=True), KEPT, 18)
    yield image("progressive_cut.jpg", jpeg_bytes(1, 120, 90, progressive=True)[:-400], BROKEN, 18)
    for orientation in (*range(1, 9), 0, 9):
        yield image(f"exif_{orientation}.jpg", with_segment(JPEG, APP1, orientation_exif(orientation)), KEPT, 23)
    exif = {
        "empty": b"Exif\0\0",
        "nothing": b"",
        "garbage": b"Exif\0\0" + b"\x9c" * 99,
        "endless": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\x08",
    }
    for name, content in exif.items():
        yield image(f"exif_{name}.jpg", with_segment(JPEG, APP1, content), KEPT, 24)
    thumbnail = thumbnail_exif(jpeg_bytes(2, 16, 12))
    yield image("thumbnail.jpg", with_segment(JPEG, APP1, thumbnail))
    yield image("thumbnail_only.jpg", b"\xff\xd8" + segment(APP1, thumbnail) + b"\xff\xd9", "header")
    yield image("thumbnail_and_half.jpg", with_segment(JPEG, APP1, thumbnail)[: -len(JPEG) // 2], BROKEN)
    yield image("icc_garbage.jpg", with_segment(JPEG, APP2, b"ICC_PROFILE\0\1\1" + b"\x9c" * 99), KEPT, 24)
    yield image("icc_huge.jpg", encode(PICTURE, "JPEG", icc_profile=noise(2_000_000).tobytes()))
    yield image("icc_cut.jpg", put(with_segment(JPEG, APP2, b"ICC_PROFILE\0\1\1"), 4, b"\xff\xff"), BROKEN)
    yield image("mpo.jpg", encode(PICTURE, "MPO", **MORE))
    yield image("jpeg_named.png", JPEG)
    yield image("jpeg_named.webp", JPEG)
    yield image("jpeg_named_nothing", JPEG)


def _jpeg_colours() -> Iterator[BadImage]:
    marker = segment(ADOBE, b"Adobe\0\x64\0\0\0\0" + b"\1")
    for name, options in {"444": {"subsampling": 0}, "422": {"subsampling": 1}, "420": {"subsampling": 2}}.items():
        yield image(f"sampled_{name}.jpg", jpeg_bytes(1, 121, 91, **options))
    yield image("quality_1.jpg", jpeg_bytes(1, 120, 90, quality=1))
    yield image("quality_100.jpg", jpeg_bytes(1, 120, 90, quality=100))
    yield image("gray.jpg", encode(PICTURE.convert("L"), "JPEG"), KEPT, 17)
    cmyk = encode(PICTURE.convert("CMYK"), "JPEG", quality=95)
    transform = cmyk.index(b"Adobe") + 11
    for number in range(4):  # 0 CMYK, 2 YCCK; 1 and 3 mean nothing
        yield image(f"cmyk_adobe_{number}.jpg", put(cmyk, transform, bytes([number])), KEPT, 16)
    yield image("cmyk_progressive.jpg", encode(PICTURE.convert("CMYK"), "JPEG", progressive=True), KEPT, 16)
    yield image("cmyk_without_adobe.jpg", without_segment(cmyk, ADOBE), "ambiguous", 16, unseen=True)
    plain = without_segment(JPEG, APP0)
    yield image("no_jfif.jpg", plain)
    for number in range(3):  # 0: the components are RGB
        adobe = marker[:-1] + bytes([number])
        yield image(f"adobe_{number}.jpg", plain[:2] + adobe + plain[2:])
        yield image(f"jfif_and_adobe_{number}.jpg", JPEG[:2] + adobe + JPEG[2:])
    for name, ids in {"rgb": b"RGB", "from_0": b"\0\1\2", "same": b"\1\1\1", "ycc": b"\1\x22\x23"}.items():
        yield image(f"components_{name}.jpg", with_component_ids(plain, ids))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield image("icc_srgb.jpg", encode(PICTURE, "JPEG", icc_profile=profile))
