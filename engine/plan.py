"""A recipe and a number of samples turned into counts of steps: pure arithmetic, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass

from engine.schedules import warmup_cosine
from recipes.methods import Lut
from recipes.schema import Optim, Recipe
from shards.draws.order import num_micro_steps, steps_per_epoch


@dataclass(frozen=True)
class Plan:
    """All counts are in optimizer steps unless they say otherwise."""

    steps_per_epoch: int
    total_steps: int  # length of the schedule
    last_step: int  # where this run stops: total_steps, or run.stop_after
    warmup_steps: float
    accumulation: int  # micro-steps per optimizer step
    optim: Optim

    def lr(self, step: int) -> float:
        """Learning rate of the step with index `step` (from 0)."""
        return warmup_cosine(
            step,
            peak=self.optim.peak_lr,
            minimum=self.optim.min_lr,
            warmup=self.warmup_steps,
            total=self.total_steps,
            peak_within=self.optim.warmup_end == "within",
        )


def make_plan(recipe: Recipe, num_samples: int, world_size: int) -> Plan:
    """ValueError where the batch does not divide among the ranks or is larger than the data set.

    run.steps, where it is given, replaces run.epochs x steps per epoch and the warm-up keeps its share of the run, so
    that a shortened run has the same schedule in small.
    """
    if isinstance(recipe.objective, Lut) and recipe.optim.micro_batch * world_size < 2:
        raise ValueError(
            "optim.micro_batch=1: LUT's batch norm needs at least 2 images, micro-batch x ranks, to have a variance"
        )
    per_epoch = steps_per_epoch(num_samples, recipe.optim.global_batch)
    total = recipe.run.steps or max(1, round(recipe.run.epochs * per_epoch))
    return Plan(
        steps_per_epoch=per_epoch,
        total_steps=total,
        last_step=min(total, recipe.run.stop_after or total),
        warmup_steps=total * recipe.optim.warmup_epochs / recipe.run.epochs,
        accumulation=num_micro_steps(recipe.optim.global_batch, recipe.optim.micro_batch, world_size),
        optim=recipe.optim,
    )
