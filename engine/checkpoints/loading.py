"""Put a chosen checkpoint into the engine: as it is, or, for another number of ranks, in DeepSpeed's universal form."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from engine.agreement import RankFailure, barrier
from engine.checkpoints.choosing import Chosen
from engine.checkpoints.elastic import load_what_universal_leaves_out, repaired, universal_form
from engine.checkpoints.folders import CheckpointError
from engine.fault_points import reached
from engine.objectives.contract import Objective
from engine.runtime import Runtime
from engine.shell import OnThisRank
from engine.weights.export import read_outside


def needs_universal(chosen: Chosen | None, stage: int, runtime: Runtime) -> bool:
    """Whether the engine must be built to load DeepSpeed's universal form. At stage 0 every rank has everything."""
    return chosen is not None and stage > 0 and chosen.manifest["world_size"] != runtime.world_size


def load(chosen: Chosen, model_engine, objective: Objective, runtime: Runtime, *, universal: bool) -> None:
    """Weights, optimizer and moving averages as they were saved. Collective.

    CheckpointError where DeepSpeed finds nothing; RankFailure (an OSError) where a universal form cannot be written;
    OnThisRank where this rank alone cannot read its part.
    """
    try:
        load_parts(chosen, model_engine, objective, runtime, universal=universal)
    except RankFailure:
        raise
    except OSError as error:
        raise OnThisRank(f"rank {runtime.rank}: {chosen.folder} cannot be loaded ({error})") from error


def load_parts(chosen: Chosen, model_engine, objective: Objective, runtime: Runtime, *, universal: bool) -> None:
    if universal:
        # stderr as it is now: it is hidden while DeepSpeed's converter talks
        say = partial(print, file=sys.stderr, flush=True) if runtime.is_main else None
        with universal_form(chosen.folder, chosen.manifest, runtime, say) as folder:
            reached("resume.converted")
            with repaired(model_engine):
                load_folder(folder, model_engine)
            load_what_universal_leaves_out(chosen.folder, objective)
            barrier(runtime)  # nobody reads any more
    else:
        load_folder(chosen.folder, model_engine)
    read_outside(chosen.folder, objective)
    reached("resume.loaded")


def load_folder(folder: Path, model_engine) -> None:
    path, _ = model_engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise CheckpointError(f"{folder}: DeepSpeed found no checkpoint in it")
