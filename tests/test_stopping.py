"""Signals: a run that is asked to stop saves and says so by its exit code, under every launcher, and leaves nobody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runs import ROOT, TIMEOUT, TINY, TRAIN, environment, launch, train

from engine import signals
from engine.checkpoints.keeping import SaveError
from engine.console import Console
from engine.evaluation.features import extract, pixels
from engine.evaluation.monitor import Monitor
from engine.runtime import Runtime
from engine.shell import NOT_SAVED, STOPPED, NotSaved, exit_code
from engine.signals import Requests
from engine.stopping import ASKED, StopAgreement, saving
from recipes import registry
from recipes.overrides import apply_overrides
from shards.dataset import open_dataset

ALONE = Runtime(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
PROMISE = 60.0  # seconds from the signal to the end of the last process
TERM, INT, USR1, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL

# --- one process, without a training --------------------------------------------------------------------------------

LISTENER = """
import os, signal, sys, threading, time
sys.path.insert(0, {root!r})
busy = threading.Thread(target=time.sleep, args=(600,), daemon=True)
if {early}:
    busy.start()  # a thread from before, in which nothing is blocked
from engine.signals import REQUESTS
REQUESTS.listen()
if {training}:
    REQUESTS.keep_until_asked()
print("ready", flush=True)
while not REQUESTS.first:
    time.sleep(0.01)
print("asked", REQUESTS.first, flush=True)
time.sleep(600)
"""


def listen(
    *,
    training: bool = True,
    early: bool = False,
    ignored: bool = False,
    stderr: Any = subprocess.PIPE,
    **variables: str,
) -> subprocess.Popen:
    """A process that listens as a rank does; `variables` of its environment tell what launched it."""
    code = LISTENER.format(root=str(ROOT), training=training, early=early)
    clean = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "SLURM_PROCID", "RANK")}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, text=True, env=clean | variables,
        preexec_fn=(lambda: signal.signal(INT, signal.SIG_IGN)) if ignored else None,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def stranger(process: subprocess.Popen, number: int) -> None:
    """The signal, from a process that is not the parent of its receiver."""
    subprocess.run(["kill", f"-{number}", str(process.pid)], check=True)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    _, said = process.communicate(timeout=TIMEOUT)
    return process.returncode, said


@pytest.mark.parametrize("number", [TERM, INT, USR1])
def test_the_first_signal_asks_and_the_second_ends(number):
    process = listen()
    stranger(process, number)
    assert process.stdout.readline() == f"asked {int(number)}\n"
    time.sleep(signals.SAME + 0.3)
    stranger(process, number)
    code, said = ended(process)
    assert code == 128 + number and f"{signal.Signals(number).name}: ends at once" in said
    assert "stopping at the end of this step, with a checkpoint; a second signal ends at once" in said


def test_a_full_log_device_makes_nobody_deaf():
    with open("/dev/full", "w") as full:
        process = listen(stderr=full)
    stranger(process, TERM)
    assert process.stdout.readline() == f"asked {int(TERM)}\n"
    time.sleep(signals.SAME + 0.3)
    stranger(process, TERM)
    assert ended(process)[0] == 128 + TERM


def test_a_signal_told_twice_is_one_request():
    process = listen()
    stranger(process, TERM)
    stranger(process, TERM)
    time.sleep(signals.SAME + 0.3)
    assert process.poll() is None
    stranger(process, INT)
    assert ended(process)[0] == 128 + INT


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "SLURM_PROCID"])
def test_what_a_launcher_passes_on_is_never_the_second(variable):
    """SIGUSR1 two minutes before the limit, then SIGTERM: the save goes on; somebody else's signal still ends it."""
    process = listen(**{variable: "0"})
    process.send_signal(USR1)
    time.sleep(signals.SAME + 0.3)
    process.send_signal(TERM)
    time.sleep(0.3)
    assert process.poll() is None
    stranger(process, TERM)
    assert ended(process)[0] == 128 + TERM


def test_before_the_first_step_there_is_nothing_to_save():
    process = listen(training=False)
    stranger(process, TERM)
    code, said = ended(process)
    assert code == STOPPED and said == "SIGTERM: stopped before the first step; nothing is lost\n"


def test_a_thread_from_before_does_not_let_a_signal_through():
    process = listen(early=True)
    stranger(process, TERM)
    assert process.stdout.readline() == f"asked {int(TERM)}\n"
    process.kill()
    ended(process)


def test_an_ignored_signal_stays_ignored():
    """A run in the background of a script does not get the Ctrl-C for the one in the foreground."""
    process = listen(ignored=True)
    stranger(process, INT)
    time.sleep(0.3)
    assert process.poll() is None
    stranger(process, TERM)
    assert process.stdout.readline() == f"asked {int(TERM)}\n"
    process.kill()
    ended(process)


