"""Check a folder of shards: every hash, both indexes against the tar's headers, counts, names; rebuild lost indexes.

Shards that somebody else made (tools/index_shards.py) are checked against their index.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

# The repository root goes first, so that this file runs from any folder, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.shell import FAILED, run

if TYPE_CHECKING:
    from shards.checking.folder_statistics import Statistics
    from shards.checking.verify import Finding

SHOWN = 50  # findings in the table
EPILOG = """examples:
  python tools/verify_shards.py data/imagenet/train
  python tools/verify_shards.py data/imagenet/train --quick --statistics --contact-sheet train.png
  python tools/verify_shards.py data/imagenet/train --decode
  python tools/verify_shards.py data/imagenet/train --repair

Exit code 0: as promised; 1: findings; 2: nothing to check. --repair never touches a tar: it rebuilds the small files
that can be proved by the manifest, and names the command that makes the rest again.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("folder", metavar="DIR", type=Path, help="folder of shards with a manifest or an index")
    depth = result.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="sizes, counts and indexes; does not read the tars")
    depth.add_argument("--decode", action="store_true", help="also decode every image as training does")
    result.add_argument("--repair", action="store_true", help="rebuild small files, then check")
    result.add_argument("--statistics", action="store_true", help="samples per class, sizes, formats, colors")
    result.add_argument("--contact-sheet", type=Path, metavar="FILE", help="write a PNG of images spread over the set")
    result.add_argument("--debug", action="store_true", help="show tracebacks")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(argv)
    return run(lambda: check(args), debug=args.debug)


def check(args: argparse.Namespace) -> int:
    """Repair if asked, verify under a bar, print what was found and what was asked for; 1 if there are findings."""
    from shards.dataset import is_foreign

    if args.contact_sheet and not args.contact_sheet.absolute().parent.is_dir():  # not told after an hour of reading
        raise ValueError(f"--contact-sheet={args.contact_sheet}: no folder for it; make {args.contact_sheet.parent}")
    foreign = is_foreign(args.folder)
    began = time.monotonic()
    if args.repair:
        repair_folder(args.folder, foreign)
    findings = (foreign_findings if foreign else own_findings)(args)
    if findings:
        print_findings(args.folder, findings)
        if not foreign:
            say_command(args.folder, findings)
        return FAILED
    depth = "quick check" if args.quick else "every image decoded" if args.decode else "all tars read"
    describe(args, f"({depth}, {time.monotonic() - began:.1f} s)")
    return 0


def own_findings(args: argparse.Namespace) -> list[Finding]:
    """What is wrong with a folder that tools/make_shards.py made."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from shards.checking.verify import verify

    with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), transient=True) as bar:
        return verify(args.folder, quick=args.quick, decode=args.decode, progress=shown(bar))


def foreign_findings(args: argparse.Namespace) -> list[Finding]:
    """What is wrong with an indexed folder; --quick asks what a training run asks when it starts."""
    from rich.progress import Progress

    from shards.checking.verify import Finding
    from shards.dataset import open_dataset
    from shards.foreign.indexing import check_foreign
    from shards.layout import DataError, MissingData

    if args.quick:
        try:
            open_dataset(args.folder)
        except MissingData:
            raise
        except DataError as error:
            return [Finding(args.folder.name, "", str(error))]
        return []
    with Progress(transient=True) as bar:
        return check_foreign(args.folder, args.decode, progress=shown(bar))


def shown(bar) -> Callable[[int, int], None]:
    """A function (done, all) that moves a bar."""
    task = bar.add_task("", total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


def repair_folder(folder: Path, foreign: bool) -> None:
    """Rebuild what can be, and say so."""
    if foreign:
        raise ValueError(f"repair={folder}: its index is rebuilt by python tools/index_shards.py {folder}")
    from shards.checking.repair import repair

    rebuilt = repair(folder)
    say(f"{folder}: rebuilt {', '.join(rebuilt)}" if rebuilt else f"{folder}: nothing could or had to be rebuilt")


def say_command(folder: Path, findings: list[Finding]) -> None:
    """How to get the files with findings again."""
    from shards.checking.repair import again

    if command := again(folder, [finding.file for finding in findings]):
        say("Try --repair; what it leaves is made again, from the same source, by")
        say(f"  {command}")


def describe(args: argparse.Namespace, how: str) -> None:
    """The good end: what the folder holds, and the views of it that were asked for."""
    from shards.dataset import open_dataset

    dataset = open_dataset(args.folder)
    say(f"{args.folder}: {len(dataset):,} samples in {len(dataset.paths):,} shards are as promised {how}")
    if args.statistics:
        from shards.checking.folder_statistics import statistics_of

        print_statistics(statistics_of(dataset))
    if args.contact_sheet:
        from shards.checking.contact_sheet import contact_sheet

        contact_sheet(dataset).save(args.contact_sheet, "PNG")
        say(f"contact sheet: {args.contact_sheet}")


def print_statistics(found: Statistics) -> None:
    """A table of numbers."""
    from rich.console import Console
    from rich.table import Table

    def joined(values: tuple) -> str:
        return " / ".join(f"{value:,g}" if isinstance(value, float) else f"{value:,}" for value in values)

    def shares(counts) -> str:
        return ", ".join(f"{name} {count / found.looked_at:.1%}" for name, count in counts.most_common())

    table = Table(title="statistics", title_justify="left", show_header=False, box=None)
    table.add_row("classes", f"{found.classes:,}")
    table.add_row("samples per class, min / median / max", joined(found.per_class))
    table.add_row("samples without a label", f"{found.unlabelled:,}")
    for name, values in found.pixels.items():
        table.add_row(f"{name} in pixels, min / 5 % / median / 95 % / max", joined(values))
    table.add_row("bytes of an image, min / 5 % / median / 95 % / max", joined(found.bytes))
    table.add_row(f"formats of {found.looked_at:,} images", shares(found.formats))
    table.add_row(f"colors of {found.looked_at:,} images", shares(found.colors))
    Console().print(table, soft_wrap=True)


def print_findings(folder: Path, findings: list[Finding]) -> None:
    """A table of at most `SHOWN` findings."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("file", "sample", "problem", title=Text(f"{folder}: {len(findings):,} findings", style="red"))
    for finding in findings[:SHOWN]:
        table.add_row(*(Text(text, overflow="fold") for text in finding))
    console = Console()
    console.print(table)
    if len(findings) > SHOWN:
        console.print(f"... and {len(findings) - SHOWN:,} more")


def say(text: str) -> None:
    """One plain line."""
    from rich.console import Console

    Console().print(text, soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
