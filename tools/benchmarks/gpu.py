"""Pre-training on a GPU by the real trainer: speed, stall, memory, time by part, and without each optimisation.

Every training runs once; a rate is the median of what it logged after its first third.

What stands on the other side of a row: of rates the target of this project, of the stall its limit, of memory what
`tools/recipe.py plan` predicts, of a part the whole step, of an optimisation the same run without it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from recipes import registry
from recipes.costs.gpus import GPUS, Gpu, known_gpu
from recipes.costs.memory import memory_of
from recipes.costs.training import training_cost
from recipes.overrides import apply_overrides
from recipes.schema import Recipe
from tools.benchmarks.side_by_side import Row, Settings, smaller
from tools.benchmarks.stopwatch import Stopwatch

if TYPE_CHECKING:
    from engine.runtime import Runtime
    from engine.train import Trainer

# Share of what a large matrix product attains (gpus.py; 790 TFLOP/s on an H200), in percent: what we mean to reach.
TARGETS = {"vit_s_lut": 33, "vit_b_lut": 45, "vit_l_lut": 52, "vit_s_dtm": 36, "vit_b_dtm": 46, "vit_l_dtm": 53}
REHEARSED = ("vit_ti_lut_demo", "vit_ti_dtm_demo")
STALL, NO_STALL = 3.0, 0.01  # percent of a step that may be spent on data, and what counts as none
BATCHES, BATCH = (64, 128, 256, 512), 128  # images; the one with which everything but speed is measured
STEPS, WARM_UP, LOG_EVERY = 60, 20, 5
PICTURES, LEAST_BYTES = 10_000, 100_000
PER_JOB = 250  # pictures
NOISE = 30.0  # levels: makes them compress to more than LEAST_BYTES

Prepare = Callable[["Trainer"], None]


@dataclass(frozen=True)
class Without:
    """How to do without an optimisation: by overrides, by changing the trainer, or around the whole run."""

    name: str
    overrides: tuple[str, ...] = ()
    prepare: Prepare = lambda trainer: None
    around: Callable[[], object] | None = None  # makes a context
    method: str = ""  # the only one that has it
    from_dali: bool = False  # it is the data's


def suite(settings: Settings) -> Iterator[Row]:
    """Rows of every recipe; ValueError where there is no GPU and none was to be rehearsed."""
    import torch

    from engine.runtime import start, stop

    if not (torch.cuda.is_available() or settings.rehearse):
        raise ValueError("suite=gpu: no GPU to be seen; tools/doctor.py says why, --rehearse tries it without")
    recipes = settings.recipes or (REHEARSED if settings.rehearse else tuple(TARGETS))
    for name in recipes:
        registry.load(name)  # an unknown one is told before the pictures are made
    runtime = start(timeout=600)
    try:
        with tempfile.TemporaryDirectory(prefix="maskwright-gpu-") as folder:
            bench = Bench(Path(folder), settings, runtime)
            for name in recipes:
                yield from bench.rows(name)
    finally:
        stop()


class Bench:
    """Trainings on one set of pictures."""

    def __init__(self, folder: Path, settings: Settings, runtime: Runtime) -> None:
        self.folder, self.settings, self.runtime, self.runs = folder, settings, runtime, 0
        self.on_gpu = runtime.device.type == "cuda"
        make_shards(folder, settings)

    def rows(self, name: str) -> Iterator[Row]:
        """Speeds by batch, then everything else at one batch."""
        batches = (8,) if self.settings.rehearse else BATCHES
        at = 8 if self.settings.rehearse else BATCH
        speeds = {}
        for batch in batches:
            watch = Stopwatch(self.runtime.device)
            speeds[batch] = self.speed(name, batch, prepare=partial(parts, watch) if batch == at else None)
            yield from self.rate_rows(name, batch, speeds[batch])
            if batch == at:
                yield from self.memory_rows(name, batch)
                yield from part_rows(name, watch, batch / speeds[batch])
        fed = self.speed(name, at, from_dali=True)
        yield Row(name=f"{name}, batch {at}: DALI, against one batch for ever", ratio=fed / speeds[at], ours=fed,
                  theirs=speeds[at], unit="images/s")  # fmt: skip
        stall = max(NO_STALL, 100 * (1 - fed / speeds[at]))  # the two runs may be equal, or fed the faster by chance
        yield smaller(f"{name}, batch {at}: stall, against its limit", stall, STALL, "%")
        for without in withouts():
            if without.method in ("", method_of(name)):
                rate = self.speed(name, at, without=without, from_dali=without.from_dali)
                ours = fed if without.from_dali else speeds[at]
                yield Row(name=f"{name}, batch {at}: {without.name}, against none", ratio=ours / rate, ours=ours,
                          theirs=rate, unit="images/s")  # fmt: skip

    def speed(
        self,
        name: str,
        batch: int,
        *,
        from_dali: bool = False,
        without: Without = Without("nothing"),  # noqa: B008  frozen
        prepare: Prepare | None = None,
    ) -> float:
        """Images per second: the median of what was logged after the warm-up."""
        import torch

        from tools.trainings import train_here

        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.runs += 1
        with ExitStack() as around:
            if without.around:
                around.enter_context(without.around())
            lines = train_here(
                name, self.recipe(name, batch, *without.overrides), self.folder / f"run_{self.runs}", self.runtime,
                synthetic=not from_dali, prepare=prepare or without.prepare,
            )  # fmt: skip
        return median(line["images_per_second"] for line in lines if line["step"] > self.steps // 3)

    @property
    def gpu(self) -> Gpu:
        """What shares are of: this GPU, or an H200 where it is not known or there is none."""
        import torch

        known = known_gpu(torch.cuda.get_device_name(self.runtime.device)) if self.on_gpu else None
        return known or GPUS["h200"]

    @property
    def steps(self) -> int:
        return self.settings.scaled(STEPS, 3)

    def recipe(self, name: str, batch: int, *overrides: str) -> Recipe:
        """One micro-batch per step, in bf16. DTM's teacher has random weights: they cost as much."""
        common = [
            f"data.train={self.folder / 'shards'}", f"optim.global_batch={batch}", f"optim.micro_batch={batch}",
            f"run.steps={self.steps}", f"run.log_every={self.settings.scaled(LOG_EVERY)}", "run.save_every=0",
            "precision=bf16",
        ]  # fmt: skip
        plain = registry.load(name)
        if plain.objective.has_teacher and not plain.teacher:
            common.append(f"teacher={self.teacher()}")
        return apply_overrides(plain, [*common, *overrides])

    def teacher(self) -> str:
        """A file like OpenAI's; tiny models have no CLIP of their grid and learn from pixels."""
        if self.settings.rehearse:
            return "pixels"
        place = self.folder / "teacher.safetensors"
        if not place.exists():
            from safetensors.torch import save_file

            from engine.teachers import clip_network

            save_file({key: value.contiguous() for key, value in clip_network(224).state_dict().items()}, place)
        return str(place)

    def rate_rows(self, name: str, batch: int, rate: float) -> Iterator[Row]:
        """Images per second, and as shares of what the GPU attains and of its peak."""
        flops, gpu, target = training_cost(self.recipe(name, batch)).flops, self.gpu, TARGETS.get(name, 100)
        wanted = target / 100 * gpu.attainable * 1e12 / flops
        where = f"{name}, batch {batch}"
        yield Row(name=f"{where}: speed, against the target", ratio=rate / wanted, ours=rate, theirs=wanted,
                  unit="images/s")  # fmt: skip
        for limit in (gpu.attainable, gpu.peak):
            share, asked = 100 * rate * flops / (limit * 1e12), 100 * wanted * flops / (limit * 1e12)
            yield Row(name=f"{where}: share of {limit:g} TFLOP/s", ratio=share / asked, ours=share, theirs=asked,
                      unit="%")  # fmt: skip

    def memory_rows(self, name: str, batch: int) -> Iterator[Row]:
        """Torch's part of the memory, DALI's is not in it."""
        from engine.runtime import peak_memory

        measured, planned = peak_memory(self.runtime), memory_of(self.recipe(name, batch), gpus=1).total
        yield smaller(f"{name}, batch {batch}: peak memory, against the plan", measured / 1e9, planned / 1e9, "GB")


