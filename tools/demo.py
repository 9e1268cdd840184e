"""The whole system on two CPU cores: photographs -> shards -> DALI -> DeepSpeed -> features (`make demo`)."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

# Started as a script, tools/ is first on the path; the repository's root belongs there, installed or not.
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from rich.console import Console

PER_CLASS = {"train": 200, "val": 50}  # crops of each of the 18 photographs
RECIPE = "vit_ti_mae_demo"
MARK = ".maskwright-demo"  # says that a folder is ours to empty
MADE = ("images", "shards", "mae", "summary.json", "reconstructions.png")
EXAMPLE = "example:\n  python tools/demo.py --out runs/demo --seed 1"

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder, replaced if it is a demo's")
    parser.add_argument("--seed", type=int, default=0, help="of the crops, the order and the weights (default: 0)")
    parser.add_argument("--steps", type=int, help="train for fewer steps than the recipe's")
    args = parser.parse_args()
    out = args.out.resolve()
    introduce(out)
    began = time.monotonic()
    clear(out)
    make_images(out, args.seed)
    make_shards(out)
    train(out, args.seed, args.steps)
    picture = draw(out)
    conclude(out, picture, time.monotonic() - began)
    return 0


def introduce(out: Path) -> None:
    """What was found, what will happen and how long it takes."""
    import torch

    cores = len(os.sched_getaffinity(0))
    device = torch.cuda.get_device_name() if gpu_is_there() else "no GPU: DALI and DeepSpeed run on the CPU"
    heading("maskwright demo")
    console.print(f"found    {cores} cores, Python {platform.python_version()}, torch {torch.__version__}, {device}")
    console.print("does     18 photographs -> 4,500 small JPEGs -> shards -> DALI -> MAE by DeepSpeed -> k-NN")
    console.print(f"takes    about two minutes on two cores; everything goes to {out}")


def heading(text: str) -> None:
    console.rule(f"[bold]{text}", align="left")


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
            count = make_photographs(out / "images" / split, per_class=per_class, validation=split == "val", seed=seed)
        console.print(f"{split:5}    {count:,} JPEGs in {out / 'images' / split}")


def make_shards(out: Path) -> None:
    """WebDataset shards of both splits, verified."""
    heading("2  shards: converted, then every byte verified")
    for split in PER_CLASS:
        options = ["--no-shuffle"] if split == "val" else []
        shards = str(out / "shards" / split)
        call("tools/make_shards.py", str(out / "images" / split), shards, "--samples-per-shard", "500", *options)
        call("tools/verify_shards.py", shards)


def train(out: Path, seed: int, steps: int | None) -> None:
    """MAE through DeepSpeed's launcher, with k-NN accuracy before, during and after."""
    heading(f"3  training: deepspeed engine/train.py --recipe {RECIPE}")
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    from engine.runtime import free_port

    arguments = [f"data.train={out}/shards/train", f"run.out={out}/mae", f"run.seed={seed}"]
    arguments += [f"run.steps={steps}"] if steps else []
    command = [deepspeed, "-q", "--num_gpus", "1", "--master_port", str(free_port()), str(ROOT / "engine/train.py")]
    quiet = {} if gpu_is_there() else {"DS_ACCELERATOR": "cpu"}  # else the launcher warns that it found no GPU
    check(
        subprocess.run([*command, "--recipe", RECIPE, *arguments], cwd=out, env=os.environ | quiet).returncode,
        "training",
    )


def gpu_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def draw(out: Path) -> Path:
    """A picture of what MAE paints into masked patches of validation images."""
    heading("4  picture: masked patches, reconstructed")
    checkpoint = sorted((out / "mae" / "checkpoints").glob("step_*"))[-1]
    picture = out / "reconstructions.png"
    call("tools/analyze.py", "reconstructions", str(checkpoint), "--data", f"{out}/shards/val", "--out", str(picture))
    return picture


def conclude(out: Path, picture: Path, seconds: float) -> None:
    """The result in two numbers, where things are, and what to type next."""
    curve = [json.loads(line) for line in (out / "mae" / "evaluations.jsonl").read_text().splitlines()]
    before, after = curve[0]["knn"], curve[-1]["knn"]
    summary = {"random": {"knn": before}, "mae": {"knn": after}, "seconds": round(seconds, 1)}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    heading("result")
    console.print(f"k-NN     {before:.1f} % before training, {after:.1f} % after (18 classes, chance 5.6 %)")
    console.print(f"time     {seconds / 60:.1f} minutes")
    console.print(f"picture  {picture}")
    console.print(f"files    {out}/summary.json, {out}/mae/metrics.jsonl")
    console.print("next     python tools/make_shards.py /path/to/imagenet/train data/imagenet/train")
    console.print("         deepspeed engine/train.py --recipe vit_b_mae")


def call(script: str, *arguments: str) -> None:
    """Run one of the tools as a user would."""
    check(subprocess.run([sys.executable, str(ROOT / script), *arguments]).returncode, script)


def check(returncode: int, what: str) -> None:
    if returncode:
        raise SystemExit(f"{what} failed with code {returncode}; its message is above")


if __name__ == "__main__":
    sys.exit(main())
