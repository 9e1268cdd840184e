"""Ranks that save in a loop without training, and are killed while they do; or whose disks fail one at a time.

Usage: save_worker.py kills FOLDER DATA RANKS COUNT SEED     kill COUNT times at random or at fault points, resume after
       save_worker.py failures FOLDER DATA                   two ranks, of which one cannot write

The ranks are forked from a process that has imported everything, which saves their start-up. The last line of the
output is JSON. Every save writes the step's number into all weights and all optimizer state, so that a resume can tell
whether what it loaded is of one save.
"""

from __future__ import annotations

import json
import os
import random
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import shell

shell.calm_threads()  # before torch

import torch
from runs import TINY, free_port

from engine import fault_points
from engine.checkpoints.folders import complete_checkpoints
from engine.checkpoints.keeping import SaveError
from engine.command_line import parse_command
from engine.run_folder import claimed
from engine.runtime import Runtime, import_deepspeed, start
from engine.train import Trainer

LONGEST = 0.4  # seconds from the first save to the kill; a save takes a tenth of a second
PATIENCE = 120.0  # seconds for a rank to say something
AIMED = [
    f"{point}:kill@{number}{rank}"
    for point in ("save.write", "save.state", "save.hashed", "save.manifest", "save.rename", "save.published",
                  "prune.begin", "prune.middle")
    for number in (1, 2)
    for rank in ("#0", "")
]  # fmt: skip


def build(folder: Path, data: Path, runtime: Runtime, *overrides: str) -> Trainer:
    """A trainer that goes on where there is something to go on from, without a loader."""
    command = parse_command(
        ["--recipe", "vit_ti_mae_demo", "--resume=auto", *TINY, f"data.train={data}", "data.val=", f"run.out={folder}",
         "run.steps=1000000", "optim.micro_batch=2", *overrides]
    )  # fmt: skip
    silent = SimpleNamespace(at=lambda *place: None, warn=print, log=SimpleNamespace(write=lambda text: None))
    trainer = Trainer(command, runtime, silent)
    trainer.open_run_folder()
    trainer.loader = SimpleNamespace(data_wait=0.0)
    return trainer


@torch.no_grad()
def mark(trainer: Trainer, step: int) -> None:
    """Write `step` into everything that is saved."""
    for parameter in trainer.objective.parameters():
        parameter.fill_(step)
    for group in trainer.model_engine.optimizer.single_partition_of_fp32_groups:
        group.fill_(step)
    adam = trainer.model_engine.optimizer.optimizer
    for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
        moments = {name: torch.full_like(parameter, step) for name in ("exp_avg", "exp_avg_sq")}
        adam.state[parameter] = {"step": torch.tensor(float(step)), **moments}


def marks(trainer: Trainer) -> set[float]:
    """The steps of which what was loaded is."""
    optimizer = trainer.model_engine.optimizer
    tensors = [*trainer.objective.parameters(), *optimizer.single_partition_of_fp32_groups]
    moments = ("step", "exp_avg", "exp_avg_sq")
    tensors += [state[name] for state in optimizer.optimizer.state.values() for name in moments]
    assert len(optimizer.optimizer.state) == len(optimizer.param_groups)
    return {float(value) for tensor in tensors for value in tensor.detach().unique()}


# --- the ranks ------------------------------------------------------------------------------------------------------


def fork(rank: int, ranks: int, port: str, work: Callable[[Runtime, Callable], None], fault: str = "") -> tuple:
    """Start a rank; its process and the file descriptor of what it says, JSON lines."""
    ours, theirs = os.pipe()
    process = os.fork()
    if process:
        os.close(theirs)
        return process, ours
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"})
    if fault:
        os.environ[fault_points.VARIABLE] = fault
    try:
        work(start(timeout=60), lambda **news: os.write(theirs, (json.dumps(news) + "\n").encode()))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def save_for_ever(runtime: Runtime, say: Callable, folder: Path, data: Path) -> None:
    with claimed(folder, runtime):
        trainer = build(folder, data, runtime, "run.keep=2")
        first = trainer.first_step
        say(resumed=first, loaded=sorted(marks(trainer)) if first else None)
        for step in range(first + 1, first + 1000):
            mark(trainer, step)
            trainer.save(step, last=False)
            say(saved=step)


def lines_of(descriptor: int, until: str, seconds: float) -> bytes:
    """What a rank says until it says `until`, ends, or `seconds` are over."""
    text, deadline = b"", time.monotonic() + seconds
    while f'"{until}"'.encode() not in text:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            break
        part = os.read(descriptor, 65536)
        if not part:
            break
        text += part
    return text


