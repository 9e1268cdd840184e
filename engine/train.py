"""The entry and the loop: `deepspeed engine/train.py --recipe vit_b_mae data.train=DIR run.out=RUN`.

The same under `torchrun`, `srun` and plain `python`. One step is `Trainer.optimizer_step`; what a batch is stands in
`shards/reading/loader.py`, what is learned from it in `engine/objectives/`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# A launcher puts engine/ first on the path; the repository's root belongs there, installed or not.
sys.path[:] = [str(Path(__file__).resolve().parents[1]), *(p for p in sys.path if Path(p).name != "engine")]

from engine import shell
from engine.command_line import Command, parse_command

if __name__ == "__main__":
    COMMAND = parse_command(sys.argv[1:])  # --list, --print and mistakes are answered before torch is imported
    shell.calm_threads()

import json
import math
from contextlib import suppress
from functools import partial

import torch

from engine.checkpoints import saving
from engine.checkpoints.folders import complete_checkpoints
from engine.checkpoints.resuming import resume
from engine.console import Console
from engine.evaluation.features import extract, mean_token
from engine.evaluation.neighbours import knn_accuracy
from engine.fault_points import reached
from engine.feeding import make_train_loader, open_records
from engine.meter import Meter, gradient_norm
from engine.objectives.build import build_objective
from engine.objectives.contract import Objective
from engine.params import parameter_groups, set_learning_rate
from engine.plan import make_plan
from engine.run_folder import claim, release
from engine.runtime import Runtime, import_deepspeed, peak_memory, seed_step, start, stop
from engine.start_up import check_classes, start_lines, training_folder, validation_folder
from engine.weights import export
from engine.weights.initial import begin_from
from engine.zero import deepspeed_config
from recipes.overrides import leaves, show
from shards.dataset import Dataset, open_dataset
from shards.reading import bus_errors
from shards.reading.loader import Batch, TrainLoader


class Trainer:
    """One run: everything built from a recipe, then `fit`."""

    def __init__(self, command: Command, runtime: Runtime) -> None:
        self.command, self.recipe, self.runtime = command, command.recipe, runtime
        self.train_set = open_dataset(training_folder(self.recipe.data), setting="data.train")
        val_folder = validation_folder(self.recipe.data)
        self.val_set: Dataset | None = open_dataset(val_folder, setting="data.val") if val_folder else None
        check_classes(self.train_set, self.val_set)
        self.plan = make_plan(self.recipe, len(self.train_set), runtime.world_size)
        self.meter = Meter(self.plan, runtime)
        self.folder = Path(self.recipe.run.out or f"runs/{command.name}").expanduser()
        self.checkpoint_folder = self.folder / "checkpoints"
        self.lock = claim(self.folder, runtime)
        self.build_engine()
        self.first_step = resume(
            command, self.plan, self.checkpoint_folder, self.facts(), self.model_engine, self.objective, runtime
        )
        self.bad_train_samples, self.bad_val_samples = open_records(
            self.folder, self.recipe.data, [self.train_set, self.val_set], runtime, afresh=self.first_step == 0
        )

    # --- building ---------------------------------------------------------------------------------------------------

    def build_engine(self) -> None:
        """The objective with its initial weights, wrapped by DeepSpeed."""
        torch.manual_seed(self.recipe.run.seed)  # the same initial weights on every rank
        objective = build_objective(self.recipe)
        self.init = self.begin(objective)
        self.objective = objective.to(self.runtime.device)
        optim = self.recipe.optim
        optimizer = torch.optim.AdamW(
            parameter_groups(self.objective, optim.weight_decay, self.objective.no_decay),
            lr=optim.peak_lr,
            betas=optim.betas,
            eps=optim.eps,
            fused=True,
        )
        self.model_engine, self.optimizer, *_ = import_deepspeed().initialize(
            model=self.objective,
            optimizer=optimizer,
            config=deepspeed_config(self.recipe, self.runtime.world_size),
            dist_init_required=False,
        )

    def begin(self, objective: Objective) -> str:
        """Give the objective its first weights; one line on what they are, or were where a checkpoint goes on."""
        saved = complete_checkpoints(self.checkpoint_folder) if self.command.resume else []
        for folder in saved:  # recipe.init is of no account any more, nor need it still be there
            with suppress(ValueError):  # a broken checkpoint is met by `resume`
                return export.read_manifest_file(folder).get("init", "")
        return begin_from(self.recipe.init, objective) if self.recipe.init and not saved else ""

    def facts(self) -> dict:
        """What a checkpoint must share with the run that resumes it."""
        return {
            "name": self.command.name,
            "recipe": {path: show(value) for path, value in leaves(self.recipe).items()},
            "dataset": self.train_set.fingerprint,
            "objective": self.objective.facts(),
            "init": self.init,
            "world_size": self.runtime.world_size,
            "versions": {"torch": torch.__version__, "deepspeed": import_deepspeed().__version__},
        }

    # --- the loop ---------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """All steps from the first to the last, with what is due between them."""
        run, plan = self.recipe.run, self.plan
        self.open_run_folder()
        self.loader = self.make_loader()
        self.checked_step = self.first_step
        self.restart_clock(self.first_step)
        try:
            if run.eval_every and self.first_step == 0:
                self.evaluate(0)
            for step in range(self.first_step, plan.last_step):
                done = step + 1
                reached("step.begin")
                end = done == plan.total_steps
                log = end or done % run.log_every == 0
                save = done == plan.last_step or bool(run.save_every and done % run.save_every == 0)
                metrics = self.optimizer_step(step, measure=log or save)
                self.console.advance(done)
                reached("step.done")
                if log or save:
                    self.check_finite(done, metrics)  # before anything relies on these weights
                if log:
                    self.report(done, metrics)
                if end or (run.eval_every and done % run.eval_every == 0):
                    self.evaluate(done)
                if save:
                    self.save(done)
            self.finish()
        finally:
            self.loader.close()
            self.console.close()
            release(self.lock)

    def optimizer_step(self, step: int, *, measure: bool) -> dict[str, torch.Tensor]:
        """One update from one global batch; its metrics over all ranks where they are measured (else nothing)."""
        set_learning_rate(self.optimizer.param_groups, self.plan.lr(step))
        grad_norm: torch.Tensor | None = None
        for micro_step in range(self.plan.accumulation):
            seed_step(self.recipe.run.seed, step, micro_step, self.runtime.rank)
            batch: Batch = self.loader.next_batch()
            metrics = self.model_engine(batch, step)
            if reached("step.loss"):
                metrics["loss"] = metrics["loss"] * math.nan
            self.model_engine.backward(metrics["loss"])
            reached("step.gradient")
            if measure:
                self.meter.add(metrics)
            if micro_step == self.plan.accumulation - 1:
                reached("step.update")
                if measure and not self.recipe.zero.stage:
                    grad_norm = gradient_norm(self.objective)
            self.model_engine.step()
        self.objective.after_step(step, self.plan.total_steps)
        if not measure:
            return {}
        if self.recipe.zero.stage:
            grad_norm = self.model_engine.get_global_grad_norm()
        return {**self.meter.averages(), "grad_norm": grad_norm}

    # --- what is due between steps ----------------------------------------------------------------------------------

    def check_finite(self, done: int, metrics: dict[str, torch.Tensor]) -> None:
        """FloatingPointError, on all ranks, where the loss is no number: nothing is saved from here on."""
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss} between steps {self.checked_step + 1} and {done}; the checkpoints are from "
                "before; lower optim.lr, set optim.clip_grad, or look at the data of these steps"
            )
        self.checked_step = done

    def report(self, done: int, metrics: dict[str, torch.Tensor]) -> None:
        """Read the metrics from the device (one of the places that wait for it) and record them."""
        record, seconds_per_step = self.meter.record(done, metrics, self.loader.data_wait)
        self.console.log(record, seconds_left=seconds_per_step * (self.plan.last_step - done))
        self.restart_clock(done)

    def restart_clock(self, done: int) -> None:
        """A new measurement begins."""
        self.meter.restart(done)
        self.loader.data_wait = 0.0

    def evaluate(self, done: int) -> None:
        """k-NN accuracy of the encoder as it would be exported. Collective."""
        if self.val_set is None:
            return
        state = export.full_state(self.objective.encoder)
        encoder = export.plain_encoder(self.recipe, state, self.runtime.device)
        reached("evaluate.begin")
        settings, features = self.recipe.evaluation, partial(extract, mean_token(encoder))
        with self.console.working(f"step {done}: features of {len(self.val_set):,} validation images for k-NN"):
            bank = features(
                self.train_set, settings.knn_train_samples, self.recipe, self.runtime, self.bad_train_samples
            )
            queries = features(self.val_set, settings.knn_val_samples, self.recipe, self.runtime, self.bad_val_samples)
        accuracy = knn_accuracy(bank, queries, k=settings.knn_k, temperature=settings.knn_temperature)
        self.console.log_evaluation({"step": done, "knn": accuracy})
        self.restart_clock(done)

    def save(self, done: int) -> None:
        """A complete checkpoint with the exported encoder inside, then the old ones go. Collective."""
        with self.console.working(f"step {done}: saving"):
            state = export.full_state(self.objective)
            folder = saving.save(
                self.checkpoint_folder,
                self.model_engine,
                self.runtime,
                step=done,
                facts=self.facts(),
                write_more=lambda folder: export.write_weights(
                    folder, self.recipe, state, self.objective.outside_state()
                ),
            )
        saving.prune(self.checkpoint_folder, self.recipe.run.keep, self.runtime)
        self.console.say(f"step {done}  saved {folder}")
        self.restart_clock(done)

    # --- beginning and end ------------------------------------------------------------------------------------------

    def open_run_folder(self) -> None:
        """Make the run folder, write down the recipe, say what will run."""
        self.console = Console(self.folder, enabled=False, total_steps=self.plan.last_step, start_step=self.first_step)
        if not self.runtime.is_main:
            return
        self.checkpoint_folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.json").write_text(json.dumps(self.facts(), indent=1) + "\n")
        self.console = Console(self.folder, enabled=True, total_steps=self.plan.last_step, start_step=self.first_step)
        lines = start_lines(
            self.command.name,
            self.recipe,
            self.plan,
            self.runtime.world_size,
            self.train_set,
            self.val_set,
            teacher=self.objective.facts().get("teacher", ""),
            init=self.init,
        )
        for line in lines:
            self.console.say(line)
        if self.first_step:
            self.console.say(f"resume      from step {self.first_step}")

    def make_loader(self) -> TrainLoader:
        steps = (self.first_step, self.plan.last_step)
        return make_train_loader(
            self.train_set, self.recipe, self.objective, self.runtime, steps, self.bad_train_samples
        )

    def finish(self) -> None:
        """Name what the run leaves behind."""
        reached("finish")
        newest = complete_checkpoints(self.checkpoint_folder)[0]
        self.console.say(f"memory      {peak_memory(self.runtime) / 2**30:.2f} GiB at most on rank 0")
        self.console.say(f"done        {self.folder}: metrics.jsonl, {newest.relative_to(self.folder)}")
        self.console.say(f'features    timm.create_model("local-dir:{newest / "encoder"}", pretrained=True)')


def run(command: Command) -> int:
    """Join the world, train, leave it."""
    runtime = start()
    reached("start.joined")
    try:
        trainer = Trainer(command, runtime)
        datasets = [dataset for dataset in (trainer.train_set, trainer.val_set) if dataset]
        try:
            with bus_errors.explained(datasets, runtime.rank):
                trainer.fit()
        except (ValueError, OSError) as error:  # a shard or an image that cannot be read: this rank's alone
            raise shell.OnThisRank(f"rank {runtime.rank}: {error}") from error
        except RuntimeError as error:
            if "closed by peer" not in str(error) or isinstance(error, shell.OnThisRank):
                raise
            raise shell.OnThisRank(f"rank {runtime.rank}: another rank has ended; its message says why") from error
    finally:
        stop()
    return 0


if __name__ == "__main__":
    INTERRUPTED = "interrupted; add --resume to go on from the newest checkpoint"
    EXPECTED = (ValueError, OSError, FloatingPointError, shell.OnThisRank)
    sys.exit(shell.run(lambda: run(COMMAND), debug=COMMAND.debug, interrupted=INTERRUPTED, expected=EXPECTED))
