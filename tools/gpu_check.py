"""Does everything work on this GPU? Graphs, every method in bf16, memory, resume: one table, in about three minutes.

What fails becomes a row of the table and the rest goes on; the JSON is written anew after every part, so that even a
crash of the driver leaves what was measured before it.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import sys
import tempfile
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

# Started as a script, tools/ is first on the path; the repository's root belongs there, installed or not.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine import shell
from tools.doctor import DALI, version_of
from tools.findings import Findings
from tools.image_checks import Comparison
from tools.trainings import free_memory, train_here

EXAMPLE = """example:
  python tools/gpu_check.py --out gpu_check.json
  python tools/gpu_check.py --device cpu --small        (a rehearsal where there is no GPU)"""
METHODS = ("mae", "lut", "dtm")
VIEWS = {"pretrain_mae": "mae", "pretrain_lut": "lut", "pretrain_dtm": "dtm", "evaluate": "mae"}
STEPS, WARM_UP, LOG_EVERY = 30, 10, 5  # steps of a timed training; a measurement waits for the device: not each step
SWITCHES = 20
GROWTH = 64 * 2**20  # bytes that memory may grow by over the second half of the segment switches


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=EXAMPLE, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="where the numbers go as JSON")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models at 32 px: only whether it runs")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    return shell.run(lambda: Check(args.device, args.small, args.out).run(), debug=args.debug)


class Check:
    """The parts; each adds rows to the findings."""

    def __init__(self, device: str, small: bool, out: Path) -> None:
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "--device cuda: no GPU to be seen; tools/doctor.py says why, --device cpu --small rehearses"
            )
        if device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self.device, self.small = torch.device(device), small
        self.card = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}"
        heading = {"card": self.card, "date": str(date.today()), "versions": versions()}
        self.findings = Findings(out, heading, clean=free_memory)
        self.add, self.attempt = self.findings.add, self.findings.attempt

    def run(self) -> int:
        """All parts, the table, the JSON; 1 if a row failed."""
        with tempfile.TemporaryDirectory() as folder, self.findings.told(f"{self.card}, {date.today()}"):
            self.folder = Path(folder)
            self.all_parts()
        return 0 if self.findings.passed() else 1

    def all_parts(self) -> None:
        """The first two are what the others stand on."""
        others = (
            self.teacher,
            self.graphs,
            self.operators,
            self.trainings,
            self.segment_switches,
            self.resume,
            self.stop,
        )
        if self.findings.part(self.start) and self.findings.part(self.pictures):
            for part in others:
                self.findings.part(part)

    # --- parts ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """starting DeepSpeed"""
        from engine.runtime import start

        self.runtime = start(timeout=300)

    def stop(self) -> None:
        """ending DeepSpeed"""
        from engine.runtime import stop

        stop()

    def pictures(self) -> None:
        """making pictures and shards"""
        from shards.augment.parity import make_pictures

        count, sides = (64, (40, 64)) if self.small else (512, (300, 500))
        side = self.recipe("mae").data.image_size
        workers = len(os.sched_getaffinity(0))
        self.dataset = make_pictures(self.folder / "training", count, sides, num_workers=workers)
        self.few = make_pictures(self.folder / "few", 16, sides)
        self.exact = make_pictures(self.folder / "exact", 16, (side, side + 1))  # nothing to crop, nothing to resize

    def teacher(self) -> None:
        """making a teacher of random weights"""
        import torch
        from safetensors.torch import save_file

        from engine.teachers import clip_network

        if self.small:
            self.train("teacher", self.recipe("mae", "run.steps=2"), saves=True)
        else:
            torch.manual_seed(0)
            state = clip_network(224).state_dict()
            save_file({name: value.contiguous() for name, value in state.items()}, self.teacher_place)

    @property
    def teacher_place(self) -> Path:
        """DTM's teacher: a file like OpenAI's, or the run folder of the tiny MAE."""
        return self.folder / ("teacher" if self.small else "teacher.safetensors")

    def graphs(self) -> None:
        """comparing DALI's images on the device, on the CPU and PIL's"""
        comparison = Comparison(self.findings, self.few, self.device)
        for view, method in VIEWS.items():
            self.attempt(view, partial(comparison.view, view, self.recipe(method).data))

    def operators(self) -> None:
        """comparing each operator alone, device and CPU (or CPU and PIL)"""
        Comparison(self.findings, self.exact, self.device).operators(*(self.recipe(method).data for method in METHODS))

    def recipe(self, method: str, *overrides: str):
        """ViT-B by the released recipe with a small batch, or the tiny one, made to do what the large one does."""
        from recipes import registry
        from recipes.overrides import apply_overrides

        batch = 8 if self.small else 128
        common = [f"data.train={self.folder}/training/shards", "run.save_every=0", "run.log_every=1"]
        common += [f"optim.global_batch={batch}", f"optim.micro_batch={batch}"]
        common += ["precision=bf16"] if self.small else []
        if method == "dtm":
            common += [f"teacher={self.teacher_place}"]
            common += [f"data.{name}=0.4" for name in ("brightness", "contrast", "saturation") if self.small]
        return apply_overrides(registry.load(self.recipe_name(method)), [*common, *overrides])

    def recipe_name(self, method: str) -> str:
        return f"vit_ti_{method}_demo" if self.small else f"vit_b_{method}"

    def train(self, name: str, recipe, **options) -> list[dict]:
        """The lines of metrics.jsonl of a training into the folder `name`; `options` are those of `train_here`."""
        method = type(recipe.objective).__name__.lower()
        return train_here(self.recipe_name(method), recipe, self.folder / name, self.runtime, **options)

    def trainings(self) -> None:
        """training every method, from one batch on the device and from DALI"""
        for method in METHODS:
            self.attempt(f"{method}: training", partial(self.time_method, method))

    def time_method(self, method: str) -> None:
        import torch

        recipe, speeds = self.recipe(method, f"run.steps={STEPS}", f"run.log_every={LOG_EVERY}"), {}
        for kind in ("synthetic", "DALI"):
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            lines = self.train(f"{method}_{kind}".lower(), recipe, synthetic=kind == "synthetic")
            speeds[kind] = median(line["images_per_second"] for line in lines if line["step"] > WARM_UP)
            finite = all(line["loss"] == line["loss"] and line["grad_norm"] > 0 for line in lines)
            self.add(f"{method}: {kind} input, {recipe.precision}", speeds[kind], "images/s", finite)
        if self.device.type == "cuda":
            self.add(f"{method}: memory, torch's part", torch.cuda.max_memory_allocated() / 2**30, "GiB")
        self.add(f"{method}: time that DALI adds", 100 * (1 - speeds["DALI"] / speeds["synthetic"]), "%")

    def segment_switches(self) -> None:
        """watching memory over segment switches"""
        from shards.draws.masks import NO_MASK
        from shards.reading.loader import TrainLoader

        batch, used = 16, []
        with TrainLoader(
            self.dataset, view="pretrain_mae", data=self.recipe("mae").data, seed=0, global_batch=batch,
            micro_batch=batch, rank=0, world_size=1, masks=NO_MASK, device=self.device, total_steps=4 * SWITCHES,
            most_pairs=4 * batch,
        ) as loader:  # fmt: skip
            for number, _ in enumerate(loader, start=1):
                if number % 4 == 0:
                    used.append(memory_in_use(self.device))
        growth = max(used[-5:]) - max(used[SWITCHES // 2 - 5 : SWITCHES // 2])
        self.add(f"memory growth over {SWITCHES // 2} segment switches", growth / 2**20, "MiB", growth < GROWTH)

    def resume(self) -> None:
        """resuming every method in the middle"""
        for method in METHODS:
            self.attempt(f"{method}: resuming", partial(self.resume_method, method))
            for folder in (f"{method}_whole", f"{method}_parts"):
                shutil.rmtree(self.folder / folder, ignore_errors=True)  # checkpoints of ViT-B fill small disks

    def resume_method(self, method: str) -> None:
        recipe, first_half = self.recipe(method, "run.steps=6"), self.recipe(method, "run.steps=6", "run.stop_after=3")
        whole = self.train(f"{method}_whole", recipe)
        self.train(f"{method}_parts", first_half, saves=True)
        parts = self.train(f"{method}_parts", recipe, resume="must")
        equal = [a["loss_hex"] == b["loss_hex"] for a, b in zip(whole, parts, strict=True)]
        self.add(f"{method}: resumed losses bitwise equal", f"{sum(equal)} of {len(equal)}", "steps", all(equal))


def versions() -> dict[str, str]:
    """Of what matters, without importing it: DeepSpeed is to be imported by `start`."""
    import torch

    names = {name: version_of(name) for name in ("torch", "deepspeed", *DALI)}
    installed = {name: version for name, version in names.items() if version}
    return installed | {"python": platform.python_version(), "cuda": str(torch.version.cuda)}


def memory_in_use(device) -> int:
    """Bytes on the whole GPU (DALI's are not torch's), or the most that this process was resident with."""
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return total - free
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
