"""A step whose loss or gradient is no number changes nothing and is written down; too many of them end the run.

ZeRO's optimizers compute the norm of the gradient over all ranks before they step, read it, and skip a step whose norm
is not finite; at stage 0 nothing does, so it is done here. That is where a step waits for the device: once it has been
queued to its end, and nowhere else. A loss that is not finite is made to spoil the gradient, on the device: one rank's
loss reaches the decision of all ranks without being sent or waited for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.agreement import gathered, shared
from engine.console import Console, forget_after
from engine.meter import gradient_norm
from engine.runtime import Runtime
from engine.shell import Diverged
from recipes.schema import Recipe
from shards.dataset import Dataset
from shards.reading.loader import Batch

BAD_STEPS = "bad_steps.jsonl"
WINDOW, MOST_IN_WINDOW = 1000, 10  # steps; a run that meets more is not worth its electricity

Part = tuple[list[str], float]  # keys of a micro-batch, and its loss


class Safeguard:
    """One optimizer step at a time, so that it can be taken back."""

    def __init__(self, objective: nn.Module, stage: int) -> None:
        """`stage` of ZeRO."""
        self.objective, self.stage = objective, stage
        # A forward pass changes running statistics. What it changes must be saved, or a resumed run would be another:
        # so other buffers, which hold constants, need not be remembered.
        saved = objective.state_dict().keys()
        self.buffers = [buffer for name, buffer in objective.named_buffers() if name in saved]
        self.before = [torch.empty_like(buffer) for buffer in self.buffers]
        self.grad_norm: Tensor | float | None = None  # of the last step, before clipping

    def begin(self) -> None:
        """The step begins: what a forward pass changes is remembered."""
        self.micro_steps: list[tuple[Tensor, Tensor]] = []  # sample ids [B], loss
        copy_all(self.buffers, self.before)

    def watched(self, loss: Tensor, batch: Batch) -> Tensor:
        """The loss of a micro-step, to be differentiated: the same bits, but no gradient is finite where it is not."""
        self.micro_steps.append((batch.sample_ids, loss.detach()))
        return loss * torch.ones_like(loss).masked_fill(~loss.detach().isfinite(), math.nan)

    def step(self, model_engine) -> bool:
        """DeepSpeed's step after the last micro-step; whether it was applied, alike on all ranks."""
        if self.stage:
            step_or_diverge(model_engine)
            self.grad_norm = model_engine.get_global_grad_norm()
            applied = model_engine.was_step_applied()
        else:
            self.grad_norm = gradient_norm(self.objective)
            applied = bool(self.grad_norm.isfinite())
            with nullcontext() if applied else self.without_gradients(model_engine.optimizer):
                model_engine.step()
        if not applied:
            copy_all(self.before, self.buffers)
        return applied

    @contextmanager
    def without_gradients(self, optimizer: Optimizer) -> Iterator[None]:
        """Its step leaves weights and state as they are. DeepSpeed clips before, and that needs gradients."""
        hook = optimizer.register_step_pre_hook(lambda *_: self.objective.zero_grad(set_to_none=True))
        try:
            yield
        finally:
            hook.remove()


@torch.no_grad()
def copy_all(sources: list[Tensor], targets: list[Tensor]) -> None:
    """The numbers of tensors into others, in few launches."""
    if sources:
        torch._foreach_copy_(targets, sources)


def step_or_diverge(model_engine) -> None:
    """DeepSpeed's step; Diverged where fp16's gradient overflows although the loss is scaled up no more."""
    try:
        model_engine.step()
    except Exception as error:
        if type(error) is not Exception or "loss scale" not in str(error):  # DeepSpeed has no class of its own for it
            raise
        raise Diverged(
            "fp16: the gradient overflows at every scale of the loss, down to the smallest (1); the newest checkpoint "
            "is from before. Lower optim.lr or set optim.clip_grad and go on with --resume --allow-changes, or start "
            "afresh with precision=bf16"
        ) from error


class BadSteps:
    """The record of the steps that were not applied, RUN/bad_steps.jsonl, and the limits to their number."""

    def __init__(self, console: Console, dataset: Dataset, runtime: Runtime, recipe: Recipe, *, done: int) -> None:
        """A run that goes on after `done` steps goes on counting. Collective."""
        self.console, self.dataset, self.runtime = console, dataset, runtime
        self.most_in_a_row = recipe.run.max_bad_steps
        # DeepSpeed finds the scale of the loss by overflowing now and then, which is no bad step.
        self.scales_loss = recipe.precision == "fp16"
        self.file = console.folder / BAD_STEPS
        self.steps: list[int] = shared(self.read(done) if runtime.is_main else None, runtime)

    def read(self, done: int) -> list[int]:
        """The bad steps of the run so far; those after `done` come again."""
        forget_after(self.file, done)
        return [json.loads(line)["step"] for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def note(self, done: int, micro_steps: list[tuple[Tensor, Tensor]]) -> None:
        """Step `done` (from 1) was not applied: write it down. Collective; Diverged on all ranks where it is too much.

        The keys are those of the whole global batch in its order; suspects are those of the micro-batches whose own
        loss is no number.
        """
        parts = self.parts(micro_steps)
        losses = [loss for _, loss in parts]
        if self.scales_loss and all(map(math.isfinite, losses)):
            return
        self.steps.append(done)
        record = {
            "step": done,
            "loss": sum(losses) / len(losses),
            "keys": [key for keys, _ in parts for key in keys],
            "suspects": [key for keys, loss in parts if not math.isfinite(loss) for key in keys],
        }
        what = "the gradient" if math.isfinite(record["loss"]) else f"the loss {record['loss']}"
        if self.runtime.is_main:
            self.console.keep(BAD_STEPS, record)
        self.console.say(f"step {done}  {what} is no number: not applied; the keys of its batch are in {self.file}")
        self.check(done, what)

    def parts(self, micro_steps: list[tuple[Tensor, Tensor]]) -> list[Part]:
        """Keys and loss of every micro-batch of the step, in the order of the global batch. Collective."""
        mine = [([self.dataset.name(i) for i in ids.tolist()], float(loss)) for ids, loss in micro_steps]
        return [part for micro_step in zip(*gathered(mine, self.runtime), strict=True) for part in micro_step]

    def check(self, done: int, what: str) -> None:
        """Diverged where they are too many in a row, or too many lately."""
        lately = sum(step > done - WINDOW for step in self.steps)
        if self.in_a_row(done) < self.most_in_a_row and lately <= MOST_IN_WINDOW:
            return
        raise Diverged(
            f"step {done}: {what} is no number, for the {self.in_a_row(done)}. time in a row (run.max_bad_steps="
            f"{self.most_in_a_row}) and in {lately} of the last {WINDOW:,} steps (at most {MOST_IN_WINDOW}); the "
            f"newest checkpoint is from before. Look at the images that {self.file} names, or lower optim.lr or set "
            "optim.clip_grad and go on from the checkpoint with --resume --allow-changes"
        )

    def in_a_row(self, done: int) -> int:
        """How many steps up to `done` were bad one after the other."""
        bad, count = set(self.steps), 0
        while done - count in bad:
            count += 1
        return count