def test_only_the_first_rank_speaks():
    process = listen(RANK="1", LOCAL_RANK="1")
    stranger(process, TERM)
    assert process.stdout.readline() == f"asked {int(TERM)}\n"
    process.kill()
    assert ended(process)[1] == ""


# --- the agreement --------------------------------------------------------------------------------------------------


@pytest.fixture
def requests(monkeypatch) -> Requests:
    """The process's requests, for this test."""
    fresh = Requests()
    monkeypatch.setattr("engine.stopping.REQUESTS", fresh)
    return fresh


def test_alone_the_answer_is_what_was_asked_of_us(requests):
    agreement = StopAgreement(ALONE, timeout=9)
    assert agreement.agreed() == 0 and not agreement.is_near()
    agreement.ask()
    requests.make(USR1)
    assert agreement.answer() == 0 and agreement.is_near(), "the answer is that of the moment of the question"
    assert agreement.agreed() == USR1


def test_ranks_learn_of_each_other_between_questions(requests):
    agreement, other = StopAgreement(ALONE, timeout=9), StopAgreement(ALONE, timeout=9)
    agreement.board = other.board = dist.HashStore()
    assert not agreement.is_near()
    other.board.set(ASKED, "")
    assert agreement.is_near() and requests.first == 0
    agreement.board = dist.HashStore()
    requests.make(TERM)
    assert agreement.is_near() and agreement.board.check([ASKED])


def test_a_board_that_is_gone_is_no_request(requests):
    agreement = StopAgreement(ALONE, timeout=9)

    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise dist.DistNetworkError("the connection was reset")

        def set(self, key: str, value: str) -> None:
            raise dist.DistNetworkError("the connection was reset")

    agreement.board = Gone()
    assert not agreement.is_near()
    requests.make(TERM)
    assert agreement.is_near()


@pytest.mark.parametrize("error", [SaveError("no room"), OSError("no room")])
def test_a_stop_that_could_not_save_has_a_code_of_its_own(error):
    with pytest.raises(NotSaved, match="SIGTERM: no room") as raised, saving(TERM):
        raise error
    assert exit_code(raised.value) == NOT_SAVED
    with pytest.raises(type(error), match="^no room$"), saving(0):
        raise error


def test_an_evaluation_is_left_after_a_batch(shards):
    dataset, recipe = (
        open_dataset(shards / "train"),
        apply_overrides(registry.load("vit_ti_mae_demo"), ["evaluation.batch=8", "data.threads=1"]),
    )
    asked = iter([False, True])
    assert len(extract(pixels, dataset, 80, recipe, ALONE, leave=lambda: next(asked)).labels) == 16
    assert len(extract(pixels, dataset, 80, recipe, ALONE).labels) == 80


# --- runs -----------------------------------------------------------------------------------------------------------

ENDLESS = ("data.val=", "precision=fp32", "run.steps=1000000")


