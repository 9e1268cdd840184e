"""Before the first step: do all ranks mean the same run? A node with other code or data would spoil it in silence."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from engine.agreement import gathered
from engine.command_line import Command
from engine.runtime import Runtime
from recipes.overrides import leaves, show
from shards.dataset import Dataset

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("recipes", "shards", "engine")  # what decides the numbers of a run
NAMED = 5  # differences in a message
PATHS = {"data.train", "data.val", "data.cache", "teacher", "init"}  # what lies there is compared instead
Result = TypeVar("Result")


def everywhere(work: Callable[[], Result], runtime: Runtime) -> Result:
    """`work()` of this rank, where it succeeds on every rank. Collective.

    Its ValueError and OSError, met by only some of the ranks, are ValueErrors on all of them: else the others would
    wait for ranks that have ended.
    """
    result, problem = None, ""
    try:
        result = work()
    except (ValueError, OSError) as error:
        problem = str(error)
        if runtime.world_size == 1:
            raise
    problems = gathered((socket.gethostname(), problem), runtime)
    if not any(text for _, text in problems):
        return result
    if len({text for _, text in problems}) == 1:
        raise ValueError(problem)
    told = [f"rank {rank} on {host}: {text}" for rank, (host, text) in enumerate(problems) if text]
    more = f"; and {len(told) - NAMED} more ranks" if len(told) > NAMED else ""
    raise ValueError("; ".join(told[:NAMED]) + more + "; the other ranks are ready")


def agree(facts: Mapping[str, str], runtime: Runtime) -> None:
    """ValueError on every rank where `facts` differ between them, with rank 0's value and the other. Collective."""
    everyone = gathered((socket.gethostname(), dict(facts)), runtime)
    host, first = everyone[0]
    for rank, (other_host, theirs) in enumerate(everyone[1:], start=1):
        names = [name for name in first | theirs if first.get(name) != theirs.get(name)]
        if names:
            diff = "; ".join(f"{name}: {first.get(name)} and {theirs.get(name)}" for name in names[:NAMED])
            raise ValueError(
                f"rank 0 on {host} and rank {rank} on {other_host} differ: {diff}; start all ranks with the same "
                "command, data, code and environment"
            )


def rank_facts(command: Command, train_set: Dataset, val_set: Dataset | None, objective: Mapping[str, str]) -> dict:
    """What must be the same on every rank: recipe, data, weights of a teacher, code and versions.

    Paths may differ, as long as what lies there does not.
    """
    fields = {path: show(value) for path, value in leaves(command.recipe).items() if path not in PATHS}
    data = {"training data": train_set.fingerprint, "validation data": val_set.fingerprint if val_set else "none"}
    code = {"code of maskwright": code_hash(), "resume": str(command.resume)}
    return {**fields, **data, **objective, **code, **{name: version(name) for name in ("torch", "deepspeed")}}


@cache
def code_hash() -> str:
    """sha256 over the names and bytes of our source files, in bytewise order of their names."""
    digest = hashlib.sha256()
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    for path in sorted(files, key=lambda path: str(path.relative_to(ROOT))):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
