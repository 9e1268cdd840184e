"""Conversion on a dask cluster: the same bytes, no hang whatever dies, and refusals within seconds."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from shards.making import cluster as module
from shards.making.cluster import convert_on_cluster
from shards.making.conversion import ConversionFailed, convert
from shards.making.planning import Options, Plan, make_plan
from shards.sources.class_folders import list_class_folders
from tests.folders import contents
from tests.images import make_class_folders
from tools.make_shards import main


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    source = tmp_path_factory.mktemp("source")
    make_class_folders(source, classes=3, per_class=40)
    return make_plan(list_class_folders(source), Options(samples_per_shard=4))


@pytest.fixture(scope="module")
def wanted(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("straight") / "out"
    convert(plan, out, num_workers=2)
    return contents(out)


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0") as running:
        yield running


def kill_once_begun(out: Path, numbers: list[int]) -> threading.Thread:
    """Kill processes as soon as a shard is being written."""

    def kill() -> None:
        while not list(out.glob(".shard-*")):
            time.sleep(0.001)
        for number in numbers:
            os.kill(number, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def workers_of(cluster: LocalCluster) -> list[int]:
    with Client(cluster, set_as_default=False) as client:
        return list(client.run(os.getpid).values())


def test_a_cluster_makes_the_same_bytes(plan, wanted, cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    report = convert_on_cluster(plan, Path("out"), cluster.scheduler_address, progress=lambda *n: seen.append(n))
    assert report.made == 30 and seen[-1] == (120, 0)
    assert contents(tmp_path / "out") == wanted
    source = str(plan.listing.root)
    command = [source, str(tmp_path / "tool"), "--scheduler", cluster.scheduler_address, "--samples-per-shard", "4"]
    assert main(command) == 0 and contents(tmp_path / "tool") == wanted


def test_a_worker_that_dies_costs_nothing(plan, wanted, cluster, tmp_path):
    thread = kill_once_begun(tmp_path / "out", workers_of(cluster)[:1])
    convert_on_cluster(plan, tmp_path / "out", cluster.scheduler_address)
    thread.join()
    assert contents(tmp_path / "out") == wanted


def test_without_workers_it_ends(plan, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ALONE_SECONDS", 2.0)
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0") as cluster:
        thread = threading.Thread(target=scale_down_once_begun, args=(cluster, tmp_path / "out"))
        thread.start()
        with pytest.raises(ConversionFailed, match="no workers, or no answer, for 2 s"):
            convert_on_cluster(plan, tmp_path / "out", cluster.scheduler_address)
        thread.join()
    assert not (tmp_path / "out" / "manifest.json").exists()
    convert(plan, tmp_path / "out", num_workers=2)
    assert contents(tmp_path / "out") == wanted


def scale_down_once_begun(cluster: LocalCluster, out: Path) -> None:
    while not list(out.glob(".shard-*")):
        time.sleep(0.001)
    cluster.scale(0)


def test_wrong_addresses_are_refused_soon(plan, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "CONNECT_SECONDS", 2)
    monkeypatch.setattr(module, "WORKER_SECONDS", 1)
    for address in ("tcp://127.0.0.1:9", "nonsense", "ftp://127.0.0.1:9"):
        began = time.monotonic()
        with pytest.raises(ConversionFailed, match=f"^scheduler={address}: no answer.*dask worker ADDRESS"):
            convert_on_cluster(plan, tmp_path / "out", address)
        assert time.monotonic() - began < 60
    assert not (tmp_path / "out").exists()
    source = str(plan.listing.root)
    assert main([source, str(tmp_path / "out"), "--scheduler", "nonsense"]) == 1
    assert "scheduler=nonsense: no answer" in capsys.readouterr().err
    assert main([source, str(tmp_path / "out"), "--scheduler", "x", "--workers", "2"]) == 2
    assert "workers=2" in capsys.readouterr().err


def none_appears(client: Client, number: int, timeout: float) -> None:
    raise TimeoutError(f"{number} workers in {timeout} s")


def test_workers_are_asked_before_the_work(plan, cluster, tmp_path, monkeypatch):
    """Workers that do not see a path are named; so is a cluster without workers."""
    monkeypatch.setattr(module, "WORKER_SECONDS", 1)
    (tmp_path / "out").mkdir()
    with Client(cluster, set_as_default=False) as client:
        with pytest.raises(ConversionFailed, match="2 of 2 workers.*does not see the source /nowhere"):
            module._check_workers(client, "here", Path("/nowhere"), tmp_path)
        with pytest.raises(ConversionFailed, match="2 of 2 workers.*cannot write into /nowhere"):
            module._check_workers(client, "here", tmp_path, Path("/nowhere"))
        monkeypatch.setattr(Client, "wait_for_workers", none_appears)
        with pytest.raises(ConversionFailed, match="no worker within 1 s"):
            convert_on_cluster(plan, tmp_path / "out", cluster.scheduler_address)
