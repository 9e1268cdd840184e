"""What feeds the loop: the training loader as a recipe describes it, and the record of samples that cannot be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine.agreement import barrier
from engine.objectives.contract import Objective
from engine.runtime import TIMEOUT, Runtime
from recipes.schema import Data, Recipe
from shards.dataset import Dataset
from shards.layout import QUARANTINE
from shards.reading.bad_samples import BadSamples
from shards.reading.loader import TrainLoader

SOONER = 0.8  # share of the collectives' patience after which a rank speaks that waits for data


def make_train_loader(
    train_set: Dataset,
    recipe: Recipe,
    objective: Objective,
    runtime: Runtime,
    steps: tuple[int, int],
    bad_samples: BadSamples | None,
) -> TrainLoader:
    """This rank's micro-batches of the steps from `steps[0]` up to, but not including, `steps[1]`."""
    return TrainLoader(
        train_set,
        view=objective.view,
        data=replace(recipe.data, timeout=patience(recipe.data, runtime)),
        seed=recipe.run.seed,
        global_batch=recipe.optim.global_batch,
        micro_batch=recipe.optim.micro_batch,
        rank=runtime.rank,
        world_size=runtime.world_size,
        masks=objective.masks,
        device=runtime.device,
        start_step=steps[0],
        total_steps=steps[1],
        local_world_size=runtime.local_world_size,
        bad_samples=bad_samples,
    )


def patience(data: Data, runtime: Runtime) -> float:
    """`data.timeout`, but among several ranks less than the patience of their collectives.

    Else the others, who wait for this rank there, would give up first, and nobody would say that it was the data.
    """
    limit = SOONER * TIMEOUT.total_seconds()
    return min(data.timeout, limit) if data.timeout and runtime.world_size > 1 else data.timeout


def open_records(
    folder: Path, data: Data, datasets: list[Dataset | None], runtime: Runtime, *, afresh: bool
) -> list[BadSamples | None]:
    """The bad samples of each data set that the run in `folder` has met, before too unless it begins `afresh`.

    None where the policy is to stop at the first. Collective. DataError on all ranks where they are too many already.
    """
    file = folder / QUARANTINE
    if runtime.is_main and afresh:
        file.unlink(missing_ok=True)  # of a run that left nothing to go on from
    barrier(runtime)  # nobody reads before
    if data.on_bad_sample == "fail":
        return [None] * len(datasets)
    return [BadSamples(d, data.max_bad_fraction, file, runtime.rank) if d else None for d in datasets]
