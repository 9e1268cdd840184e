"""Is there room for a checkpoint? Asked before the first byte, because a disk that fills up hurts others too."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from torch import Tensor

from engine.checkpoints.folders import CheckpointError, complete_checkpoints
from engine.checkpoints.manifests import read_manifest, total_bytes
from engine.checkpoints.progress import gigabytes

MARGIN = 1.2  # of the expected size
COPIES = 5  # of the weights in fp32: exported, DeepSpeed's, and the optimizer's masters and two moments


def expected_bytes(root: Path, state: dict[str, Tensor]) -> int:
    """Size of the next checkpoint: that of the newest one, or an estimate from the objective's weights."""
    for folder in complete_checkpoints(root):
        try:
            return total_bytes(read_manifest(folder))
        except CheckpointError:  # its own business; the one before will do
            continue
    return COPIES * sum(value.numel() * value.element_size() for value in state.values())


def require_space(root: Path, expected: int) -> None:
    """OSError with both numbers where the disk has less room than a checkpoint of `expected` bytes with a margin."""
    free = shutil.disk_usage(root).free
    if free < MARGIN * expected:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint needs {gigabytes(MARGIN * expected)} ({MARGIN} x {gigabytes(expected)}) and "
            f"{gigabytes(free)} are free; make room, or lower run.keep",
            str(root),
        )
