"""Samples that cannot be decoded: named and replaced, and nothing else changes for anybody."""

from __future__ import annotations

import dataclasses
import gc
import json
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import CERTAIN, Damage, no_end, no_header, no_tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images import jpeg_bytes
from tars import make_dataset

from recipes.schema import Data
from shards.dataset import Dataset
from shards.draws.masks import MaskDraws
from shards.layout import DataError
from shards.reading.bad_samples import BadSamples
from shards.reading.loader import Batch, EvaluationLoader, TrainLoader
from shards.reading.pipelines import SegmentPipeline
from shards.reading.sample_check import UndecodableSample

CPU = torch.device("cpu")
NUM, GLOBAL, EPOCHS = 24, 8, 2  # an epoch is whole, so that every sample is seen in every epoch
STEPS = NUM // GLOBAL * EPOCHS
DATA = Data(image_size=16, threads=1, on_bad_sample="quarantine", max_bad_fraction=0.9)
ENCODED = [jpeg_bytes(seed, 40 + seed, 60 - seed, quality=70) for seed in range(NUM)]
SIZES = [(60 - seed, 40 + seed) for seed in range(NUM)]

Look = tuple[bytes, bytes, int]  # pixels, noise, label
Places = dict[tuple[int, int], tuple[int, Look]]  # (step, position) -> sample id and how it looks


def damaged(folder: Path, harm: dict[int, Damage]) -> Dataset:
    folder.mkdir(exist_ok=True)
    encoded = [harm[number](image) if number in harm else image for number, image in enumerate(ENCODED)]
    return make_dataset(folder, encoded, per_tar=7, sizes=SIZES)


def train(dataset: Dataset, **changes: Any) -> TrainLoader:
    options = {
        "view": "pretrain_mae", "data": DATA, "seed": 3, "global_batch": GLOBAL, "micro_batch": 4, "rank": 0,
        "world_size": 1, "masks": MaskDraws(num_noise=3), "device": CPU, "total_steps": STEPS, "check_sources": True,
    }  # fmt: skip
    return TrainLoader(dataset, **(options | changes))


def served(dataset: Dataset, start_step: int = 0, **changes: Any) -> Places:
    """What a rank serves, by its place in the order."""
    places: Places = {}
    with train(dataset, start_step=start_step, **changes) as loader:
        for number, batch in enumerate(loader):
            step = start_step + number // loader.micro_steps
            for row, position in enumerate(batch.positions.tolist()):
                assert (step, position) not in places
                places[step, position] = (int(batch.sample_ids[row]), look(batch, row))
    return places


def look(batch: Batch, row: int) -> Look:
    return (batch.views[0][row].numpy().tobytes(), batch.noise[row].numpy().tobytes(), int(batch.labels[row]))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return served(damaged(tmp_path_factory.mktemp("plain"), {}))