@dataclass
class Stopped:
    """What became of a run after a signal."""

    code: int  # of the outermost process, negative where a signal killed it
    seconds: float  # until its last process had gone
    output: str
    folder: Path

    @property
    def last_step(self) -> int:
        return json.loads((self.folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]

    @property
    def saved(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())


def processes(folder: Path) -> dict[int, str]:
    """Command lines of all processes of the run, by process id."""
    found = {}
    pattern = f"run.out={folder}( |$)"
    for pid in subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout.split():
        try:
            found[int(pid)] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # ended meanwhile
            continue
    return found


def ranks_of(folder: Path) -> list[int]:
    """Process ids of the ranks."""
    launchers = ("deepspeed.launcher.launch", "bin/deepspeed", "bin/torchrun", "imitation_srun")
    return [pid for pid, line in processes(folder).items() if not any(name in line for name in launchers)]


def start_line(launcher: str, folder: Path, shards: Path, *arguments: str) -> list[str]:
    arguments = ("--recipe", "vit_ti_mae_demo", *TINY, f"run.out={folder}", f"data.train={shards}/train", *arguments)
    if launcher == "srun":
        return [sys.executable, str(ROOT / "tests" / "imitation_srun.py"), "2", *launch(TRAIN, *arguments)]
    return launch(TRAIN, *arguments, launcher=launcher, ranks=1 if launcher == "python" else 2)


def wait_until(condition, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.02)


def stop_run(tmp_path: Path, shards: Path, launcher: str, *sent: tuple[str, int], after: int = 3) -> Stopped:
    """Start an endless run, send signals once step `after` is done, and wait for the end of all its processes.

    Each of `sent` is to whom and what: `group` (the process group of the launcher), `outer` (the process that was
    started), `launch` (deepspeed's second process), `ranks`, `rank1`.
    """
    folder = tmp_path / "run"
    with open(tmp_path / "output.txt", "w") as output:
        process = subprocess.Popen(
            start_line(launcher, folder, shards, *ENDLESS), stdout=output, stderr=output, cwd="/",
            env=environment(tmp_path), start_new_session=True,
        )  # fmt: skip
    metrics = folder / "metrics.jsonl"
    try:
        wait_until(lambda: metrics.exists() and f'"step": {after},' in metrics.read_text(), process)
    except AssertionError:
        pytest.fail((tmp_path / "output.txt").read_text()[-3000:])
    began = time.monotonic()
    for target, number in sent:
        send(target, number, process, folder)
    code = process.wait(TIMEOUT)
    wait_until(lambda: not processes(folder))
    seconds = time.monotonic() - began
    return Stopped(code, seconds, (tmp_path / "output.txt").read_text(), folder)


def send(target: str, number: int, process: subprocess.Popen, folder: Path) -> None:
    if target == "group":
        os.killpg(process.pid, number)
    elif target == "outer":
        process.send_signal(number)
    elif target == "launch":
        (launch_pid,) = [p for p, line in processes(folder).items() if "deepspeed.launcher.launch" in line]
        os.kill(launch_pid, number)
    else:
        ranks = sorted(ranks_of(folder))
        for rank in ranks if target == "ranks" else ranks[-1:]:
            os.kill(rank, number)


def assert_saved(stopped: Stopped) -> None:
    """In time, after the step that was the last, and with nothing half written."""
    assert stopped.seconds < PROMISE
    assert stopped.saved == [f"step_{stopped.last_step:08d}"]
    assert "stopped     SIG" in stopped.output
    assert f'File "{ROOT}/engine' not in stopped.output, "a traceback of ours; launchers have their own"


def test_one_rank_is_asked_and_all_stop(shards, tmp_path):
    """Each rank's log says so, and that of the one that was asked says by what."""
    stopped = stop_run(tmp_path, shards, "srun", ("rank1", USR1))
    assert_saved(stopped)
    assert stopped.code == STOPPED
    logs = [(stopped.folder / f"logs/rank_{rank:05d}.log").read_text() for rank in range(2)]
    assert all("end: stopped by SIGUSR1" in log and "stopped     SIGUSR1; --resume goes on" in log for log in logs)
    assert ["SIGUSR1: stopping at the end of this step" in log for log in logs] == [False, True]


@pytest.mark.long
def test_under_srun_a_signal_before_the_limit_and_the_limits_own(shards, tmp_path):
    stopped = stop_run(tmp_path, shards, "srun", ("outer", USR1), ("outer", TERM))
    assert_saved(stopped)
    assert stopped.code == STOPPED and "SIGUSR1: stopping at the end of this step" in stopped.output


def test_the_process_group_under_deepspeed(shards, tmp_path):
    """Every rank gets the signal twice, the second time one rank after the other, and none of them loses patience."""
    stopped = stop_run(tmp_path, shards, "deepspeed", ("group", TERM))
    assert_saved(stopped)
    assert stopped.code == -TERM


# Who gets which signal, and the code that comes out: the table of docs/cluster.md.
OTHERS = [
    ("python", "group", INT, STOPPED),
    ("python", "outer", USR1, STOPPED),
    ("deepspeed", "group", INT, -INT),
    ("deepspeed", "outer", TERM, -TERM),
    ("deepspeed", "outer", KILL, -KILL),
    ("deepspeed", "launch", TERM, 1),
    ("deepspeed", "launch", KILL, 0),
    ("deepspeed", "ranks", USR1, STOPPED),
    ("deepspeed", "rank1", USR1, STOPPED),
    ("torchrun", "group", TERM, 1),
    ("torchrun", "outer", INT, 1),
    ("torchrun", "outer", USR1, -USR1),
    ("torchrun", "outer", KILL, -KILL),
    ("torchrun", "ranks", USR1, 1),
    ("srun", "outer", TERM, STOPPED),
    ("srun", "outer", INT, STOPPED),
]


@pytest.mark.long
@pytest.mark.parametrize(("launcher", "target", "number", "code"), OTHERS)
def test_every_launcher_and_target(launcher, target, number, code, shards, tmp_path):
    stopped = stop_run(tmp_path, shards, launcher, (target, number))
    assert_saved(stopped)
    assert stopped.code == code


def test_the_table_of_the_cluster_page_is_the_tested_one():
    page = (ROOT / "docs" / "cluster.md").read_text()
    words = {"group": "process group", "outer": "{} alone", "launch": "its second process", "ranks": "the ranks",
             "rank1": "one rank"}  # fmt: skip
    for launcher, target, number, code in [*OTHERS, ("deepspeed", "group", TERM, -TERM), ("srun", "outer", USR1, 75)]:
        shown = f"{128 - code} ({signal.Signals(-code).name})" if code < 0 else str(code)
        row = f"| {launcher} | {words[target].format(launcher)} | {signal.Signals(number).name} | {shown} |"
        assert row in page, row


FP32 = ("precision=fp32", "run.steps=12", "run.save_every=5")


@pytest.mark.long  # test_one_rank_is_asked_and_all_stop is the short form
def test_a_stop_during_an_evaluation_loses_nothing(shards, tmp_path, monkeypatch):
    """It is left early, the step is saved, and the run that goes on makes the evaluation good."""
    arguments = (f"data.train={shards}/train", *FP32, "run.eval_every=6")
    monkeypatch.setenv("MASKWRIGHT_FAULT", "evaluate.begin:term@2")  # that of step 6
    broken_off = train(tmp_path / "run", *arguments, succeeds=False)
    assert broken_off.returncode == STOPPED and [line["step"] for line in broken_off.evaluations] == [0]
    assert broken_off.newest_checkpoint().name == "step_00000006"
    monkeypatch.delenv("MASKWRIGHT_FAULT")
    resumed = train(tmp_path / "run", *arguments, "--resume")
    assert [line["step"] for line in resumed.evaluations] == [0, 6, 12] and len(resumed.losses) == 12


def test_an_evaluation_is_made_good_once(shards, tmp_path, requests):
    dataset = open_dataset(shards / "val")
    recipe = apply_overrides(registry.load("vit_ti_mae_demo"), ["run.eval_every=4"])
    console = Console(tmp_path, enabled=True, total_steps=9, start_step=0)
    sets = ((dataset, None), (dataset, None))
    monitor = Monitor(recipe, ALONE, *sets, 9, console, StopAgreement(ALONE, timeout=9))
    assert [step for step in range(10) if monitor.is_missing(step)] == [0, 4, 8, 9]
    console.log_evaluation({"step": 4, "knn": 1.0})
    assert [step for step in range(10) if monitor.is_missing(step)] == [0, 8, 9]


@pytest.mark.long
def test_a_stop_during_an_evaluation_on_one_of_two_ranks(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("MASKWRIGHT_FAULT", "evaluate.begin:term@1#1")
    arguments = (f"data.train={shards}/train", *FP32, "run.eval_every=4", "evaluation.batch=1")
    stopped = train(tmp_path / "run", *arguments, launcher="torchrun", ranks=2, succeeds=False)
    assert "stopped     SIGTERM" in stopped.output and not (tmp_path / "run/evaluations.jsonl").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "code", "saved"),
    [
        ("start.joined:term", STOPPED, None),
        ("save.state:term", STOPPED, 5),  # the save is finished, and serves
        ("step.gradient:term@30", STOPPED, 8),
        ("step.gradient:term@30;save.rename:enospc@2;save.rename:enospc@3", NOT_SAVED, 5),
        ("finish:term", 0, 12),
    ],
)
def test_a_stop_at_other_moments(fault, code, saved, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("MASKWRIGHT_FAULT", fault)
    run = train(tmp_path / "run", f"data.train={shards}/train", "data.val=", *FP32, succeeds=False)
    assert run.returncode == code and "Traceback" not in run.output
    if saved:
        assert run.newest_checkpoint().name == f"step_{saved:08d}"


@pytest.mark.long
def test_a_stopped_run_that_goes_on_is_the_same_run(shards, tmp_path, monkeypatch):
    arguments = (f"data.train={shards}/train", "data.val=", *FP32)
    whole = train(tmp_path / "whole", *arguments)
    monkeypatch.setenv("MASKWRIGHT_FAULT", "step.gradient:term@30")
    train(tmp_path / "run", *arguments, succeeds=False)
    monkeypatch.delenv("MASKWRIGHT_FAULT")
    resumed = train(tmp_path / "run", *arguments, "--resume", "auto")
    assert "resume      from step 8" in resumed.output and resumed.losses == whole.losses


@pytest.mark.long
def test_a_second_signal_harms_no_checkpoint(shards, tmp_path):
    """It comes while the first one's checkpoint is written."""
    folder = tmp_path / "run"
    command = start_line("python", folder, shards, *ENDLESS, "run.save_every=3")
    variables = environment(tmp_path) | {"MASKWRIGHT_FAULT": "step.gradient:term@15;save.state:sleep@2"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables)
    wait_until(lambda: list(folder.glob("checkpoints/.tmp-step_00000004*/mp_rank_00_model_states.pt")), process)
    time.sleep(signals.SAME)
    process.send_signal(TERM)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + TERM and "SIGTERM: ends at once" in output
    resumed = train(folder, f"data.train={shards}/train", "data.val=", "precision=fp32", "run.steps=5",
                    "run.save_every=3", "--resume", "--allow-changes", succeeds=False)  # fmt: skip
    assert "resume      from step 3" in resumed.output
