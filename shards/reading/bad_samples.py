"""The bad samples that a run has met: in memory, and in a file that its ranks and its resumes share.

One JSON line per sample, written by whichever rank met it first: `id`, `tar`, `key`, `folder`, `reason`, `step` (as in
metrics.jsonl; null in an evaluation), `rank`. Ranks append under a lock and read what the others wrote, so that the
limit counts the samples of all of them.
"""

from __future__ import annotations

import fcntl
import json
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from shards.dataset import Dataset
from shards.layout import DataError
from shards.reading.sample_check import named

_LISTED = 20  # samples in the message that ends a run


class BadSamples:
    """Distinct bad samples of one data set, and how many are too many."""

    def __init__(self, dataset: Dataset, max_fraction: float, file: Path | None = None, rank: int = 0) -> None:
        """Starts with the samples of this data set that stand in `file`, if it is there.

        Raises DataError as `add` does, where these are too many already.
        """
        self.most = max(1, int(max_fraction * len(dataset)))
        self._dataset, self._file, self._rank = dataset, file, rank
        self._reasons: dict[int, str] = {}
        self._lock = threading.Lock()  # the next segment is built in a thread
        if file is not None and file.exists():
            with open(file) as lines:
                self._reasons |= self._read(lines)
        self._stop_beyond_the_limit()

    def __contains__(self, sample_id: int) -> bool:
        return sample_id in self._reasons

    @property
    def ids(self) -> list[int]:
        """Sample ids, in the order in which they were met."""
        with self._lock:
            return list(self._reasons)

    def add(self, reasons: Mapping[int, str], steps: Mapping[int, int | None], fate: str) -> None:
        """Tell of the samples that are new, on stderr with their `fate`, and write them down.

        Raises DataError listing the samples where there are more than `most`.
        """
        with self._lock:
            new = {i: reason for i, reason in reasons.items() if i not in self._reasons}
            self._reasons |= new
            for sample_id, reason in new.items():
                where = f"warning: rank {self._rank}: {self._dataset.name(sample_id)} (id {sample_id}): {reason}"
                print(f"{where}; {fate}", file=sys.stderr)
            if self._file is not None and new:
                self._share({i: (reason, steps.get(i)) for i, reason in new.items()})
            self._stop_beyond_the_limit()

    def _stop_beyond_the_limit(self) -> None:
        if len(self._reasons) > self.most:
            raise DataError(
                f"data.max_bad_fraction: {len(self._reasons)} bad samples, {self.most} of the {len(self._dataset):,} "
                f"in {self._dataset.folder} are allowed: {named(self._dataset, self._reasons, _LISTED)}. Verify the "
                "shards, and make or index them again without these samples"
            )

    def _share(self, new: Mapping[int, tuple[str, int | None]]) -> None:
        """Append what no other rank has written, and learn what others wrote."""
        try:
            with open(self._file, "a+") as lines:
                with suppress(OSError):  # a file system without locks: a sample may then stand there twice
                    fcntl.flock(lines, fcntl.LOCK_EX)
                lines.seek(0)
                others = self._read(lines)
                text = "".join(self._line(i, *told) for i, told in new.items() if i not in others)
                lines.write(text)
            self._reasons = {**others, **self._reasons}
        except OSError as error:  # a full disk must not end the training
            print(f"warning: {self._file}: {error.strerror}; the record is lost", file=sys.stderr)

    def _line(self, sample_id: int, reason: str, step: int | None) -> str:
        tar, _, key = self._dataset.name(sample_id).rpartition(":")
        entry = {
            "id": sample_id,
            "tar": tar,
            "key": key,
            "folder": str(self._dataset.folder),
            "reason": reason,
            "step": step,
            "rank": self._rank,
        }
        return json.dumps(entry) + "\n"

    def _read(self, lines: TextIO) -> dict[int, str]:
        """Reasons by id of the entries that are of this data set; lines cut by a kill are passed over."""
        found = {}
        for line in lines:
            with suppress(ValueError, TypeError, KeyError, IndexError):
                entry = json.loads(line)
                if self._dataset.name(int(entry["id"])) == f"{entry['tar']}:{entry['key']}":
                    found[int(entry["id"])] = str(entry["reason"])
        return found
