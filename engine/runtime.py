"""Where this process stands: rank, device, threads, random seeds.

Works under `deepspeed`, `torchrun`, `srun` (Slurm) and plain `python`: the launcher is recognised by the environment
it leaves, and without one a world of a single rank is set up on a free port.
"""

from __future__ import annotations

import hashlib
import os
import re
import resource
import socket
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.launcher_watch import stop_with
from engine.rendezvous import join_world
from engine.signals import REQUESTS
from shards.reading.cores import cores_per_rank


@dataclass(frozen=True)
class Runtime:
    """This rank among the ranks of the run."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that torch.distributed needs and `environment` lacks.

    DeepSpeed's launcher and torchrun set them all; `srun` has its own names; otherwise this is a world of one. A plain
    `python` in a batch script of Slurm is a world of one too: SLURM_NTASKS and SLURM_PROCID are those of the job, and
    only `srun` describes a step.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        local = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or "1"
        return {"LOCAL_WORLD_SIZE": local, "LOCAL_RANK": environment.get("LOCAL_RANK", "0")}
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return slurm_environment(environment)
    world_of_one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return world_of_one | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The world as `srun` describes it; the first host of the step is the meeting point."""
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "127.0.0.1")
    if "[" in hosts or "," in hosts:
        command = ["scontrol", "show", "hostnames", hosts]
        hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(slurm_tasks_here(environment)),
        "MASTER_ADDR": environment.get("MASTER_ADDR", hosts),
        "MASTER_PORT": environment.get("MASTER_PORT", "29500"),
    }


def slurm_tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks of the step on this node.

    What the step has goes before what was asked of the job (SLURM_NTASKS_PER_NODE), from which `srun -n` may differ.
    """
    node = int(environment.get("SLURM_NODEID", "0"))
    if step := environment.get("SLURM_STEP_TASKS_PER_NODE"):
        return tasks_per_node(step)[node]
    if asked := environment.get("SLURM_NTASKS_PER_NODE"):
        return int(asked)
    return tasks_per_node(environment.get("SLURM_TASKS_PER_NODE", "1"))[node]


def tasks_per_node(text: str) -> list[int]:
    """Slurm's "4(x2),3" as [4, 4, 3]: tasks on the first node, the second, ...; ValueError for anything else."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise ValueError(f"SLURM_TASKS_PER_NODE={text}: counts such as 4(x2),3 are needed")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(timeout: float) -> Runtime:
    """Join the world: environment, device, threads, DeepSpeed's communication. Call once, before DeepSpeed.

    `timeout` in seconds is that of every collective: a rank that hangs is noticed by the others.
    """
    if "LOCAL_RANK" in os.environ:  # a launcher is the parent
        stop_with(REQUESTS.launcher or os.getppid())
    os.environ.update(world_environment(os.environ))
    local_rank, local_world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(cores_per_rank(local_world_size))
    deepspeed = import_deepspeed()
    backend = "nccl" if device.type == "cuda" else "gloo"
    join_world(backend, device, timedelta(seconds=timeout))
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)  # takes over what is there
    return Runtime(dist.get_rank(), dist.get_world_size(), local_rank, local_world_size, device)


def import_deepspeed():
    """DeepSpeed, without its chatter and without compiling C++.

    On the CPU `init_distributed` builds an operator (minutes of g++, behind a lock that can wait for ever) that only
    inference uses; it is declared incompatible before that.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    # The collective that has a gradient (batch norm over all ranks): what torch names in its place is private.
    warnings.filterwarnings("ignore", r"torch\.distributed\.nn\.functional\.\w+ is deprecated", FutureWarning)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    return deepspeed


def peak_memory(runtime: Runtime) -> int:
    """Most bytes that this process has held: of the GPU where there is one, else resident in main memory."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated(runtime.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def stop() -> None:
    """Leave the world quietly."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_step(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Seed what torch draws inside a step (drop path, dropout): a function of the place, nothing to be stored."""
    digest = hashlib.sha256(f"{seed} {step} {micro_step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