def replaced(plain: Places, bad: set[int]) -> Places:
    """What must be served where the samples `bad` can never be: computed from the undisturbed run alone."""
    by_sample = {(step // (NUM // GLOBAL), sample): seen for (step, _), (sample, seen) in plain.items()}
    expected = {}
    for (step, position), (sample, _) in plain.items():
        while sample in bad:
            sample = (sample + 1) % NUM
        expected[step, position] = (sample, by_sample[step // (NUM // GLOBAL), sample])
    return expected


CASES = {
    "one": ({5: no_tables}, {}),
    "several in one batch and in many": (dict.fromkeys(range(0, NUM, 3), no_tables), {}),
    "bad replacements, round the end": (dict.fromkeys((22, 23, 0, 1), no_tables), {}),
    "only found by the header": ({7: no_header, 8: no_header}, {}),
    "segments of one batch, built in the thread": ({5: no_tables, 12: no_header, 13: no_tables}, {"most_pairs": 1}),
    "one segment": ({5: no_tables, 12: no_header, 13: no_tables}, {"most_pairs": 10_000}),
    "every sample but one": (dict.fromkeys(set(range(NUM)) - {9, 10, 11}, no_tables), {}),
    "far ahead": ({5: no_tables, 6: no_tables}, {"data": dataclasses.replace(DATA, prefetch=4, threads=2)}),
}


@pytest.mark.parametrize("case", CASES)
def test_only_the_bad_are_replaced(case: str, plain: Places, tmp_path: Path) -> None:
    harm, changes = CASES[case]
    assert served(damaged(tmp_path, harm), **changes) == replaced(plain, set(harm))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    harm=st.dictionaries(st.integers(0, NUM - 1), st.sampled_from(CERTAIN), min_size=1, max_size=6),
    division=st.sampled_from([(1, 1), (1, 8), (2, 1), (2, 4), (4, 2)]),
    most_pairs=st.sampled_from([1, 6, 1000]),
    start_step=st.integers(0, STEPS - 1),
)
def test_ranks_divisions_and_resumes_agree(
    harm: dict[int, Damage],
    division: tuple[int, int],
    most_pairs: int,
    start_step: int,
    plain: Places,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    dataset = damaged(tmp_path_factory.mktemp("harm"), harm)
    world_size, micro_batch = division
    together: Places = {}
    for rank in range(world_size):
        part = served(
            dataset, start_step, rank=rank, world_size=world_size, micro_batch=micro_batch, most_pairs=most_pairs
        )
        assert not part.keys() & together.keys()
        together |= part
    expected = replaced(plain, set(harm))
    assert together == {place: seen for place, seen in expected.items() if place[0] >= start_step}


def test_a_sample_that_fails_for_some_crops_is_judged_by_its_epoch(tmp_path: Path) -> None:
    """Whether it was met before, by this rank or another, must not matter: 12 epochs in several divisions."""
    dataset = damaged(tmp_path / "data", {4: no_end, 5: no_end, 17: no_end})
    steps = 12 * NUM // GLOBAL
    whole = served(dataset, total_steps=steps)
    fates = {
        (step // (NUM // GLOBAL), sample)
        for (step, _), (sample, _) in served(damaged(tmp_path / "good", {}), total_steps=steps).items()
    } - {(step // (NUM // GLOBAL), sample) for (step, _), (sample, _) in whole.items()}
    assert 0 < len({epoch for epoch, sample in fates if sample in (4, 5, 17)}) and len(fates) < 36, "both must occur"
    resumed = served(dataset, start_step=17, total_steps=steps, micro_batch=8, most_pairs=9)
    assert resumed == {place: seen for place, seen in whole.items() if place[0] >= 17}
    ranks = [served(dataset, total_steps=steps, rank=r, world_size=2, most_pairs=3) for r in range(2)]
    assert ranks[0] | ranks[1] == whole
    file = tmp_path / "quarantine.jsonl"
    for _ in range(2):  # the second time everything is known from the beginning
        known = BadSamples(dataset, 0.9, file)
        assert served(dataset, total_steps=steps, bad_samples=known) == whole
    assert len(file.read_text().splitlines()) == 3


def test_a_failure_counts_though_a_second_look_finds_nothing(
    plain: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage can be moody; the run must go on all the same, not try again for ever."""
    monkeypatch.setattr("shards.reading.quarantine.complaint", lambda *_: None)
    assert served(damaged(tmp_path, {4: no_tables, 5: no_header})) == replaced(plain, {4, 5})


def test_the_default_policy_stops_with_the_name(tmp_path: Path) -> None:
    dataset = damaged(tmp_path, {11: no_tables})
    with train(dataset, data=Data(image_size=16, threads=1)) as loader:
        with pytest.raises(UndecodableSample, match=r"set 001.tar:00011 \(id 11\): .*data.on_bad_sample=quarantine"):
            list(loader)
        with pytest.raises(StopIteration):
            loader.next_batch()


@pytest.mark.parametrize("most_pairs", [4, 1000], ids=["in the thread", "in the pipeline"])
def test_two_pipelines_live_at_most_and_none_afterwards(
    most_pairs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's mappings are shared out to two."""
    living: weakref.WeakSet = weakref.WeakSet()
    most = []

    class Counted(SegmentPipeline):
        def __init__(self, *arguments: Any) -> None:
            living.add(self)
            most.append(len(living))
            super().__init__(*arguments)

    monkeypatch.setattr("shards.reading.stream.SegmentPipeline", Counted)
    dataset = damaged(tmp_path, {2: no_tables, 9: no_tables, 16: no_tables, 20: no_header})
    gc.collect()
    threads = threading.active_count()
    with train(dataset, most_pairs=most_pairs) as loader:
        list(loader)
    assert max(most) <= 2 and len(most) >= 4
    assert not living and threading.active_count() == threads
    assert str(dataset.folder) not in Path("/proc/self/maps").read_text()


# --- how many are too many, and what is written down ----------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "number", "stops"), [(0.0, 1, False), (0.0, 2, True), (0.1, 2, False)])
def test_too_many_end_the_run_with_the_list(
    fraction: float, number: int, stops: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """At least one is allowed; a tenth of 24 are two."""
    bad = (3, 20)[:number]
    dataset = damaged(tmp_path, dict.fromkeys(bad, no_tables))
    data = dataclasses.replace(DATA, max_bad_fraction=fraction)
    with train(dataset, data=data) as loader:
        if stops:
            with pytest.raises(DataError, match=r"2 bad samples, 1 of the 24 .*00003 \(id 3\).*00020 \(id 20\)"):
                list(loader)
        else:
            assert len(list(loader)) == 2 * STEPS
    said = capfd.readouterr().err
    for sample in bad:
        assert said.count(f"(id {sample}): ") == 1 and "takes its place" in said


def test_what_was_met_stands_in_the_file_once(tmp_path: Path) -> None:
    dataset = damaged(tmp_path / "data", {3: no_tables, 20: no_header})
    file = tmp_path / "quarantine.jsonl"
    for rank in (0, 1, 0):
        serving = {"rank": rank, "world_size": 2, "micro_batch": 2}
        served(dataset, **serving, bad_samples=BadSamples(dataset, 0.5, file, rank))
    lines = {entry["id"]: entry for entry in map(json.loads, file.read_text().splitlines())}
    assert len(file.read_text().splitlines()) == 2 and lines.keys() == {3, 20}
    entry = lines[3]
    assert (entry["tar"], entry["key"], entry["folder"]) == ("set 000.tar", "00003", str(dataset.folder))
    assert "offset" in lines[20]["reason"] and entry["reason"] and entry["rank"] in (0, 1)
    first = min(step for (step, _), (sample, _) in served(damaged(tmp_path / "good", {})).items() if sample == 3)
    later = [first + 1, first + 1 + NUM // GLOBAL]
    assert entry["step"] in later, "a rank may meet it in the second epoch only; counted as metrics.jsonl counts"


def test_the_limit_counts_what_other_ranks_met(tmp_path: Path) -> None:
    dataset, file = damaged(tmp_path, {}), tmp_path / "quarantine.jsonl"
    ranks = [BadSamples(dataset, 0.1, file, rank) for rank in range(3)]
    ranks[0].add({1: "bad"}, {1: 4}, "gone")
    ranks[1].add({2: "bad"}, {2: 4}, "gone")
    ranks[0].add({2: "bad"}, {2: 5}, "gone")
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == [1, 2], "once, though two met it"
    with pytest.raises(DataError, match=r"3 bad samples, 2 of the 24"):
        ranks[2].add({7: "bad"}, {7: 9}, "gone")
    with pytest.raises(DataError, match=r"3 bad samples, 2 of the 24"):
        BadSamples(dataset, 0.1, file)  # a resume stops at once


def test_the_file_of_other_data_and_cut_lines_are_passed_over(tmp_path: Path) -> None:
    dataset, file = damaged(tmp_path, {}), tmp_path / "quarantine.jsonl"
    BadSamples(dataset, 0.5, file).add({1: "bad", 8: "bad"}, {}, "gone")
    other = dataclasses.replace(dataset, key=np.array([b"x%05d" % i for i in range(NUM)]))
    with open(file, "a") as lines:
        lines.write('{"id": 9, "tar": "set 00')
    assert BadSamples(dataset, 0.5, file).ids == [1, 8]
    assert BadSamples(other, 0.5, file).ids == []


def test_a_file_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = BadSamples(damaged(tmp_path, {}), 0.5, tmp_path / "no such folder" / "quarantine.jsonl")
    bad.add({1: "bad"}, {}, "gone")
    assert bad.ids == [1] and "record is lost" in capfd.readouterr().err


@pytest.mark.parametrize(
    "change", [{"max_bad_fraction": 1.0}, {"max_bad_fraction": -0.1}, {"max_bad_fraction": float("nan")},
               {"timeout": -1.0}, {"timeout": float("inf")}, {"fetch_tries": 0}], ids=str,
)  # fmt: skip
def test_impossible_settings_are_refused(change: dict[str, float]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"data.{name}={value:g}: .* needed"):
        Data(**change)


# --- evaluation -----------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    harm=st.dictionaries(st.integers(0, NUM - 1), st.sampled_from((*CERTAIN, no_end)), max_size=8),
    ids=st.lists(st.integers(0, NUM - 1), max_size=30),
    batch=st.integers(1, 9),
    most_pairs=st.integers(1, 9),
)
def test_evaluation_serves_each_of_the_others_once(
    harm: dict[int, Damage], ids: list[int], batch: int, most_pairs: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dataset = damaged(tmp_path_factory.mktemp("harm"), harm)
    loader = EvaluationLoader(
        dataset, np.array(ids, int), data=DATA, batch=batch, device=CPU, most_pairs=most_pairs, check_sources=True
    )
    with loader:
        batches = list(loader)
    wanted = [(place, sample) for place, sample in enumerate(ids) if sample not in harm]
    found = [pair for b in batches for pair in zip(b.positions.tolist(), b.sample_ids.tolist(), strict=True)]
    assert found == wanted
    assert all(len(b.views[0]) == len(b.labels) == len(b.noise) == len(b.mask) > 0 for b in batches)
    assert [label for b in batches for label in b.labels.tolist()] == [sample % 5 for _, sample in wanted]


def test_evaluation_says_what_it_leaves_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dataset, file = damaged(tmp_path, {6: no_tables}), tmp_path / "quarantine.jsonl"
    bad = BadSamples(dataset, 0.5, file, rank=2)
    with EvaluationLoader(dataset, np.arange(NUM), data=DATA, batch=5, device=CPU, bad_samples=bad) as loader:
        assert sum(len(batch.labels) for batch in loader) == NUM - 1
    said = capfd.readouterr().err
    assert "warning: rank 2: set 000.tar:00006 (id 6): " in said and "left out of the evaluation" in said
    assert json.loads(file.read_text())["step"] is None


def test_evaluation_stops_by_default(tmp_path: Path) -> None:
    dataset, data = damaged(tmp_path, {6: no_tables}), Data(image_size=16, threads=1)
    with EvaluationLoader(dataset, np.arange(NUM), data=data, batch=5, device=CPU) as loader:
        with pytest.raises(UndecodableSample, match=r"00006 \(id 6\)"):
            list(loader)
