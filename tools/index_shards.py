"""Index WebDataset shards that somebody else made, so that they are trained on where they are; nothing is converted.

DIR is a folder of tars: timm/imagenet-1k-wds, imagenet-train-{000000..001281}.tar, CLIP-benchmark's, or any other with
one image per sample (jpg, jpeg, png, webp) and a label, if there is one, in cls or json. A part of a folder is named
by a pattern: 'DIR/imagenet1k-train-*.tar'. The tars are only read. The index goes to DIR/.maskwright, or to the cache
folder where DIR cannot be written.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

# The repository root goes first, so that this file runs from any folder, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.shell import run

if TYPE_CHECKING:
    from shards.checking.verify import Finding
    from shards.foreign.indexing import Progress, Report

SHOWN = 20  # rejected images or findings that are listed
EPILOG = """examples:
  python tools/index_shards.py /data/imagenet-1k-wds/train
  python tools/index_shards.py '/data/timm/imagenet1k-train-*.tar'
  python tools/index_shards.py /data/imagenet-1k-wds/train --check --decode

A rerun reads all headers again and writes what changed. Exit code 0: indexed, or as it was indexed; 1: --check found
something; 2: not a set that can be used as it is.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("place", metavar="DIR", type=Path, help="folder of tars, or a pattern in it")
    result.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    result.add_argument(
        "--max-bad-fraction", type=float, default=0.001, metavar="F", help="more unusable images fail (%(default)s)"
    )
    result.add_argument("--classnames", type=Path, metavar="FILE", help="one class name per line, in order")
    result.add_argument("--check", action="store_true", help="compare the tars with their index; write nothing")
    result.add_argument("--decode", action="store_true", help="with --check: decode every image as training does")
    result.add_argument("--debug", action="store_true", help="show tracebacks")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(argv)
    return run(lambda: check(args) if args.check else index(args), debug=args.debug)


def index(args: argparse.Namespace) -> int:
    """Look, say what is there, index, sum up."""
    from shards.foreign.indexing import index_shards, look

    if args.decode:
        raise ValueError("--decode: images are decoded with --check only")
    tars, components = look(args.place)
    listed = ", ".join(f"[{one}]" for one in dict.fromkeys(components))
    say(f"{args.place}: {len(tars):,} tars, the first samples hold {listed}")
    began = time.monotonic()
    with bar() as progress:
        report = index_shards(
            args.place,
            num_workers=args.workers,
            max_bad_fraction=args.max_bad_fraction,
            class_names=args.classnames,
            progress=progress,
        )
    print_report(args.place, report, time.monotonic() - began)
    return 0


def check(args: argparse.Namespace) -> int:
    """Compare the index with the tars; 1 if anything is found."""
    from shards.foreign.indexing import check_foreign

    began = time.monotonic()
    with bar() as progress:
        findings = check_foreign(args.place, args.decode, num_workers=args.workers, progress=progress)
    if findings:
        print_findings(findings)
        return 1
    what = "every image decodes" if args.decode else "headers, labels and image headers"
    say(f"{args.place}: the tars are as they were indexed ({what}, {time.monotonic() - began:.1f} s)")
    return 0


@contextmanager
def bar() -> Iterator[Progress]:
    """A progress bar over tars."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("tars"), TimeRemainingColumn())
    with Progress(*columns, transient=True, console=Console(stderr=True)) as shown:
        task = shown.add_task("", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def print_report(place: Path, report: Report, seconds: float) -> None:
    """What was found, what is odd, and what to type next."""
    from shards.foreign.hints import shortfalls
    from shards.foreign.index_files import split_place

    found, total = report.index, sum(report.samples.values())
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in Counter(found.rejected).most_common())
    labels = f"{len(found.classes):,} classes from {found.labels}, their names from {found.named_by}"
    override = f"data.train={shlex.quote(str(place.resolve()))}"
    rows = {
        "samples": f"{found.samples:,} in {len(found.tars):,} tars ({report.made:,} indexed now, {seconds:.1f} s)",
        "components": ", ".join(f"[{names}] {count:,}" for names, count in Counter(found.components).most_common(5)),
        "labels": labels if found.classes else "none: fit for pre-training, not for k-NN and probes",
        "left out": f"{total - found.samples:,} of {total:,} images" + (f" ({reasons})" if reasons else ""),
        "index": str(report.home),
        "train": f"deepspeed engine/train.py --recipe vit_b_mae {override}",
    }
    for name, text in rows.items():
        say(f"  {name:12}{text}")
    for tar, image in report.rejected[:SHOWN]:
        say(f"  left out    {tar}:{image.path}: {image.reason}: {image.detail}")
    if len(report.rejected) > SHOWN:
        say(f"  left out    ... and {len(report.rejected) - SHOWN:,} more")
    for note in shortfalls(split_place(place)[0], report.samples):
        say(f"  warning     {note}", style="yellow")


def print_findings(findings: Sequence[Finding]) -> None:
    """One line each, at most `SHOWN`."""
    for finding in findings[:SHOWN]:
        say(str(finding), style="red")
    if len(findings) > SHOWN:
        say(f"... and {len(findings) - SHOWN:,} more", style="red")


def say(line: str, style: str = "") -> None:
    """A line on stdout; names of files may hold bytes that no terminal can show."""
    from rich.console import Console
    from rich.text import Text

    shown = line.encode("utf-8", "backslashreplace").decode("utf-8")
    Console().print(Text(shown, style=style), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
