"""Recipes: which there are, what one says, how two differ, and what one costs on a number of GPUs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

# The repository root goes first, so that this file runs from any folder, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import shell
from engine.command_line import answer, list_lines, recipe_lines
from recipes import registry
from recipes.costs.gpus import GPUS
from recipes.costs.memory import memory_of
from recipes.costs.prediction import IMAGENET_IMAGES, Prediction, assumptions, predict
from recipes.overrides import apply_overrides, difference, show
from recipes.schema import Recipe

EPILOG = """examples:
  python tools/recipe.py list
  python tools/recipe.py show vit_b_dtm
  python tools/recipe.py diff vit_b_lut vit_b_lut_400ep
  python tools/recipe.py plan vit_l_dtm --gpus 64
  python tools/recipe.py plan vit_b_lut --gpus 8 --gpu a100 zero.stage=2 optim.micro_batch=64
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = result.add_subparsers(dest="command", required=True, metavar="list|show|diff|plan")
    commands.add_parser("list", help="all recipes, a line each")
    one = commands.add_parser("show", help="every field of a recipe, and where it departs from the paper")
    two = commands.add_parser("diff", help="the fields in which two recipes differ")
    plan = commands.add_parser("plan", help="FLOPs, memory, communication, time and disk space: a prediction")
    one.add_argument("name", metavar="NAME")
    two.add_argument("name", metavar="NAME")
    two.add_argument("other", metavar="OTHER")
    plan.add_argument("name", metavar="NAME")
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="all of them, on nodes of 8")
    plan.add_argument("--gpu", default="h200", metavar="KIND", help=f"{', '.join(GPUS)} (%(default)s)")
    plan.add_argument("--images", type=int, default=IMAGENET_IMAGES, metavar="N", help="in an epoch (%(default)s)")
    plan.add_argument("--json", action="store_true", help="the numbers alone")
    for command in (one, plan):
        command.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the recipe")
    result.add_argument("--debug", action="store_true", help="show tracebacks")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parse(argv)
    return shell.run(lambda: COMMANDS[args.command](args), debug=args.debug)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere behind the name; argparse itself takes them only right behind it."""
    ours = parser()
    args, rest = ours.parse_known_args(argv)
    strange = [text for text in rest if text.startswith("-") or "overrides" not in args]
    if strange:
        ours.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        args.overrides += rest
    return args


def list_all(args: argparse.Namespace) -> int:
    answer(list_lines())


def show_one(args: argparse.Namespace) -> int:
    answer(recipe_lines(args.name, apply_overrides(registry.load(args.name), args.overrides)))


def show_difference(args: argparse.Namespace) -> int:
    """Fields of both, one per line; those that only one objective has are shown with a dash."""
    changed = difference(registry.load(args.name), registry.load(args.other))
    width = max([len(path) for path in changed] or [0])
    shown = [(path, *("-" if value is None else show(value) for value in both)) for path, both in changed.items()]
    lines = [f"{path:{width}}  {ours}  ->  {theirs}" for path, ours, theirs in shown]
    answer(lines or [f"{args.name} and {args.other} are the same"])


def plan(args: argparse.Namespace) -> int:
    recipe = apply_overrides(registry.load(args.name), args.overrides)
    prediction = predict(recipe, gpus=args.gpus, gpu=args.gpu, images=args.images)
    if args.json:
        answer([json.dumps(numbers(prediction), indent=1)])
    answer(plan_lines(args.name, prediction))


def plan_lines(name: str, prediction: Prediction) -> list[str]:
    """The prediction for a reader."""
    cost, memory, optim = prediction.cost, prediction.memory, prediction.recipe.optim
    low, high = prediction.hours
    parts = [(label, getattr(cost, label)) for label in ("encoder", "decoder", "heads", "average", "teacher")]
    counted = ", ".join(f"{label} {part.parameters / 1e6:.1f} M" for label, part in parts if part.parameters)
    spent = ", ".join(f"{label} {part.flops / 1e9:.1f}" for label, part in parts if part.flops)
    held = ", ".join(f"{label} {value / 1e9:.1f}" for label, value in vars(memory).items() if value >= 5e7)
    return [
        f"{name} on {prediction.gpus} x {prediction.gpu.title}: predicted, not measured",
        "",
        f"parameters     {cost.trained / 1e6:,.1f} M trained ({counted})",
        f"FLOPs          {cost.flops / 1e9:,.1f} GFLOP per image, backward {cost.student.backward / 1e9:.1f} ({spent})",
        f"batch          global {optim.global_batch} = micro {optim.micro_batch} x {prediction.gpus} GPUs x "
        f"accumulation {prediction.accumulation}",
        f"memory         {memory.total / 1e9:,.1f} of {prediction.gpu.memory:g} GB per GPU at ZeRO stage "
        f"{prediction.recipe.zero.stage} ({held} GB){'' if prediction.fits else ': TOO MUCH, lower optim.micro_batch'}",
        *(f"               {line}" for line in stage_lines(prediction)),
        f"communication  {prediction.message / 1e9:,.2f} GB per GPU and step",
        f"speed          {between(prediction.slowest, prediction.fastest)} images/s in all, "
        f"{between(prediction.slowest / prediction.gpus, prediction.fastest / prediction.gpus)} per GPU, "
        f"MFU {prediction.mfu:.0%} of the peak",
        f"time           {between(low, high, '.1f')} hours = {between(low * prediction.gpus, high * prediction.gpus)} "
        "GPU hours, evaluations and saves not counted",
        f"storage        {prediction.shard_bytes / 1e9:,.0f} GB of shards, read at {prediction.read_rate / 1e6:,.0f} "
        f"MB/s per node; {prediction.checkpoint_bytes / 1e9:.1f} GB per checkpoint, of which "
        f"{prediction.recipe.run.keep + 1} are there at a time",
        "",
        "assumptions",
        *(f"  {line}" for line in assumptions(prediction)),
    ]


def stage_lines(prediction: Prediction) -> list[str]:
    """Memory at every stage of ZeRO that the precision allows."""
    stages = (0, 1, 2, 3) if prediction.recipe.precision == "fp32" else (1, 2, 3)
    totals = {stage: memory_of(at_stage(prediction.recipe, stage), gpus=prediction.gpus).total for stage in stages}
    return [", ".join(f"stage {stage}: {value / 1e9:.1f} GB" for stage, value in totals.items())]


def at_stage(recipe: Recipe, stage: int) -> Recipe:
    return replace(recipe, zero=replace(recipe.zero, stage=stage))


def between(low: float, high: float, form: str = ",.0f") -> str:
    """Two numbers, or one where they are shown alike."""
    texts = list(dict.fromkeys(format(value, form) for value in sorted((low, high))))
    return " to ".join(texts)


def numbers(prediction: Prediction) -> dict:
    """The prediction for a program; bytes, FLOPs, images per second and hours."""
    return {
        "parameters": prediction.cost.trained,
        "flops_per_image": prediction.cost.flops,
        "micro_batch": prediction.recipe.optim.micro_batch,
        "accumulation": prediction.accumulation,
        "memory_bytes": {**vars(prediction.memory), "total": prediction.memory.total},
        "communication_bytes": prediction.message,
        "images_per_second": [prediction.slowest, prediction.fastest],
        "mfu": prediction.mfu,
        "hours": list(prediction.hours),
        "shard_bytes": prediction.shard_bytes,
        "checkpoint_bytes": prediction.checkpoint_bytes,
        "assumptions": assumptions(prediction),
    }


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "list": list_all,
    "show": show_one,
    "diff": show_difference,
    "plan": plan,
}

if __name__ == "__main__":
    sys.exit(main())
