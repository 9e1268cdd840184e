"""A script: in which part of a step of LUT the host reads numbers from the device, by stage of ZeRO; prints JSON.

Usage: waiting_worker.py STAGE ...
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from tiny_lut import batch_of, tiny_lut

from engine.bad_steps import Safeguard
from engine.runtime import start, stop
from engine.zero import wrap
from recipes import registry
from recipes.overrides import apply_overrides
from tools.benchmarks.operators import operators


def measure(stage: int) -> dict[str, object]:
    """Calls that wait, before DeepSpeed's step and in it, and the optimizers that the step called."""
    precision = "bf16" if stage else "fp32"
    overrides = ["optim.global_batch=5", "optim.micro_batch=5", f"zero.stage={stage}", f"precision={precision}"]
    recipe = apply_overrides(registry.load("vit_ti_lut_demo"), [*overrides, "zero.param_persistence_threshold=0"])
    objective, batch = tiny_lut(), batch_of()
    batch.sample_ids = torch.arange(5)
    model_engine, _ = wrap(objective, recipe, 1, load_universal=False)
    guard = Safeguard(objective, stage)

    def compute() -> None:
        guard.begin()
        model_engine.backward(guard.watched(model_engine(batch, 0)["loss"], batch))

    found: dict[str, object] = {}
    for _ in range(3):  # the first makes the optimizer's state, the second has stage 3 compare its order among ranks
        found["before"] = operators(compute).waiting
        step = operators(lambda: guard.step(model_engine))
        found["after"] = operators(lambda: objective.after_step(0, 10)).waiting
    found["step"] = step.waiting
    found["optimizer"] = sorted(name for name in step.names if "adam" in name)
    model_engine.destroy()
    return found


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    start(300)
    print(json.dumps({stage: measure(int(stage)) for stage in sys.argv[1:]}))
    stop()
