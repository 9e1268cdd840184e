"""Every knob of a run, with its unit, its meaning and where its default comes from.

A recipe is one frozen `Recipe`: what is trained (`model`, `objective`), on what (`data`), how (`optim`, `zero`,
`precision`), for how long and where to (`run`), and how it is watched (`evaluation`). Nothing here imports anything
but the standard library, so that listing and printing recipes is immediate.

Errors: an impossible combination raises ValueError when the recipe is made, naming the field, both numbers and
what to do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Precision = Literal["fp32", "bf16", "bf16_params", "fp16"]


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The encoder: a plain Vision Transformer under timm's names."""

    embed_dim: int  # channels of a token
    depth: int  # transformer blocks
    num_heads: int
    patch_size: int = 16  # pixels
    mlp_ratio: float = 4.0
    drop_path: float = 0.0  # stochastic depth of the last block; grows linearly from 0

    def __post_init__(self) -> None:
        require(
            self.embed_dim % self.num_heads == 0,
            f"model.num_heads={self.num_heads}: does not divide model.embed_dim={self.embed_dim}; "
            "choose a number of heads that divides the width",
        )
        require(
            self.embed_dim % 4 == 0,
            f"model.embed_dim={self.embed_dim}: the 2-D sin-cos position table needs a multiple of 4",
        )
        require(0 <= self.drop_path < 1, f"model.drop_path={self.drop_path}: a probability in [0, 1) is needed")


@dataclass(frozen=True, kw_only=True)
class Mae:
    """Masked autoencoder (He et al., 2021, arXiv 2111.06377): predict the pixels of the masked patches."""

    mask_ratio: float = 0.75  # share of patches hidden from the encoder (section 4.1)
    norm_pix_loss: bool = True  # targets normalised per patch (Table 1d)
    decoder_embed_dim: int = 512  # Table 1b
    decoder_depth: int = 8  # Table 1a
    decoder_num_heads: int = 16

    def __post_init__(self) -> None:
        require(
            0 < self.mask_ratio < 1,
            f"objective.mask_ratio={self.mask_ratio}: a share strictly between 0 and 1 is needed",
        )
        require(
            self.decoder_embed_dim % self.decoder_num_heads == 0 and self.decoder_embed_dim % 4 == 0,
            f"objective.decoder_embed_dim={self.decoder_embed_dim}: must be divisible by 4 and by "
            f"objective.decoder_num_heads={self.decoder_num_heads}",
        )


