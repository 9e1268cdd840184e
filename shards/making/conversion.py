"""A whole plan: shards in parallel, what is there already kept, and the manifest when everything is right.

The output folder is claimed first (`plan.json` names the plan, so a rerun knows its own), every shard is made by
its own call of `make_shard`, and the manifest is written last. Killed at any moment, the same command goes on: only
missing shards are made, and the result has the same bytes as an undisturbed run.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from shards.layout import (
    MANIFEST,
    PLAN,
    QUARANTINE,
    TAR_BLOCK,
    TIMM_INFO,
    DataError,
    Manifest,
    canonical_json,
    padded,
    read_manifest,
    sha256_hex,
)
from shards.making.planning import Plan, ShardPlan
from shards.making.workers import borrowed, workers
from shards.making.writer import HIDDEN_SUFFIX, ShardResult, finished_shard, quarantine_text, write_file

_POLL = 0.2  # seconds between two looks at the workers' counters
_NAMED = 5  # rejected files named in a message
Progress = Callable[[int, int], None]  # images kept and images rejected so far


class ConversionFailed(RuntimeError):
    """The conversion stopped and nothing was declared complete; the message says why and what to do."""


@dataclass(frozen=True)
class Report:
    """What a conversion did: images = written + the sum of `quarantined`."""

    images: int
    written: int
    quarantined: Counter[str]  # by reason
    shards: int
    made: int  # shards made by this call; the others were finished before
    bytes: int  # of all tars
    classes: int


def convert(
    plan: Plan,
    out: Path,
    *,
    num_workers: int | None = None,
    max_bad_fraction: float = 0.001,
    progress: Progress | None = None,
    executor: Executor | None = None,
    watch: Callable[[], None] | None = None,
) -> Report:
    """Make every missing shard of `plan` in `out`, then the manifest.

    `num_workers` processes (default: one per core), or any `executor` whose workers see the same paths. Images are
    screened in children of the workers (screener.py). `watch` is called a few times per second and may raise
    to stop the work. A folder that is complete is left as it is. Raises DataError when `out` belongs to something else,
    ConversionFailed when more than `max_bad_fraction` of the images are rejected or a worker dies, OSError when `out`
    cannot be written. Then no manifest is written, and shards that are complete stay.
    """
    check_limits(num_workers, max_bad_fraction)
    with _claimed(plan, out):
        done = [result for part in plan.shards if (result := finished_shard(out, part))]
        if complete := _complete_already(plan, out, done):
            return complete
        finished = {result.number for result in done}
        todo = [part for part in plan.shards if part.number not in finished]
        _need_space(out, todo)
        if progress:
            progress(*_counts(done))
        made = _make(plan, out, todo, done, num_workers, max_bad_fraction, progress, executor, watch)
        _remove_leftovers(out)  # of workers of a cluster that died
        results = sorted([*done, *made], key=lambda result: result.number)
        _check_share(plan, results, max_bad_fraction)
        return _finish(plan, out, results, len(made))


def check_limits(num_workers: int | None, max_bad_fraction: float) -> None:
    """ValueError for a number of workers, or a share of bad images, that cannot be."""
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction={max_bad_fraction}: a share from 0 to 1 is needed")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"workers={num_workers}: at least 1 process is needed")


@contextmanager
def _claimed(plan: Plan, out: Path) -> Iterator[None]:
    """Hold `out` for this plan alone; leftovers of a killed run are removed."""
    if plan.listing.walked and out.resolve().is_relative_to(plan.listing.root.resolve()):
        raise DataError(f"out={out}: lies in the source {plan.listing.root}; choose a folder outside of it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"out={out}: a file lies where a folder is needed; choose another") from error
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, out)
        _check_owner(plan, out)
        _remove_leftovers(out)
        _write_if_new(out / PLAN, _claim(plan))
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(out: Path) -> None:
    """Remove files that a process was writing when it was killed."""
    for leftover in out.glob(f".*{HIDDEN_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f"out={out}: another conversion is writing there; wait for it or choose another") from error
    except OSError:
        pass  # a file system without locks: hidden names are unique, so two runs only do the work twice


def _check_owner(plan: Plan, out: Path) -> None:
    """Raise DataError unless `out` is empty or was begun for this very plan."""
    names = {name for name in os.listdir(out) if not name.endswith(HIDDEN_SUFFIX)}
    if not names:
        return
    if not names & {PLAN, MANIFEST}:
        raise DataError(f"out={out}: holds {len(names)} other files ({min(names)} ...); choose an empty folder")
    owner = _owner(out)
    if owner != plan.sha256:
        raise DataError(
            f"out={out}: holds a conversion of another source or with other options (plan {owner[:12]}, now "
            f"{plan.sha256[:12]}); repeat the command that began it, or choose another folder"
        )


def _owner(out: Path) -> str:
    """The plan that `out` was begun for, from its plan file, or from its manifest where that file is damaged."""
    try:
        return str(json.loads((out / PLAN).read_bytes())["sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        return read_manifest(out).plan["sha256"]


def _claim(plan: Plan) -> bytes:
    return claim_text(plan.sha256, plan.images, asdict(plan.options))


def claim_text(plan_sha256: str, images: int, options: Mapping[str, object]) -> bytes:
    """The plan file: which conversion a folder belongs to."""
    return canonical_json({"sha256": plan_sha256, "images": images, "options": dict(options)}).encode("ascii")


def _complete_already(plan: Plan, out: Path, done: Sequence[ShardResult]) -> Report | None:
    """The report of a folder whose manifest and files are all as they were left, else None."""
    try:
        manifest = read_manifest(out)
        intact = all(sha256_hex((out / name).read_bytes()) == digest for name, digest in manifest.files.items())
    except (OSError, DataError):
        return None
    if not intact or tuple(result.record for result in done) != manifest.shards:
        return None
    return _report(plan, manifest, 0)


def _need_space(out: Path, todo: Sequence[ShardPlan]) -> None:
    """Refuse at once what cannot fit; re-encoding makes files smaller, so only plain copies are judged."""
    if not todo or todo[0].options.short_side:
        return
    beside = 5 * TAR_BLOCK  # three headers, label and description of one sample
    need = sum(padded(item.size) + beside for part in todo for item in part.items)
    free = shutil.disk_usage(out).free
    if need > free:
        raise DataError(f"out={out}: about {need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; make room")


def _make(
    plan: Plan,
    out: Path,
    todo: Sequence[ShardPlan],
    done: Sequence[ShardResult],
    num_workers: int | None,
    max_bad_fraction: float,
    progress: Progress | None,
    executor: Executor | None,
    watch: Callable[[], None] | None,
) -> list[ShardResult]:
    """Make the shards `todo`; stops as soon as too many images are rejected for any continuation to pass."""
    if not todo:
        return []
    before = _counts(done)
    results: list[ShardResult] = []
    count = min(num_workers or os.cpu_count() or 1, len(todo))
    with borrowed(executor) if executor else workers(count) as (submit, live):
        waiting = {submit(plan.listing.root, out, part) for part in todo}
        while waiting:
            ready, waiting = wait(waiting, timeout=_POLL, return_when=FIRST_COMPLETED)
            results += [_result_of(future) for future in ready]
            if watch:
                watch()
            if progress:
                kept, rejected = live() if live else _counts(results)
                progress(before[0] + kept, before[1] + rejected)
            if _counts(results)[1] + before[1] > max_bad_fraction * plan.images:
                _check_share(plan, [*done, *results], max_bad_fraction)
    return results


def _result_of(future: Future[ShardResult]) -> ShardResult:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ConversionFailed(
            "a worker process died (killed, or out of memory); run the same command again to go on, with a smaller "
            "--workers if it happens again"
        ) from error


def _counts(results: Sequence[ShardResult]) -> tuple[int, int]:
    """Images kept and images rejected."""
    kept = sum(result.record.samples for result in results if result.record)
    return kept, sum(len(result.rejected) for result in results)


def _check_share(plan: Plan, results: Sequence[ShardResult], max_bad_fraction: float) -> None:
    """Raise ConversionFailed when more images were rejected than allowed, or all of them."""
    kept, bad = _counts(results)
    if bad <= max_bad_fraction * plan.images and (kept or len(results) < len(plan.shards)):
        return
    rejected = sorted(entry for result in results for entry in result.rejected)
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in Counter(e.reason for e in rejected).most_common())
    first = "; ".join(f"{entry.path!r} ({entry.reason}: {entry.detail})" for entry in rejected[:_NAMED])
    raise ConversionFailed(
        f"max_bad_fraction={max_bad_fraction:g}: {bad:,} of the {kept + bad:,} images seen so far were rejected, "
        f"{int(max_bad_fraction * plan.images):,} of {plan.images:,} are allowed ({reasons}). First: {first}. "
        "Repair or remove them, or run again with a larger --max-bad-fraction; the folder is not complete"
    )


def _finish(plan: Plan, out: Path, results: Sequence[ShardResult], made: int) -> Report:
    """Write the files about the whole folder, the manifest last."""
    records = tuple(result.record for result in results if result.record)
    rejected = [entry for result in results for entry in result.rejected]
    reasons = Counter(entry.reason for entry in rejected)
    written = sum(record.samples for record in records)
    lengths = {record.file("tar"): record.samples for record in records}
    files = {
        PLAN: _claim(plan),
        QUARANTINE: quarantine_text(rejected),
        TIMM_INFO: timm_info(plan.options.split, lengths),
    }
    for name, data in files.items():
        _write_if_new(out / name, data)
    manifest = Manifest(
        split=plan.options.split,
        samples=written,
        classes=plan.listing.classes,
        shards=records,
        quarantined=dict(reasons),
        source={"images": plan.images, "bytes": plan.listing.bytes, "listing_sha256": plan.listing_sha256},
        plan={"sha256": plan.sha256, **asdict(plan.options)},
        files={name: sha256_hex(data) for name, data in files.items()},
    )
    manifest.check()
    _write_if_new(out / MANIFEST, manifest.text().encode("ascii"))
    return _report(plan, manifest, made)


def _report(plan: Plan, manifest: Manifest, made: int) -> Report:
    size = sum(record.bytes for record in manifest.shards)
    quarantined = Counter(manifest.quarantined)
    classes = len(manifest.classes)
    return Report(plan.images, manifest.samples, quarantined, len(manifest.shards), made, size, classes)


def _write_if_new(file: Path, data: bytes) -> None:
    """Write unless it stands there already: a finished folder may be read-only."""
    if not file.is_file() or file.read_bytes() != data:
        write_file(file, data)


def timm_info(split: str, lengths: dict[str, int]) -> bytes:
    """timm's `_info.json` (timm/data/readers/reader_wds.py)."""
    info = {
        "name": split,
        "num_samples": sum(lengths.values()),
        "filenames": list(lengths),
        "shard_lengths": list(lengths.values()),
    }
    return canonical_json({"name": "maskwright", "splits": {split: info}}).encode("ascii")
