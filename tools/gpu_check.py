"""Does everything work on this GPU? Graphs, every method in bf16, memory, resume: one table, in about three minutes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

# Started as a script, tools/ is first on the path; the repository's root belongs there, installed or not.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine import shell

EXAMPLE = """example:
  python tools/gpu_check.py --out gpu_check.json
  python tools/gpu_check.py --device cpu --small        (a rehearsal where there is no GPU)"""
METHODS = ("mae", "lut", "dtm")
VIEWS = {"pretrain_mae": "mae", "pretrain_lut": "lut", "pretrain_dtm": "dtm", "evaluate": "mae"}
STEPS, MEASURED = 20, 10  # steps of a training; the last ones are timed
SWITCHES = 20
GROWTH = 64 * 2**20  # bytes that memory may grow by over the second half of the segment switches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="where the numbers go as JSON")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models at 32 px: only whether it runs")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    return shell.run(lambda: Check(args.device, args.small).run(args.out), debug=args.debug)


class Check:
    """The rows of the table; each part adds some."""

    def __init__(self, device: str, small: bool) -> None:
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                "--device cuda: torch sees no GPU; tools/doctor.py says why, --device cpu --small rehearses"
            )
        self.device, self.small, self.rows = torch.device(device), small, []
        if device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def run(self, out: Path) -> int:
        """All parts, the table, the JSON; 1 if a row failed."""
        from rich.console import Console
        from rich.table import Table

        from engine.runtime import start, stop

        console, began = Console(file=sys.stdout, soft_wrap=True), time.monotonic()
        self.runtime = start()
        with tempfile.TemporaryDirectory() as folder:
            self.folder = Path(folder)
            for part in (self.prepare, self.graphs, self.trainings, self.segment_switches, self.resume):
                with console.status(part.__doc__), open(self.folder / "log", "a") as log:
                    with contextlib.redirect_stdout(log):  # what the trainings say is no news here
                        part()
        stop()
        table = Table("check", "value", "unit", "ok", title=f"{self.card()}, {date.today()}")
        for row in self.rows:
            table.add_row(row["check"], row["value"], row["unit"], "yes" if row["ok"] else "[bold red]NO[/]")
        console.print(table)
        summary = {"card": self.card(), "date": str(date.today()), "versions": self.versions(), "rows": self.rows}
        summary["seconds"] = round(time.monotonic() - began, 1)
        out.write_text(json.dumps(summary, indent=1) + "\n")
        console.print(f"{summary['seconds']} s; {out}")
        return 0 if all(row["ok"] for row in self.rows) else 1

    def add(self, check: str, value: float | str, unit: str = "", ok: bool = True) -> None:
        text = value if isinstance(value, str) else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
        self.rows.append({"check": check, "value": text, "unit": unit, "ok": bool(ok)})

    def card(self) -> str:
        import torch

        return torch.cuda.get_device_name() if self.device.type == "cuda" else f"CPU, {platform.machine()}"

    def versions(self) -> dict[str, str]:
        import deepspeed
        import nvidia.dali
        import torch

        return {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "dali": nvidia.dali.__version__,
                "python": platform.python_version(), "cuda": str(torch.version.cuda)}  # fmt: skip

    # --- parts ------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """making pictures, shards and a teacher"""
        import torch
        from safetensors.torch import save_file

        from engine.teachers import clip_network
        from shards.parity import make_pictures

        count, sides = (64, (40, 64)) if self.small else (512, (300, 500))
        workers = len(os.sched_getaffinity(0))
        self.dataset = make_pictures(self.folder / "training", count, sides, num_workers=workers)
        self.few = make_pictures(self.folder / "few", 16, sides)
        torch.manual_seed(0)
        network = clip_network(32 if self.small else 224, **({"patch_size": 8, "depth": 2} if self.small else {}))
        self.teacher = self.folder / "teacher.safetensors"
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, self.teacher)

    def graphs(self) -> None:
        """comparing DALI's images on the device, on the CPU and PIL's"""
        import torch

        from shards.parity import dali_images, mean_difference, pil_images

        for view, method in VIEWS.items():
            data = self.recipe(method).data
            ids, cpu = dali_images(self.few, view, data, torch.device("cpu"))
            pil = mean_difference(cpu, pil_images(self.few, view, data, ids))
            self.add(f"{view}: CPU graph and PIL", pil, "of 255", pil <= (2.0 if method in ("lut", "dtm") else 1.0))
            if self.device.type == "cuda":
                _, gpu = dali_images(self.few, view, data, self.device)
                difference = mean_difference(gpu, cpu)
                self.add(f"{view}: mixed graph and CPU graph", difference, "of 255", difference <= 3.0)

    def recipe(self, method: str, *overrides: str):
        """ViT-B by the released recipe with a small batch, or the tiny one; the teacher is random."""
        from recipes import registry
        from recipes.overrides import apply_overrides

        name = f"vit_ti_{method}_demo" if self.small else f"vit_b_{method}"
        common = [f"data.train={self.folder}/training/shards", "run.save_every=0", "run.log_every=1", *overrides]
        batch = 8 if self.small else 128
        common += [f"optim.global_batch={batch}", f"optim.micro_batch={batch}"]
        if method == "dtm":
            common.append(f"teacher={self.teacher_for_small() if self.small else self.teacher}")
        return apply_overrides(registry.load(name), common)

    def teacher_for_small(self) -> Path:
        """The encoder that the tiny MAE training has exported."""
        return self.folder / "mae_synthetic"

    def train(self, name: str, recipe, *, synthetic: bool = False, resume: str | None = None) -> list[dict]:
        """Train in this process; the lines of metrics.jsonl."""
        from dataclasses import replace

        from engine.command_line import Command
        from engine.train import Trainer

        folder = self.folder / name
        recipe = replace(recipe, run=replace(recipe.run, out=str(folder)))
        trainer = Trainer(Command(recipe_name(recipe), recipe, resume, False, False), self.runtime)
        if synthetic:
            trainer.make_loader = lambda: RepeatedBatch(Trainer.make_loader(trainer))
        trainer.fit()
        trainer.model_engine.destroy()
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def trainings(self) -> None:
        """training every method, from one batch on the device and from DALI"""
        import torch

        for method in METHODS:
            speeds = {}
            for synthetic in (True, False):
                kind = "synthetic" if synthetic else "DALI"
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                recipe = self.recipe(method, f"run.steps={STEPS}")
                lines = self.train(f"{method}_{kind}".lower(), recipe, synthetic=synthetic)
                tail = lines[-MEASURED:]
                speeds[kind] = len(tail) / sum(1 / line["images_per_second"] for line in tail)
                finite = all(line["loss"] == line["loss"] and line["grad_norm"] > 0 for line in lines)
                self.add(f"{method}: {kind} input, {recipe.precision}", speeds[kind], "images/s", finite)
            if self.device.type == "cuda":
                self.add(f"{method}: memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
            self.add(f"{method}: time that DALI adds", 100 * (1 - speeds["DALI"] / speeds["synthetic"]), "%")

    def segment_switches(self) -> None:
        """watching memory over segment switches"""
        from recipes.schema import Data
        from shards.loader import TrainLoader
        from shards.mask_draws import NO_MASK

        data = Data(image_size=32 if self.small else 224)
        batch, used = 16, []
        with TrainLoader(
            self.dataset, view="pretrain_mae", data=data, seed=0, global_batch=batch, micro_batch=batch, rank=0,
            world_size=1, masks=NO_MASK, device=self.device, total_steps=4 * SWITCHES, most_pairs=4 * batch,
        ) as loader:  # fmt: skip
            for number, _ in enumerate(loader, start=1):
                if number % 4 == 0:
                    used.append(self.memory_in_use())
        growth = max(used[-5:]) - max(used[SWITCHES // 2 - 5 : SWITCHES // 2])
        self.add(
            f"memory growth over {SWITCHES // 2} of {SWITCHES} segment switches", growth / 2**20, "MiB", growth < GROWTH
        )

    def memory_in_use(self) -> int:
        """Bytes on the whole GPU (DALI's are not torch's), or the most that this process was resident with."""
        import torch

        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            return total - free
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def resume(self) -> None:
        """resuming every method in the middle"""
        for method in METHODS:
            whole = self.train(f"{method}_whole", self.recipe(method, "run.steps=6"))
            self.train(f"{method}_parts", self.recipe(method, "run.steps=6", "run.stop_after=3"))
            parts = self.train(f"{method}_parts", self.recipe(method, "run.steps=6"), resume="must")
            equal = [a["loss_hex"] == b["loss_hex"] for a, b in zip(whole, parts, strict=True)]
            self.add(f"{method}: resumed losses bitwise equal", f"{sum(equal)} of {len(equal)}", "steps", all(equal))


def recipe_name(recipe) -> str:
    """The registered name that a recipe of this check came from."""
    method = type(recipe.objective).__name__.lower()
    return f"vit_ti_{method}_demo" if recipe.model.embed_dim < 384 else f"vit_b_{method}"


class RepeatedBatch:
    """A loader that serves its first batch for ever: what training costs without data."""

    def __init__(self, loader) -> None:
        self.batch, self.data_wait = loader.next_batch(), 0.0
        loader.close()

    def next_batch(self):
        return self.batch

    def close(self) -> None:
        pass


if __name__ == "__main__":
    sys.exit(main())