def method_of(name: str) -> str:
    """mae, lut or dtm."""
    return type(registry.load(name).objective).__name__.lower()


# --- parts of a step ------------------------------------------------------------------------------------------------


def parts(watch: Stopwatch, trainer: Trainer) -> None:
    """Measure the parts of every step; those indented lie inside the one above."""
    objective = trainer.objective
    watch.follow(trainer.model_engine, "forward", "forward")
    for owner, method, label in (
        (objective, "targets", "  teacher"),
        (getattr(objective, "outside", {}).get("teacher"), "forward", "  teacher"),
        (objective, "compare", "  morphing and comparison"),
    ):
        if hasattr(owner, method):
            watch.follow(owner, method, label)
    watch.follow(trainer.model_engine, "backward", "backward")
    watch.follow(trainer.model_engine, "step", "optimizer")
    watch.follow(objective, "after_step", "moving average")


def part_rows(name: str, watch: Stopwatch, seconds: float) -> Iterator[Row]:
    """Milliseconds of a part beside those of the whole step; the ratio is its share."""
    for label, spent in watch.medians().items():
        yield Row(name=f"{name}: {label}, share of the step", ratio=spent / seconds, ours=1e3 * spent,
                  theirs=1e3 * seconds, unit="ms")  # fmt: skip


