"""Runs of the real program in processes of their own, started by the launchers that users use."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "engine" / "train.py"
BIN = Path(sys.executable).parent
TIMEOUT = 1200  # seconds; generous, because machines are busy

# A model of 60 thousand parameters: every part of the real one, in milliseconds.
TINY = (
    "model.embed_dim=32", "model.depth=2", "model.num_heads=2",
    "objective.decoder_embed_dim=32", "objective.decoder_num_heads=2",
    "optim.global_batch=16", "optim.micro_batch=4", "run.log_every=1", "data.threads=1",
)  # fmt: skip


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(script: Path | str, *arguments: str, launcher: str = "python", ranks: int = 1) -> list[str]:
    """The command line that starts `script` on `ranks` ranks."""
    start = {
        "python": [sys.executable],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", free_port()],
        "deepspeed": [str(BIN / "deepspeed"), "-q", "--num_gpus", str(ranks), "--master_port", free_port()],
    }[launcher]
    return [*start, str(script), *arguments]


def environment(folder: Path) -> dict[str, str]:
    """Compiled extensions would land in `folder`; no progress bars."""
    extensions = folder / "torch_extensions"
    extensions.mkdir(parents=True, exist_ok=True)
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    return os.environ | {"TORCH_EXTENSIONS_DIR": str(extensions), "PATH": path, "CI": "true", "GOMP_SPINCOUNT": "1000"}


@dataclass
class Finished:
    """What a run printed and left behind."""

    returncode: int
    output: str
    folder: Path

    @property
    def metrics(self) -> list[dict]:
        return read_lines(self.folder / "metrics.jsonl")

    @property
    def evaluations(self) -> list[dict]:
        return read_lines(self.folder / "evaluations.jsonl")

    @property
    def losses(self) -> dict[int, str]:
        """Loss by step, as hexadecimal floats: equal text means equal bits."""
        return {line["step"]: line["loss_hex"] for line in self.metrics}

    def newest_checkpoint(self) -> Path:
        return sorted((self.folder / "checkpoints").glob("step_*"))[-1]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(
    folder: Path,
    *arguments: str,
    recipe: str = "vit_ti_mae_demo",
    launcher: str = "python",
    ranks: int = 1,
    succeeds: bool = True,
) -> Finished:
    """Train a tiny model into `folder` from `/`, as a user would; its output is shown where it does not succeed."""
    command = launch(TRAIN, "--recipe", recipe, *TINY, f"run.out={folder}", *arguments, launcher=launcher, ranks=ranks)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT, cwd="/", env=environment(folder.parent)
    )
    if succeeds:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Finished(done.returncode, done.stdout + done.stderr, folder)


def kill_when(ready: Callable[[], bool], command: list[str], folder: Path) -> None:
    """Start a run and kill -9 its launcher and all its ranks as soon as `ready()`."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(folder.parent),
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(["pkill", "-9", "-f", f"run.out={folder}( |$)"], check=False)  # ranks in sessions of their own
    while subprocess.run(["pgrep", "-f", f"run.out={folder}( |$)"], capture_output=True).stdout:
        time.sleep(0.05)


def train_together(folder: Path, *arguments: str, ranks: int = 1) -> str:
    """Several trainings one after the other in the same ranks, as tests/rank_worker.py takes them; what they print."""
    launcher = "torchrun" if ranks > 1 else "python"
    command = launch(ROOT / "tests" / "rank_worker.py", str(folder), *arguments, launcher=launcher, ranks=ranks)
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd="/", env=environment(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr
