"""Convert images into WebDataset shards with indexes, a manifest and timm's _info.json.

SRC is a folder with one folder of images per class, an official tar of ILSVRC2012 (not unpacked), a folder of parquet
files (Hugging Face), or a list of lines `PATH LABEL`. Shards that exist are used in place: tools/index_shards.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

# The repository root goes first, so that this file runs from any folder, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.shell import run
from shards.making.planning import Options, Plan

if TYPE_CHECKING:
    from shards.making.conversion import Report
    from shards.sources.listing import Listing

EPILOG = """examples:
  python tools/make_shards.py /data/imagenet/train data/imagenet/train
  python tools/make_shards.py /data/imagenet/val data/imagenet/val --no-shuffle
  python tools/make_shards.py ILSVRC2012_img_train.tar data/imagenet/train
  python tools/make_shards.py ILSVRC2012_img_val.tar data/val --labels ILSVRC2012_devkit_t12.tar.gz --no-shuffle
  python tools/make_shards.py hub/imagenet-1k data/imagenet/val --source-split validation --no-shuffle
  python tools/make_shards.py images.tsv data/mine --root /data/images
  python tools/make_shards.py /data/imagenet/train data/imagenet/train --scheduler tcp://10.0.0.1:8786

Killed or interrupted, the same command goes on where it was. Original bytes are kept unless --short-side is given.
"""


def parser() -> argparse.ArgumentParser:
    """The command line; defaults are those of `shards.making.planning.Options`."""
    default = Options()
    result = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("source", metavar="SRC", type=Path, help="folder, official tar, or list")
    result.add_argument(
        "--labels", type=Path, metavar="FILE", help="of the validation tar: devkit, or lines `FILE WNID`"
    )
    result.add_argument("--root", type=Path, metavar="DIR", help="of a list's paths (default: the list's folder)")
    result.add_argument("--source-split", default="train", metavar="NAME", help="of parquet files (%(default)s)")
    result.add_argument("out", metavar="OUT", type=Path, help="new or half-made folder of shards")
    result.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    result.add_argument(
        "--scheduler", metavar="ADDRESS", help="of dask.distributed: its workers make the shards, not this machine's"
    )
    result.add_argument("--seed", type=int, default=default.seed, metavar="S", help="of the shuffle (%(default)s)")
    result.add_argument("--no-shuffle", action="store_true", help="sorted order, for validation sets")
    result.add_argument("--samples-per-shard", type=int, default=default.samples_per_shard, metavar="N")
    result.add_argument(
        "--max-bad-fraction", type=float, default=0.001, metavar="F", help="more rejects fail (%(default)s)"
    )
    result.add_argument(
        "--short-side", type=int, default=0, metavar="PX", help="resize larger images to this and re-encode them"
    )
    result.add_argument("--quality", type=int, default=default.quality, metavar="Q", help="JPEG, with --short-side")
    result.add_argument("--split", help="name for timm (default: train, or validation with --no-shuffle)")
    result.add_argument("--follow-symlinks", action="store_true", help="accept links that leave SRC")
    result.add_argument("--dry-run", action="store_true", help="plan, estimate the time, write nothing")
    result.add_argument("--debug", action="store_true", help="show tracebacks")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(argv)
    again = "interrupted; finished shards are kept, run the same command again to go on"
    return run(lambda: convert_folder(args), debug=args.debug, interrupted=again)


def convert_folder(args: argparse.Namespace) -> int:
    """List, plan, convert, sum up."""
    from rich.console import Console

    from shards.making.conversion import check_limits
    from shards.making.planning import make_plan

    if args.scheduler and args.workers is not None:
        raise ValueError(f"workers={args.workers}: the cluster has its own; leave it out with --scheduler")
    check_limits(args.workers, args.max_bad_fraction)
    listing = list_images(args)
    options = Options(
        samples_per_shard=args.samples_per_shard,
        shuffle=listing.shuffled and not args.no_shuffle,
        seed=args.seed,
        short_side=args.short_side,
        quality=args.quality,
        split=args.split or ("validation" if args.no_shuffle else "train"),
    )
    with Console(stderr=True).status(f"planning {len(listing.entries):,} images"):
        plan = make_plan(listing, options)
    if args.dry_run:
        print_plan(plan, min(args.workers or os.cpu_count() or 1, len(plan.shards)))
        return 0
    began = time.monotonic()
    report = convert_with_bar(plan, args)
    print_report(report, time.monotonic() - began, args.out)
    return 0


def list_images(args: argparse.Namespace) -> Listing:
    """The listing, with a bar and warnings about what looks odd."""
    from rich.progress import Progress

    from shards.sources.find import list_source

    with Progress(transient=True) as bar:
        task = bar.add_task("listing", total=None)
        listing = list_source(
            args.source,
            labels=args.labels,
            root=args.root,
            split=args.source_split,
            follow_symlinks=args.follow_symlinks,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if listing.empty:
        names = ", ".join(map(repr, listing.empty[:5])) + (" ..." if len(listing.empty) > 5 else "")
        warn(f"{len(listing.empty)} class folders are empty, their labels stay unused: {names}")
    if listing.ignored:
        warn(f"{listing.ignored:,} files are ignored (hidden, or beside the class folders)")
    for note in listing.notes:
        warn(note)
    if not listing.shuffled and not args.no_shuffle:
        warn("rows of parquet are kept in their order (training shuffles samples, not shards)")
    return listing


def convert_with_bar(plan: Plan, args: argparse.Namespace) -> Report:
    """The conversion under a bar with rate, time left and rejects."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from shards.making.conversion import convert

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images  {task.fields[rate]:,.0f}/s  {task.fields[rejected]:,} rejected  left"),
        TimeRemainingColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("", total=plan.images, rate=0.0, rejected=0)

        def progress(kept: int, rejected: int) -> None:
            speed = bar.tasks[0].speed or 0.0
            bar.update(task, completed=kept + rejected, rejected=rejected, rate=speed)

        common = {"max_bad_fraction": args.max_bad_fraction, "progress": progress}
        if args.scheduler:
            from shards.making.cluster import convert_on_cluster

            return convert_on_cluster(plan, args.out, args.scheduler, **common)
        return convert(plan, args.out, num_workers=args.workers, **common)


