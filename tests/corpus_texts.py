"""Files that parsers of ours read before anybody believes them: indexes and manifests, from any hand."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import numpy as np
from corpus_entries import KEPT, BadText
from corpus_files import lists

LINE = "jpg 512 600 a.jpg cls 1536 1 a.cls"
OTHER = "jpg 2560 600 b.jpg cls 3584 1 b.cls"


def texts() -> Iterator[BadText]:
    """All of them."""
    yield from _dali()
    yield from _json()
    yield from _archives()
    yield from lists()


def _dali() -> Iterator[BadText]:
    """Indexes of DALI, for a tar of 10,240 bytes."""
    refused = {
        "empty": ("", 38),
        "garbage": ("\x93NUMPY\x01\0\n", 38),
        "no end": (f"v1.2 1\n{LINE}", 38),
        "another version": (f"v9.9 1\n{LINE}\n", 38),
        "no version": (f"{LINE}\n{OTHER}\n", 38),
        "none": ("v1.2 0\n", 38),
        "count too large": (f"v1.2 2\n{LINE}\n", 38),
        "count too small": (f"v1.2 1\n{LINE}\n{OTHER}\n", 38),
        "count of -1": (f"v1.2 -1\n{LINE}\n", 38),
        "count of 1e14": (f"v1.2 100000000000000\n{LINE}\n", 39),
        "count of a hundred digits": (f"v1.2 {'9' * 100}\n{LINE}\n", 39),
        "cut line": (f"v1.2 2\n{LINE}\n{OTHER[:20]}\n", 38),
        "zero byte": (f"v1.2 1\n{LINE}\0\n", 38),
        "space in a name": (f"v1.2 1\n{LINE.replace('a.jpg', 'a b.jpg')}\n", 38),
        "two spaces": (f"v1.2 1\n{LINE.replace(' ', '  ', 1)}\n", 38),
        "lines of Windows": (f"v1.2 1\r\n{LINE}\r\n", 38),
        "tabs": (f"v1.2 1\n{LINE}\n".replace(" ", "\t"), 38),
        "negative offset": (f"v1.2 1\n{LINE.replace('512', '-512')}\n", 39),
        "negative size": (f"v1.2 1\n{LINE.replace('600', '-600')}\n", 39),
        "size of zero": (f"v1.2 1\n{LINE.replace('600', '0')}\n", 39),
        "size of 1e11": (f"v1.2 1\n{LINE.replace('600', '100000000000')}\n", 39),
        "offset beyond": (f"v1.2 1\n{LINE.replace('1536', '51200')}\n", 39),
        "offset between blocks": (f"v1.2 1\n{LINE.replace('512', '513')}\n", 39),
        "offset of 2^64": (f"v1.2 1\n{LINE.replace('512', str(2**64))}\n", 39),
        "a fraction": (f"v1.2 1\n{LINE.replace('512', '512.0')}\n", 39),
        "hexadecimal": (f"v1.2 1\n{LINE.replace('512', '0x200')}\n", 39),
        "Arabic digits": (f"v1.2 1\n{LINE.replace('600', chr(0x666) * 3)}\n", 39),
        "an extension twice": (f"v1.2 1\n{LINE.replace('cls', 'jpg')}\n", 42),
        "names of two samples": (f"v1.2 1\n{LINE.replace('a.cls', 'b.cls')}\n", 42),
        "another extension": (f"v1.2 1\n{LINE.replace('a.jpg', 'a.png')}\n", 42),
    }
    for name, (text, row) in refused.items():
        yield BadText(f"dali: {name}", r"line \d+|the last line", row, "dali", text.encode("utf-8"))
    yield BadText("dali: sound", KEPT, 38, "dali", f"v1.2 2\n{LINE}\n{OTHER}\n".encode())
    yield BadText("dali: v1.1", KEPT, 38, "dali", b"v1.1 1\njpg 512 600 cls 1536 1\n")


def _json() -> Iterator[BadText]:
    """A manifest and the index of a foreign set: anything but the exact text that we write is refused."""
    cases = {
        "empty": b"",
        "null": b"null",
        "a number": b"1" * 5000,
        "deep lists": b"[" * 1_000_000,
        "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "no fields": b"{}",
        "wrong types": json.dumps(dict.fromkeys(("tars", "shards", "classes", "samples", "format"), 7)).encode(),
        "infinity": b'{"format": "maskwright-shards", "version": Infinity}',
        "true for a number": b'{"format": "maskwright-shards", "version": true}',
        "YAML": b"!!python/object/apply:os.system ['true']",
        "a name twice": b'{"version": 1, "version": 1}',
        "UTF-16": "{}".encode("utf-16"),
        "surrogates": b'{"classes": ["\\ud800"]}',
        "leads out": b'{"tars": [{"name": "../../x.tar"}], "shards": [{"name": "../../x"}]}',
    }
    for parser in ("manifest", "set"):
        for name, data in cases.items():
            yield BadText(f"{parser}: {name}", "not a usable", 62, parser, data)


def _archives() -> Iterator[BadText]:
    """Our index of a tar: a zip of arrays."""

    def archive(**arrays: object) -> bytes:
        stream = io.BytesIO()
        np.savez(stream, **{name: np.asarray(value) for name, value in arrays.items()})
        return stream.getvalue()

    objects = archive(label=np.array([{"a": 1}], dtype=object))
    text = np.frombuffer(b"[]", np.uint8)
    cases = {
        "empty": b"",
        "a zip of nothing": b"PK\5\6" + bytes(18),
        "one array": archive(label=[1]),
        "objects that are code": objects,
        "meta that is a list": archive(meta=text, rejected=text),
        "meta that is deep": archive(meta=np.frombuffer(b"[" * 100_000, np.uint8), rejected=text),
        "cut": objects[: len(objects) // 2],
        "a plain array": b"\x93NUMPY" + bytes(99),
        "garbage": b"\xff" * 3000,
        "a size of 1e15": archive(label=np.zeros(3, np.int64)).replace(b"(3,), }", b"(10**15,)}") + b"",
    }
    for name, data in cases.items():
        yield BadText(f"index: {name}", "not a readable index|meta holds", 38, "index", data)
