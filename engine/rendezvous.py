"""Ranks find each other, or say within two minutes who is missing and where they looked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from engine.shell import OnThisRank

PATIENCE = 100.0  # seconds for all ranks to arrive; launchers start them within seconds of each other


def join_world(backend: str, device: torch.device, timeout: timedelta, patience: float = PATIENCE) -> None:
    """Make torch's process group of all ranks; `timeout` is that of its collectives. Collective.

    The environment says who and where (MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE; engine/runtime.py completes it).
    OnThisRank where the port is taken, where nobody answers, or where ranks are missing after `patience` seconds.
    """
    # DeepSpeed makes groups of its own and leaves their timeout to torch's default, which is half an hour.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=patience)))
        bound = {"device_id": device} if device.type == "cuda" and world_size > 1 else {}
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, **bound)
        dist.barrier()  # gloo connects lazily: whoever cannot be reached is met here
    except RuntimeError as error:  # torch's errors of the network and of the store are such
        raise OnThisRank(explain(str(error), os.environ, patience)) from error


def explain(error: str, environment: Mapping[str, str], patience: float) -> str:
    """What went wrong when the ranks were to meet, and what to do."""
    place = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    me = f"rank {environment['RANK']} of {environment['WORLD_SIZE']}"
    if "EADDRINUSE" in error or "address already in use" in error:
        return (
            f"{me}: port {environment['MASTER_PORT']} of this machine is in use, perhaps by another training; choose "
            "another: `deepspeed --master_port N`, `torchrun --master-port N`, or MASTER_PORT=N"
        )
    if "clients joined" in error:
        joined = error.rsplit("clients joined", 1)[0].split()[-1]
        return (
            f"{me}: only {joined} ranks arrived at {place} within {patience:.0f} s; look at the others' messages, and "
            "start the same number on every node"
        )
    return (
        f"{me}: the ranks did not meet at {place} within {patience:.0f} s ({first_line(error)}); is rank 0 running "
        "there, is that address right on every node, is the port open?"
    )


def first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no reason given"