def print_plan(plan: Plan, num_workers: int) -> None:
    """What --dry-run says; a few images are converted to tell the time."""
    from rich.console import Console

    from shards.making.estimate import estimate

    with Console(stderr=True).status("converting a few images"):
        guess = estimate(plan, num_workers)
    listing = plan.listing
    print_rows(
        "plan (nothing was written)",
        {
            "images": f"{plan.images:,}",
            "classes": f"{len(listing.classes):,}",
            "bytes": f"{listing.bytes:,}",
            "shards": f"{len(plan.shards):,} of {plan.options.samples_per_shard:,} samples",
            "bytes of shards": f"about {guess.bytes:,}",
            "time": f"about {duration(guess.seconds)} with {num_workers} workers",
            "estimated from": f"{guess.sampled:,} images converted on one core, {guess.rejected:,} rejected",
            "order": f"shuffled with seed {plan.options.seed}" if plan.options.shuffle else "sorted",
            "rejected unread": f"{sum(entry.problem is not None for entry in listing.entries):,}",
        },
    )


def duration(seconds: float) -> str:
    """Seconds, minutes or hours with two digits that mean something."""
    unit, size = next((u, n) for u, n in (("hours", 3600), ("minutes", 60), ("seconds", 1)) if seconds >= n or n == 1)
    return f"{seconds / size:.1f} {unit}"


def print_report(report: Report, seconds: float, out: Path) -> None:
    """The end of a run: in = written + quarantined, and what to type next."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in report.quarantined.most_common())
    rate = f", {report.images / seconds:,.0f} images/s" if report.made == report.shards else ""
    print_rows(
        f"{out}: complete{'' if report.made else ', all shards were there before'}",
        {
            "in": f"{report.images:,}",
            "written": f"{report.written:,}",
            "quarantined": f"{report.quarantined.total():,}" + (f" ({reasons})" if reasons else ""),
            "shards": f"{report.shards:,} ({report.made:,} made now)",
            "bytes": f"{report.bytes:,}",
            "classes": f"{report.classes:,}",
            "time": f"{seconds:.1f} s{rate}",
            "next": f"python tools/verify_shards.py {shlex.quote(str(out))}",
        },
    )


def print_rows(title: str, rows: dict[str, str]) -> None:
    """A two-column table; plain text where there is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, Text(value, overflow="fold"))
    Console().print(table, soft_wrap=True)


def warn(message: str) -> None:
    """One yellow line on stderr."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
