"""Trainings in this process, one after the other, for checks and benchmarks: the real `Trainer`, and what it wrote."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is imported when something is trained
    from engine.runtime import Runtime
    from engine.train import Trainer
    from recipes.schema import Recipe
    from shards.reading.loader import Batch, TrainLoader


def train_here(
    name: str,
    recipe: Recipe,
    folder: Path,
    runtime: Runtime,
    *,
    synthetic: bool = False,
    saves: bool = False,
    resume: str | None = None,
    prepare: Callable[[Trainer], None] = lambda trainer: None,
) -> list[dict]:
    """Train recipe `name` into `folder`, without checkpoints unless it `saves`; the lines of metrics.jsonl.

    `synthetic`: the first batch is served for ever. `prepare` gets the trainer before its first step.
    """
    from engine.command_line import Command
    from engine.run_folder import claimed
    from engine.train import Trainer
    from engine.witness import witnessed

    recipe = replace(recipe, run=replace(recipe.run, out=str(folder)))
    command = Command(name, recipe, resume, False, False)
    with claimed(folder, runtime), witnessed(folder, runtime, recipe.run.timeout) as witness:
        trainer = Trainer(command, runtime, witness)
        if synthetic:
            make_loader = trainer.make_loader
            trainer.make_loader = lambda: RepeatedBatch(make_loader())
        if not saves:
            trainer.save, trainer.finish = lambda done, last: True, lambda asked: None
        try:
            prepare(trainer)
            trainer.fit()
        finally:
            trainer.model_engine.destroy()
            del trainer
            free_memory()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class RepeatedBatch:
    """A loader that serves its first batch for ever: what training costs without data."""

    def __init__(self, loader: TrainLoader) -> None:
        self.batch, self.data_wait = loader.next_batch(), 0.0
        loader.close()

    def next_batch(self) -> Batch:
        return self.batch

    def close(self) -> None:
        pass


def free_memory() -> None:
    """What a training leaves goes now, not when the next one is short of memory."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