Objective = Mae


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the shards are and what is done to an image before the model sees it."""

    train: str = ""  # folder of training shards; empty: $MASKWRIGHT_DATA/train, then data/imagenet/train
    val: str = ""  # folder of validation shards; empty: the folder `val` beside data.train, if there is one
    image_size: int = 224  # pixels, both sides
    scale: tuple[float, float] = (0.2, 1.0)  # random resized crop: share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # random resized crop: width / height
    hflip: float = 0.5  # probability of a horizontal flip
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of pixels in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD
    eval_crop: float = 0.875  # evaluation: image_size / shorter side before the centre crop
    block_size: int = 1  # samples of one shard read in a row; 16 suits slow disks (shuffles nearly as well)
    threads: int = 0  # decoding threads per rank; 0: the node's cores shared by its ranks
    prefetch: int = 2  # batches prepared ahead
    hw_decoder_load: float = 0.9  # share of JPEGs for the GPU's hardware decoder, where it has one

    def __post_init__(self) -> None:
        low, high = self.scale
        require(0 < low <= high <= 1, f"data.scale={self.scale}: 0 < low <= high <= 1 is needed")
        low, high = self.ratio
        require(0 < low <= high, f"data.ratio={self.ratio}: 0 < low <= high is needed")
        require(0 <= self.hflip <= 1, f"data.hflip={self.hflip}: a probability in [0, 1] is needed")
        require(0 < self.eval_crop <= 1, f"data.eval_crop={self.eval_crop}: a share in (0, 1] is needed")
        require(self.block_size >= 1, f"data.block_size={self.block_size}: at least 1 is needed")
        require(self.prefetch >= 1, f"data.prefetch={self.prefetch}: at least 1 is needed")
        require(min(self.std) > 0, f"data.std={self.std}: positive numbers are needed")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with warm-up and cosine decay; batch sizes are counted in images."""

    global_batch: int  # images per optimizer step, over all ranks and micro-steps
    micro_batch: int  # images per rank in one forward pass; accumulation follows
    blr: float = 1.5e-4  # base learning rate, before the rule
    lr_rule: Literal["linear", "sqrt"] = (
        "linear"  # linear: blr x global_batch / 256; sqrt: blr x sqrt(global_batch) / 4
    )
    lr: float | None = None  # peak learning rate; none: from blr by the rule
    min_lr: float = 0.0
    warmup_epochs: float = 40.0  # a share of run.epochs; shrinks with run.steps
    weight_decay: float = 0.05  # none on vectors and biases
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_grad: float = 0.0  # global gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        require(
            self.global_batch >= 1 and self.micro_batch >= 1,
            f"optim.global_batch={self.global_batch}, optim.micro_batch={self.micro_batch}: both must be at least 1",
        )
        require(
            self.global_batch % self.micro_batch == 0,
            f"optim.micro_batch={self.micro_batch}: does not divide optim.global_batch={self.global_batch}; "
            f"choose a divisor, for example {largest_divisor(self.global_batch, self.micro_batch)}",
        )
        require(self.lr is None or self.lr > 0, f"optim.lr={self.lr}: must be positive (or none)")
        require(self.blr > 0, f"optim.blr={self.blr}: must be positive")
        require(self.clip_grad >= 0, f"optim.clip_grad={self.clip_grad}: must be 0 (off) or positive")

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up: `lr` where it is given, else `blr` by `lr_rule` (LUT's spec, section 1.8)."""
        if self.lr is not None:
            return self.lr
        if self.lr_rule == "linear":
            return self.blr * self.global_batch / 256
        return self.blr * self.global_batch**0.5 / 4


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


@dataclass(frozen=True, kw_only=True)
class Zero:
    """DeepSpeed's ZeRO: what is divided among the ranks."""

    stage: Literal[0, 1, 2, 3] = 1  # 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters
    param_persistence_threshold: int = 100_000  # stage 3: smaller parameters stay whole on every rank (elements)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured while training; k-NN as in DINO (Caron et al., 2021)."""

    knn_k: int = 20
    knn_temperature: float = 0.07
    knn_train_samples: int = 50_000  # at most so many training images are remembered, spread evenly
    knn_val_samples: int = 50_000
    batch: int = 128  # images per rank and forward pass


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long, from which seed, and where the results go. All periods are in optimizer steps."""

    out: str = ""  # run folder; empty: runs/<recipe>
    epochs: float = 1600.0
    steps: int | None = None  # optimizer steps in all; none: run.epochs passes over the data
    stop_after: int | None = None  # save and stop after this step, the schedule unchanged (to go on with --resume)
    seed: int = 0
    log_every: int = 20
    save_every: int = 1000  # 0: only at the end
    eval_every: int = 0  # k-NN; 0: only at the end
    keep: int = 2  # complete checkpoints kept

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps >= 1, f"run.steps={self.steps}: at least 1 is needed (or none)")
        require(self.epochs > 0, f"run.epochs={self.epochs}: must be positive")
        require(
            self.stop_after is None or self.stop_after >= 1,
            f"run.stop_after={self.stop_after}: at least 1 is needed (or none)",
        )
        require(self.log_every >= 1, f"run.log_every={self.log_every}: at least 1 is needed")
        require(
            self.save_every >= 0 and self.eval_every >= 0,
            f"run.save_every={self.save_every}, run.eval_every={self.eval_every}: 0 (only at the end) or a period",
        )
        require(self.keep >= 1, f"run.keep={self.keep}: at least 1 checkpoint must be kept")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. `departures` are the points in which the recipe itself is not the paper's."""

    model: Model
    objective: Objective
    optim: Optim
    data: Data = field(default_factory=Data)
    zero: Zero = field(default_factory=Zero)
    precision: Precision = "bf16"  # bf16: autocast over fp32 parameters; bf16_params, fp16: 16-bit parameters
    evaluation: Evaluation = field(default_factory=Evaluation)
    run: Run = field(default_factory=Run)
    departures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(
            self.data.image_size % self.model.patch_size == 0,
            f"data.image_size={self.data.image_size}: not a multiple of model.patch_size={self.model.patch_size}",
        )
        require(
            self.optim.warmup_epochs <= self.run.epochs,
            f"optim.warmup_epochs={self.optim.warmup_epochs:g}: longer than run.epochs={self.run.epochs:g}",
        )
        require(
            self.precision == "fp32" or self.zero.stage > 0,
            f"zero.stage=0: precision={self.precision} needs stage 1 to 3 (at stage 0 DeepSpeed's 16-bit optimizer "
            "is ten times less exact); set zero.stage=1 or precision=fp32",
        )

    @property
    def num_patches(self) -> int:
        """Patches N of one image."""
        return (self.data.image_size // self.model.patch_size) ** 2
