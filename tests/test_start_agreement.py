"""Ranks that do not mean the same run refuse together, naming who differs and in what."""

from __future__ import annotations

import pytest

from engine import start_agreement
from engine.runtime import Runtime
from engine.start_agreement import agree, code_hash, everywhere

WORLD = Runtime(rank=0, world_size=3, local_rank=0, local_world_size=3, device=None)


@pytest.fixture
def others(monkeypatch):
    """Set what ranks 1 and 2, on other hosts, answer."""

    def answer(*theirs):
        hosts = [f"node{rank + 1}" for rank in range(len(theirs))]
        monkeypatch.setattr(start_agreement, "gathered", lambda mine, _: [mine, *zip(hosts, theirs, strict=True)])

    return answer


FACTS = {"code": "a", "data": "b", "optim.lr": "0.1"}


def test_equal_ranks_agree(others):
    others(FACTS, FACTS)
    agree(FACTS, WORLD)


@pytest.mark.parametrize("theirs", [FACTS | {"data": "c"}, {"code": "a", "optim.lr": "0.1"}])
def test_a_difference_is_named_with_both_values(others, theirs):
    others(FACTS, theirs)
    with pytest.raises(ValueError, match=f"rank 2 on node2 differ: data: b and {theirs.get('data')}; start all ranks"):
        agree(FACTS, WORLD)


def test_work_that_all_can_do_is_done(others):
    others("", "")
    assert everywhere(lambda: 7, WORLD) == 7


def test_what_some_cannot_do_is_refused_by_all(others):
    others("no such folder /data", "")
    with pytest.raises(ValueError, match="rank 1 on node1: no such folder /data; the other ranks are ready"):
        everywhere(lambda: 7, WORLD)


def test_what_nobody_can_do_is_told_once(others):
    def fails():
        raise FileNotFoundError("no such folder /data")

    others("no such folder /data", "no such folder /data")
    with pytest.raises(ValueError, match="^no such folder /data$"):
        everywhere(fails, WORLD)


def test_alone_an_error_stays_what_it_is():
    def fails():
        raise FileNotFoundError("x")

    with pytest.raises(FileNotFoundError):
        everywhere(fails, Runtime(0, 1, 0, 1, None))


def test_other_errors_are_not_hidden(others):
    others("", "")
    with pytest.raises(ZeroDivisionError):
        everywhere(lambda: 1 / 0, WORLD)


def test_the_hash_is_that_of_names_and_bytes(tmp_path, monkeypatch):
    for package in start_agreement.PACKAGES:
        (tmp_path / package / "deep").mkdir(parents=True)
        (tmp_path / package / "deep" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(start_agreement, "ROOT", tmp_path)

    def fresh() -> str:
        code_hash.cache_clear()
        return code_hash()

    first = fresh()
    assert fresh() == first
    (tmp_path / "engine/deep/a.py").write_text("x = 2\n")
    second = fresh()
    (tmp_path / "engine/deep/a.py").rename(tmp_path / "engine/deep/b.py")
    assert len({first, second, fresh()}) == 3
    code_hash.cache_clear()
