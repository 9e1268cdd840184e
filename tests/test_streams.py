"""A full disk behind stdout, or a reader that has gone, never ends a training."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import suppress

from runs import TIMEOUT, TINY, TRAIN, environment, launch

from engine.streams import Lossy, lose_rather_than_stop


def test_a_training_goes_on_without_its_readers(shards, tmp_path):
    """stdout on a full disk, stderr in a pipe whose reader reads the first line and leaves."""
    out = tmp_path / "run"
    command = launch(TRAIN, "--recipe", "vit_ti_mae_demo", *TINY, f"run.out={out}", f"data.train={shards}/train",
                     "data.val=", "run.steps=3")  # fmt: skip
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(command, stdout=full, stderr=subprocess.PIPE, env=environment(tmp_path), text=True)
        assert process.stderr.readline() == "warning: stdout: No space left on device; its lines are lost\n"
        process.stderr.close()
        assert process.wait(TIMEOUT) == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]


def test_the_first_loss_is_told_and_the_rest_is_not(monkeypatch):
    told = io.StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    gone = Lossy(open("/dev/full", "w", buffering=1), "stdout")  # noqa: SIM115  closing it would fail once more
    for _ in range(3):
        print("a line", file=gone, flush=True)
    assert told.getvalue() == "warning: stdout: No space left on device; its lines are lost\n"
    with suppress(OSError):
        gone.close()


def test_a_stream_is_else_what_it_was(tmp_path, monkeypatch):
    with open(tmp_path / "out", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", None)  # closed by whoever started it
        lose_rather_than_stop()
        assert sys.stdout is out
        monkeypatch.setattr(sys, "stderr", out)
        lose_rather_than_stop()
        print("a line")
        assert sys.stdout.fileno() == out.fileno() and not sys.stdout.isatty() and sys.stdout.encoding == out.encoding
        sys.stdout.flush()
    assert (tmp_path / "out").read_text() == "a line\n"
