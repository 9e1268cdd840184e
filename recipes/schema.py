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
from recipes.methods import Objective
from recipes.sections.data import Data
from recipes.sections.model import Model
from recipes.sections.optim import Optim

LARGEST_SEED = 2**63 - 1  # torch and numpy keep a seed in 64 bits

Precision = Literal["fp32", "bf16", "bf16_params", "fp16"]


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
    max_bad_steps: int = 3  # in a row whose loss or gradient is no number and that are not applied; then the run ends
    on_failed_save: Literal["go_on", "stop"] = "go_on"  # go_on: try again at the next save, three times in a row
    timeout: float = 300.0  # seconds until ranks that wait for one another, or for a micro-step, give up

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
        require(self.timeout > 0, f"run.timeout={self.timeout:g}: seconds, more than 0, are needed")
        require(self.max_bad_steps >= 1, f"run.max_bad_steps={self.max_bad_steps}: at least 1 is needed")
        require(self.keep >= 1, f"run.keep={self.keep}: at least 1 checkpoint must be kept")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. `departures` are the points in which the recipe itself is not the paper's."""

    model: Model
    objective: Objective
    optim: Optim
    data: Data = field(default_factory=Data)
    zero: Zero = field(default_factory=Zero)
    teacher: str = ""  # DTM: file of CLIP's weights, folder of a run of ours, timm:NAME, or pixels
    init: str = ""  # weights to start from: a run of ours, an imported folder, or a released checkpoint; empty: random
    precision: Precision = "bf16"  # bf16: autocast over fp32 parameters; bf16_params, fp16: 16-bit parameters
    compile: Literal["auto", "off", "blocks"] = "auto"  # torch.compile of every transformer block; auto: on a GPU
    evaluation: Evaluation = field(default_factory=Evaluation)
    run: Run = field(default_factory=Run)
    departures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(
            self.model.architecture == self.objective.architecture,
            f"model.architecture={self.model.architecture}: this objective trains the architecture "
            f"{self.objective.architecture}; set it",
        )
        require(
            not self.teacher or self.objective.has_teacher,
            f"teacher={self.teacher}: this objective has no frozen teacher; leave it empty or choose a dtm recipe",
        )
        require(
            self.data.image_size % self.model.patch_size == 0,
            f"data.image_size={self.data.image_size}: not a multiple of model.patch_size={self.model.patch_size}",
        )
        self.objective.check(self.model, self.data, self.precision)
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
        return self.model.num_patches(self.data.image_size)
