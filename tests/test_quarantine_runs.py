"""The whole program on shards whose images were damaged after their conversion, on one and on two ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from damage import no_end, no_header
from runs import TINY, Finished, read_lines, train, train_together

from shards.dataset import open_dataset

STEPS = 12
FP32 = ("precision=fp32", f"run.steps={STEPS}", "run.save_every=5")
QUARANTINE = ("data.on_bad_sample=quarantine", "data.max_bad_fraction=0.1")


@pytest.fixture(scope="module")
def damaged(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A copy of the shards with bytes of two training images and one validation image changed, and their names."""
    root, names = tmp_path_factory.mktemp("damaged"), []
    for split, harm in (("train", {17: no_header, 41: no_end}), ("val", {3: no_header})):
        shutil.copytree(shards / split, root / split)
        dataset = open_dataset(root / split)
        for wanted, change in harm.items():
            jpegs = [i for i in range(wanted, len(dataset)) if image(dataset, i)[:2] == b"\xff\xd8"]
            sample = next(i for i in jpegs if b"\xff\xc0" in image(dataset, i))  # not progressive
            path = dataset.paths[dataset.tar[sample]]
            path.chmod(0o644)
            with open(path, "r+b") as tar:
                tar.seek(dataset.offset[sample])
                tar.write(change(image(dataset, sample)))
            names.append(dataset.name(sample))
    return root, names


def image(dataset, sample: int) -> bytes:
    with open(dataset.paths[dataset.tar[sample]], "rb") as tar:
        tar.seek(dataset.offset[sample])
        return tar.read(int(dataset.size[sample]))


@pytest.fixture(scope="module")
def one_rank(damaged: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train(tmp_path_factory.mktemp("one") / "run", f"data.train={damaged[0]}/train", *FP32, *QUARANTINE)


def entries(run: Finished) -> list[dict]:
    return read_lines(run.folder / "quarantine.jsonl")


def test_the_default_stops_with_the_name(damaged: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, names = damaged
    done = train(tmp_path / "run", f"data.train={root}/train", *FP32, succeeds=False)
    assert done.returncode == 1
    assert f"rank 0: {names[0]} (id " in done.output and "data.on_bad_sample=quarantine" in done.output
    assert "Traceback" not in done.output


def test_quarantine_finishes_and_names_what_it_left_out(damaged: tuple[Path, list[str]], one_rank: Finished) -> None:
    assert [line["step"] for line in one_rank.metrics] == list(range(1, STEPS + 1))
    assert {f"{entry['tar']}:{entry['key']}" for entry in entries(one_rank)} == set(damaged[1])
    assert all(name in one_rank.output for name in damaged[1])
    assert {entry["rank"] for entry in entries(one_rank)} == {0}
    assert one_rank.evaluations[-1]["knn"] * 19 / 100 == pytest.approx(round(one_rank.evaluations[-1]["knn"] * 0.19))


@pytest.mark.long
def test_a_resume_is_bitwise_the_same(damaged: tuple[Path, list[str]], one_rank: Finished, tmp_path: Path) -> None:
    """What was known at the stop is known again, and what was not is found again."""
    arguments = (f"data.train={damaged[0]}/train", *FP32, *QUARANTINE)
    stopped = train(tmp_path / "run", *arguments, "run.stop_after=5")
    before = entries(stopped)
    resumed = train(tmp_path / "run", *arguments, "--resume")
    assert resumed.losses == one_rank.losses
    assert entries(resumed)[: len(before)] == before
    assert {entry["id"] for entry in entries(resumed)} == {entry["id"] for entry in entries(one_rank)}


@pytest.mark.long
def test_two_ranks_agree_with_one_and_with_themselves(
    damaged: tuple[Path, list[str]], one_rank: Finished, tmp_path: Path
) -> None:
    """A whole run, and one that stops and is resumed, in the same processes."""
    overrides = ("--recipe", "vit_ti_mae_demo", *TINY, f"data.train={damaged[0]}/train", *FP32, *QUARANTINE)
    runs = ("whole", "parts=run.stop_after=7", "parts=--resume")
    output = train_together(tmp_path, *runs, "--", *overrides, ranks=2)
    whole, parts = (Finished(0, output, tmp_path / name) for name in ("whole", "parts"))
    assert parts.losses == whole.losses and len(whole.losses) == STEPS
    for one, two in zip(one_rank.metrics, whole.metrics, strict=True):
        assert abs(one["loss"] - two["loss"]) <= 1e-5, one["step"]
    assert {json.dumps([e["tar"], e["key"]]) for e in entries(whole)} == {
        json.dumps([e["tar"], e["key"]]) for e in entries(one_rank)
    }
    assert len(entries(whole)) == len(damaged[1]), "each is written once, whichever rank met it"
