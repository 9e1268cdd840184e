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
from engine.signals import REQUESTS
from engine.streams import lose_rather_than_stop

if __name__ == "__main__":
    REQUESTS.listen()  # before a library starts threads
    lose_rather_than_stop()  # and before one keeps a stream
    COMMAND = parse_command(sys.argv[1:])  # --list, --print and mistakes are answered before torch is imported
    shell.calm_threads()

import json
import math
import signal
import time
from functools import partial

import torch

from engine import stopping
from engine.bad_steps import BadSteps, Safeguard
from engine.checkpoints.choosing import choose
from engine.checkpoints.keeping import Keeper, SaveError
from engine.checkpoints.loading import load, needs_universal
from engine.checkpoints.manifests import written_with
from engine.checkpoints.progress import gigabytes
from engine.compiling import announced, compile_note, explained
from engine.console import Console, replace_text
from engine.evaluation.monitor import Monitor
from engine.fault_points import reached
from engine.feeding import make_train_loader, open_data, open_records
from engine.heartbeats import TRAINING
from engine.meter import Meter
from engine.objectives.build import build_objective
from engine.params import set_learning_rate
from engine.plan import make_plan
from engine.run_folder import claimed, run_folder
from engine.runtime import Runtime, peak_memory, seed_step, start, stop
from engine.start_agreement import agree, everywhere, rank_facts
from engine.start_up import end_lines, start_lines
from engine.weights import export
from engine.weights.initial import begin_from
from engine.witness import Witness, witnessed
from engine.zero import wrap
from recipes.overrides import leaves, show
from shards.reading import bus_errors
from shards.reading.loader import Batch, TrainLoader


