"""The DeepSpeed configuration, derived from the recipe by one pure function; there is no JSON beside it."""

from __future__ import annotations

from recipes.schema import Recipe, largest_divisor

NEVER = 10**9  # steps; DeepSpeed's own prints are replaced by our console


def accumulation(recipe: Recipe, world_size: int) -> int:
    """Micro-steps per optimizer step; ValueError with a divisor that fits where they do not come out even."""
    global_batch, micro_batch = recipe.optim.global_batch, recipe.optim.micro_batch
    if global_batch % world_size:
        raise ValueError(
            f"optim.global_batch={global_batch}: cannot be shared equally by {world_size} ranks; "
            f"choose a multiple of {world_size}"
        )
    if global_batch % (micro_batch * world_size):
        fitting = largest_divisor(global_batch // world_size, micro_batch)
        raise ValueError(
            f"optim.micro_batch={micro_batch}: {micro_batch} x {world_size} ranks does not divide "
            f"optim.global_batch={global_batch}; set optim.micro_batch={fitting}"
        )
    return global_batch // (micro_batch * world_size)


def deepspeed_config(recipe: Recipe, world_size: int) -> dict:
    """Batch sizes, clipping, ZeRO and precision; everything else is ours."""
    zero = {"stage": recipe.zero.stage}
    if recipe.zero.stage == 3:
        zero["stage3_param_persistence_threshold"] = recipe.zero.param_persistence_threshold
    return {
        "train_batch_size": recipe.optim.global_batch,
        "train_micro_batch_size_per_gpu": recipe.optim.micro_batch,
        "gradient_accumulation_steps": accumulation(recipe, world_size),
        "gradient_clipping": recipe.optim.clip_grad,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW: exact at every stage (specs: engine, 2)
        "steps_per_print": NEVER,
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