# --- without ... ----------------------------------------------------------------------------------------------------


def withouts() -> tuple[Without, ...]:
    """Every optimisation that can be switched off."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return (
        Without("compiled blocks", ("compile=off",)),
        Without("fused attention", around=lambda: sdpa_kernel(SDPBackend.MATH)),
        Without("fused AdamW", prepare=plain_adamw),
        Without("views in one batch", prepare=views_one_by_one, method="lut"),
        Without("morphing in fixed shapes", prepare=plain_morphing, method="dtm"),
        Without("teacher in bf16", prepare=teacher_in_fp32, method="dtm"),
        Without("hardware JPEG decoder", ("data.hw_decoder_load=0",), from_dali=True),
        Without("batches prepared ahead", ("data.prefetch=1",), from_dali=True),
    )


def plain_adamw(trainer: Trainer) -> None:
    optimizer = trainer.optimizer
    for group in getattr(optimizer, "optimizer", optimizer).param_groups:
        group["fused"] = False


def views_one_by_one(trainer: Trainer) -> None:
    encoder = trainer.objective.encoder
    trainer.objective.encode = lambda views, ids: tuple(map(encoder, views, ids))


def plain_morphing(trainer: Trainer) -> None:
    trainer.objective.fixed_shapes = False


def teacher_in_fp32(trainer: Trainer) -> None:
    import torch

    teacher = trainer.objective.outside["teacher"]
    if hasattr(teacher, "network"):  # pixels have no weights
        teacher.network, teacher.dtype = teacher.network.float(), torch.float32


# --- pictures -------------------------------------------------------------------------------------------------------


def make_shards(folder: Path, settings: Settings) -> None:
    """Distinct JPEGs of at least LEAST_BYTES on average, as shards; RuntimeError where they came out smaller."""
    from shards.making.conversion import convert
    from shards.making.planning import Options, make_plan
    from shards.processes import call_each
    from shards.sources.class_folders import list_class_folders

    number = settings.scaled(PICTURES, 32)
    jobs = [(str(folder / "images"), first, min(PER_JOB, number - first)) for first in range(0, number, PER_JOB)]
    for _, future in call_each(write_pictures, jobs, settings.workers):
        future.result()
    files = list((folder / "images").glob("*/*"))
    mean = sum(file.stat().st_size for file in files) / len(files)
    if mean < LEAST_BYTES:
        raise RuntimeError(f"pictures of {mean:,.0f} bytes on average, {LEAST_BYTES:,} are needed; raise NOISE")
    plan = make_plan(list_class_folders(folder / "images"), Options(samples_per_shard=1000))
    convert(plan, folder / "shards", num_workers=settings.workers)


def write_pictures(folder: str, first: int, count: int) -> None:
    """Pictures number `first` and following, each with a seed of its own, in two class folders."""
    from tools.benchmarks.data import make_picture

    for number in range(first, first + count):
        place = Path(folder) / f"class_{number % 2}" / f"{number:06d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(make_picture(number, NOISE))
