"""What `srun` is to a training: tasks with Slurm's variables, signals passed on, the highest exit code at the end.

Usage: imitation_srun.py TASKS COMMAND ...; one node. As under Slurm, a task's parent is the one that signals it, and
tasks have process groups of their own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

LAUNCHERS_OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def task_environment(task: int, tasks: int, port: int) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHERS_OWN}
    return inherited | {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_TASKS_PER_NODE": str(tasks), "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task), "MASTER_PORT": str(port),
    }  # fmt: skip


def main() -> int:
    tasks, command = int(sys.argv[1]), sys.argv[2:]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        subprocess.Popen(command, env=task_environment(task, tasks, port), start_new_session=True)
        for task in range(tasks)
    ]

    def pass_on(number: int, frame: object) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, pass_on)
    codes = [process.wait() for process in started]
    return max(code if code >= 0 else 128 - code for code in codes)


if __name__ == "__main__":
    sys.exit(main())
