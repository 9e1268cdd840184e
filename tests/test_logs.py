"""Logs of the ranks: what stands in them, what never does, and that they stop nothing."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.console import Console
from engine.heartbeats import read_beats
from engine.logs import RankLog
from engine.runtime import Runtime
from engine.shell import OnThisRank
from engine.witness import witnessed
from shards.redaction import HIDDEN, printable, redact

WORLD = Runtime(rank=0, world_size=1, local_rank=0, local_world_size=1, device="cpu")
CANARY = "canary-4711-yellow"


def test_a_log_says_what_ran_and_what_happened(tmp_path):
    log = RankLog(tmp_path, WORLD)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        log._show_warning = lambda *_: None
        warnings.warn("something odd", UserWarning, stacklevel=1)
    log.error(ValueError("the reason"))
    log.close("end: done")
    text = log.file.read_text()
    for part in ("rank 0 of 1", f"process {os.getpid()}", "torch 2", "deepspeed 0", "command: ", "end: done",
                 "UserWarning: something odd", "ValueError: the reason"):  # fmt: skip
        assert part in text, part
    before = warnings.showwarning
    RankLog(tmp_path, WORLD).close("again")
    assert warnings.showwarning is before and log.file.read_text().startswith(text)


def test_what_is_told_once_is_kept_by_every_rank(tmp_path, capfd):
    for rank in range(2):
        with witnessed(tmp_path, replace(WORLD, rank=rank), patience=0) as witness:
            witness.warn("no room for a checkpoint")
            console = Console(tmp_path, enabled=rank == 0, total_steps=9, start_step=0, note=witness.log.write)
            console.say("step 5  saved")
            console.log({"step": 6, "loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "images_per_second": 1.0,
                         "data_wait": 0.0}, None)  # fmt: skip
            witness.outcome = "stopped by SIGTERM"
        written = witness.log.file.read_text()
        assert "warning: no room for a checkpoint" in written and "step 5  saved" in written
        assert "step 6" not in written and written.endswith("end: stopped by SIGTERM\n")
    told = capfd.readouterr()
    assert told.err.count("warning: no room") == 1 and told.out.count("step 5  saved") == 1 and "step 6" in told.out


def test_a_warning_of_every_step_is_told_once(tmp_path, capfd):
    """catch_warnings, which torch and DeepSpeed use in their steps, makes Python forget what it has shown."""
    log = RankLog(tmp_path, WORLD)
    log._show_warning = lambda message, *_: print("shown:", message)
    for step in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("odd at every step", UserWarning, stacklevel=1)
            warnings.warn(f"odd at step {step}", UserWarning, stacklevel=1)
    log.close("end")
    assert log.file.read_text().count("odd at every step") == 1 and log.file.read_text().count("odd at step") == 3
    assert capfd.readouterr().out.count("shown: odd at every step") == 1


def test_what_cannot_be_written_is_told_once_and_stops_nothing(tmp_path, capfd):
    (tmp_path / "logs").write_text("a file")
    log = RankLog(tmp_path / "logs", WORLD)
    for _ in range(3):
        log.write("more")
    log.close("end")
    assert capfd.readouterr().err.count("this rank keeps no log") == 1


def test_a_full_device_stops_nothing(tmp_path, capfd):
    (tmp_path / "rank_00000.log").symlink_to("/dev/full")
    log = RankLog(tmp_path, WORLD)
    log.close("end")
    assert "No space left on device; this rank keeps no log" in capfd.readouterr().err


def test_names_of_files_cannot_forge_entries(tmp_path):
    log = RankLog(tmp_path, WORLD)
    log.write("bad image \x1b[31m\rname\x00\u202e")
    log.write("two\nlines")
    log.close("end")
    assert "\\x1b[31m\\rname\\x00\\u202e" in log.file.read_text()
    assert all(line[:4].isdigit() or line.startswith("    ") for line in log.file.read_text().split("\n") if line)


def test_secrets_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("MY_VARIABLE", "not shown")
    with pytest.raises(OnThisRank), witnessed(tmp_path, WORLD, patience=0) as witness:
        witness.log.write(f"the token is {CANARY}, the place https://me:{CANARY}@host/x?a=1&X-Amz-Signature=abc&b=2")
        raise OnThisRank(f"refused: {CANARY}")
    written = "".join(path.read_text() for path in (tmp_path / "logs").iterdir())
    assert CANARY not in written and "not shown" not in written and "X-Amz-Signature=***&b=2" in written
    assert "refused: ***" in read_beats(tmp_path / "logs", replace(WORLD, rank=1, world_size=2))[0].ended


@given(st.text(), st.text(min_size=6), st.text())
def test_no_secret_survives(before, secret, after):
    environment = {"A_PASSWORD": secret, "HOME": before}
    hidden = redact(f"{before}{secret}{after}", environment)
    assert secret not in hidden.replace(HIDDEN, "")


def test_short_values_and_other_variables_are_left():
    text = "step 12 of yes in /home/me"
    assert redact(text, {"MY_KEY": "12", "USE_TOKENS": "yes", "HOME": "/home/me"}) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pw@host/a", "https://***@host/a"),
        ("s3://key@bucket/a?token=abc", "s3://***@bucket/a?token=***"),
        ("http://host/a?page=2&sig=x%20y", "http://host/a?page=2&sig=***"),
        ("http://u:p@ss/wo@host/a and http://host/b", "http://***@host/a and http://host/b"),
        ("mail me@host", "mail me@host"),
    ],
)
def test_urls_lose_users_and_signatures(text, expected):
    assert redact(text, {}) == expected


def test_ordinary_text_stays_as_it_is():
    text = "Größe 3 µm\t名前"
    assert printable(text) == text


def test_a_run_that_ends_well_says_so(tmp_path):
    with witnessed(tmp_path, WORLD, patience=0) as witness:
        witness.at("training", 3)
    assert Path(witness.log.file).read_text().endswith("end: done\n")
