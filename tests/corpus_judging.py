"""What the doors of tests/corpus_worker.py answered, against what must become of each entry.

The truth about pixels is Pillow's and ours: the bytes that were put in are decoded here, and cut and resized by the
reference in plain Python. What the product stored is not asked.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import corpus
import numpy as np
from corpus_bytes import decoded
from corpus_entries import KEPT, BadFile, BadFolder, BadImage, BadTar, Entry
from corpus_harness import Counts, Failure, Verdict
from images import encode
from PIL import Image

from recipes.schema import Data
from shards.augment.parity import in_levels
from shards.augment.views import VIEWS

SIDE = 32  # as in corpus_worker.py
DECODED = 2  # levels of 255 by which a decoded pixel may differ: DALI rounds 16 bits to 8 and Pillow cuts them off
RESIZED = 4.0  # in the mean over a view: of dots as fine as pixels two resizers make different grays
DATA = Data(image_size=SIDE)


def view_of(encoded: bytes, view: str, sample_id: int) -> np.ndarray:
    """float32 [3, S, S] in levels: what a view must be of an image, by Pillow."""
    pixels = decoded(encoded)
    with Image.open(io.BytesIO(encoded)) as image:
        deep = image.mode.startswith("I")
    plain = encode(Image.fromarray(pixels), "PNG") if deep else encoded  # the reference leaves 16-bit gray to others
    size = [np.array([side], np.int32) for side in pixels.shape[:2]]
    drawn = VIEWS[view].draw(DATA, 0, 0, np.array([sample_id]), *size)
    (image,) = VIEWS[view].reference(plain, {name: column[0] for name, column in drawn.items()}, DATA)
    return in_levels(image[None], DATA)[0]


def difference(served: np.ndarray, encoded: bytes, view: str, sample_id: int) -> str:
    """How an image that was served differs from what it must be; nothing if it does not."""
    try:
        levels = float(np.abs(served - view_of(encoded, view, sample_id)).mean())
    except (OSError, SyntaxError) as error:  # Pillow's words for a bad file
        return f"served, and Pillow says: {error}"
    return f"{view} differs by {levels:.1f} levels" if levels > RESIZED else ""


def _bytes_of(entry: BadImage | BadFile) -> bytes:
    return entry.data if isinstance(entry, BadImage) else entry.same_as


def judge_conversion(counts: Counts, folder: Path, entries: Sequence[BadImage | BadFile], answer: Any) -> None:
    """Every entry was kept with its bytes and served once with its pixels, or left out with a fitting reason."""
    if isinstance(answer, Failure):
        counts.failed("conversion", answer)
        return
    served = np.load(folder / "served.npz")
    ids = {path: number for number, (path, _) in enumerate(answer["kept"])}
    for entry in entries:
        path = f"{corpus.CLASS}/{entry.name}"
        if path in answer["left_out"]:
            verdict = Verdict(False, answer["left_out"][path])
        elif path in ids:
            verdict = Verdict(True, wrong=_wrongly_kept(entry, ids[path], answer, served))
        else:
            verdict = Verdict(False, "nowhere: neither kept nor left out")
        counts.add(entry, verdict)
    count_served(counts, "conversion", len(ids), served["ids"])
    count_served(counts, "conversion, training", len(ids), served["crop_ids"])
    if answer["images"] != len(ids) + len(answer["left_out"]):
        counts.lost.append(f"conversion: {answer['images']} in, {len(ids)} and {len(answer['left_out'])} out")
    counts.silently_wrong += [f"conversion: verification found {finding}" for finding in answer["findings"]]


def _wrongly_kept(entry: BadImage | BadFile, sample_id: int, answer: Any, served: Any) -> str:
    if entry.fate != KEPT:
        return ""  # wrong enough
    encoded = _bytes_of(entry)
    if answer["kept"][sample_id][1] != hashlib.sha256(encoded).hexdigest():
        return "stored with other bytes"
    if answer["sizes"][sample_id] != list(decoded(encoded).shape[:2]):
        return f"stored as {answer['sizes'][sample_id]} pixels"
    off = np.abs(served[f"frame_{sample_id}"].astype(int) - decoded(encoded)).max()
    if off > DECODED:
        return f"decoded by DALI {off} levels off"
    for view, names in (("evaluate", ("ids", "views")), ("pretrain_mae", ("crop_ids", "crops"))):
        for place in np.flatnonzero(served[names[0]] == sample_id):
            if wrong := difference(served[names[1]][place], encoded, view, sample_id):
                return wrong
    return ""


def count_served(counts: Counts, name: str, promised: int, ids: np.ndarray, left_out: Sequence[int] = ()) -> None:
    """Each promised sample but those left out is served exactly once."""
    times = Counter(ids.tolist())
    wanted = set(range(promised)) - set(left_out)
    counts.lost += [f"{name}: sample {sample} is not served" for sample in sorted(wanted - times.keys())]
    counts.silently_wrong += [
        f"{name}: sample {sample} is served {number} times" for sample, number in times.items() if number > 1
    ]
    counts.silently_wrong += [f"{name}: sample {sample} is served" for sample in sorted(times.keys() - wanted)]


def judge_foreign(counts: Counts, folder: Path, entries: Sequence[BadImage], answer: Any) -> None:
    """Of images that nobody screened, the bad ones are left out by index or run, or found by `--check --decode`."""
    if isinstance(answer, Failure):
        counts.failed("foreign images", answer)
        return
    served = np.load(folder / "served.npz")
    ids = {key: number for number, key in enumerate(answer["keys"])}
    for number, entry in enumerate(entries):
        key = corpus.key_of(number)
        counts.add(entry, _foreign_verdict(entry, key, ids.get(key), answer, served))
    bad = [ids[key] for key in answer["bad"]]
    count_served(counts, "foreign images", len(ids), served["ids"], bad)
    if len(entries) != len(ids) + len(answer["left_out"]):
        counts.lost.append(f"foreign images: {len(entries)} in, {len(ids)} and {len(answer['left_out'])} out")


def _foreign_verdict(entry: BadImage, key: str, sample_id: int | None, answer: Any, served: Any) -> Verdict:
    """A run does not decode all of an image, so its words are not asked for, only that the image is not served."""
    if sample_id is None:
        return Verdict(False, answer["left_out"].get(key, "nowhere"))
    if key in answer["bad"] or (entry.unseen and key in answer["found"]):
        return Verdict(False, entry.fate if entry.fate != KEPT else "left out by the run")
    if entry.fate != KEPT:
        return Verdict(True)
    if key in answer["found"]:
        return Verdict(True, wrong=f"--check --decode says {answer['found'][key]}")
    (place,) = np.flatnonzero(served["ids"] == sample_id)
    return Verdict(True, wrong=difference(served["views"][place], entry.data, "evaluate", sample_id))


def judge_tar(counts: Counts, folder: Path, entry: BadTar, answer: Any) -> None:
    """Refused with tar and key, or served sample by sample with its label and its pixels."""
    if isinstance(answer, Failure):
        counts.add(entry, answer)
    elif "refused" in answer:
        counts.add(entry, Verdict(False, answer["refused"]))
        if answer["declared"]:
            counts.silently_wrong.append(f"{entry.name}: refused, and yet an index was declared")
    else:
        served = np.load(folder / "served.npz")
        wrong = next(_wrongly_read(entry, answer["keys"], served), "") if entry.fate == KEPT else ""
        counts.add(entry, Verdict(True, wrong=wrong))
        count_served(counts, entry.name, len(answer["keys"]), served["ids"])
        missing = sorted(entry.samples.keys() - set(answer["keys"])) if entry.fate == KEPT else []
        counts.lost += [f"{entry.name}: {key} is not in the index" for key in missing]


def _wrongly_read(entry: BadTar, keys: Sequence[str], served: Any) -> Iterator[str]:
    for place, sample_id in enumerate(served["ids"].tolist()):
        label, encoded = entry.samples.get(keys[sample_id], (None, b""))
        if label is None:
            yield f"{keys[sample_id]} is no sample of it"
            continue
        if label != served["labels"][place]:
            yield f"{keys[sample_id]}: label {served['labels'][place]}, not {label}"
        if wrong := difference(served["views"][place], encoded, "evaluate", sample_id):
            yield f"{keys[sample_id]}: {wrong}"


def judge_shards(counts: Counts, entry: BadFolder, answer: Any) -> None:
    """Verification names it; where the size of a file tells, the quick one does; a run refuses what it would read."""
    if isinstance(answer, Failure):
        counts.add(entry, answer)
        return
    counts.add(entry, Verdict(not answer["verify"], "\n".join(answer["verify"])))
    if entry.quick and not answer["quick"]:
        counts.silently_wrong.append(f"{entry.name}: --quick finds nothing")
    if entry.quick and entry.run and "open" not in answer:
        counts.silently_wrong.append(f"{entry.name}: a run takes it")


def judge_refusal(counts: Counts, entry: Entry, answer: Any) -> None:
    """Refused with these words, or taken."""
    refused = isinstance(answer, dict) and "refused" in answer
    counts.add(entry, answer if isinstance(answer, Failure) else Verdict(not refused, answer.get("refused", "")))
