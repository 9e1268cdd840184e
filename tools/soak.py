"""Kill a training again and again, resume it each time, and compare it with the same run undisturbed (`make soak`).

Every round is broken off in its own way at its own moment: the whole job or one rank is killed, the job is asked to
stop, a save is cut at a named point, or a byte of the newest checkpoint is changed. Then the same command goes on
with `--resume auto`. A finished run is begun anew until the kills or the minutes are used up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

# Started as a script, tools/ is first on the path; the repository's root belongs there, installed or not.
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from rich.console import Console

from engine import shell

RECIPE = "vit_ti_mae_demo"
TINY = ("model.embed_dim=32", "model.depth=2", "model.num_heads=2", "objective.decoder_embed_dim=32",
        "objective.decoder_num_heads=2", "optim.global_batch=16", "optim.micro_batch=4", "data.threads=1",
        "run.log_every=1", "run.save_every=10", "run.keep=3", "run.timeout=60")  # fmt: skip
WAYS = ("job", "rank", "term", "save", "byte")
SAVE_POINTS = ("save.begin", "save.state", "save.weights", "save.hashed", "save.manifest", "save.rename",
               "save.published", "prune.begin", "prune.middle")  # fmt: skip
MARK = ".maskwright-soak"  # says that a folder is ours to empty
LIMIT = 120.0  # seconds that a run which was struck has to end, and one that starts to make its first step
LAUNCHERS = {1: ("python", "deepspeed"), 2: ("torchrun", "deepspeed")}
EXAMPLE = """examples:
  python tools/soak.py --kills 20 --minutes 20
  make soak SOAK="--kills 100 --minutes 120 --seed 3" """


@dataclass
class Tally:
    """What happened. Everything but the first three must be 0."""

    kills: int = 0
    resumes: int = 0
    resumes_exact: int = 0
    checkpoints_lost: int = 0
    hangs: int = 0
    orphans: int = 0
    ways: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WAYS, 0))
    remarks: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The result in one line."""
        return (
            f"kills {self.kills}, resumes exact {self.resumes_exact} of {self.resumes}, "
            f"checkpoints lost {self.checkpoints_lost}, hangs {self.hangs}, orphans {self.orphans}"
        )

    def is_clean(self) -> bool:
        losses = self.checkpoints_lost + self.hangs + self.orphans
        return losses == 0 and self.resumes == self.resumes_exact and self.kills > 0


class Soak:
    """One session: a reference run, then runs that are struck."""

    def __init__(self, folder: Path, ranks: int, steps: int, seed: int) -> None:
        self.folder, self.ranks, self.steps = folder, ranks, steps
        self.random, self.tally, self.console = random.Random(seed), Tally(), Console(highlight=False, soft_wrap=True)

    def prepare(self) -> None:
        """Pictures, shards, and the losses of the run that nobody disturbs."""
        from shards.augment.parity import make_pictures

        make_pictures(self.folder, 80, (40, 64))
        process = self.start("reference", "torchrun" if self.ranks > 1 else "python")
        if process.wait() != 0:
            raise RuntimeError(f"the undisturbed run failed; see {self.folder / 'reference.txt'}")
        self.reference = losses(self.folder / "reference")

    def start(self, name: str, launcher: str, fault: str = "") -> subprocess.Popen:
        """`--resume auto` in the folder `name`, as the leader of a process group; what it prints goes to a file."""
        places = [f"data.train={self.folder / 'shards'}", "data.val=", f"run.out={self.folder / name}"]
        settings = ["--recipe", RECIPE, *TINY, f"run.steps={self.steps}", *places, "--resume", "auto"]
        command = [*launch(launcher, self.ranks), *settings]
        variables = os.environ | {"CI": "true"} | ({"MASKWRIGHT_FAULT": fault} if fault else {})
        with open(self.folder / f"{name}.txt", "a") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, env=variables, start_new_session=True)

    def run(self, kills: int, deadline: float) -> None:
        """Rounds until so many kills are done or the time is over."""
        number = 0
        while self.tally.kills < kills and time.monotonic() < deadline:
            name = f"run_{number:03d}"
            for way in self.ways():
                finished = self.round(name, way)
                self.console.print(f"{name}  {way:5}  {self.tally.line()}", markup=False)
                if finished or self.tally.kills >= kills or time.monotonic() > deadline:
                    break
            if self.is_good(name):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            number += 1

    def ways(self) -> Iterator[str]:
        """Every way once in each turn, in a random order."""
        while True:
            yield from self.random.sample(WAYS, len(WAYS))

    def round(self, name: str, way: str) -> bool:
        """Start, strike, look at what is left. Whether the run came to its end instead."""
        run, before = self.folder / name, intact(self.folder / name)
        done = last_step(run)
        point = self.random.choice(SAVE_POINTS)
        fault = f"{point}:kill@{self.random.randint(1, 3)}" if way == "save" else ""
        if fault and self.ranks > 1 and not point.startswith(("save.weights", "save.manifest", "save.rename", "prune")):
            fault += f"#{self.random.randrange(self.ranks)}"
        process = self.start(name, self.random.choice(LAUNCHERS[self.ranks]), fault)
        goal = done + self.random.randint(0, 30)
        struck = self.strike(process, run, way, goal)
        self.wait_for_the_end(process, run)
        self.tally.resumes += done > 0
        self.tally.resumes_exact += done > 0 and self.is_good(name)
        self.tally.kills += struck
        self.tally.ways[way] += struck
        after = intact(run)
        if before and (not after or after[0] < before[0]):
            self.tally.checkpoints_lost += 1
            self.remark(f"{name}: checkpoints {before} before, {after} after {way}")
        if way == "byte" and struck and len(after) > 1:
            spoil(run / "checkpoints" / f"step_{after[0]:08d}", self.random)
        return last_step(run) >= self.steps and not struck

    def strike(self, process: subprocess.Popen, run: Path, way: str, goal: int) -> bool:
        """Wait until the run has done `goal` steps and a bit, then end it; False where it was over before."""
        deadline = time.monotonic() + LIMIT
        while last_step(run) < goal or way == "save":
            if process.poll() is not None:
                return way == "save" and process.returncode != 0
            if time.monotonic() > deadline and last_step(run) < goal:
                return True  # it hangs: wait_for_the_end counts it
            time.sleep(0.02)
        time.sleep(self.random.random() * 0.3)
        if process.poll() is not None:
            return False
        if way == "term":
            os.killpg(process.pid, signal.SIGTERM)
        elif way == "rank":
            kill_a_rank(run, self.random.randrange(self.ranks))
        else:
            os.killpg(process.pid, signal.SIGKILL)
        return True

    def wait_for_the_end(self, process: subprocess.Popen, run: Path) -> None:
        """Nothing of the job may be left after a while; what is left is counted and killed."""
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.tally.hangs += 1
            self.remark(f"{run.name}: the launcher runs {LIMIT:.0f} s after the strike")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        deadline = time.monotonic() + LIMIT
        while (left := ranks_of(run)) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.tally.orphans += len(left)
        for pid in left:
            os.kill(pid, signal.SIGKILL)

    def is_good(self, name: str) -> bool:
        """Whether every loss so far is bitwise that of the reference."""
        found = losses(self.folder / name)
        wrong = [step for step, loss in found.items() if loss != self.reference.get(step)]
        if wrong:
            self.remark(f"{name}: other losses from step {min(wrong)} on")
        return not wrong

    def remark(self, text: str) -> None:
        self.tally.remarks.append(text)
        self.console.print(f"FOUND: {text}", style="red", markup=False)


