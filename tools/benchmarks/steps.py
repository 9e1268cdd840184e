"""A whole step of training, ours and somebody else's: loss, backward, gradient norm, AdamW, moving average.

Both begin with the same weights and see the same images, masks and draws; the losses of their first steps are compared
before anything is timed. Ours is the objective with the optimizer and the norm of `engine/`, without DeepSpeed.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn

from engine.meter import gradient_norm
from engine.objectives.contract import Objective
from engine.params import parameter_groups
from engine.zero import fused_adamw
from recipes import sizes
from recipes.schema import Model, Optim
from tools.benchmarks.operators import operators
from tools.benchmarks.side_by_side import Row, Settings, compared, interleaved, smaller

STEPS = 3  # whose losses are compared
TOLERANCE = 2e-5  # of a loss, relative: fp32, and AdamW's division by small numbers between the steps
TOTAL = 1000  # steps of the run that these are the first of

Step = Callable[[int], dict[str, float]]  # step number -> its losses by name


@dataclass(frozen=True)
class Size:
    """What is trained: ViT-S on 8 images of 224 pixels; at a scale below 0.5 something small that shows the same."""

    model: Model
    image_size: int
    images: int
    hidden: int  # of LUT's heads
    decoder: tuple[int, int, int] = (512, 8, 16)  # of LUT: width, depth, heads

    @classmethod
    def of(cls, settings: Settings, **changes: object) -> Size:
        small = settings.scale < 0.5
        shape = dict(embed_dim=64, depth=2, num_heads=2) if small else vars(sizes.VIT_S)
        if small:
            return cls(Model(**shape | changes), image_size=64, images=4, hidden=128, decoder=(64, 2, 2))
        return cls(Model(**shape | changes), image_size=224, images=8, hidden=4096)

    @property
    def num_patches(self) -> int:
        return self.model.num_patches(self.image_size)


class OurStep:
    """Ours: called with a step's number, it takes that step."""

    def __init__(self, objective: Objective, batch: SimpleNamespace, optim: Optim) -> None:
        self.objective, self.batch, self.optim = objective.train(), batch, optim
        self.optimizer = fused_adamw(parameter_groups(objective, optim.weight_decay, objective.no_decay), optim)

    def __call__(self, step: int) -> dict[str, float]:
        metrics = self.objective(self.batch, step)
        metrics["loss"].backward()
        norm = gradient_norm(self.objective)
        if self.optim.clip_grad:
            clip(self.objective, norm, self.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.objective.after_step(step, TOTAL)
        return {name: value.item() for name, value in metrics.items()}


ReleasedStep = Callable[[Settings, Size, OurStep], Step]
TextbookStep = Callable[[OurStep], Step]


def clip(module: nn.Module, norm: Tensor, most: float) -> None:
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    torch.nn.utils.clip_grads_with_norm_(parameters, most, norm.float())


def step_rows(
    method: str, ours: OurStep, settings: Settings, size: Size, released: ReleasedStep, textbook: TextbookStep
) -> Iterator[Row]:
    """Losses first; then operators, and images per second of CPU time. RuntimeError where the losses differ.

    The other side is what `released` makes where there are clones of the released programs, else what `textbook` does.
    """
    name = f"{method} step, against {'the released program' if settings.reference else 'a textbook form'}"
    theirs = released(settings, size, ours) if settings.reference else textbook(ours)
    torch.set_num_threads(1)
    for step in range(STEPS):
        require_equal(name, step, ours(step), theirs(step))
    numbers = iter(range(STEPS, 10**9))
    counts = [sum(operators(lambda side=side: side(next(numbers))).names.values()) for side in (ours, theirs)]
    yield smaller(f"{name}: operators", *counts, "dispatched per step")
    works = [lambda side=side: side(next(numbers)) for side in (ours, theirs)]
    yield compared(name, size.images, interleaved(works, settings.rounds, time.process_time), "images per CPU second")


def require_equal(name: str, step: int, ours: dict[str, float], theirs: dict[str, float]) -> None:
    for key, value in theirs.items():
        if not math.isclose(ours[key], value, rel_tol=TOLERANCE):
            raise RuntimeError(
                f"{name}: step {step}: {key} is {ours[key]:.8g} here and {value:.8g} there, further apart than "
                f"{TOLERANCE:g} of it; the two do not compute the same, so neither is timed"
            )


@contextmanager
def on_this_machine() -> Iterator[None]:
    """The released loops print, ask for CUDA's clock and for its autocast; without CUDA the latter do nothing."""
    with redirect_stdout(StringIO()), mock.patch.object(torch.cuda, "synchronize", lambda *_: None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield


def scaler(kind: type) -> object:
    """Their scaler of the loss, which without CUDA scales nothing and then lacks the scale that they print."""
    return type(kind.__name__, (kind,), {"state_dict": lambda self: {"scale": 1.0}})()


def without_fused_attention(module: nn.Module) -> nn.Module:
    """timm's attention as a product, a softmax and a product: as in the timm of 2021 that the programs name."""
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    return module
