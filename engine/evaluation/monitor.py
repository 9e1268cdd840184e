"""k-NN of the encoder while it trains: when it is due, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from engine.agreement import shared
from engine.console import EVALUATIONS, Console, record_step
from engine.evaluation.features import extract, mean_token
from engine.evaluation.neighbours import knn_accuracy
from engine.fault_points import reached
from engine.runtime import Runtime
from engine.stopping import StopAgreement
from engine.weights import export
from recipes.schema import Recipe
from shards.dataset import Dataset
from shards.reading.bad_samples import BadSamples


@dataclass(frozen=True)
class Monitor:
    """The data sets with their bad samples; nothing is measured without a validation set."""

    recipe: Recipe
    runtime: Runtime
    train: tuple[Dataset, BadSamples | None]
    val: tuple[Dataset | None, BadSamples | None]
    total_steps: int
    console: Console
    stopping: StopAgreement

    def is_due(self, done: int) -> bool:
        """At the end, and every `run.eval_every` steps, from step 0 on."""
        every = self.recipe.run.eval_every
        return self.val[0] is not None and (done == self.total_steps or bool(every and done % every == 0))

    def is_missing(self, done: int) -> bool:
        """Whether the evaluation after `done` steps was due, but was left early or not recorded. Collective."""
        if not self.is_due(done):
            return False
        return shared(not is_recorded(self.console.folder / EVALUATIONS, done), self.runtime)

    def evaluate(self, objective: nn.Module, done: int) -> int:
        """Record the accuracy of the encoder as it would be exported. Collective.

        0; or the signal that asks all ranks to stop, and then nothing is recorded.
        """
        encoder = export.plain_encoder(self.recipe, export.full_state(objective.encoder), self.runtime.device)
        reached("evaluate.begin")
        settings = self.recipe.evaluation
        features = partial(
            extract, mean_token(encoder), recipe=self.recipe, runtime=self.runtime, leave=self.stopping.is_near
        )
        with self.console.working(f"step {done}: features of {len(self.val[0]):,} validation images for k-NN"):
            bank = features(self.train[0], settings.knn_train_samples, bad_samples=self.train[1])
            queries = features(self.val[0], settings.knn_val_samples, bad_samples=self.val[1])
        asked = self.stopping.agreed()
        if not asked:
            accuracy = knn_accuracy(bank, queries, k=settings.knn_k, temperature=settings.knn_temperature)
            self.console.log_evaluation({"step": done, "knn": accuracy})
        return asked


def is_recorded(file: Path, done: int) -> bool:
    return file.exists() and any(record_step(line) == done for line in file.read_text().splitlines())
