"""The whole system on two CPU cores: photographs -> shards -> DALI -> DeepSpeed -> features (`make demo`)."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

# Started as a script, tools/ is first on the path; the repository's root belongs there, installed or not.
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from rich.console import Console
from rich.table import Table

from engine import shell

PER_CLASS = {"train": 200, "val": 50}  # crops of each of the 18 photographs
MARK = ".maskwright-demo"  # says that a folder is ours to empty
EXAMPLE = """examples:
  python tools/demo.py --seed 1
  python tools/demo.py --seeds 1 2 3 --out runs/demo_full       (make demo-full)"""

console = Console(highlight=False, soft_wrap=True)


class Training(NamedTuple):
    """One row of the table: what is trained, and from which other row its teacher comes."""

    title: str
    recipe: str
    overrides: tuple[str, ...] = ()
    teacher: str = ""


def trainings(teacher: str) -> dict[str, Training]:
    """The rows that are trained, in order; `teacher` is the row that teaches DTM."""
    taught = f"taught by {teacher.upper()}"
    return {
        # The first step has learning rate 0: after it the weights are still the initial ones.
        "random": Training("random ViT", "vit_ti_mae_demo", ("run.stop_after=1",)),
        "random_beit": Training("random BEiT", "vit_ti_dtm_demo", ("run.stop_after=1",), "random"),
        "mae": Training("MAE", "vit_ti_mae_demo"),
        "lut": Training("LUT", "vit_ti_lut_demo"),
        "dtm": Training(f"DTM, {taught}", "vit_ti_dtm_demo", (), teacher),
        "dtm_no_morphing": Training(
            f"DTM without morphing, {taught}", "vit_ti_dtm_demo", ("objective.max_removed=0",), teacher
        ),
        "dtm_untrained_teacher": Training("DTM, taught by the random ViT", "vit_ti_dtm_demo", (), "random"),
    }


PICTURES = {  # file: analysis and row
    "views_lut.png": ("views", "lut"),
    "masks_dtm.png": ("views", "dtm"),
    "reconstructions_mae.png": ("reconstructions", "mae"),
    "morphs_dtm.png": ("morphs", "dtm"),
}
MADE = ("images", "shards", "summary.json", *trainings("mae"), *PICTURES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder, emptied if it is a demo's")
    parser.add_argument("--seed", type=int, default=0, help="of crops, order and weights (default: 0)")
    parser.add_argument("--seeds", type=int, nargs="+", help="several demos: means and standard errors")
    parser.add_argument("--teacher", choices=["mae", "lut"], default="mae", help="which encoder teaches DTM")
    parser.add_argument("--steps", type=int, help="train for fewer steps than the recipes'")
    args = parser.parse_args()
    shell.calm_threads()
    out = args.out.resolve()
    introduce(out, args.teacher, len(args.seeds or [args.seed]))
    if not args.seeds:
        run_demo(out, args.seed, args.teacher, args.steps)
    else:
        summaries = [run_demo(out / f"seed_{seed}", seed, args.teacher, args.steps) for seed in args.seeds]
        conclude_seeds(out, args.seeds, args.teacher, summaries)
    return 0


def introduce(out: Path, teacher: str, num_seeds: int) -> None:
    """What was found, what will happen and how long it takes."""
    import torch

    cores = len(os.sched_getaffinity(0))
    device = torch.cuda.get_device_name() if gpu_is_there() else "no GPU: DALI and DeepSpeed run on the CPU"
    heading("maskwright demo")
    console.print(f"found    {cores} cores, Python {platform.python_version()}, torch {torch.__version__}, {device}")
    console.print(
        "does     18 photographs -> 4,500 small JPEGs -> shards -> DALI -> MAE, LUT, DTM by DeepSpeed -> scores"
    )
    console.print(f"         DTM's teacher is the {teacher.upper()} encoder just trained; ImageNet recipes use CLIP")
    console.print(f"takes    about {8 * num_seeds} minutes on two idle cores; everything goes to {out}")


def gpu_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def heading(text: str) -> None:
    console.rule(f"[bold]{text}", align="left")


def run_demo(out: Path, seed: int, teacher: str, steps: int | None) -> dict[str, dict[str, float]]:
    """One seed from images to summary.json."""
    began = time.monotonic()
    clear(out)
    make_images(out, seed)
    make_shards(out)
    rows = trainings(teacher)
    for number, (name, row) in enumerate(rows.items(), start=1):
        heading(f"3.{number}  training: {row.title}")
        train(out, name, row, seed, steps)
    scores = measure(out, rows)
    draw(out)
    conclude(out, rows, scores, time.monotonic() - began)
    return scores


def clear(out: Path) -> None:
    """Remove what an earlier demo made, and nothing else: a folder without the demo's mark is left alone."""
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise SystemExit(f"--out {out}: is not empty and was not made by the demo; choose another folder")
    for name in MADE:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def make_images(out: Path, seed: int) -> None:
    """Class folders of JPEGs for training and validation."""
    from tools.photographs import make_photographs

    heading("1  images: crops of the photographs inside scikit-image and scikit-learn")
    for split, per_class in PER_CLASS.items():
        with console.status(f"cutting {split} crops"):
            folder = out / "images" / split
            count = make_photographs(folder, per_class=per_class, validation=split == "val", seed=seed)
        console.print(f"{split:5}    {count:,} JPEGs in {folder}")


