"""Check a folder of shards against its manifest: every hash, both indexes against the tar's headers, counts, names."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

# The repository root goes first, so that this file runs from any folder, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.shell import run

SHOWN = 50  # findings in the table
EPILOG = """examples:
  python tools/verify_shards.py data/imagenet/train
  python tools/verify_shards.py data/imagenet/train --quick

Exit code 0: as promised; 1: findings; 2: nothing to check. To repair, delete the files that are named and run the
command again that made the folder: only they are made anew.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("folder", metavar="DIR", type=Path, help="folder that tools/make_shards.py made")
    result.add_argument("--quick", action="store_true", help="sizes, counts and indexes; does not read the tars")
    result.add_argument("--debug", action="store_true", help="show tracebacks")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(argv)
    return run(lambda: check(args.folder, args.quick), debug=args.debug)


def check(folder: Path, quick: bool) -> int:
    """Verify under a bar, then print the findings; 1 if there are any."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from shards.layout import read_manifest
    from shards.verify import verify

    began = time.monotonic()
    with Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task("", total=None)
        findings = verify(
            folder, quick=quick, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    if findings:
        print_findings(folder, findings)
        return 1
    manifest = read_manifest(folder)
    Console().print(
        f"{folder}: {manifest.samples:,} samples in {len(manifest.shards):,} shards are as promised "
        f"({'quick check' if quick else 'every byte'}, {time.monotonic() - began:.1f} s)",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    return 0


def print_findings(folder: Path, findings: list) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