def launch(launcher: str, ranks: int) -> list[str]:
    """The beginning of a command line that starts so many ranks."""
    beside = Path(sys.executable).parent
    train = str(ROOT / "engine" / "train.py")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {
        "python": [sys.executable, train],
        "torchrun": [str(beside / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", port, train],
        "deepspeed": [str(beside / "deepspeed"), "-q", "--num_gpus", str(ranks), "--master_port", port, train],
    }[launcher]


def losses(run: Path) -> dict[int, str]:
    """Loss by step, as hexadecimal floats; a line cut by a kill is left out."""
    found = {}
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_text().splitlines():
            if line.endswith("}"):
                record = json.loads(line)
                found[record["step"]] = record["loss_hex"]
    return found


def last_step(run: Path) -> int:
    return max(losses(run), default=0)


def intact(run: Path) -> list[int]:
    """Steps of the complete checkpoints whose files all have their hashes, newest first."""
    import torch

    from engine.checkpoints.folders import complete_checkpoints
    from engine.checkpoints.verifying import damage, manifest_of
    from engine.runtime import Runtime, import_deepspeed

    import_deepspeed()  # quietly, before a file of its own does it
    alone = Runtime(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
    steps = []
    for folder in complete_checkpoints(run / "checkpoints"):
        manifest, problem = manifest_of(folder)
        if manifest is not None and not problem and damage(folder, manifest, alone) is None:
            steps.append(manifest["step"])
    return steps


def spoil(checkpoint: Path, chance: random.Random) -> None:
    """Change one byte of one of a checkpoint's files."""
    victim = chance.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size))
    data = bytearray(victim.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    victim.write_bytes(data)


def kill_a_rank(run: Path, rank: int) -> None:
    """SIGKILL for the process that a rank's heartbeat names."""
    heartbeat = json.loads((run / "logs" / f"rank_{rank:05d}.heartbeat.json").read_text())
    os.kill(heartbeat["pid"], signal.SIGKILL)


def ranks_of(run: Path) -> list[int]:
    """Processes that train in this folder."""
    found = subprocess.run(["pgrep", "-f", f"run.out={run}( |$)"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def emptied(folder: Path) -> Path:
    """An empty folder for this session; ValueError where something is in it that is not a session's."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise ValueError(f"--out {folder}: holds something else; choose another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="how often a run is struck (20)")
    parser.add_argument("--minutes", type=float, default=20.0, help="no new round after so many minutes (20)")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=2, help="ranks of the runs (2)")
    parser.add_argument("--steps", type=int, default=200, help="steps of a run (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the ways (0)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "soak", help="folder, emptied first (runs/soak)")
    args = parser.parse_args()
    folder = emptied(args.out.absolute())
    soak = Soak(folder, args.ranks, args.steps, args.seed)
    began = time.monotonic()
    soak.prepare()
    soak.run(args.kills, began + 60 * args.minutes)
    settings = {"ranks": args.ranks, "steps": args.steps, "seed": args.seed}
    record = {**settings, **asdict(soak.tally), "minutes": round((time.monotonic() - began) / 60, 1)}
    (folder / "soak.json").write_text(json.dumps(record, indent=1) + "\n")
    soak.console.print(soak.tally.line(), markup=False)
    return 0 if soak.tally.is_clean() else 1


if __name__ == "__main__":
    sys.exit(shell.run(main, debug="--debug" in sys.argv))
