"""How fast a recipe should run on a number of GPUs, how long it takes, and what it asks of network and disks.

A model, not a measurement: every assumption is a constant here and is printed with the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from recipes.checks import require
from recipes.costs.gpus import GPUS, GPUS_PER_NODE, Gpu
from recipes.costs.memory import WEIGHT_BYTES, Memory, checkpoint_bytes, memory_of
from recipes.costs.training import Training, knows_teacher, training_cost
from recipes.schema import Recipe
from recipes.sections.optim import largest_divisor

IMAGENET_IMAGES = 1_281_167
IMAGE_BYTES = 110e3  # of an ImageNet JPEG with its tar headers
HIDDEN = 0.9  # share of the backward pass behind which gradients can travel
BACKWARD = 2 / 3  # of the student's time
LAUNCH_BOUND = 32  # images of a micro-batch


# Share of the attainable rate that a step without communication reaches, by width: planned for compiled blocks and
# fused attention, not measured (docs/performance.md).
WIDTHS = (384, 768, 1024)
SHARES = {"autoencoder": (0.33, 0.45, 0.52), "morphing": (0.36, 0.46, 0.53)}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one recipe on one number of GPUs."""

    recipe: Recipe  # with the micro-batch that these GPUs take
    gpu: Gpu
    gpus: int
    images: int
    cost: Training
    memory: Memory
    share: float  # of the attainable rate
    message: float  # bytes that each GPU sends and receives in a step
    slowest: float  # images/s where nothing of the communication is hidden
    fastest: float  # images/s where it is hidden behind the backward pass

    @property
    def accumulation(self) -> int:
        return self.recipe.optim.global_batch // (self.recipe.optim.micro_batch * self.gpus)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: share of the vendor's peak, at the faster rate."""
        return self.fastest * self.cost.flops / (self.gpus * self.gpu.peak * 1e12)

    @property
    def hours(self) -> tuple[float, float]:
        """Of the whole run, at the faster and at the slower rate; evaluations and saves come on top."""
        run, batch = self.recipe.run, self.recipe.optim.global_batch
        images = batch * run.steps if run.steps else batch * round(run.epochs * (self.images // batch))
        return images / self.fastest / 3600, images / self.slowest / 3600

    @property
    def fits(self) -> bool:
        return self.memory.total < 0.9 * self.gpu.memory * 1e9

    @property
    def read_rate(self) -> float:
        """Bytes per second that the storage must deliver to each node."""
        return self.fastest * IMAGE_BYTES / -(-self.gpus // GPUS_PER_NODE)

    @property
    def shard_bytes(self) -> float:
        return self.images * IMAGE_BYTES

    @property
    def checkpoint_bytes(self) -> float:
        """Of one checkpoint."""
        return checkpoint_bytes(self.recipe)


def predict(recipe: Recipe, *, gpus: int, gpu: str = "h200", images: int = IMAGENET_IMAGES) -> Prediction:
    """ValueError where so many GPUs cannot share the global batch, or the set is smaller than one."""
    require(gpu in GPUS, f"--gpu {gpu}: not known; choose one of {', '.join(GPUS)}")
    require(gpus >= 1, f"--gpus {gpus}: at least 1 is needed")
    batch = recipe.optim.global_batch
    require(
        batch % gpus == 0,
        f"--gpus {gpus}: optim.global_batch={batch} cannot be shared equally; choose a divisor, "
        f"for example {largest_divisor(batch, gpus)}",
    )
    require(images >= batch, f"--images {images}: fewer than optim.global_batch={batch}; an epoch would have no step")
    micro = largest_divisor(batch // gpus, recipe.optim.micro_batch)
    recipe = replace(recipe, optim=replace(recipe.optim, micro_batch=micro))
    cost, card = training_cost(recipe), GPUS[gpu]
    share, message = planned_share(recipe), message_bytes(recipe, cost, gpus)
    slowest, fastest = rates(cost, card, gpus, batch, share, message)
    return Prediction(
        recipe=recipe,
        gpu=card,
        gpus=gpus,
        images=images,
        cost=cost,
        memory=memory_of(recipe, gpus=gpus),
        share=share,
        message=message,
        slowest=slowest,
        fastest=fastest,
    )


def planned_share(recipe: Recipe) -> float:
    """Of the attainable rate; between the known widths linearly."""
    return interpolate(recipe.model.embed_dim, SHARES["morphing" if recipe.objective.has_teacher else "autoencoder"])


def interpolate(width: int, shares: Sequence[float]) -> float:
    points = list(zip(WIDTHS, shares, strict=True))
    for (low, a), (high, b) in zip(points, points[1:], strict=False):
        if width <= high:
            return a + (b - a) * max(0, width - low) / (high - low)
    return shares[-1]


def message_bytes(recipe: Recipe, cost: Training, gpus: int) -> float:
    """What a GPU sends in a step, in a ring: gradients are reduced and weights gathered.

    Stages 2 and 3 reduce after every micro-batch, and stage 3 gathers the weights for each forward and backward pass.
    """
    stage, around = recipe.zero.stage, (gpus - 1) / gpus
    micro_steps = recipe.optim.global_batch // (recipe.optim.micro_batch * gpus)
    reductions = micro_steps if stage >= 2 else 1
    gathers = 2 * micro_steps if stage == 3 else 1
    return (reductions + gathers) * WEIGHT_BYTES[recipe.precision] * cost.trained * around


def rates(cost: Training, card: Gpu, gpus: int, batch: int, share: float, message: float) -> tuple[float, float]:
    """Images per second of all GPUs, with all of the communication on top of the computation, and as hidden."""
    computing = batch / gpus * cost.flops / (share * card.attainable * 1e12)
    sending = message / (1e9 * (card.inside_node if gpus <= GPUS_PER_NODE else card.between_nodes))
    trained = (cost.student.flops + cost.student.backward) / cost.flops
    hidden = HIDDEN * BACKWARD * trained * computing
    return batch / (computing + sending), batch / (computing + max(0.0, sending - hidden))


def assumptions(prediction: Prediction) -> list[str]:
    """What the numbers stand on, in words."""
    gpu, recipe = prediction.gpu, prediction.recipe
    lines = [
        f"{gpu.title}: {gpu.attainable:,.0f} of {gpu.peak:,.0f} TFLOP/s attainable ({gpu.source}), of which a step "
        f"without communication reaches {prediction.share:.0%} (planned, not measured)",
        f"a flat ring: {gpu.inside_node:g} GB/s per GPU in a node of {GPUS_PER_NODE}, {gpu.between_nodes:g} GB/s "
        "between nodes; the slower rate hides nothing, the faster "
        f"hides it behind {HIDDEN:.0%} of the backward pass",
        f"{prediction.images:,} images of {IMAGE_BYTES / 1e3:.0f} kB; data always in time",
        "memory: fused attention, blocks not compiled (compiled ones keep less); without NCCL, DALI, fragmentation",
    ]
    if recipe.optim.micro_batch < LAUNCH_BOUND:
        lines.append(
            f"a micro-batch of {recipe.optim.micro_batch}: below about {LAUNCH_BOUND} images a GPU waits for what the "
            "host launches, which is not in this model: it will be slower"
        )
    if recipe.objective.has_teacher and not knows_teacher(recipe):
        lines.append(f"teacher={recipe.teacher}: its cost is not known and counts nothing")
    return lines
