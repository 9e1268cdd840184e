"""Everything bad and odd of tests/corpus.py goes through the product, in processes that may die, and is counted.

`pytest tests/test_corpus.py -s` shows the tally.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import pytest
from corpus_bytes import decoded
from corpus_entries import JPEG, KEPT, BadFolder, BadTar, Entry, image
from corpus_harness import Counts, Doors, Failure, Verdict
from corpus_judging import SIDE, judge_conversion, judge_foreign, judge_refusal, judge_shards, judge_tar, view_of

SECONDS = 60.0  # for an answer
MANY_SECONDS = 400.0  # for a set of all images; it takes 8 on two cores
SICK = (sys.executable, str(Path(__file__).with_name("sick_doors.py")))


def test_the_corpus(tmp_path: Path, record_testsuite_property) -> None:
    """Nothing dies, hangs, is lost or silently wrong; what is bad is left out or refused with the words that help."""
    parts, counts, places = corpus.all_entries(), Counts(), corpus.write(tmp_path)
    with Doors(tmp_path / "stderr") as doors:
        source, folder = (*parts["images"], *parts["files"]), tmp_path / "conversion"
        judge_conversion(counts, folder, source, doors.ask("convert", str(folder), MANY_SECONDS))
        folder = tmp_path / "foreign"
        judge_foreign(counts, folder, parts["images"], doors.ask("foreign", str(folder), MANY_SECONDS))
        for folder, entry in zip(places["tars"], parts["tars"], strict=True):
            judge_tar(counts, folder, entry, doors.ask("index", str(folder), SECONDS))
        for folder, entry in zip(places["shards"], parts["shards"], strict=True):
            judge_shards(counts, entry, doors.ask("shards", str(folder), SECONDS))
        for folder, entry in zip(places["folders"], parts["folders"], strict=True):
            judge_refusal(counts, entry, doors.ask("list", str(folder), SECONDS))
        for file, entry in zip(places["texts"], parts["texts"], strict=True):
            judge_refusal(counts, entry, doors.ask("parse", [entry.parser, str(file)], SECONDS))
    print(f"\n{counts.line()}")
    record_testsuite_property("corpus", counts.line())
    assert not counts.faults(), "\n".join([counts.line(), *counts.faults()])
    assert counts.tried == sum(map(len, parts.values())) + len(parts["images"])  # images come through two doors
    assert counts.line().startswith(
        f"bad inputs tried {counts.tried}, process deaths 0, hangs 0, silently wrong 0, samples lost 0, quarantined"
    )
    bad = [sum(entry.fate != KEPT for entry in entries) for entries in (*parts.values(), parts["images"])]
    assert counts.quarantined == sum(bad) > 500


def test_every_row_on_data_is_there() -> None:
    """Rows 46 to 48 and 64 are about moments, not inputs; mode 000 of row 28 means nothing to root."""
    rows = {entry.row for entries in corpus.all_entries().values() for entry in entries}
    assert rows >= {*range(1, 46), 62}


# --- the harness counts what it should ---


@pytest.fixture
def sick(tmp_path: Path) -> Iterator[Doors]:
    with Doors(tmp_path / "stderr", SICK) as doors:
        yield doors


def test_deaths_and_hangs_are_counted(sick: Doors) -> None:
    counts = Counts()
    for number, door in enumerate(("die", "echo", "raise", "hang", "echo")):
        seconds = 0.5 if door == "hang" else SECONDS
        judge_refusal(counts, Entry(f"{number} {door}", "bad"), sick.ask(door, {"refused": "it is bad"}, seconds))
    assert (counts.tried, len(counts.deaths), len(counts.hangs), counts.quarantined) == (5, 2, 1, 2)
    assert counts.deaths[0].startswith("0 die: ended with status -11")
    assert counts.deaths[1] == "2 raise: ended with status 1: ValueError: a fault of the product"
    assert counts.hangs == ["3 hang: no answer in 0.5 s"]
    assert counts.line() == (
        "bad inputs tried 5, process deaths 2, hangs 1, silently wrong 0, samples lost 0, quarantined as expected 2"
    )


def test_a_hanging_door_takes_its_children_with_it(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys; print('\"ready\"', flush=True); subprocess.run([sys.executable, '-c', sys.argv[1]])"
    )
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(1000)"
    with Doors(tmp_path / "stderr", (sys.executable, "-c", script, child)) as doors:
        assert doors.ask("any", 0, 5.0) == Failure(True, "no answer in 5 s")
    deadline = time.monotonic() + SECONDS
    while alive(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < deadline, "a child outlives its door"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize(
    ("fate", "verdict", "counted"),
    [
        (KEPT, Verdict(True), {}),
        (KEPT, Verdict(True, wrong="other pixels"), {"silently_wrong": ["x: other pixels"]}),
        (KEPT, Verdict(False, "header"), {"lost": ["x: header"]}),
        ("header", Verdict(False, "header: cut"), {"quarantined": 1}),
        ("header", Verdict(False, "empty"), {"misnamed": ["x: 'empty', not 'header'"]}),
        ("header", Verdict(True), {"silently_wrong": ["x: accepted, not header"]}),
    ],
)
def test_fates_are_compared(fate: str, verdict: Verdict, counted: dict[str, Any]) -> None:
    counts = Counts()
    counts.add(Entry("x", fate), verdict)
    assert counts == Counts(tried=1, **counted)
    assert bool(counts.faults()) == any(isinstance(value, list) for value in counted.values())


ENTRIES = (image("good.jpg", JPEG), image("other.jpg", JPEG), image("bad.jpg", b"<html>", "format"))


def answered(folder: Path, **changes: Any) -> dict[str, Any]:
    """What the door of a sound conversion of ENTRIES says and leaves, but for `changes`."""
    digest = hashlib.sha256(JPEG).hexdigest()
    served = {"ids": np.arange(2), "crop_ids": np.arange(2), "frame_0": decoded(JPEG), "frame_1": decoded(JPEG)}
    served["views"] = np.stack([view_of(JPEG, "evaluate", number) for number in range(2)])
    served["crops"] = np.stack([view_of(JPEG, "pretrain_mae", number) for number in range(2)])
    np.savez(folder / "served.npz", **{name: changes.get(name, array) for name, array in served.items()})
    answer = {
        "images": 3,
        "kept": [["things/good.jpg", digest], ["things/other.jpg", digest]],
        "sizes": [[90, 120], [90, 120]],
        "left_out": {"things/bad.jpg": "format: not an image"},
        "findings": [],
    }
    return {name: changes.get(name, value) for name, value in answer.items()}


GRAY = np.full((2, 3, SIDE, SIDE), 128, np.float32)


@pytest.mark.parametrize(
    ("changes", "wrong", "lost"),
    [
        ({}, 0, 0),
        ({"frame_1": np.zeros((90, 120, 3), np.uint8)}, 1, 0),
        ({"views": GRAY}, 2, 0),
        ({"crops": GRAY}, 2, 0),
        ({"kept": [["things/good.jpg", "0"], ["things/other.jpg", "0"]]}, 2, 0),
        ({"sizes": [[90, 120], [120, 90]]}, 1, 0),
        ({"findings": ["shard-000000.tar: changed"]}, 1, 0),
        ({"ids": np.array([0, 0])}, 1, 1),
        ({"ids": np.array([0, 7])}, 1, 1),
        ({"images": 4}, 0, 1),
        ({"left_out": {}}, 0, 1),  # and it is nowhere, though in the count: the words do not fit
        ({"left_out": {"things/bad.jpg": "format", "things/x": ""}}, 0, 1),
    ],
)
def test_a_wrong_or_lossy_conversion_is_counted(changes: dict[str, Any], wrong: int, lost: int, tmp_path: Path) -> None:
    counts = Counts()
    judge_conversion(counts, tmp_path, ENTRIES, answered(tmp_path, **changes))
    assert (len(counts.silently_wrong), len(counts.lost)) == (wrong, lost), counts.faults()
    assert bool(counts.faults()) == bool(changes)


def test_a_wrong_or_lossy_index_is_counted(tmp_path: Path) -> None:
    entry = BadTar("x", samples={"a": (1, JPEG), "b": (2, JPEG)})
    views = np.stack([view_of(JPEG, "evaluate", number) for number in range(2)])

    def faults(keys: tuple[str, ...] = ("a", "b"), **changes: np.ndarray) -> tuple[int, int]:
        served = {"ids": np.arange(2), "views": views, "labels": np.array([1, 2])} | changes
        np.savez(tmp_path / "served.npz", **served)
        counts = Counts()
        judge_tar(counts, tmp_path, entry, {"keys": list(keys)})
        return len(counts.silently_wrong), len(counts.lost)

    assert faults() == (0, 0)
    assert faults(labels=np.array([2, 1])) == (1, 0)
    assert faults(views=GRAY) == (1, 0)
    assert faults(keys=("a", "c")) == (1, 1)
    assert faults(keys=("a", "b", "c")) == (0, 1)
    counts = Counts()
    judge_tar(counts, tmp_path, BadTar("y", "no images"), {"refused": "y: no images", "declared": True})
    assert counts.silently_wrong == ["y: refused, and yet an index was declared"]


def test_a_door_that_takes_all_or_nothing_is_counted() -> None:
    folder, text = BadFolder("x", "missing"), Entry("y", "line 2")
    counts = Counts()
    judge_shards(counts, folder, {"verify": [], "quick": []})
    judge_shards(counts, folder, {"verify": ["a: missing"], "quick": []})
    judge_shards(counts, folder, {"verify": ["a: missing"], "quick": ["a: missing"]})
    judge_refusal(counts, text, {})
    judge_refusal(counts, text, {"refused": "line 3"})
    judge_refusal(counts, Entry("z"), {"refused": "line 3"})
    assert (len(counts.silently_wrong), len(counts.misnamed), len(counts.lost)) == (7, 1, 1), counts.faults()


def test_the_script_runs_from_anywhere() -> None:
    result = subprocess.run([sys.executable, corpus.__file__], cwd="/", capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "usage: python tests/corpus.py DIR\n")
