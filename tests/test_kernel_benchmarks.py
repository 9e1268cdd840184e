"""The suites morph, ema and masks: their rows, and that they refuse to time what does not compute the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine import masks as random_masks
from shards.draws.block_masks import BlockMasks
from tools.benchmarks import ema, masks, morph
from tools.benchmarks.memory import peak_megabytes
from tools.benchmarks.side_by_side import Row, Settings

QUICK = Settings(rounds=1, scale=0.03)


@pytest.fixture(autouse=True)
def threads():
    """The suites run on one thread; what comes after them does not."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def check_rows(rows: list[Row]) -> None:
    for row in rows:
        assert row.ours > 0 and row.theirs > 0
        better = row.theirs / row.ours if row.unit in ("MB", "CPU ms", "operators") else row.ours / row.theirs
        assert row.ratio == pytest.approx(better)


def test_morph():
    rows = list(morph.suite(QUICK))
    check_rows(rows)
    assert [row.unit for row in rows] == 5 * ["images/s", "MB"] + ["images/s"] + 3 * ["share"]
    assert all(f"(r, k) = {schedule}" in row.name for row, schedule in zip(rows[::2], morph.SCHEDULES, strict=False))
    assert all(row.ratio > 1 / 0.7 for row in rows if row.unit == "MB")  # deterministic: no time is in it
    assert all(row.ours == 1 for row in rows if row.unit == "share")


def test_morph_is_not_timed_where_groups_or_losses_differ(monkeypatch):
    tokens = morph.gaussian_tokens(2, seed=0), morph.smooth_tokens(2, seed=1)
    outputs, targets = tokens[0].requires_grad_(), tokens[1]

    def flipped(targets: torch.Tensor, removed: int, steps: int) -> torch.Tensor:
        return morph.dense_sources(targets.flip(0), removed, steps)

    with pytest.raises(RuntimeError, match="different groups"):
        list(morph.schedule_rows(outputs, targets, (14, 7), flipped, "a wrong form", 1))
    monkeypatch.setattr(morph, "BETA", 1.0)

    def at_beta_2(outputs: torch.Tensor, targets: torch.Tensor, schedule: tuple[int, int]):
        loss, gradient = morph.plain_step(outputs, targets, schedule)
        return loss / 2, gradient / 2

    with pytest.raises(RuntimeError, match="losses differ by 5.0e-01"):
        morph.check_equal("x", at_beta_2, morph.plain_step, outputs, targets, (14, 7))


def test_peak_memory_is_what_was_held_at_once():
    def work() -> None:
        for _ in range(3):
            first = torch.empty(250_000)  # 1 MB
            second = torch.empty(500_000)
            del first, second
        torch.empty(125_000)

    assert peak_megabytes(work) == pytest.approx(3, rel=0.01)


def test_ema():
    time, count = ema.suite(QUICK)
    check_rows([time, count])
    assert (time.unit, count.unit) == ("CPU ms", "operators") and count.ours <= 4 and count.ratio > 20


def test_averages_that_differ_are_not_timed(monkeypatch):
    def half(student: torch.nn.Module, average: torch.nn.Module, momentum: float) -> None:
        """As if a step of half the size were right."""
        for ours, theirs in zip(average.parameters(), student.parameters(), strict=True):
            ours.data.lerp_(theirs.data, (1 - momentum) / 2)

    monkeypatch.setattr(ema, "update_average", half)
    with pytest.raises(RuntimeError, match="moving average of encoder.*differs by"):
        next(ema.suite(QUICK))


def test_masks():
    rows = list(masks.suite(QUICK))
    check_rows(rows)
    assert [row.unit for row in rows] == ["masks/s", "masks/s", "pairs/s"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_masked": 74}, "not all have 75"), ({"min_area": 4}, "border|share"), ({"min_aspect": 0.9}, "border|share")],
)
def test_masks_of_another_law_are_not_timed(change, message):
    law = BlockMasks(**{"grid": 14, "num_masked": 75, "min_area": 16, **change})
    others = iter(law.masks(5, 0, np.arange(1500)).reshape(-1, 14, 14))
    with pytest.raises(RuntimeError, match=message):
        masks.check_distribution(lambda: next(others), 1500)


def test_random_masks_that_differ_are_not_timed(monkeypatch):
    monkeypatch.setattr(masks, "disjoint_masks", lambda noise, ratio: random_masks.disjoint_masks(-noise, ratio))
    with pytest.raises(RuntimeError, match="random masks"):
        masks.random_row(8, rounds=1)
