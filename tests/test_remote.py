"""Shards at a URL: fetched whole, checked and kept, through a server on loopback that misbehaves in many ways."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from runs import ROOT, train

from engine.start_up import fetch_remote, is_harmless
from recipes.schema import Data
from shards import remote
from shards.dataset import open_dataset
from shards.layout import MANIFEST, DataError, MissingData
from tests.folders import contents

TRIES = 3


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; what it does to a file's answers in turn stands in the server's `mischief`."""

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.asked[name] += 1
        turns = self.server.mischief.get(name, [])
        turn = turns.pop(0) if turns else "serve"
        if turn == "serve":
            return super().do_GET()
        content = bytearray((Path(self.directory) / self.path.lstrip("/")).read_bytes())
        if turn in ("503", "404", "403"):
            return self.send_error(int(turn))
        if turn == "wrong":
            content[len(content) // 2] ^= 1
        self.send_response(200)
        if turn != "short without length":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 3] if turn.startswith("short") else content)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(shards: Path) -> Iterator[ThreadingHTTPServer]:
    handler = functools.partial(Handler, directory=str(shards))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.mischief, running.asked = {}, Counter()
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def url(server: ThreadingHTTPServer, split: str = "train") -> str:
    return f"http://127.0.0.1:{server.server_port}/{split}"


def fetch(place: str, cache: Path, **changes) -> Path:
    said: list[str] = changes.pop("said", [])
    options = {"setting": "data.train", "tries": TRIES, "say": said.append, "pause": 0.01} | changes
    return remote.fetch(place, cache, **options)


TAR, INDEX = "shard-000001.tar", "shard-000002.npz"


