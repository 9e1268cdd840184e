"""Ours against what people would use instead, in one interleaved run: medians, and ratios above 1 where ours is faster.

Absolute numbers are of this machine; give it rest before you believe them. Suites:
  data      indexing, conversion and verification of shards, against wds2idx, tar with one decoding, and sha256sum
  loader    images per second of processor time, against a torch DataLoader with PIL, webdataset, torchvision, SPDL
  morph     token morphing: matching, grouping, loss and backward; memory; agreement of the two forms
  ema       the moving average of LUT's ViT-B
  masks     block-wise and random masks
  lut_step  a whole step of LUT (ViT-S, batch 8, fp32): dispatched operators, images per CPU second
  dtm_step  the same of DTM
  startup   --list and --help, against `import torch`
  gpu       pre-training on a GPU: speed by batch, share of its peak, stall, memory, parts, without each optimisation
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

# The repository root goes first, so that this file runs from any folder, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.shell import run
from tools.benchmarks.side_by_side import ROUNDS, Row, Settings

# A suite is imported when it is asked for.
SUITES = {name: f"tools.benchmarks.{name}" for name in (
    "data", "loader", "morph", "ema", "masks", "lut_step", "dtm_step", "startup", "gpu"
)}  # fmt: skip
ONE_ROUND = {"gpu": "every training once, medians of what it logged"}  # these have no use for --rounds
EPILOG = """examples:
  python tools/benchmark.py data
  python tools/benchmark.py data --json data.json --rounds 7 --workers 4
  python tools/benchmark.py data --scale 0.05      # a quick look; start-up is then part of what is measured
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    default = Settings()
    result = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("suite", metavar="SUITE", help=", ".join(SUITES))
    result.add_argument(
        "--reference",
        type=Path,
        metavar="DIR",
        help="clones dtm/ and lut/ of the released programs, to be the other side",
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    result.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="that count (%(default)s)")
    result.add_argument("--workers", type=int, default=default.workers, metavar="N", help="processes (%(default)s)")
    result.add_argument("--scale", type=float, default=1.0, metavar="F", help="of the sets it makes (%(default)s)")
    result.add_argument("--recipes", default="", metavar="A,B", help="gpu: these only")
    result.add_argument("--rehearse", action="store_true", help="gpu: tiny models on the CPU, to see whether it runs")
    result.add_argument("--debug", action="store_true", help="show tracebacks")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(argv)
    return run(lambda: measure(args), debug=args.debug)


def measure(args: argparse.Namespace) -> int:
    """Run a suite, show its rows as they come, and write them."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of this process and its children: what is compared has as many threads
    settings = Settings(
        rounds=args.rounds,
        workers=args.workers,
        scale=args.scale,
        reference=args.reference,
        recipes=tuple(name for name in args.recipes.split(",") if name),
        rehearse=args.rehearse,
    )
    suite = find_suite(args.suite)
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise ValueError(f"json={args.json}: the name of a file in a folder that exists is needed")
    rows: list[Row] = []
    for row in watched(suite(settings)):
        rows.append(row)
        if args.json:  # anew after every row: what was measured before an end stays
            args.json.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    print_rows(args.suite, settings, rows)
    return 0


def find_suite(name: str) -> Callable[[Settings], Iterable[Row]]:
    """The suite of that name; ValueError naming those that there are."""
    if name not in SUITES:
        close = difflib.get_close_matches(name, SUITES, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"suite={name}: not known{hint}; choose one of {', '.join(SUITES)}")
    return import_module(SUITES[name]).suite


def watched(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, with a line on a terminal that says what was last found."""
    from rich.console import Console

    with Console(stderr=True).status("measuring") as status:
        for row in rows:
            status.update(f"measuring; last: {row.name}, {row.ratio:.2f}")
            yield row


def print_rows(suite: str, settings: Settings, rows: Sequence[Row]) -> None:
    """A table, and under what load it was measured."""
    from rich.console import Console
    from rich.table import Table

    how = ONE_ROUND.get(suite, f"medians of {settings.rounds} interleaved rounds")
    table = Table(title=f"{suite}: {how}", title_justify="left")
    for name in ("what", "ratio", "ours", "theirs", "unit"):
        table.add_column(name, justify="left" if name in ("what", "unit") else "right")
    for row in rows:
        table.add_row(row.name, f"{row.ratio:.2f}", f"{shown(row.ours)}", f"{shown(row.theirs)}", row.unit)
    console = Console()
    console.print(table)
    console.print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} (averaged over the last minute, this included)"
    )


def shown(amount: float) -> str:
    """Three digits at least."""
    return f"{amount:,.0f}" if abs(amount) >= 100 else f"{amount:.3g}"


if __name__ == "__main__":
    sys.exit(main())
