"""Killed, without space, beside another one: a conversion leaves nothing half-made, and a rerun makes the same bytes.

All conversions here are processes of their own, as they are in life.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.folders import contents
from tests.images import jpeg_bytes, make_class_folders

ROOT = Path(__file__).resolve().parents[1]


def command(source: Path, out: Path, *options: str) -> list[str]:
    tool = str(ROOT / "tools" / "make_shards.py")
    return [sys.executable, tool, str(source), str(out), "--workers", "2", "--samples-per-shard", "3", *options]


def converted(source: Path, out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(source, out, *options), cwd="/", capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make_class_folders(folder, classes=3, per_class=40)
    return folder


@pytest.fixture(scope="module")
def straight(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """What an undisturbed conversion makes, and the seconds that it takes."""
    out = tmp_path_factory.mktemp("straight") / "out"
    began = time.monotonic()
    assert converted(source, out).returncode == 0
    return contents(out), time.monotonic() - began


def killed_on_the_way(source: Path, out: Path, rng: random.Random, seconds: float) -> bool:
    """Start a conversion and kill its whole process group at some moment; False if it ended before."""
    process = subprocess.Popen(command(source, out), cwd="/", stdout=subprocess.DEVNULL, start_new_session=True)
    give_up = time.monotonic() + rng.uniform(0, seconds)
    if rng.random() < 0.5:  # any moment of time; else a moment at which files are being written
        while time.monotonic() < give_up and process.poll() is None:
            time.sleep(0.001)
    else:
        enough = rng.randrange(1, 8) + (len(os.listdir(out)) if out.exists() else 0)
        while process.poll() is None and (not out.exists() or len(os.listdir(out)) < enough):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.02))
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.long)])
def test_killed_at_any_moment_then_rerun(source, straight, tmp_path, kills):
    """After every kill each final name holds all of its bytes, and finished shards are not made again."""
    wanted, seconds = straight
    out, rng, killed, written = tmp_path / "out", random.Random(kills), 0, {}
    while killed < kills:
        killed += killed_on_the_way(source, out, rng, seconds)
        if not out.exists():
            continue
        finished = {name: data for name, data in contents(out).items() if not name.startswith(".")}
        assert {name: wanted[name] for name in finished} == finished
        stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
        complete = [name for name in written if name.endswith(".npz")]  # the last file of a shard
        for name in complete:
            for suffix in ("tar", "idx", "npz"):
                assert stamps[f"{name[:-3]}{suffix}"] == written[f"{name[:-3]}{suffix}"], "made again"
        written = stamps
        if "manifest.json" in finished:
            shutil.rmtree(out)
            written = {}
    assert converted(source, out).returncode == 0
    assert contents(out) == wanted


def test_one_killed_process_of_the_conversion(source, straight, tmp_path):
    """A worker or its screening process that is killed from outside: the end is an error or the right bytes."""
    wanted, _ = straight
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(source, out), cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    screeners: list[int] = []
    while not screeners and process.poll() is None:
        found = subprocess.run(["pgrep", "-g", str(process.pid), "-f", "shards.making.screener"], capture_output=True)
        screeners = [int(number) for number in found.stdout.split()]
    os.kill(screeners[0], signal.SIGKILL)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0 or b"the screening process did not start" in told
    assert converted(source, out).returncode == 0
    assert contents(out) == wanted


def test_the_disk_is_full_then_rerun(source, straight, tmp_path):
    """A file size limit stands for it: one line names the file and the reason."""
    out = tmp_path / "out"
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *command(source, out)]
    result = subprocess.run(limited, cwd="/", capture_output=True, text=True)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert f"{out}/shard-" in result.stderr and "[Errno 27] File too large" in result.stderr
    assert set(contents(out)) <= set(straight[0])
    assert converted(source, out).returncode == 0
    assert contents(out) == straight[0]


def test_a_full_file_system_then_rerun(source, tmp_path):
    """A small file system in a name space of our own; with --short-side its need is not known before."""
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    first, again = (" ".join(command(source, small / "out", "--short-side", "30")) for _ in range(2))
    script = f"""
        mount -t tmpfs -o size=3m tmpfs {small} || exit 99
        head -c 2950k /dev/zero > {small}/filler
        {first} > /dev/null
        echo "first $?"
        ls {small}/out
        rm {small}/filler
        {again} > /dev/null
        echo "again $?"
        cp -r {small}/out {kept}
    """
    result = subprocess.run(["unshare", "-rm", "bash", "-c", script], cwd="/", capture_output=True, text=True)
    if result.returncode in (1, 99) and not kept.exists():
        pytest.skip(f"no mounts here: {result.stderr}")
    assert "first 1" in result.stdout and "again 0" in result.stdout
    assert "manifest.json" not in result.stdout
    assert result.stderr.count("\n") == 1 and "[Errno 28] No space left on device" in result.stderr
    assert str(small / "out") in result.stderr
    assert converted(source, tmp_path / "out", "--short-side", "30").returncode == 0
    assert contents(kept) == contents(tmp_path / "out")


def test_two_conversions_of_one_folder(source, straight, tmp_path):
    out = tmp_path / "out"
    first = subprocess.Popen(command(source, out), cwd="/", stdout=subprocess.DEVNULL)
    while not (out / "plan.json").exists():
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)
    second = converted(source, out)
    os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 2 and "another conversion is writing there" in second.stderr
    assert first.wait() == 0 and contents(out) == straight[0]


def test_bytes_do_not_depend_on_locale_or_workers(tmp_path):
    source = tmp_path / "source"
    make_class_folders(source, classes=2, per_class=4)
    for name in ("ünï", "Zz", "ıI", "e\u0301"):
        (source / "n00000000" / f"{name}.jpg").write_bytes(jpeg_bytes(len(name)))
    (source / "n00000001" / os.fsdecode(b"\xff\xfe.jpg")).write_bytes(jpeg_bytes(9))
    made = []
    for number, (locale, utf8, seed) in enumerate([("C", "0", "1"), ("C.UTF-8", "1", "2"), ("tr_TR.UTF-8", "0", "3")]):
        environment = {"LC_ALL": locale, "PYTHONUTF8": utf8, "PYTHONCOERCECLOCALE": "0", "PYTHONHASHSEED": seed}
        out = tmp_path / str(number)
        result = converted(source, out, "--workers", str(number + 1), **environment)
        assert result.returncode == 0, result.stderr
        made.append(contents(out))
    assert made[0] == made[1] == made[2] and len(made[0]) == 3 * 5 + 4
