"""DeepSpeed's writing, made to fail together: what goes wrong on one rank is remembered, not raised.

`save_checkpoint` ends in a barrier. A rank that met a full disk before would never come there, and the others would
wait for it until the collectives give up. So this rank's files are written by an object of ours that keeps the first
failure for later, when all ranks are asked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from engine.checkpoints.finite import first_not_finite
from engine.fault_points import reached


class NotFinite(OSError):
    """Weights or optimizer state with NaN or infinity: not to be written."""


class RememberingWriter:
    """In the place of DeepSpeed's checkpoint engine, which answers whatever is not writing."""

    def __init__(self, original) -> None:
        self.original = original
        self.failure: OSError | None = None

    def __getattr__(self, name: str):
        return getattr(self.original, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.attempt(lambda: os.makedirs(path, exist_ok=exist_ok))

    def save(self, state_dict: dict, path: str) -> None:
        """Write one file of this rank, unless one has failed before."""
        if self.failure is None:
            self.attempt(lambda: write_state(state_dict, path))

    def attempt(self, work: Callable[[], None]) -> None:
        """Do it, or keep why it failed."""
        try:
            work()
        except OSError as error:
            self.failure = self.failure or error

    def answer(self) -> None:
        """Raise what was remembered."""
        if self.failure is not None:
            raise self.failure


def write_state(state_dict: dict, path: str) -> None:
    """Write a file as DeepSpeed would; OSError with the system's reason, NotFinite where the numbers are none."""
    reached("save.write")
    place = first_not_finite(state_dict)
    if place is not None:
        raise NotFinite(f"{os.path.basename(path)}: {place} is not finite")
    with open(path, "wb", buffering=0) as raw:
        file = FailureRecorder(raw)
        try:
            torch.save(state_dict, file)
        except RuntimeError as error:  # torch's zip writer hides why the file could not take more
            raise file.failure or OSError(f"{path}: {error}") from error


class FailureRecorder:
    """An unbuffered file that keeps the reason of the first write that failed."""

    def __init__(self, raw) -> None:
        self.raw, self.failure = raw, None

    def write(self, data) -> int:
        """All of `data`: one call of the system may take less, as it does where the disk is about to be full."""
        left = memoryview(data).cast("B")
        total = len(left)
        try:
            while left:
                left = left[self.raw.write(left) :]
        except OSError as error:
            self.failure = self.failure or OSError(error.errno, error.strerror, self.raw.name)
            raise self.failure from error
        return total

    def flush(self) -> None:
        """Nothing is held back."""


@contextmanager
def remembering(model_engine) -> Iterator[RememberingWriter]:
    """Let `model_engine.save_checkpoint` write through a RememberingWriter."""
    original = model_engine.checkpoint_engine
    model_engine.checkpoint_engine = writer = RememberingWriter(original)
    # Private, for want of a switch: rank 0 alone would copy a script beside the checkpoints, and raise there.
    model_engine._copy_recovery_script = lambda folder: None
    try:
        yield writer
    finally:
        model_engine.checkpoint_engine = original
        del model_engine._copy_recovery_script