def kill_once(folder: Path, data: Path, ranks: int, luck: random.Random, fault: str) -> dict:
    """Start, let it save, kill; what was resumed from, and the newest step that was said to be saved."""
    port = free_port()
    work = lambda runtime, say: save_for_ever(runtime, say, folder, data)  # noqa: E731
    started = [fork(rank, ranks, port, work, fault) for rank in range(ranks)]
    text = lines_of(started[0][1], "resumed", PATIENCE)
    if fault:
        text += lines_of(started[0][1], "nothing that is ever said", 5.0 if ranks == 1 else 2.0)
    else:
        time.sleep(luck.random() * LONGEST)
    for process, _ in luck.sample(started, len(started)):
        os.kill(process, signal.SIGKILL)
        time.sleep(luck.random() * 0.02)
    for process, _ in started:
        os.waitpid(process, 0)
    text += lines_of(started[0][1], "nothing that is ever said", 1.0)
    for _, descriptor in started:
        os.close(descriptor)
    said = [json.loads(line) for line in text.splitlines()]
    resumed = next((line for line in said if "resumed" in line), None)
    saved = max((line["saved"] for line in said if "saved" in line), default=0)
    return {"fault": fault, "resumed": resumed, "saved": saved}


def kills(folder: Path, data: Path, ranks: int, count: int, seed: int) -> dict:
    """Kill `count` times, half of them at fault points; then one resume more to see that the last one did no harm."""
    luck, tried = random.Random(seed), []
    aimed = luck.sample(AIMED * (count // len(AIMED) + 1), count)
    for number in range(count + 1):
        tried.append(kill_once(folder, data, ranks, luck, aimed[number - 1] if number % 2 else ""))
    lost = exact = 0
    for before, after in zip(tried, tried[1:], strict=False):
        known = max(before["saved"], before["resumed"]["resumed"] if before["resumed"] else 0)
        resumed = after["resumed"] or {"resumed": -1, "loaded": None}
        lost += resumed["resumed"] < known
        exact += resumed["loaded"] in ([float(resumed["resumed"])], None) and resumed["resumed"] >= 0
    left = [path.name for path in folder.glob("checkpoints/broken-*")]
    return {"kills": count, "resumes_exact": exact, "lost": lost, "broken": left, "last": tried[-1]}


# --- failures -------------------------------------------------------------------------------------------------------


def failures(runtime: Runtime, say: Callable, folder: Path, data: Path) -> None:
    """One rank cannot write, in one way after the other; what came of each save."""
    with claimed(folder, runtime):
        trainer = build(folder, data, runtime, "run.keep=1")
        scenes = {
            "well": "",
            "once": "save.write:enospc@1#1",
            "twice": "save.write:enospc@1#1;save.write:enospc@2#1",
            "export": "save.weights:enospc@1#0;save.weights:enospc@2#0",
            "again": "",
            "manifest": "save.manifest:enospc@1#0;save.manifest:enospc@2#0",
            "large": "file size limit",
            "better": "",
            "nan": "not finite",
            "full": "no space",
            "third": "save.rename:enospc@1#0;save.rename:enospc@2#0",
        }
        for step, (name, fault) in enumerate(scenes.items(), start=1):
            outcome = save_with(trainer, step, fault)
            names = sorted(path.name for path in (folder / "checkpoints").iterdir())
            if runtime.is_main:
                say(**{name: outcome, "left": names})


def save_with(trainer: Trainer, step: int, fault: str) -> str:
    fault_points._visits.clear()
    os.environ.pop(fault_points.VARIABLE, None)
    mark(trainer, step)
    if fault == "file size limit" and trainer.runtime.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    elif fault == "not finite" and trainer.runtime.rank == 1:
        next(iter(trainer.model_engine.optimizer.optimizer.state.values()))["exp_avg"][0] = torch.nan
    elif fault == "no space":
        import engine.checkpoints.space as space

        space.MARGIN, margin = 1e12, space.MARGIN
    elif ":" in fault:
        os.environ[fault_points.VARIABLE] = fault
    try:
        return "saved" if trainer.save(step, last=False) else "went on"
    except SaveError as error:
        return f"stopped: {error}"
    finally:
        if fault == "no space":
            space.MARGIN = margin
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main() -> None:
    import_deepspeed()  # before the forks
    mode, folder, data, *rest = sys.argv[1:]
    if mode == "kills":
        ranks, count, seed = map(int, rest)
        result = kills(Path(folder), Path(data), ranks, count, seed)
    else:
        port = free_port()
        work = lambda runtime, say: failures(runtime, say, Path(folder), Path(data))  # noqa: E731
        started = [fork(rank, 2, port, work) for rank in range(2)]
        text = lines_of(started[0][1], "third", PATIENCE)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process, _ in started]
        result = {"codes": codes, "scenes": [json.loads(line) for line in text.splitlines()]}
    complete = complete_checkpoints(Path(folder) / "checkpoints")  # none where a slow machine was always killed before
    print(json.dumps(result | {"newest": complete[0].name if complete else ""}))


if __name__ == "__main__":
    main()