def make_shards(out: Path) -> None:
    """WebDataset shards of both splits, verified."""
    heading("2  shards: converted, then every byte verified")
    for split in PER_CLASS:
        options = ["--no-shuffle"] if split == "val" else []
        shards = str(out / "shards" / split)
        call("tools/make_shards.py", str(out / "images" / split), shards, "--samples-per-shard", "500", *options)
        call("tools/verify_shards.py", shards)


def train(out: Path, name: str, row: Training, seed: int, steps: int | None) -> None:
    """One run through DeepSpeed's launcher."""
    from engine.runtime import free_port

    arguments = ["--recipe", row.recipe, f"data.train={out}/shards/train", f"run.out={out}/{name}", f"run.seed={seed}"]
    arguments += [*row.overrides, *([f"run.steps={steps}"] if steps else [])]
    arguments += [f"teacher={out}/{row.teacher}"] if row.teacher else []
    console.print(f"[dim]deepspeed engine/train.py {' '.join(arguments)}[/]")
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "-q", "--num_gpus", "1"]
    command = [*launcher, "--master_port", str(free_port()), str(ROOT / "engine/train.py"), *arguments]
    quiet = {} if gpu_is_there() else {"DS_ACCELERATOR": "cpu"}  # else the launcher warns that it found no GPU
    check(subprocess.run(command, cwd=out, env=os.environ | quiet).returncode, row.title)


def newest_checkpoint(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def measure(out: Path, rows: dict[str, Training]) -> dict[str, dict[str, float]]:
    """k-NN and probe accuracy, and training speed, of every row and of the raw pixels."""
    from engine.evaluation.scores import score_checkpoint

    heading("4  features: k-NN and linear probe on crops of unseen parts of the photographs")
    scores: dict[str, dict[str, float]] = {}
    for name in rows:
        with console.status(f"features of {name}"):
            scores[name] = score_checkpoint(newest_checkpoint(out / name), out / "shards")
        if name == "random":
            scores["pixels"] = score_checkpoint(newest_checkpoint(out / name), out / "shards", of_pixels=True)
        if not name.startswith("random"):
            scores[name]["images_per_second"] = median_speed(out / name / "metrics.jsonl")
    return scores


def median_speed(metrics: Path) -> float:
    return statistics.median(json.loads(line)["images_per_second"] for line in metrics.read_text().splitlines())


def draw(out: Path) -> None:
    """What training saw, what MAE paints, what DTM's teacher finds alike."""
    heading("5  pictures")
    for file, (analysis, name) in PICTURES.items():
        checkpoint = str(newest_checkpoint(out / name))
        call("tools/analyze.py", analysis, checkpoint, "--data", f"{out}/shards/val", "--out", f"{out}/{file}")


def conclude(out: Path, rows: dict[str, Training], scores: dict[str, dict[str, float]], seconds: float) -> None:
    """The table, where things are, and what to type next."""
    (out / "summary.json").write_text(json.dumps(scores, indent=1) + "\n")
    heading("result")
    table = Table("features", "k-NN %", "probe %", "images/s")
    for name, row in scores.items():
        speed = f"{row['images_per_second']:,.0f}" if "images_per_second" in row else ""
        table.add_row(title(name, rows), f"{row['knn']:.1f}", f"{row['probe']:.1f}", speed)
    console.print(table)
    console.print("18 classes, chance 5.6 %; one seed, 900 crops: differences of two points mean nothing")
    console.print(f"time     {seconds / 60:.1f} minutes")
    console.print(f"files    {out}: summary.json, {', '.join(PICTURES)}, metrics.jsonl in each run's folder")
    console.print("next     python tools/make_shards.py /path/to/imagenet/train data/imagenet/train")
    console.print("         deepspeed engine/train.py --recipe vit_b_mae")


def title(name: str, rows: dict[str, Training]) -> str:
    return rows[name].title if name in rows else "raw pixels"


def conclude_seeds(out: Path, seeds: list[int], teacher: str, summaries: list[dict]) -> None:
    """Means and standard errors over the seeds, to the screen and to summary.json."""
    rows, collected = trainings(teacher), {}
    table = Table("features", "k-NN %", "probe %", title=f"mean +- standard error of {len(seeds)} seeds")
    for name in summaries[0]:
        cells = {}
        for score in ("knn", "probe"):
            values = [summary[name][score] for summary in summaries]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            cells[score] = {"mean": statistics.mean(values), "standard_error": error, "values": values}
        collected[name] = cells
        table.add_row(title(name, rows), *(f"{c['mean']:.1f} +- {c['standard_error']:.1f}" for c in cells.values()))
    (out / "summary.json").write_text(
        json.dumps({"seeds": seeds, "teacher": teacher, "rows": collected}, indent=1) + "\n"
    )
    heading(f"{len(seeds)} seeds")
    console.print(table)
    console.print(f"files    {out}/summary.json")


def call(script: str, *arguments: str) -> None:
    """Run one of the tools as a user would."""
    check(subprocess.run([sys.executable, str(ROOT / script), *arguments]).returncode, script)


def check(returncode: int, what: str) -> None:
    if returncode:
        raise SystemExit(f"{what} failed with code {returncode}; its message is above")


if __name__ == "__main__":
    sys.exit(main())
