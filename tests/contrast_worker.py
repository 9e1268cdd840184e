"""One of two gloo processes: InfoNCE of its half of the rows. Usage: contrast_worker.py FOLDER RANK."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from engine.objectives.contrast import contextual_loss


def main(folder: str, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    queries, keys = (rows.chunk(2)[rank].clone().requires_grad_() for rows in torch.load(f"{folder}/rows.pt"))
    loss = contextual_loss(queries, keys, kind="infonce", temperature=0.3)
    loss.backward()
    assert keys.grad is None
    torch.save((loss.detach(), queries.grad), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
