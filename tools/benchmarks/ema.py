"""The moving average of LUT's ViT-B, against the released way or a textbook one.

Both move what the teacher runs, encoder and projector; theirs moves decoder and predictor as well, and does so one
after the other for every tensor of the state dict.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from engine.ema import update_average
from engine.objectives.lut import ContextualAutoencoder
from recipes import registry
from tools.benchmarks.operators import operators
from tools.benchmarks.released import released
from tools.benchmarks.side_by_side import Row, Settings, interleaved, smaller

MOMENTUM = 0.996
TOLERANCE = 1e-6  # of weights, which are below 1 but for the norms' and the batch norms' 1


def suite(settings: Settings) -> Iterator[Row]:
    """CPU time and dispatched operators of an update. `settings.scale` makes the networks shallower."""
    torch.set_num_threads(1)
    student = build_student(settings)
    part = nn.ModuleDict({"encoder": student.encoder, "head": student.head})
    average, whole = copy.deepcopy(part).requires_grad_(False), copy.deepcopy(student).requires_grad_(False)
    change(student)
    if settings.reference:
        other, theirs = "the released program", released_update(settings, student, whole)
    else:
        other, theirs = "a loop over the state dict", lambda: loop_update(student, whole)
    works = (lambda: update_average(part, average, MOMENTUM)), theirs
    for work in works:
        work()
    check_equal(average, {"encoder": whole.encoder, "head": whole.head}, part)
    seconds = interleaved(works, settings.rounds, time.process_time)
    numbers = sum(t.numel() for t in student.state_dict().values()), sum(t.numel() for t in part.state_dict().values())
    name = f"moving average, {numbers[1] / 1e6:.0f} of {numbers[0] / 1e6:.0f} M numbers, against {other}"
    yield smaller(name, *(1000 * spent for spent in seconds), "CPU ms")
    yield smaller("its dispatched operators", *(operators(work).names.total() for work in works), "operators")


def build_student(settings: Settings) -> ContextualAutoencoder:
    """LUT's ViT-B with decoder, projector and predictor, at `settings.scale` of their depth."""
    recipe = registry.load("vit_b_lut")
    model = replace(recipe.model, depth=settings.scaled(recipe.model.depth))
    objective = replace(recipe.objective, decoder_depth=settings.scaled(recipe.objective.decoder_depth))
    torch.manual_seed(0)
    return ContextualAutoencoder(objective, model, recipe.data.image_size)


@torch.no_grad()
def change(module: nn.Module) -> None:
    """Give the student other weights than its average, as a step would, and other running statistics."""
    generator = torch.Generator().manual_seed(1)
    statistics = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    for values in [*(parameter for parameter in module.parameters() if parameter.requires_grad), *statistics]:
        values.add_(0.01 * torch.randn(values.shape, generator=generator))


def released_update(settings: Settings, student: nn.Module, whole: nn.Module) -> Callable[[], object]:
    """The released program's update of its average, which stands in `whole` and begins with its weights."""
    with released(settings.reference, "lut") as load:
        average = load("util.model_ema_sched").ModelEma_sched(whole, decay=[MOMENTUM])
    average.ema = whole  # it has made a copy, which is equal
    return lambda: average.update(student, 0)


@torch.no_grad()
def loop_update(student: nn.Module, whole: nn.Module) -> None:
    """As it is written in textbooks: every tensor of the state dict, one after the other."""
    values = student.state_dict()
    for name, average in whole.state_dict().items():
        average.copy_(MOMENTUM * average + (1 - MOMENTUM) * values[name])


def check_equal(average: nn.Module, theirs: dict[str, nn.Module], student: nn.Module) -> None:
    """RuntimeError where the averages differ by more than rounding, or have not moved."""
    expected: dict[str, Tensor] = nn.ModuleDict(theirs).state_dict()
    moved = 0
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            worst = (value - expected[name]).abs().max().item()
            if not worst <= TOLERANCE:
                raise RuntimeError(f"moving average of {name}: differs by {worst:.1e}, which is more than {TOLERANCE}")
            moved += not torch.equal(value, student.state_dict()[name])
    if not moved:
        raise RuntimeError("moving average: nothing has moved")
