"""The doors through which the corpus comes: conversion, verification, opening, foreign sets, parsers, lists of images.

Driven by tests/corpus_harness.py. Only errors that a user may expect are
answers; any other exception ends the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode

from recipes.schema import Data
from shards.augment import graphs
from shards.augment.parity import dali_images, in_levels
from shards.checking.folder_statistics import image_bytes
from shards.checking.verify import verify
from shards.dali_index import parse_dali_index
from shards.dataset import Dataset, open_dataset
from shards.foreign.index_files import index_file, parse_set
from shards.foreign.indexing import check_foreign, index_shards
from shards.index import parse_index
from shards.layout import DataError, parse_manifest
from shards.making.conversion import ConversionFailed, convert
from shards.making.planning import Options, make_plan
from shards.reading.bad_samples import BadSamples
from shards.reading.loader import EvaluationLoader
from shards.sources.find import list_source

SIDE = 32  # pixels of the views that are compared
BATCH = 7
DATA = Data(image_size=SIDE, threads=1, timeout=0)
CPU = torch.device("cpu")


def convert_folder(folder: str) -> Any:
    """FOLDER/source becomes FOLDER/out and is served: what was kept, what was left out, and both views of the kept."""
    source, out = Path(folder, "source"), Path(folder, "out")
    plan = make_plan(list_source(source), Options(samples_per_shard=60))
    report = convert(plan, out, num_workers=2, max_bad_fraction=1.0)
    left_out = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    dataset = open_dataset(out)
    kept = _stored(dataset)
    served = evaluated(dataset)
    ids, (crops,) = dali_images(dataset, "pretrain_mae", DATA, CPU)
    frames = {f"frame_{number}": frame for number, frame in enumerate(decoded(dataset))}
    np.savez(Path(folder, "served.npz"), ids=served[0], views=served[1], crop_ids=ids, crops=crops, **frames)
    return {
        "images": report.images,
        "kept": kept,
        "left_out": {entry["path"]: f"{entry['reason']}: {entry['detail']}" for entry in left_out},
        "sizes": [[int(h), int(w)] for h, w in zip(dataset.height, dataset.width, strict=True)],
        "findings": list(map(str, verify(out, decode=True))),
    }


def _stored(dataset: Dataset) -> list[list[str]]:
    """(original path, sha256 of the stored image) of every sample by its id."""
    found = []
    for number, path in enumerate(dataset.paths):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for key in dataset.key[dataset.tar == number]:
            about = json.loads(members[f"{key.decode()}.json"])
            (image,) = (members[n] for e in ("jpg", "png", "webp") if (n := f"{key.decode()}.{e}") in members)
            found.append([about["filename"], hashlib.sha256(image).hexdigest()])
    return found


def decoded(dataset: Dataset) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] of every sample by its id: what the decoder of the graphs makes of it."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def decode() -> DataNode:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(encoded, **graphs._decoding(DATA, gpu=False))  # noqa: SLF001  what training decodes with

    pipeline = decode()
    pipeline.build()
    for sample_id in range(len(dataset)):
        pipeline.feed_input("encoded", [np.frombuffer(image_bytes(dataset, sample_id), np.uint8)])
        yield np.array(pipeline.run()[0].at(0))


def evaluated(
    dataset: Dataset, data: Data = DATA, bad: BadSamples | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, images [n, 3, S, S] in levels of 255 and labels as the evaluation serves them, in its order."""
    everything = np.arange(len(dataset))
    with EvaluationLoader(dataset, everything, data=data, batch=BATCH, device=CPU, bad_samples=bad) as loader:
        batches = [(b.sample_ids.numpy(), b.views[0].numpy(), b.labels.numpy()) for b in loader]
    ids, images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return ids, in_levels(images, data), labels


def serve_foreign(folder: str) -> Any:
    """A set of images that nobody screened: what indexing, decoding and training leave out, and what is served."""
    report = index_shards(Path(folder), num_workers=1, max_bad_fraction=1.0)
    findings = check_foreign(Path(folder), decode=True, num_workers=1)
    dataset = open_dataset(Path(folder))
    lenient = Data(image_size=SIDE, threads=1, timeout=0, on_bad_sample="quarantine", max_bad_fraction=0.99)
    bad = BadSamples(dataset, 0.99)
    ids, images, _ = evaluated(dataset, lenient, bad)
    np.savez(Path(folder, "served.npz"), ids=ids, views=images)
    return {
        "left_out": {image.path.partition(".")[0]: image.reason for _, image in report.rejected},
        "found": {finding.key: finding.problem for finding in findings},
        "bad": [dataset.key[i].decode() for i in bad.ids],
        "keys": [key.decode() for key in dataset.key],
    }


def index_folder(folder: str) -> Any:
    """Index a foreign set and serve it: [key, label] by id, and the images in FOLDER/served.npz."""
    try:
        index_shards(Path(folder), num_workers=1)
    except DataError as error:
        return {"refused": str(error), "declared": index_file(Path(folder)) is not None}
    try:
        dataset = open_dataset(Path(folder))
        ids, images, labels = evaluated(dataset)
    except DataError as error:
        return {"refused": str(error), "declared": False}
    np.savez(Path(folder, "served.npz"), ids=ids, views=images, labels=labels)
    return {"keys": [key.decode() for key in dataset.key]}


def check_shards(folder: str) -> Any:
    """What verification finds in a folder of ours, and what a run says when it opens it."""
    answer: dict[str, Any] = {"verify": _findings(Path(folder), quick=False)}
    answer["quick"] = _findings(Path(folder), quick=True)
    try:
        open_dataset(Path(folder))
    except DataError as error:
        answer["open"] = str(error)
    return answer


def _findings(folder: Path, quick: bool) -> list[str]:
    try:
        return list(map(str, verify(folder, quick=quick)))
    except DataError as error:
        return [str(error)]


def list_folder(folder: str) -> Any:
    """Plan a conversion of what lies in a folder."""
    try:
        listing = list_source(Path(folder))
        out = Path(folder).with_name("out")
        convert(make_plan(listing, Options()), out, num_workers=1)
    except (DataError, ConversionFailed) as error:
        return {"refused": str(error)}
    return {"images": len(listing.entries)}


def parse_text(request: list[str]) -> Any:
    """Hand a file to a parser."""
    parser, name = request
    file = Path(name)
    parsers: dict[str, Callable[[bytes], object]] = {
        "dali": lambda data: parse_dali_index(data.decode("utf-8", "replace"), file, tar_size=10_240),
        "manifest": lambda data: parse_manifest(data.decode("utf-8", "replace"), file),
        "set": lambda data: parse_set(data.decode("utf-8", "replace"), file, file.parent),
        "index": lambda data: parse_index(data, file),
        "list": lambda data: list_source(file),
    }
    try:
        parsers[parser](file.read_bytes())
    except DataError as error:
        return {"refused": str(error)}
    return {}


DOORS = {
    "convert": convert_folder,
    "foreign": serve_foreign,
    "index": index_folder,
    "shards": check_shards,
    "list": list_folder,
    "parse": parse_text,
}


def main() -> None:
    """Answer on a copy of stdout; whatever else is written there goes to stderr."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        print('"ready"', file=answers, flush=True)
        for line in sys.stdin:
            door, request = json.loads(line)
            print(json.dumps(DOORS[door](request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
