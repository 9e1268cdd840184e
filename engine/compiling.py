"""torch.compile, one transformer block at a time: a graph per width and number of tokens, used by all blocks alike.

And one step of DTM's morphing in fixed shapes, a graph for all steps and draws.

A block is compiled in place, so the names of its weights stay. Shapes are those of the run, never symbols. On a GPU
kernels are chosen by rules, not by timing: a run that is resumed gets the same ones, and with them the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from engine.console import Console
from engine.shell import OnThisRank
from recipes.schema import Recipe

INDUCTOR = {"backend": "inductor", "options": {"deterministic": True}}


def compile_blocks(objective: nn.Module, recipe: Recipe, **how: object) -> int:
    """Compile the blocks of an objective and of the teachers that it keeps outside, as recipe.compile says.

    Returns how many. Called once, with everything on its device and copied that will be: a copy of a compiled block is
    not compiled. `how` takes the place of the arguments for `torch.compile`.
    """
    if not compiles(recipe, next(objective.parameters()).device):
        return 0
    teachers = getattr(objective, "outside", {}).values()
    networks = [*teachers] if recipe.zero.stage == 3 else [objective, *teachers]
    blocks = [block for network in networks for block in transformer_blocks(network)]
    for block in blocks:
        block.compile(**(how or INDUCTOR), dynamic=False)
    if hasattr(objective, "join_step"):
        objective.join_step = torch.compile(objective.join_step, fullgraph=True, dynamic=False, **(how or INDUCTOR))
    return len(blocks)


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Whether anything is compiled there: auto means on a GPU."""
    return recipe.compile == "blocks" or (recipe.compile == "auto" and device.type == "cuda")


def transformer_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks of every transformer in a network, by timm's name for where they are."""
    for module in network.modules():
        blocks = getattr(module, "blocks", None)
        if isinstance(blocks, nn.Sequential | nn.ModuleList):
            yield from blocks


def compile_note(recipe: Recipe, device: torch.device) -> str:
    """What is compiled, in the words of the start-up lines; empty for nothing."""
    if not compiles(recipe, device):
        return ""
    if recipe.zero.stage == 3:
        return "blocks of teachers only (zero.stage=3 gathers the student's weights by hooks, which graphs cannot hold)"
    return "every transformer block; compile=off leaves them as they are"


def announced(console: Console, step: int, *, compiles: bool) -> AbstractContextManager:
    """Tells, while it lasts, that step number `step` takes long because it `compiles`; else nothing."""
    return console.working(f"step {step}: compiling") if compiles else nullcontext()


@contextmanager
def explained(recipe: Recipe, rank: int) -> Iterator[None]:
    """OnThisRank, with a way out, where the compiler fails: it works in the first steps, and needs a C++ compiler."""
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException  # torch loads its compiler when it is first asked for

        if not isinstance(error, TorchDynamoException):
            raise
        cause = getattr(error, "inner_exception", error)
        what = f"{type(cause).__name__}: {cause}".partition("\n")[0]
        raise OnThisRank(
            f"rank {rank}: compile={recipe.compile}: torch.compile failed: {what}; install what is missing, or set "
            "compile=off and start again (--resume goes on from a checkpoint)"
        ) from error
