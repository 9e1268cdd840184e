"""How many threads decode: a rank's share of its node's cores, less what torch needs beside a GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping

TORCH_CORES = 2  # beside a GPU: the thread that launches kernels; backward, collectives and the next segment's builder


def decoding_threads(cores: int, *, gpu: bool) -> int:
    """Threads of DALI for a rank that has so many cores.

    On a CPU all of them: the model computes when a step's images are there, and images are made while nobody computes.
    """
    return max(1, cores - TORCH_CORES if gpu else cores)


def cores_per_rank(local_world_size: int) -> int:
    """Cores for each of so many ranks on this node, at least one; never more than this process may run on."""
    return share(len(os.sched_getaffinity(0)), node_cores(os.environ), local_world_size)


def share(own: int, node: int, local_world_size: int) -> int:
    """An equal part of the `node` cores, within the `own` that this process may run on.

    Where a launcher binds every rank to cores of its own (srun, `deepspeed --bind_cores_to_rank`), or several to one
    processor, `own` is less than `node`, and is not to be divided once more.
    """
    return max(1, min(own, node // local_world_size))


def node_cores(environ: Mapping[str, str]) -> int:
    """Cores that the ranks of this node have together: those of the launcher, within the allocation of the job.

    The launcher is the parent process: it is bound to none, or to those of a container. Slurm's is outside the job, and
    a script between the two is bound as the rank is: where the ranks are tasks of Slurm, the allocation alone counts.
    """
    text = environ.get("SLURM_CPUS_ON_NODE", "")
    allocated = int(text) if text.isdecimal() else 0
    if allocated and environ.get("SLURM_STEP_NUM_TASKS") == environ.get("WORLD_SIZE", ""):
        return allocated
    try:
        cores = len(os.sched_getaffinity(os.getppid()) | os.sched_getaffinity(0))
    except OSError:  # the parent is gone
        cores = len(os.sched_getaffinity(0))
    return min(cores, allocated or cores)
