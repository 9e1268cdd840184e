"""Images that hang, eat or kill their decoder are left out by name, and nobody else suffers from them.

The sick decoders are put into the child process by a `sitecustomize` module on its path.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.layout import read_manifest
from shards.making.planning import Options, make_plan
from shards.making.screener import Rules, Screener
from shards.making.screening import Rejected, Screened
from shards.sources.class_folders import list_class_folders
from tests.images import encode, jpeg_bytes, make_class_folders, smooth_picture

ROOT = Path(__file__).resolve().parents[1]
RULES = Rules(max_pixels=64_000_000)
SICK = """
import os, signal, sys, time
if sys.orig_argv[1:3] == ["-m", "shards.making.screener"]:
    import shards.making.screening

    timer, opened, decodes = signal.setitimer, shards.making.screening._open, shards.making.screening._decodes

    def sick_open(data, extension):
        image = opened(data, extension)
        if image.size == (61, 61):
            time.sleep(1000)
        if image.size == (62, 62):
            bytearray(3 * 2**30)
        if image.size == (63, 63):
            os.kill(os.getpid(), signal.SIGSEGV)
        if image.size == (64, 64):
            os.kill(os.getpid(), signal.SIGKILL)
        return image

    def sick_decodes(images):
        if any(image.width == 65 for image in images):
            os.abort()
        if any(image.width == 66 for image in images) and not os.path.exists(__file__ + ".once"):
            open(__file__ + ".once", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return decodes(images)

    signal.setitimer = lambda which, seconds: timer(which, seconds / 15)
    shards.making.screening._open = sick_open
    shards.making.screening._decodes = sick_decodes
"""
REASONS = {61: "timeout", 62: "memory", 63: "crash", 64: "memory", 65: "crash"}


@pytest.fixture
def sick_decoders(tmp_path_factory, monkeypatch) -> None:
    folder = tmp_path_factory.mktemp("sick")
    (folder / "sitecustomize.py").write_text(SICK)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")


def square(side: int) -> bytes:
    return jpeg_bytes(side, side, side)


def reasons(verdicts: list[Screened | Rejected]) -> list[str]:
    return [verdict.reason if isinstance(verdict, Rejected) else "kept" for verdict in verdicts]


def test_every_limit_names_its_image_only(sick_decoders):
    sides = [50, 61, 51, 62, 63, 64, 52, 65, 53]
    screener = Screener()
    verdicts = screener.judge([*map(square, sides), b"no image at all"], RULES)
    assert reasons(verdicts) == [*(REASONS.get(side, "kept") for side in sides), "format"]
    assert [verdict.detail for verdict in verdicts if isinstance(verdict, Rejected)] == [
        "decoding takes longer than 30 s",
        "decoding takes more than 1,024 MiB",
        "the decoder ended with SIGSEGV",
        "decoding takes more than 1,024 MiB",
        "the decoder ended with SIGABRT",
        "not an image: begins with b'no image'",
    ]
    assert reasons(screener.judge([square(50)], RULES)) == ["kept"]


def test_a_death_without_a_cause_costs_no_image(sick_decoders):
    sides = [50, 66, 51]
    assert reasons(Screener().judge([*map(square, sides)], RULES)) == ["kept"] * 3


def test_memory_of_the_real_decoder_is_bounded():
    large = encode(Image.new("RGB", (8000, 6000)), "JPEG")  # 144 MB of pixels
    images = [square(50), large, square(51)]
    for rules in (RULES, Rules(max_pixels=64_000_000, short_side=200)):  # DALI decodes, or Pillow for a smaller copy
        assert reasons(Screener(memory=2**26).judge(images, rules)) == ["kept", "memory", "kept"]
        assert reasons(Screener().judge(images, rules)) == ["kept"] * 3


def test_time_of_the_real_decoder_is_bounded():
    large = encode(smooth_picture(np.random.default_rng(0), 7000, 7000), "PNG")
    assert reasons(Screener(seconds=0.02).judge([large], RULES)) == ["timeout"]


def test_bombs_are_judged_by_their_header():
    """30000 x 30000 pixels: a JPEG and a PNG with patched headers (test_conversion.py has a true PNG of that size)."""
    jpeg = jpeg_bytes(1, 120, 90)
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg = jpeg[:at] + (30000).to_bytes(2, "big") * 2 + jpeg[at + 4 :]
    png = bytearray(encode(Image.new("1", (30, 30)), "PNG"))
    png[16:24] = (30000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    screener = Screener(seconds=5, memory=2**26)
    assert reasons(screener.judge([jpeg, bytes(png)], RULES)) == ["too-large"] * 2
    status = Path(f"/proc/{screener._process.pid}/status").read_text()
    assert int(status.split("VmHWM:")[1].split()[0]) < 400_000  # kB; decoded they are 0.9 and 2.7 GB


@pytest.mark.long  # the test above and test_corpus.py have short forms
def test_conversion_survives_and_is_the_same_again(sick_decoders, tmp_path):
    source = tmp_path / "source"
    make_class_folders(source, classes=2, per_class=6, sides=(30, 60))
    for side in (*REASONS, 66):
        (source / "n00000001" / f"sick{side}.jpg").write_bytes(square(side))
    for out, workers in (("one", "1"), ("two", "2")):
        command = [sys.executable, "tools/make_shards.py", str(source), str(tmp_path / out), "--workers", workers]
        command += ["--samples-per-shard", "6", "--max-bad-fraction", "0.5"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0 and "13" in result.stdout, result.stderr
    assert read_manifest(tmp_path / "one").samples == 13
    left_out = [json.loads(line) for line in (tmp_path / "one" / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["path"]: entry["reason"] for entry in left_out} == {
        f"n00000001/sick{side}.jpg": reason for side, reason in REASONS.items()
    }
    assert all(len(entry["sha256"]) == 64 for entry in left_out)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("one", "two"))
    assert one == two


def test_files_beyond_the_memory_limit_are_not_read(tmp_path, monkeypatch):
    make_class_folders(tmp_path / "source", classes=1, per_class=4)
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    (tmp_path / "source" / "n00000000" / "big.png").write_bytes(encode(Image.fromarray(noise), "PNG"))
    monkeypatch.setattr("shards.making.writer._LARGEST_FILE", 200_000)
    from shards.making.writer import make_shard

    plan = make_plan(list_class_folders(tmp_path / "source"), Options())
    result = make_shard(tmp_path / "source", tmp_path, plan.shards[0])
    ((path, reason, detail, digest),) = result.rejected
    assert (path, reason, digest) == ("n00000000/big.png", "too-large", "") and "the limit is 200,000" in detail


def test_a_child_that_cannot_start_fails_with_words(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os\nos._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="screening process did not start: ended with exit status 3"):
        Screener()


def test_no_child_outlives_its_parent():
    code = "import time; from shards.making.screener import Screener; "
    code += "s = Screener(); print(s._process.pid, flush=True); "
    parent = subprocess.Popen(
        [sys.executable, "-c", code + "time.sleep(99)"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    give_up = time.monotonic() + 20
    while Path(f"/proc/{child}/stat").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < give_up, "the child is still there"
        time.sleep(0.05)


def test_an_interrupted_request_is_forgotten(monkeypatch):
    """What the child still says to it must not be taken for the next answer."""
    screener = Screener()

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(screener._connection, "recv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        screener.judge([b"no image at all"] * 3, RULES)
    assert reasons(screener.judge([square(50), square(51)], RULES)) == ["kept"] * 2
