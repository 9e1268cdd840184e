"""Memory of one GPU in training, and the size of a checkpoint, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.costs.layers import CHANNELS, Cost
from recipes.costs.training import Training, training_cost
from recipes.schema import Recipe

WEIGHT_BYTES = {"fp32": 4, "bf16": 4, "bf16_params": 2, "fp16": 2}  # of a parameter as the forward pass holds it
PRODUCT_BYTES = {"fp32": 4, "bf16": 2, "bf16_params": 2, "fp16": 2}  # of a number in matrix products
MOMENTS = 8  # AdamW's two, in fp32
MASTER = 4  # the fp32 weights that ZeRO's optimizers step
BUCKET = 500_000_000  # numbers that DeepSpeed gathers before it reduces gradients: its default


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU while a micro-batch goes backward, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    bucket: float  # gradients on their way to other ranks
    frozen: float  # moving average, teacher
    copies: float  # 16-bit copies of fp32 weights that autocast keeps for the backward pass
    activations: float  # kept for the backward pass
    images: float

    @property
    def states(self) -> float:
        """What is there between steps, gradients included."""
        return self.weights + self.gradients + self.optimizer + self.frozen

    @property
    def total(self) -> float:
        return self.states + self.bucket + self.copies + self.activations + self.images


def memory_of(recipe: Recipe, *, gpus: int) -> Memory:
    """Of the recipe on so many GPUs. Fragmentation, cuDNN's, NCCL's and DALI's buffers come on top.

    Stage 3 keeps small parameters whole (zero.param_persistence_threshold) and gathers a few layers at a time: neither
    is counted.
    """
    cost, stage = training_cost(recipe), recipe.zero.stage
    weight, micro = WEIGHT_BYTES[recipe.precision], recipe.optim.micro_batch
    optimizer = MOMENTS + (MASTER if stage else 0)
    return Memory(
        weights=cost.trained * weight / (gpus if stage == 3 else 1),
        gradients=cost.trained * weight / (gpus if stage >= 2 else 1),
        optimizer=cost.trained * optimizer / (gpus if stage else 1),
        bucket=BUCKET * weight if stage else 0,
        frozen=frozen_bytes(recipe, cost),
        copies=2 * cost.student.matrices if recipe.precision == "bf16" else 0,
        activations=micro * kept_bytes(recipe, cost.student),
        images=4.0 * micro * recipe.objective.num_views * CHANNELS * recipe.data.image_size**2,
    )


def frozen_bytes(recipe: Recipe, cost: Training) -> float:
    """The moving average is fp32, a teacher is in the precision of matrix products."""
    return 4 * cost.average.parameters + PRODUCT_BYTES[recipe.precision] * cost.teacher.parameters


def kept_bytes(recipe: Recipe, student: Cost) -> float:
    """What the backward pass of one image needs."""
    wide = 2 if WEIGHT_BYTES[recipe.precision] == 2 else 4
    return wide * student.wide + PRODUCT_BYTES[recipe.precision] * student.narrow


def checkpoint_bytes(recipe: Recipe) -> float:
    """DeepSpeed's state on all ranks together, the weights once more in fp32 for others to load, the moving average."""
    cost, weight = training_cost(recipe), WEIGHT_BYTES[recipe.precision]
    states = MOMENTS + (MASTER if recipe.zero.stage else 0)
    return cost.trained * (weight + states + 4) + 4 * cost.average.parameters
