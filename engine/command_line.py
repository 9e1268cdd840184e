"""What `engine/train.py` is asked: parsed, checked and, where that is all, answered without importing torch."""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from engine import shell
from recipes import registry
from recipes.overrides import apply_overrides, leaves, show
from recipes.schema import Recipe

DESCRIPTION = "Train by recipe. Overrides are written section.field=value; --print shows every field."
EXAMPLES = """examples:
  deepspeed engine/train.py --recipe vit_b_mae data.train=data/imagenet/train run.out=runs/mae_b
  deepspeed engine/train.py --recipe vit_b_mae run.out=runs/mae_b --resume
  torchrun --nproc-per-node 8 engine/train.py --recipe vit_b_mae optim.micro_batch=256
  python engine/train.py --list"""


@dataclass(frozen=True)
class Command:
    """A valid request to train."""

    name: str
    recipe: Recipe
    resume: str | None  # None: start afresh; "must": go on; "auto": go on where there is something to go on from
    allow_changes: bool
    debug: bool


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", metavar="NAME", help="what to train; --list shows the names")
    parser.add_argument("--list", action="store_true", help="list the recipes and exit")
    parser.add_argument("--print", action="store_true", help="print every field of the recipe and exit")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="must",
        metavar="auto",
        help="go on from the newest intact checkpoint of run.out;\n`--resume auto` starts afresh where there is none",
    )
    parser.add_argument("--allow-changes", action="store_true", help="resume although the recipe or data changed")
    parser.add_argument("--download", action="store_true", help="allow teacher=timm:NAME to fetch weights by network")
    parser.add_argument("--debug", action="store_true", help="show the traceback of expected errors too")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers pass it
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the recipe")
    return parser


def parse_command(arguments: list[str]) -> Command:
    """The request to train; for anything else (--list, --print, a mistake) says its answer and exits."""
    args = make_parser().parse_intermixed_args(unglue_resume(arguments))
    if args.list:
        answer(list_lines())
    try:
        return check_command(args)
    except ValueError as error:
        if args.debug:
            raise
        shell.say_error(str(error), once_per="node")  # data may be missing on one node only, and nobody has met yet
        sys.exit(shell.IMPOSSIBLE)


def unglue_resume(arguments: list[str]) -> list[str]:
    """`--resume optim.lr=1` means `--resume` and an override, not a checkpoint called optim.lr=1."""
    fixed: list[str] = []
    for argument in arguments:
        if fixed and fixed[-1] == "--resume" and "=" in argument:
            fixed[-1] = "--resume=must"
        fixed.append(argument)
    return fixed


def check_command(args: argparse.Namespace) -> Command:
    if not args.recipe:
        raise ValueError("--recipe NAME is needed; engine/train.py --list shows the names")
    if args.resume not in (None, "must", "auto"):
        raise ValueError(f"--resume {args.resume}: write `--resume` or `--resume auto`; the folder is run.out")
    recipe = apply_overrides(registry.load(args.recipe), args.overrides)
    if args.print:
        answer(recipe_lines(args.recipe, recipe))
    from engine.start_up import require_data, require_init
    from engine.teacher_sources import require_teacher

    missing: list[str] = []  # all are told at once
    first = (require_init,) if args.resume is None else ()  # a run that goes on needs its first weights no more
    for require in (require_data, *first, partial(require_teacher, download=args.download)):
        try:
            recipe = require(args.recipe, recipe)
        except ValueError as error:
            missing.append(str(error))
    if missing:
        raise ValueError("\n\n".join(missing))
    return Command(args.recipe, recipe, args.resume, args.allow_changes, args.debug)


def answer(lines: list[str]) -> NoReturn:
    """Print and exit; a reader that stops early (`--list | head`) ends it quietly."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    print("\n".join(lines))
    sys.exit(0)


def list_lines() -> list[str]:
    """Every recipe's name and the first line of its documentation, by module."""
    width = max(map(len, registry.recipes()))
    lines = []
    for title, names in registry.by_module().items():
        lines += ["", title, *(f"  {name:{width}}  {registry.summary(name)}" for name in names)]
    return lines[1:]


def recipe_lines(name: str, recipe: Recipe) -> list[str]:
    """A recipe's documentation, every field as an override would spell it, and its departures from the paper."""
    fields = [f"{path}={show(value)}" for path, value in leaves(recipe).items()]
    remarks = [f"departure from the paper: {line}" for line in recipe.departures]
    return [f"{name}: {registry.documentation(name)}", "", *fields, *remarks]
