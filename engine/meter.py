"""What is measured of the steps between two records: losses over all ranks, gradient norm, speed, waiting for data.

MFU, model FLOPs utilisation, is the share of the GPU's peak that the method's own matrix products make up
(recipes/costs/): what a step must compute, by the time that it took.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.plan import Plan
from engine.runtime import Runtime
from recipes.costs.gpus import known_gpu
from recipes.costs.training import training_cost
from recipes.schema import Recipe


class Meter:
    """Sums of one step's metrics, and the clock since the last record."""

    def __init__(self, plan: Plan, recipe: Recipe, runtime: Runtime) -> None:
        self.plan, self.runtime = plan, runtime
        self.flops, self.peak = training_cost(recipe).flops, peak_flops(recipe, runtime)
        self.sums: dict[str, Tensor] = {}

    def restart(self, done: int) -> None:
        """What lies between measurements (evaluation, saving) does not count as training time."""
        self.began, self.first = time.perf_counter(), done

    def add(self, metrics: dict[str, Tensor]) -> None:
        """One micro-step's metrics, scalars."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double()

    def averages(self) -> dict[str, Tensor]:
        """Means of what was added, over micro-steps and ranks; the sums begin anew. Collective."""
        values = torch.stack(list(self.sums.values())) / (self.plan.accumulation * self.runtime.world_size)
        if self.runtime.world_size > 1:
            dist.all_reduce(values)
        averages = dict(zip(self.sums, values, strict=True))
        self.sums = {}
        return averages

    def record(self, done: int, metrics: dict[str, Tensor | None], data_wait: float) -> tuple[dict, float]:
        """A line of metrics.jsonl, and the seconds that a step took. Waits for the device."""
        values = {name: float("nan") if value is None else float(value) for name, value in metrics.items()}
        seconds, steps = time.perf_counter() - self.began, done - self.first
        grad_norm, speed = values.pop("grad_norm"), self.plan.optim.global_batch * steps / seconds
        record = {
            "step": done,
            "loss": values.pop("loss"),
            **values,
            "lr": self.plan.lr(done - 1),
            "grad_norm": grad_norm,
            "images_per_second": round(speed, 1),
            **({"mfu": round(speed * self.flops / self.peak, 4)} if self.peak else {}),
            "data_wait": round(min(1.0, data_wait / seconds), 4),
        }
        record["loss_hex"] = record["loss"].hex()
        return record, seconds / steps


def peak_flops(recipe: Recipe, runtime: Runtime) -> float | None:
    """FLOP/s of all GPUs of the run together in 16-bit matrix products; None on the CPU, in fp32, for unknown GPUs."""
    if runtime.device.type != "cuda" or recipe.precision == "fp32":
        return None
    gpu = known_gpu(torch.cuda.get_device_name(runtime.device))
    return gpu and gpu.peak * 1e12 * runtime.world_size


def gradient_norm(module: nn.Module) -> Tensor:
    """Norm of the gradients as they are now, before clipping: where ZeRO does not compute it (stage 0)."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads).double()