@pytest.mark.parametrize(
    "mischief",
    [
        {},
        {TAR: ["503", "503"], MANIFEST: ["503", "503"], INDEX: ["503"]},
        {TAR: ["short"], INDEX: ["short", "short"], MANIFEST: ["short"]},
        {TAR: ["short without length"], INDEX: ["short without length"]},
        {TAR: ["wrong", "wrong"], INDEX: ["wrong"], "plan.json": ["wrong"]},
    ],
    ids=["all is well", "failing twice", "truncated", "truncated, of unknown length", "wrong bytes"],
)
def test_the_set_arrives_whole(
    mischief: dict, server: ThreadingHTTPServer, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.mischief = {name: list(turns) for name, turns in mischief.items()}
    said: list[str] = []
    folder = fetch(url(server), tmp_path, said=said)
    assert contents(folder) == contents(shards / "train")
    assert len(open_dataset(folder, check="full")) == 80
    assert f"fetching {url(server)}: 15 files" in said[0] and str(folder) in said[0]
    for name, turns in mischief.items():
        assert server.asked[name] == len(turns) + 1
    assert folder.parent == tmp_path and "127.0.0.1" in folder.name


def test_what_is_there_is_not_fetched_again(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    folder = fetch(url(server), tmp_path)
    server.asked.clear()
    assert fetch(url(server) + "/", tmp_path) == folder
    assert server.asked == {MANIFEST: 1}


def test_what_was_lost_from_the_cache_is_fetched_again(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    folder = fetch(url(server), tmp_path)
    whole = contents(folder)
    (folder / TAR).unlink()
    cut = folder / "shard-000000.tar"
    cut.write_bytes(whole[cut.name][:-512])
    server.asked.clear()
    assert fetch(url(server), tmp_path) == folder and contents(folder) == whole
    assert set(server.asked) == {MANIFEST, TAR, cut.name}


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ("503", "503"),
        ("403", "403"),
        ("wrong", "its sha256 is"),
        ("short without length", "bytes came, the manifest says"),
    ],
)
def test_after_the_last_try_the_file_is_named_and_the_rest_is_kept(
    turn: str, says: str, server: ThreadingHTTPServer, shards: Path, tmp_path: Path
) -> None:
    server.mischief = {TAR: [turn] * TRIES}
    with pytest.raises(DataError) as caught:
        fetch(url(server), tmp_path)
    message = str(caught.value)
    assert message.startswith(f"data.train={url(server)}: {url(server)}/{TAR} could not be fetched, 3 tries: ")
    assert says in message and "what has come is kept" in message
    assert server.asked[TAR] == TRIES
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    kept = contents(folder)
    assert kept and TAR not in kept and MANIFEST not in kept and not list(folder.glob(".*"))
    (folder / f".{INDEX}.part").write_text("left by a process that was killed")
    server.asked.clear()
    assert contents(fetch(url(server), tmp_path)) == contents(shards / "train")  # the server has come to its senses
    assert not any(server.asked[name] for name in kept), "what was whole is not fetched again"


def test_a_missing_file_is_not_asked_for_again(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=f"data.train=.*nothing: no {MANIFEST} there"):
        fetch(url(server, "nothing"), tmp_path)
    server.mischief = {TAR: ["404"] * TRIES}
    with pytest.raises(MissingData, match=f"no {TAR} there"):
        fetch(url(server), tmp_path)
    assert server.asked[TAR] == 1 and server.asked[MANIFEST] == 2


def test_pauses_grow_between_tries(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    server.mischief = {MANIFEST: ["503"] * 9}
    with pytest.raises(DataError, match="9 tries"):
        fetch(url(server), tmp_path, tries=9, pause=1.0)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"http://\*\*\*@127.0.0.1:9/set/manifest.json could not be fetched, 1 try: "):
        fetch("http://somebody:secret@127.0.0.1:9/set", tmp_path, tries=1)


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(remote, "_SILENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(DataError, match="could not be fetched, 2 tries: .*[Tt]imeout"):
            fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/set", tmp_path, tries=2)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("nosuch://host/set", r"data.train=nosuch://host/set: .*nosuch.*pip install maskwright\[remote\]"),
        ("http://host/set?key=1", "without . and #"),
    ],
)
def test_urls_that_cannot_be_used_are_refused(place: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        fetch(place, tmp_path)


def test_a_manifest_that_is_none_is_refused(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    server.mischief = {MANIFEST: ["wrong"]}
    with pytest.raises(
        DataError, match=rf"data.train=http://.*: what came as {MANIFEST} is none \([0-9,]+ bytes, .*\); see what"
    ):
        fetch(url(server), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_set_that_changed_is_another_folder(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    assert fetch(url(server, "train"), tmp_path) != fetch(url(server, "val"), tmp_path)
    assert len(list(tmp_path.glob("*.lock"))) == 2


def test_too_little_room_is_told_before_anything_is_fetched(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = remote.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda folder: usage._replace(free=2**30 + 1000))
    with pytest.raises(DataError, match=r"data.cache=.*: [0-9,]+ bytes are to be fetched .*, 1,073,742,824 are free"):
        fetch(url(server), tmp_path)
    assert server.asked == {MANIFEST: 1}


def test_a_cache_that_cannot_be_written_is_told(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="data.cache=.*file: .*; choose a folder"):
        fetch(url(server), tmp_path / "file")


def test_processes_of_a_node_fetch_once(server: ThreadingHTTPServer, shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "fetch_shards.py"), url(server), "--cache", str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    folders = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert contents(Path(*folders)) == contents(shards / "train")
    assert server.asked[MANIFEST] == 3 and all(n == 1 for name, n in server.asked.items() if name != MANIFEST)


def test_a_waiting_process_says_so_and_goes_on_when_the_other_dies(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    folder = fetch(url(server), tmp_path)
    code = f"import fcntl, time; f = open({str(folder) + '.lock'!r}); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True)"
    other = subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(600)"], stdout=subprocess.PIPE)
    other.stdout.readline()
    said: list[str] = []
    threading.Timer(0.5, other.kill).start()
    began = time.monotonic()
    assert fetch(url(server), tmp_path, said=said) == folder
    assert time.monotonic() - began >= 0.4 and said[0].startswith("waiting for another process")
    other.communicate()


def test_any_file_system_that_fsspec_knows(shards: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(shards / "val"), "/bucket/val", recursive=True)
    assert contents(fetch("memory://bucket/val", tmp_path)) == contents(shards / "val")


def test_the_cache_is_where_the_setting_or_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert remote.cache_folder("") == Path("/somewhere/maskwright/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert remote.cache_folder("") == Path.home() / ".cache/maskwright/shards"
    assert remote.cache_folder("~/x") == Path.home() / "x"


def test_folders_stay_what_they_are(tmp_path: Path) -> None:
    for place in ("", "data/train", "/data:/train", "C:/data"):
        data = Data(train=place)
        assert fetch_remote(data) == data
    assert all(is_harmless(f"data.{name}") for name in ("cache", "fetch_tries", "train"))


@pytest.mark.long  # a whole run; fetching is tested above
def test_a_training_reads_from_urls(
    server: ThreadingHTTPServer, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the losses of the folder; and without a network once the first step is done."""
    plain = train(tmp_path / "plain", f"data.train={shards}/train", f"data.val={shards}/val", "run.steps=3")
    places = (f"data.train={url(server)}", f"data.val={url(server, 'val')}")
    server.mischief = {TAR: ["503"]}
    fetched = train(tmp_path / "run", *places, "run.steps=3", f"data.cache={tmp_path}/cache", "data.fetch_tries=2")
    assert fetched.losses == plain.losses and len(fetched.evaluations) == len(plain.evaluations)
    assert "fetching http" in fetched.output and f"{tmp_path}/cache/" in fetched.output
    server.mischief = {MANIFEST: ["503"]}
    failed = train(tmp_path / "again", *places, "data.fetch_tries=1", f"data.cache={tmp_path}/cache", succeeds=False)
    assert failed.returncode == 2 and "could not be fetched, 1 try" in failed.output
    assert "Traceback" not in failed.output and not os.path.exists(tmp_path / "again")
