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

from recipes.checks import require
from recipes.methods import ARCHITECTURE_OF, Dtm, Lut, Mae, Objective

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LARGEST_SEED = 2**63 - 1  # torch and numpy keep a seed in 64 bits

Precision = Literal["fp32", "bf16", "bf16_params", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The encoder: a Vision Transformer under timm's names, of one of two architectures.

    vit: fixed sine-cosine positions (MAE, LUT). beit: positions relative, by one table per block and one that all
    blocks share, added up, and a learned scale of every branch (DTM).
    """

    architecture: Literal["vit", "beit"] = "vit"
    embed_dim: int  # channels of a token
    depth: int  # transformer blocks
    num_heads: int
    patch_size: int = 16  # pixels
    mlp_ratio: float = 4.0
    drop_path: float = 0.0  # stochastic depth of the last block; grows linearly from 0
    init_values: float | None = None  # beit: what the scale of a branch begins with; none: branches are not scaled

    def __post_init__(self) -> None:
        for name in ("embed_dim", "depth", "num_heads", "patch_size"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name}={value}: at least 1 is needed")
        require(
            self.embed_dim % self.num_heads == 0,
            f"model.num_heads={self.num_heads}: does not divide model.embed_dim={self.embed_dim}; "
            "choose a number of heads that divides the width",
        )
        require(
            self.embed_dim % 4 == 0,
            f"model.embed_dim={self.embed_dim}: the 2-D sin-cos position table needs a multiple of 4",
        )
        require(self.mlp_ratio > 0, f"model.mlp_ratio={self.mlp_ratio}: must be positive")
        require(0 <= self.drop_path < 1, f"model.drop_path={self.drop_path}: a probability in [0, 1) is needed")
        require(
            self.init_values is None or (self.architecture == "beit" and self.init_values > 0),
            f"model.init_values={self.init_values}: must be positive (or none); only model.architecture=beit has it",
        )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the shards are and what is done to an image before the model sees it."""

    train: str = ""  # folder of training shards; empty: $MASKWRIGHT_DATA/train, then data/imagenet/train
    val: str = ""  # folder of validation shards; empty: the folder `val` beside data.train, if there is one
    image_size: int = 224  # pixels, both sides
    crop: Literal["rrc", "src"] = "rrc"  # random resized crop (MAE, DTM), or simple resized crop (LUT)
    scale: tuple[float, float] = (0.2, 1.0)  # rrc: share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # rrc: width / height
    crop_padding: int = 4  # src: pixels reflected at each side of the resized image
    hflip: float = 0.5  # probability of a horizontal flip
    # Colour jitter of the view pretrain_dtm and of pretrain_lut's second image; strength 0 leaves an operation out.
    brightness: float = 0.0  # factor in 1 - b ... 1 + b; LUT and DTM: 0.4
    contrast: float = 0.0  # likewise, about the mean gray; LUT and DTM: 0.4
    saturation: float = 0.0  # likewise, about the pixel's gray; LUT: 0.2, DTM: 0.4
    hue: float = 0.0  # shift in -h ... h turns of the colour circle, at most 1/6; LUT: 0.1
    jitter_prob: float = 1.0  # share of the images that are jittered; LUT: 0.8, DTM: 1
    # The second image of pretrain_lut then becomes gray, solarized or blurred, a third each.
    solarize_threshold: int = 128  # levels of 255: values from here on are inverted
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels, uniform
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of pixels in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD
    eval_crop: float = 0.875  # evaluation: image_size / shorter side before the centre crop
    block_size: int = 1  # samples of one shard read in a row; 16 suits slow disks (shuffles nearly as well)
    threads: int = 0  # decoding threads per rank; 0: the node's cores shared by its ranks
    prefetch: int = 2  # batches prepared ahead
    hw_decoder_load: float = 0.9  # share of JPEGs for the GPU's hardware decoder, where it has one

    def __post_init__(self) -> None:
        require(self.image_size >= 1, f"data.image_size={self.image_size}: at least 1 pixel is needed")
        low, high = self.scale
        require(0 < low <= high <= 1, f"data.scale={self.scale}: 0 < low <= high <= 1 is needed")
        low, high = self.ratio
        require(0 < low <= high, f"data.ratio={self.ratio}: 0 < low <= high is needed")
        require(
            0 <= self.crop_padding < self.image_size,
            f"data.crop_padding={self.crop_padding}: 0 to data.image_size - 1 = {self.image_size - 1} pixels can be "
            "reflected",
        )
        for name in ("hflip", "jitter_prob"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.{name}={value}: a probability in [0, 1] is needed")
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.{name}={value}: a strength in [0, 1] is needed (0: off)")
        require(0 <= self.hue <= 1 / 6, f"data.hue={self.hue}: a share of the circle in [0, 1/6] is needed (0: off)")
        require(
            0 <= self.solarize_threshold <= 255,
            f"data.solarize_threshold={self.solarize_threshold}: a level in 0 ... 255 is needed",
        )
        low, high = self.blur_sigma
        require(0 < low <= high, f"data.blur_sigma={self.blur_sigma}: 0 < low <= high pixels is needed")
        require(0 < self.eval_crop <= 1, f"data.eval_crop={self.eval_crop}: a share in (0, 1] is needed")
        require(self.block_size >= 1, f"data.block_size={self.block_size}: at least 1 is needed")
        require(self.threads >= 0, f"data.threads={self.threads}: 0 (all cores) or a number of threads is needed")
        require(self.prefetch >= 1, f"data.prefetch={self.prefetch}: at least 1 is needed")
        require(
            0 <= self.hw_decoder_load <= 1,
            f"data.hw_decoder_load={self.hw_decoder_load}: a share in [0, 1] is needed",
        )
        require(min(self.std) > 0, f"data.std={self.std}: positive numbers are needed")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with warm-up and cosine decay; batch sizes are counted in images."""

    global_batch: int  # images per optimizer step, over all ranks and micro-steps
    micro_batch: int  # images per rank in one forward pass; accumulation follows
    blr: float = 1.5e-4  # base learning rate, before the rule
    # linear: blr x global_batch / 256; sqrt: blr x sqrt(global_batch) / 4; sqrt_2048: blr x sqrt(global_batch / 2048)
    lr_rule: Literal["linear", "sqrt", "sqrt_2048"] = "linear"
    lr: float | None = None  # peak learning rate; none: from blr by the rule
    min_lr: float = 0.0
    warmup_epochs: float = 40.0  # a share of run.epochs; shrinks with run.steps
    warmup_end: Literal["after", "within"] = "after"  # peak: first step after the warm-up (MAE), or its last too (BEiT)
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
        for name in ("min_lr", "warmup_epochs", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0, f"optim.{name}={value}: must not be negative")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas={self.betas}: two numbers in [0, 1) are needed",
        )
        require(self.eps > 0, f"optim.eps={self.eps}: must be positive")
        require(self.clip_grad >= 0, f"optim.clip_grad={self.clip_grad}: must be 0 (off) or positive")

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up: `lr` where it is given, else `blr` by `lr_rule`.

        linear: MAE; sqrt: LUT; sqrt_2048: DTM (docs/methods.md).
        """
        if self.lr is not None:
            return self.lr
        batch = self.global_batch
        factors = {"linear": batch / 256, "sqrt": batch**0.5 / 4, "sqrt_2048": (batch / 2048) ** 0.5}
        return self.blr * factors[self.lr_rule]


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


@dataclass(frozen=True, kw_only=True)
class Zero:
    """DeepSpeed's ZeRO: what is divided among the ranks."""

    stage: Literal[0, 1, 2, 3] = 1  # 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters
    param_persistence_threshold: int = 100_000  # stage 3: smaller parameters stay whole on every rank (elements)

    def __post_init__(self) -> None:
        require(
            self.param_persistence_threshold >= 0,
            f"zero.param_persistence_threshold={self.param_persistence_threshold}: 0 or more elements are needed",
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured while training; k-NN as in DINO (Caron et al., 2021)."""

    knn_k: int = 20
    knn_temperature: float = 0.07
    knn_train_samples: int = 50_000  # at most so many training images are remembered, spread evenly
    knn_val_samples: int = 50_000
    batch: int = 128  # images per rank and forward pass

    def __post_init__(self) -> None:
        for name in ("knn_k", "knn_train_samples", "knn_val_samples", "batch"):
            value = getattr(self, name)
            require(value >= 1, f"evaluation.{name}={value}: at least 1 is needed")
        require(
            self.knn_temperature > 0,
            f"evaluation.knn_temperature={self.knn_temperature}: must be positive",
        )


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
        require(
            0 <= self.seed <= LARGEST_SEED,
            f"run.seed={self.seed}: a whole number in 0 ... {LARGEST_SEED} is needed",
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
    teacher: str = ""  # DTM: file of weights, folder of a run of ours, or timm:NAME
    precision: Precision = "bf16"  # bf16: autocast over fp32 parameters; bf16_params, fp16: 16-bit parameters
    evaluation: Evaluation = field(default_factory=Evaluation)
    run: Run = field(default_factory=Run)
    departures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        needed = ARCHITECTURE_OF.get(type(self.objective), self.model.architecture)
        require(
            self.model.architecture == needed,
            f"model.architecture={self.model.architecture}: this objective trains the architecture {needed}; set it",
        )
        require(
            not self.teacher or isinstance(self.objective, Dtm),
            f"teacher={self.teacher}: this objective has no frozen teacher; leave it empty or choose a dtm recipe",
        )
        require(
            not isinstance(self.objective, Dtm) or self.objective.num_masked <= self.num_patches,
            f"objective.num_masked={getattr(self.objective, 'num_masked', 0)}: an image has {self.num_patches} patches "
            "(data.image_size / model.patch_size, squared); choose fewer",
        )
        require(
            self.data.image_size % self.model.patch_size == 0,
            f"data.image_size={self.data.image_size}: not a multiple of model.patch_size={self.model.patch_size}",
        )
        require(
            not isinstance(self.objective, Mae) or int(self.num_patches * (1 - self.objective.mask_ratio)) >= 1,
            f"objective.mask_ratio={getattr(self.objective, 'mask_ratio', 0)}: leaves none of {self.num_patches} "
            "patches; choose a smaller share",
        )
        require(
            not isinstance(self.objective, Lut) or self.precision in ("fp32", "bf16"),
            f"precision={self.precision}: a moving average of 16-bit weights loses part of every step; "
            "set precision=bf16 (autocast over fp32 weights) or fp32",
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
