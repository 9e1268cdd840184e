"""Bytes per parameter that DeepSpeed holds beside gradients, as JSON: `states_worker.py PRECISION:STAGE ...`."""

from __future__ import annotations

import gc
import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from engine.runtime import start, stop
from engine.zero import wrap
from recipes import registry
from recipes.overrides import apply_overrides

WIDTH, DEPTH = 512, 8


class Squares(nn.Module):
    """A stack of linear layers with a loss."""

    no_decay = ()

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).square().mean()


def held() -> int:
    """Bytes of all tensors that anybody can still reach."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(precision: str, stage: str) -> float:
    """Before the third step: optimizers make their state in the first."""
    overrides = [f"precision={precision}", f"zero.stage={stage}", "optim.global_batch=8", "optim.micro_batch=8"]
    before, module = held(), Squares()
    number = sum(weight.numel() for weight in module.parameters())
    recipe = apply_overrides(registry.load("vit_b_mae"), overrides)
    model_engine, _ = wrap(module, recipe, 1, load_universal=False)
    for step in range(3):
        x = torch.randn(8, WIDTH, dtype=next(module.parameters()).dtype)
        model_engine.backward(model_engine(x))
        found = held() - before
        if step < 2:
            model_engine.step()
    model_engine.destroy()
    return found / number


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    start(300)
    print(json.dumps({name: measure(*name.split(":")) for name in sys.argv[1:]}))
    stop()