class Trainer:
    """One run: everything built from a recipe, then `fit`."""

    exit_code = 0  # of a run that came to its end or was asked to stop

    def __init__(self, command: Command, runtime: Runtime, witness: Witness) -> None:
        self.command, self.recipe, self.runtime, self.witness = command, command.recipe, runtime, witness
        self.train_set, self.val_set = everywhere(partial(open_data, self.recipe.data), runtime)
        self.plan = make_plan(self.recipe, len(self.train_set), runtime.world_size)
        self.meter = Meter(self.plan, self.recipe, runtime)
        self.folder = run_folder(command)
        self.checkpoint_folder = self.folder / "checkpoints"
        self.keeper = Keeper(self.checkpoint_folder, self.recipe.run, runtime, witness.warn)
        self.build_objective()
        self.build_engine()
        self.first_step = self.chosen.step if self.chosen else 0
        self.bad_train_samples, self.bad_val_samples = open_records(
            self.folder, self.recipe.data, [self.train_set, self.val_set], runtime, afresh=self.first_step == 0
        )

    # --- building ---------------------------------------------------------------------------------------------------

    def build_objective(self) -> None:
        """The objective with its first weights, and the checkpoint that will take their place, where one does."""
        torch.manual_seed(self.recipe.run.seed)  # the same initial weights on every rank
        self.objective, self.init = everywhere(partial(build_objective, self.recipe), self.runtime), ""
        agree(rank_facts(self.command, self.train_set, self.val_set, self.objective.facts()), self.runtime)
        reached("start.agreed")
        self.chosen = choose(
            self.command, self.plan, self.checkpoint_folder, self.facts(), self.runtime, self.witness.warn
        )
        if self.chosen:  # recipe.init is of no account any more, nor need it still be there
            self.init = self.chosen.manifest.get("init", "")
        elif self.recipe.init:
            self.init = begin_from(self.recipe.init, self.objective)

    def build_engine(self) -> None:
        """The objective on its device, wrapped by DeepSpeed, with everything that a chosen checkpoint holds."""
        universal = needs_universal(self.chosen, self.recipe.zero.stage, self.runtime)
        self.objective = self.objective.to(self.runtime.device)
        self.compiled = compile_note(self.recipe, self.runtime.device)
        self.model_engine, self.optimizer = wrap(
            self.objective, self.recipe, self.runtime.world_size, load_universal=universal
        )
        if self.chosen:
            load(self.chosen, self.model_engine, self.objective, self.runtime, universal=universal)

    def facts(self) -> dict:
        """What a checkpoint must share with the run that resumes it."""
        return {
            "name": self.command.name,
            "recipe": {path: show(value) for path, value in leaves(self.recipe).items()},
            "dataset": self.train_set.fingerprint,
            "objective": self.objective.facts(),
            "init": self.init,
            **written_with(self.runtime),
        }

    # --- the loop ---------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """All steps from the first to the last, with what is due between them, unless a signal asks for an end."""
        self.open_run_folder()
        self.watch()
        self.loader = self.make_loader()
        self.restart_clock(self.first_step)
        try:
            asked = self.evaluate(self.first_step) if self.monitor.is_missing(self.first_step) else 0
            for step in range(self.first_step, self.plan.last_step):
                if asked:
                    break
                asked = self.advance(step)
            self.finish(asked)
        finally:
            self.loader.close()
            self.console.close()

    def advance(self, step: int) -> int:
        """One optimizer step and what is due after it; the signal for which all ranks are to stop now, or 0."""
        run, done = self.recipe.run, step + 1
        reached("step.begin")
        log = done == self.plan.total_steps or done % run.log_every == 0
        with announced(self.console, done, compiles=step == self.first_step and bool(self.compiled)):
            metrics = self.optimizer_step(step, measure=log)
        asked = self.stopping.answer()
        self.console.advance(done)
        reached("step.done")
        if log:
            self.report(done, metrics)
        if not asked and self.monitor.is_due(done):
            asked = self.evaluate(done)
        last = bool(asked) or done == self.plan.last_step
        # After a bad step it is not known what the weights are worth: the save waits for a good one.
        self.save_is_due |= bool(run.save_every and done % run.save_every == 0)
        if last or (self.save_is_due and not self.bad_steps.in_a_row(done)):
            self.save_is_due = False
            with stopping.saving(asked):
                self.save(done, last=last)
            asked = asked or self.stopping.agreed()  # a signal that came meanwhile finds all saved
        return asked

    def optimizer_step(self, step: int, *, measure: bool) -> dict[str, torch.Tensor]:
        """One update from one global batch; its metrics over all ranks where they are measured (else nothing).

        Where loss or gradient is no number, nothing changes and that is noted.
        """
        set_learning_rate(self.optimizer.param_groups, self.plan.lr(step))
        self.safeguard.begin()
        for micro_step in range(self.plan.accumulation):
            self.witness.at(TRAINING, step)
            seed_step(self.recipe.run.seed, step, micro_step, self.runtime.rank)
            batch: Batch = self.loader.next_batch()
            metrics = self.model_engine(batch, step)
            if reached("step.loss"):
                metrics["loss"] = metrics["loss"] * math.nan
            if reached("step.backward"):
                metrics["loss"].register_hook(lambda gradient: gradient * math.nan)
            self.model_engine.backward(self.safeguard.watched(metrics["loss"], batch))
            reached("step.gradient")
            if measure:
                self.meter.add(metrics)
            if micro_step < self.plan.accumulation - 1:
                self.model_engine.step()
        reached("step.update")
        self.stopping.ask()
        if self.safeguard.step(self.model_engine):
            self.objective.after_step(step, self.plan.total_steps)
        else:
            self.bad_steps.note(step + 1, self.safeguard.micro_steps)
        return {**self.meter.averages(), "grad_norm": self.safeguard.grad_norm} if measure else {}

    # --- what is due between steps ----------------------------------------------------------------------------------

    def report(self, done: int, metrics: dict[str, torch.Tensor]) -> None:
        """Read the metrics from the device (one of the places that wait for it) and record them."""
        record, seconds_per_step = self.meter.record(done, metrics, self.loader.data_wait)
        self.console.log(record, seconds_left=seconds_per_step * (self.plan.last_step - done))
        self.restart_clock(done)

    def restart_clock(self, done: int) -> None:
        """A new measurement begins."""
        self.meter.restart(done)
        self.loader.data_wait = 0.0

    def evaluate(self, done: int) -> int:
        """How good the encoder is by now; the signal for which all ranks are to stop, or 0. Collective."""
        self.witness.at("evaluation", done)
        asked = self.monitor.evaluate(self.objective, done)
        self.restart_clock(done)
        return asked

    def save(self, done: int, *, last: bool) -> bool:
        """A complete checkpoint with the exported encoder inside, then the old ones go. Collective.

        False where it could not be written and the run may go on without; SaveError where it may not.
        """
        self.witness.at("saving", done)
        began = time.monotonic()
        with self.console.working(f"step {done}: saving"):
            state = export.full_state(self.objective)
            saved = self.keeper.save(
                self.model_engine,
                step=done,
                last=last,
                state=state,
                facts=self.facts(),
                write_more=lambda folder: export.write_weights(
                    folder, self.recipe, state, self.objective.outside_state()
                ),
                say=self.console.say,
            )
        if saved:
            taken = f"{gigabytes(saved.num_bytes)} in {time.monotonic() - began:.1f} s"
            self.console.say(f"step {done}  saved {saved.folder}: {taken}")
        self.restart_clock(done)
        return saved is not None

    # --- beginning and end ------------------------------------------------------------------------------------------

    def open_run_folder(self) -> None:
        """Make the run folder, write down the recipe, say what will run."""
        if self.runtime.is_main:
            self.checkpoint_folder.mkdir(parents=True, exist_ok=True)
            replace_text(self.folder / "recipe.json", json.dumps(self.facts(), indent=1) + "\n")
        steps = dict(total_steps=self.plan.last_step, start_step=self.first_step)
        self.console = Console(self.folder, enabled=self.runtime.is_main, note=self.witness.log.write, **steps)
        lines = start_lines(
            self.command.name,
            self.recipe,
            self.plan,
            self.runtime.world_size,
            self.train_set,
            self.val_set,
            compiled=self.compiled,
            teacher=self.objective.facts().get("teacher", ""),
            init=self.init,
        )
        if self.chosen:
            lines += [f"resume      from step {self.first_step}", *self.chosen.notes]
        for line in lines:
            self.console.say(line)

    def make_loader(self) -> TrainLoader:
        steps = (self.first_step, self.plan.last_step)
        return make_train_loader(
            self.train_set, self.recipe, self.objective, self.runtime, steps, self.bad_train_samples
        )

    def watch(self) -> None:
        """For signals that ask for an end, and for steps that must not be applied. Collective."""
        self.stopping = stopping.StopAgreement(self.runtime, self.recipe.run.timeout)
        train, val = (self.train_set, self.bad_train_samples), (self.val_set, self.bad_val_samples)
        self.monitor = Monitor(
            self.recipe, self.runtime, train, val, self.plan.total_steps, self.console, self.stopping
        )
        self.safeguard = Safeguard(self.objective, self.recipe.zero.stage)
        self.bad_steps = BadSteps(self.console, self.train_set, self.runtime, self.recipe, done=self.first_step)
        self.save_is_due = False

    def finish(self, asked: int) -> None:
        """Name what the run leaves behind."""
        if asked:
            self.exit_code, self.witness.outcome = shell.STOPPED, f"stopped by {signal.Signals(asked).name}"
            self.console.say(f"stopped     {signal.Signals(asked).name}; --resume goes on")
            return
        reached("finish")
        for line in end_lines(self.folder, self.checkpoint_folder, peak_memory(self.runtime)):
            self.console.say(line)


def train(command: Command, runtime: Runtime) -> Trainer:
    """One run in a world that is there: its folder is its own, and each rank leaves a log there. Collective."""
    folder = run_folder(command)
    with claimed(folder, runtime), witnessed(folder, runtime, command.recipe.run.timeout) as witness:
        trainer = Trainer(command, runtime, witness)
        datasets = [dataset for dataset in (trainer.train_set, trainer.val_set) if dataset]
        try:
            with explained(command.recipe, runtime.rank), bus_errors.explained(datasets, runtime.rank):
                trainer.fit()
        except (ValueError, OSError) as error:  # a shard or an image that cannot be read: this rank's alone
            raise shell.OnThisRank(f"rank {runtime.rank}: {error}") from error
    return trainer


def run(command: Command) -> int:
    """Join the world, train, leave it."""
    runtime = start(command.recipe.run.timeout)
    reached("start.joined")
    try:
        return train(command, runtime).exit_code
    finally:
        stop()


if __name__ == "__main__":
    EXPECTED = (ValueError, OSError, SaveError, shell.OnThisRank, shell.Diverged, shell.NotSaved)
    sys.exit(shell.run(lambda: run(COMMAND), debug=COMMAND.debug, expected=EXPECTED))
