"""Is this machine ready? Versions, GPU, decoding, DeepSpeed, shared memory and disk, with a remedy for each finding."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

# Started as a script, tools/ is first on the path; the repository's root belongs there, installed or not.
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from engine import shell

if TYPE_CHECKING:
    from rich.text import Text

EXAMPLE = "example:\n  python tools/doctor.py --data data/imagenet/train"
OK, NOTE, BAD = "ok", "note", "BAD"
STYLES = {OK: "green", NOTE: "yellow", BAD: "bold red"}
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
GIB = 2**30
MIN_SHM, MIN_DISK, MIN_MAPS, MIN_FILES = 1 * GIB, 20 * GIB, 65_530, 1024
MAX_DIFFERENCE = 1.0  # mean, of 255: what the graphs promise against PIL


class Finding(NamedTuple):
    """One line of the report."""

    what: str
    state: str
    text: str
    remedy: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of shards to look at as well")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where runs will be written (default: runs)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    return shell.run(lambda: report(args.data, args.out), debug=args.debug)


class Check(NamedTuple):
    """A part of the examination: its findings, and what helps where it cannot even be made."""

    name: str
    findings: Callable[[], Iterator[Finding]]
    remedy: str


def checks(data: Path | None, out: Path) -> list[Check]:
    found = [
        Check("packages", versions, "install again: make setup"),
        Check("gpu", devices, "install torch again: make setup; then look at nvidia-smi"),
        Check("decoding", decoding, "install DALI again: make setup"),
        Check("deepspeed", deepspeed_state, "install DeepSpeed again: make setup"),
        Check("memory", memory, "in a container: mount /proc and /dev/shm (--shm-size=8g)"),
        Check("disk", partial(disk, out), "choose another folder: --out DIR here, run.out=DIR when training"),
    ]
    if data is not None:
        remedy = "name a folder that tools/make_shards.py has written; tools/verify_shards.py looks at one closely"
        found.append(Check("data", partial(shards, data), remedy))
    return found


def report(data: Path | None, out: Path) -> int:
    """Print every finding as it is made; 1 if one is bad."""
    from rich.console import Console

    console, bad = Console(highlight=False, soft_wrap=True), 0
    with console.status("looking at this machine") as status:
        for check in checks(data, out):
            status.update(f"looking at {check.name}")
            for finding in tried(check):
                bad += finding.state == BAD
                console.print(line(finding))
    console.print("[bold red]not ready[/]" if bad else "[green]ready[/]")
    return 1 if bad else 0


def line(finding: Finding) -> Text:
    """A finding in colour. Names of files may look like rich's markup, so none is read from them."""
    from rich.text import Text

    remedy = f"\n                  -> {finding.remedy}" if finding.remedy else ""
    return Text.assemble((f"{finding.state:4}", STYLES[finding.state]), f" {finding.what:12} {finding.text}{remedy}")


def tried(check: Check) -> Iterator[Finding]:
    """The findings of a check; one that fails is a finding itself."""
    try:
        yield from check.findings()
    except Exception as error:  # noqa: BLE001  a doctor must not die of what it finds
        yield Finding(check.name, BAD, f"{type(error).__name__}: {error}", check.remedy)


def versions() -> Iterator[Finding]:
    """Python and every package, against what the tests ran with."""
    yield Finding("python", OK, f"{platform.python_version()} on {platform.platform()}")
    for name, tested in tested_versions().items():
        names = DALI if name in DALI else (name,)
        installed = {other: version for other in names if (version := version_of(other))}
        if not installed:
            yield Finding(name, BAD, "is not installed", f"pip install {name}=={tested}")
        for other, version in installed.items():
            same = version.partition("+")[0] == tested
            yield Finding(other, OK if same else NOTE, version + ("" if same else f" (tested with {tested})"))


def tested_versions() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def devices() -> Iterator[Finding]:
    """GPUs as torch sees them, and cores."""
    import torch

    yield Finding("cores", OK, f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}")
    if not torch.cuda.is_available():
        reason = "this torch is a CPU build" if torch.version.cuda is None else f"CUDA {torch.version.cuda} finds none"
        yield Finding("gpu", NOTE, f"none ({reason}): everything runs on the CPU", "README, Install, for a GPU machine")
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield Finding("gpu", OK, f"{card.name}, {card.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}")
    if not torch.cuda.is_bf16_supported():
        yield Finding("bf16", BAD, "not supported by this GPU", "train with precision=fp32 or precision=fp16")


def decoding() -> Iterator[Finding]:
    """DALI's graph for MAE against PIL on the same draws."""
    import torch

    from recipes.schema import Data
    from shards.augment.parity import dali_images, make_pictures, mean_difference, pil_images

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_pictures(Path(folder), 8, (200, 400))
        ids, ours = dali_images(dataset, "pretrain_mae", Data(), device)
        difference = mean_difference(ours, pil_images(dataset, "pretrain_mae", Data(), ids))
    state = OK if difference <= MAX_DIFFERENCE else BAD
    remedy = "" if state == OK else "train with the DALI version of constraints.txt; images would look different"
    yield Finding("decoding", state, f"DALI and PIL differ by {difference:.2f} of 255 on average (limit 1.0)", remedy)


def deepspeed_state() -> Iterator[Finding]:
    """DeepSpeed imports, knows the device, and needs to compile nothing."""
    import torch

    from engine.runtime import import_deepspeed

    deepspeed = import_deepspeed()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    available = torch.distributed.is_backend_available(backend)
    yield Finding("deepspeed", OK if available else BAD, f"{deepspeed.__version__}, ranks talk by {backend}")
    launcher = Path(sys.executable).parent / "deepspeed"
    if not launcher.exists() and not shutil.which("deepspeed"):
        yield Finding("launcher", BAD, "no `deepspeed` command", "activate the environment, or use torchrun")


def memory() -> Iterator[Finding]:
    """Shared memory, memory maps and open files: what the reader of shards lives on."""
    free = shutil.disk_usage("/dev/shm").free
    remedy = "" if free >= MIN_SHM else "in a container: --shm-size=8g or --ipc=host"
    yield Finding("shared mem", OK if free >= MIN_SHM else NOTE, f"{free / GIB:.1f} GiB free in /dev/shm", remedy)
    maps = int(Path("/proc/sys/vm/max_map_count").read_text())
    remedy = "" if maps >= MIN_MAPS else "sysctl vm.max_map_count=262144 (fewer maps, shorter segments)"
    yield Finding("memory maps", OK if maps >= MIN_MAPS else NOTE, f"{maps:,} per process", remedy)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    remedy = "" if files >= MIN_FILES else "ulimit -n 65536"
    yield Finding("open files", OK if files >= MIN_FILES else NOTE, f"{files:,} per process", remedy)


def disk(out: Path) -> Iterator[Finding]:
    """Room for checkpoints."""
    place = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    remedy = "" if free >= MIN_DISK else "a ViT-L checkpoint takes about 6 GB and three are there at a time"
    yield Finding("disk", OK if free >= MIN_DISK else NOTE, f"{free / GIB:.0f} GiB free at {place}", remedy)
    if not os.access(place, os.W_OK):
        yield Finding("disk", BAD, f"{place} cannot be written", "choose another folder: run.out=DIR")


def shards(data: Path) -> Iterator[Finding]:
    """A folder of shards, quickly checked."""
    dataset = importlib.import_module("shards.dataset").open_dataset(data)
    text = f"{data}: {len(dataset):,} samples in {len(dataset.paths):,} shards, {len(dataset.classes):,} classes"
    yield Finding("data", OK, text)


if __name__ == "__main__":
    sys.exit(main())
