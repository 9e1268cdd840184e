"""The world as each launcher describes it."""

from __future__ import annotations

import os

import pytest

from engine.runtime import tasks_per_node, world_environment

# What the launchers set, as far as we look at it.
TORCHRUN = {
    "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "node0",
    "MASTER_PORT": "29400",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2",
    "MASTER_ADDR": "node0", "MASTER_PORT": "29500",
}  # fmt: skip
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "7", "SLURM_NTASKS": "11", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_JOB_NODELIST": "gpu7", "SLURM_TASKS_PER_NODE": "4(x2),3",
}  # fmt: skip
SRUN = BATCH_SCRIPT | {
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_STEP_NODELIST": "gpu7",
}  # fmt: skip


def world(environment: dict[str, str]) -> tuple[str, ...]:
    """Rank, world size, local rank, local world size and where to meet, as the process will see them."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    complete = environment | world_environment(environment)
    assert complete["MASTER_PORT"].isdigit()
    return tuple(complete[name] for name in names)


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


ALONE = ("0", "1", "0", "1", "127.0.0.1")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ALONE),
        (TORCHRUN, ("9", "16", "1", "8", "node0")),
        (DEEPSPEED, ("5", "8", "1", "4", "node0")),
        (TORCHRUN | SRUN, ("9", "16", "1", "8", "node0")),  # torchrun started by srun
        (BATCH_SCRIPT, ALONE),  # plain python in a batch script
        (BATCH_SCRIPT | {"SLURM_STEP_ID": "4294967291"}, ALONE),
        (BATCH_SCRIPT | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, ALONE),  # a shell by salloc
        (SRUN, ("9", "11", "1", "3", "gpu7")),
        (SRUN | {"SLURM_NODEID": "1"}, ("9", "11", "1", "4", "gpu7")),
        (SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}, ("9", "11", "1", "3", "10.0.0.1")),
        (SRUN | {"SLURM_NTASKS_PER_NODE": "8"}, ("9", "11", "1", "3", "gpu7")),  # the job asked for more
        (without(SRUN, "SLURM_STEP_TASKS_PER_NODE"), ("9", "11", "1", "3", "gpu7")),
        (without(SRUN, "SLURM_STEP_TASKS_PER_NODE") | {"SLURM_NTASKS_PER_NODE": "4"}, ("9", "11", "1", "4", "gpu7")),
        (SRUN | {"SLURM_JOB_NODELIST": "gpu6", "SLURM_NTASKS": "99"}, ("9", "11", "1", "3", "gpu7")),
    ],
)
def test_the_world_of_every_launcher(environment, expected):
    assert world(environment) == expected


def test_a_list_of_hosts_is_expanded_by_slurm(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[7-9]" ] && printf "gpu7\\ngpu8\\ngpu9\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert world(SRUN | {"SLURM_STEP_NODELIST": "gpu[7-9]"})[-1] == "gpu7"


@pytest.mark.parametrize(
    ("text", "counts"),
    [("8", [8]), ("4(x2),3", [4, 4, 3]), ("1,2,3", [1, 2, 3]), ("2(x1),1(x3)", [2, 1, 1, 1]), ("12(x10)", [12] * 10)],
)
def test_tasks_per_node(text, counts):
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize("text", ["", "4(x)", "4x2", "-1", "4(x2),"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="4\\(x2\\),3 are needed"):
        tasks_per_node(text)
