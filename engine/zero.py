"""DeepSpeed around an objective; its configuration is derived from the recipe by one pure function, without JSON."""

from __future__ import annotations

import torch
from torch import nn

from engine.compiling import compile_blocks
from engine.params import parameter_groups
from engine.runtime import import_deepspeed
from recipes.schema import Optim, Recipe
from shards.draws.order import num_micro_steps

NEVER = 10**9  # steps; DeepSpeed's own prints are replaced by our console


def wrap(objective: nn.Module, recipe: Recipe, world_size: int, *, load_universal: bool) -> tuple:
    """DeepSpeed's engine around `objective` and its optimizer: AdamW with our groups. Collective.

    Blocks are compiled as recipe.compile says.
    """
    optimizer = fused_adamw(parameter_groups(objective, recipe.optim.weight_decay, objective.no_decay), recipe.optim)
    model_engine, optimizer, *_ = import_deepspeed().initialize(
        model=objective,
        optimizer=optimizer,
        config=deepspeed_config(recipe, world_size, load_universal=load_universal),
        dist_init_required=False,
    )
    compile_blocks(objective, recipe)
    return model_engine, optimizer


def fused_adamw(groups: list[dict], optim: Optim) -> torch.optim.AdamW:
    """AdamW in one launch per group of tensors; ZeRO calls it with its own flat partitions."""
    return torch.optim.AdamW(groups, lr=optim.peak_lr, betas=optim.betas, eps=optim.eps, fused=True)


def deepspeed_config(recipe: Recipe, world_size: int, *, load_universal: bool = False) -> dict:
    """Batch sizes, clipping, ZeRO and precision; everything else is ours.

    `load_universal`: this engine will load a checkpoint of another number of ranks, in DeepSpeed's universal form.
    """
    zero = {"stage": recipe.zero.stage}
    if recipe.zero.stage == 3:
        zero["stage3_param_persistence_threshold"] = recipe.zero.param_persistence_threshold
    optim = recipe.optim
    return {
        "train_batch_size": optim.global_batch,
        "train_micro_batch_size_per_gpu": optim.micro_batch,
        "gradient_accumulation_steps": num_micro_steps(optim.global_batch, optim.micro_batch, world_size),
        "gradient_clipping": optim.clip_grad,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW: exact at every stage
        "steps_per_print": NEVER,
        **({"checkpoint": {"load_universal": True}} if load_universal else {}),
        **PRECISIONS[recipe.precision],
    }


# bf16: parameters stay fp32, matrix products run in bf16, gradients travel in fp32. The others hold 16-bit parameters
# with fp32 masters inside DeepSpeed's optimizer.
PRECISIONS: dict[str, dict] = {
    "fp32": {},
    "bf16": {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}},
    "bf16_params": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 12}},
}
