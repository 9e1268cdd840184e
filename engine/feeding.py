"""What feeds the loop: the training loader as a recipe describes it, and the record of samples that cannot be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from engine.agreement import barrier
from engine.objectives.contract import Objective
from engine.runtime import Runtime
from engine.start_up import check_classes, training_folder, validation_folder
from recipes.schema import Data, Recipe
from shards.dataset import Dataset, open_dataset
from shards.layout import QUARANTINE
from shards.reading.bad_samples import BadSamples
from shards.reading.loader import TrainLoader

SOONER = 0.8  # share of the collectives' patience after which a rank speaks that waits for data


def open_data(data: Data) -> tuple[Dataset, Dataset | None]:
    """What to train on, and what to measure k-NN on; ValueError where they do not fit together."""
    train_set = open_dataset(training_folder(data), setting="data.train")
    val_folder = validation_folder(data)
    val_set = open_dataset(val_folder, setting="data.val") if val_folder else None
    check_classes(train_set, val_set)
    return train_set, val_set


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
        data=replace(recipe.data, timeout=patience(recipe, runtime)),
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


def patience(recipe: Recipe, runtime: Runtime) -> float:
    """`data.timeout`, but among several ranks less than the patience of their collectives.

    Else the others, who wait for this rank there, would give up first, and nobody would say that it was the data.
    """
    wanted = recipe.data.timeout
    return min(wanted, SOONER * recipe.run.timeout) if wanted and runtime.world_size > 1 else wanted


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
