"""The loaders serve what the pure functions promise: order, pixels and noise, however the work is divided."""

from __future__ import annotations

import dataclasses
import gc
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from images import encode, jpeg_bytes, smooth_picture
from tars import make_dataset

from recipes.schema import Data
from shards.augment.views import VIEWS
from shards.dataset import Dataset
from shards.draws.augmentations import mask_noise
from shards.draws.block_masks import BlockMasks
from shards.draws.masks import NO_MASK, MaskDraws
from shards.draws.order import GlobalOrder
from shards.layout import DataError
from shards.reading import cores, loader
from shards.reading.loader import Batch, EvaluationLoader, TrainLoader
from shards.reading.sample_check import UndecodableSample
from shards.reading.segments import MicroBatch, cut_segments, pair_budget, run_starts, write_segment

CPU = torch.device("cpu")
DATA = Data(image_size=32, threads=1)
NUM = 37  # samples; a prime, so that nothing divides it
MASKS = MaskDraws(num_noise=4, blocks=BlockMasks(grid=4, num_masked=7, min_area=2))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    encoded = [jpeg_bytes(seed, 30 + seed, 60 - seed) for seed in range(NUM)]
    return make_dataset(tmp_path_factory.mktemp("train"), encoded, per_tar=10)


def train(dataset: Dataset, **changes: Any) -> TrainLoader:
    settings = {
        "view": "pretrain_mae", "data": DATA, "seed": 5, "global_batch": 12, "micro_batch": 4, "rank": 0,
        "world_size": 1, "masks": MASKS, "device": CPU, "total_steps": 5, "check_sources": True,
    }  # fmt: skip
    return TrainLoader(dataset, **(settings | changes))


def drain(loader: TrainLoader | EvaluationLoader) -> list[Batch]:
    with loader:
        return list(loader)


Looks = dict[tuple[int, int], tuple[bytes, bytes, int]]


def looks(batches: list[Batch], steps_of: list[int]) -> Looks:
    """(step, sample id) -> the sample's pixels, noise and mask as bytes, and its place in the global batch."""
    found: Looks = {}
    for step, batch in zip(steps_of, batches, strict=True):
        for row, sample in enumerate(batch.sample_ids.tolist()):
            pixels = b"".join(view[row].numpy().tobytes() for view in batch.views)
            drawn = batch.noise[row].numpy().tobytes() + batch.mask[row].numpy().tobytes()
            found[step, sample] = (pixels, drawn, int(batch.positions[row]))
    return found


@pytest.fixture(scope="module")
def plain(dataset: Dataset) -> Looks:
    """Five steps (into the second epoch) on one rank: what every other division of the work must reproduce."""
    return looks(drain(train(dataset)), [k // 3 for k in range(15)])


def test_order_labels_positions_and_noise_are_the_pure_functions(dataset: Dataset) -> None:
    batches = drain(train(dataset))
    order = GlobalOrder(dataset.tar, seed=5, global_batch=12)
    assert len(batches) == 15
    for k, batch in enumerate(batches):
        step, positions = k // 3, np.arange(4) + 4 * (k % 3)
        ids = order.global_batch_ids(step)[positions]
        assert batch.sample_ids.tolist() == ids.tolist() and batch.positions.tolist() == positions.tolist()
        assert batch.labels.tolist() == (ids % 5).tolist()
        np.testing.assert_array_equal(batch.noise, mask_noise(5, order.epoch(step), ids, 4))
        assert batch.mask.dtype == torch.bool
        np.testing.assert_array_equal(batch.mask, MASKS.blocks.masks(5, order.epoch(step), ids))
        assert batch.views[0].shape == (4, 3, 32, 32) and batch.views[0].dtype == torch.float32
        assert (batch.labels.dtype, batch.sample_ids.dtype, batch.noise.dtype) == (
            torch.int64,
            torch.int64,
            torch.float32,
        )


def test_pixels_are_those_of_the_reference(dataset: Dataset) -> None:
    """With the right crop, flip and image: a wrong one is tens of levels away."""
    order = GlobalOrder(dataset.tar, seed=5, global_batch=12)
    for k, batch in enumerate(drain(train(dataset))):
        epoch = order.epoch(k // 3)
        expected = VIEWS["pretrain_mae"].referenced(dataset, DATA, 5, epoch, batch.sample_ids.numpy())[0]
        difference = (batch.views[0].numpy() - expected) * 255 * np.float32(DATA.std).reshape(3, 1, 1)
        assert np.abs(difference).mean((1, 2, 3)).max() < 1


def test_one_epoch_shows_each_sample_at_most_once(dataset: Dataset) -> None:
    ids = torch.cat([batch.sample_ids for batch in drain(train(dataset, total_steps=3))])
    assert len(set(ids.tolist())) == 36


@pytest.mark.parametrize("change", [{"micro_batch": 6}, {"micro_batch": 12}, {"data": DATA, "most_pairs": 5}], ids=str)
def test_a_sample_looks_the_same_in_another_division(dataset: Dataset, plain: Looks, change: dict[str, Any]) -> None:
    steps = 12 // change.get("micro_batch", 4)
    assert looks(drain(train(dataset, **change)), [k // steps for k in range(5 * steps)]) == plain


def test_a_sample_looks_the_same_with_two_threads(dataset: Dataset, plain: Looks) -> None:
    data = dataclasses.replace(DATA, threads=2, prefetch=3)
    assert looks(drain(train(dataset, data=data)), [k // 3 for k in range(15)]) == plain


@pytest.mark.parametrize(("world", "micro"), [(2, 2), (2, 6), (3, 4)])
def test_ranks_together_serve_the_same_global_batches(dataset: Dataset, plain: Looks, world: int, micro: int) -> None:
    steps = 12 // (world * micro)
    parts = [
        looks(
            drain(train(dataset, rank=r, world_size=world, micro_batch=micro)), [k // steps for k in range(5 * steps)]
        )
        for r in range(world)
    ]
    assert sum(len(part) for part in parts) == len(plain)  # disjoint
    assert {place: look for part in parts for place, look in part.items()} == plain


@pytest.mark.parametrize("start", [1, 3, 4])
def test_resume_serves_the_rest(dataset: Dataset, plain: Looks, start: int) -> None:
    found = looks(drain(train(dataset, start_step=start)), [start + k // 3 for k in range(3 * (5 - start))])
    assert found == {place: look for place, look in plain.items() if place[0] >= start}


def test_blocks_are_served_in_their_order(dataset: Dataset) -> None:
    data = dataclasses.replace(DATA, block_size=4)
    order = GlobalOrder(dataset.tar, seed=5, global_batch=12, block_size=4)
    served = torch.cat([batch.sample_ids for batch in drain(train(dataset, data=data, most_pairs=4))])
    assert served.tolist() == np.concatenate([order.global_batch_ids(step) for step in range(5)]).tolist()


def test_finished_run_serves_nothing_and_bad_start_is_refused(dataset: Dataset) -> None:
    assert drain(train(dataset, start_step=5)) == []
    with pytest.raises(ValueError, match="start_step=6: outside 0 ... total_steps=5"):
        train(dataset, start_step=6)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 7), st.integers(1, 12))
def test_segments_keep_the_order_and_the_budget(tars: list[int], size: int, most: int) -> None:
    tar = np.array(tars, np.int32)
    batches = [MicroBatch(0, ids, ids) for ids in np.array_split(np.arange(len(tar)), -(-len(tar) // size))]
    segments = list(cut_segments(iter(batches), tar, most))
    assert [batch for segment in segments for batch in segment] == batches
    pairs = [len(run_starts(tar[np.concatenate([b.ids for b in segment])])) for segment in segments]
    assert all(p <= most or len(segment) == 1 for p, segment in zip(pairs, segments, strict=True))
    for segment, after in zip(segments, segments[1:], strict=False):  # no segment could have been longer
        longer = np.concatenate([batch.ids for batch in (*segment, after[0])])
        assert len(run_starts(tar[longer])) > most


def test_pair_budget_leaves_room_for_two_training_and_two_evaluation_pipelines() -> None:
    half = int(Path("/proc/sys/vm/max_map_count").read_text()) // 2
    assert 2 * pair_budget(3 / 7) + 2 * pair_budget(1 / 15) <= half
    assert 1 <= pair_budget(3 / 7) <= 14_000


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, NUM - 1), max_size=30), st.integers(1, 9), st.integers(1, 9))
def test_evaluation_serves_each_row_once_in_order(dataset: Dataset, ids: list[int], batch: int, most: int) -> None:
    loader = EvaluationLoader(
        dataset, np.array(ids, int), data=DATA, batch=batch, device=CPU, most_pairs=most, check_sources=True
    )
    batches = drain(loader)
    assert [row for b in batches for row in b.sample_ids.tolist()] == ids
    assert [row for b in batches for row in b.positions.tolist()] == list(range(len(ids)))
    assert all(len(b.labels) == batch for b in batches[:-1])
    assert all(len(b.views[0]) == len(b.labels) == len(b.noise) == len(b.mask) for b in batches)


def mappings(dataset: Dataset) -> int:
    return sum(str(dataset.folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_close_frees_pipelines_thread_and_files_and_batches_stay_valid(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.reading.segments.SCRATCH", tmp_path)
    gc.collect()
    threads = threading.active_count()
    loader = train(dataset, most_pairs=3)
    kept = [loader.next_batch() for _ in range(6)]
    copies = [batch.views[0].clone() for batch in kept]
    assert mappings(dataset) > 0 and loader.data_wait > 0
    loader.close()
    loader.close()
    assert mappings(dataset) == 0 and threading.active_count() == threads and not list(tmp_path.iterdir())
    drain(train(dataset))  # DALI takes its memory anew
    assert all(torch.equal(batch.views[0], copy) for batch, copy in zip(kept, copies, strict=True))
    with pytest.raises(StopIteration):
        loader.next_batch()


def test_shifted_offset_is_caught_before_dali_sees_it(dataset: Dataset) -> None:
    size = dataset.paths[0].stat().st_size
    for offset in (size, 513, -512):
        offsets = dataset.offset.copy()
        offsets[3] = offset
        with train(dataclasses.replace(dataset, offset=offsets)) as loader:
            with pytest.raises(
                ValueError, match=rf"set 000.tar:00003: the index says .* at offset {offset}, .* {size} "
            ):
                list(loader)


@pytest.mark.parametrize("most_pairs", [None, 4], ids=["in the first segment", "in the thread"])
def test_bytes_that_are_no_image_never_reach_the_decoder(dataset: Dataset, most_pairs: int | None) -> None:
    """Inside the file and aligned, but a tar header: DALI's decoder would crash in half of all runs."""
    offsets = dataset.offset.copy()
    offsets[14] -= 512
    with train(dataclasses.replace(dataset, offset=offsets), total_steps=9, most_pairs=most_pairs) as loader:
        with pytest.raises(DataError, match=rf"set 001.tar:00014 \(id 14\): no image begins at offset {offsets[14]}"):
            list(loader)
        with pytest.raises(StopIteration):  # a failed loader never goes on with other samples
            loader.next_batch()


@pytest.mark.parametrize("most_pairs", [None, 4], ids=["in the pipeline", "in the thread"])
def test_truncated_image_is_named(tmp_path: Path, most_pairs: int | None) -> None:
    encoded = [jpeg_bytes(seed, 64, 48) for seed in range(20)]
    encoded[11] = encoded[11][: len(encoded[11]) // 2]
    dataset = make_dataset(tmp_path, encoded, per_tar=6, sizes=[(48, 64)] * 20)
    with train(dataset, global_batch=4, total_steps=10, most_pairs=most_pairs) as loader:
        with pytest.raises(UndecodableSample, match=r"set 001.tar:00011 \(id 11\): .*truncated") as caught:
            list(loader)
    assert list(caught.value.reasons) == [11]


def test_file_that_only_pil_forgives_is_named(tmp_path: Path) -> None:
    """A PNG with a wrong checksum: Pillow decodes it, DALI does not."""
    encoded = [jpeg_bytes(seed, 64, 48) for seed in range(8)]
    png = bytearray(encode(smooth_picture(np.random.default_rng(0), 64, 48), "PNG"))
    data = png.index(b"IDAT")
    length = int.from_bytes(png[data - 4 : data])
    png[data + 4 + length] ^= 255
    encoded[5] = bytes(png)
    dataset = make_dataset(tmp_path, encoded, per_tar=4, sizes=[(48, 64)] * 8)
    with train(dataset, global_batch=8, micro_batch=8, total_steps=1) as loader:
        with pytest.raises(UndecodableSample, match=r"set 001.tar:00005 \(id 5\)"):
            list(loader)


def test_missing_shard_is_named(dataset: Dataset) -> None:
    paths = (*dataset.paths[:2], dataset.folder / "gone.tar", dataset.paths[3])
    with train(dataclasses.replace(dataset, paths=paths)) as loader:
        with pytest.raises(DataError, match="gone.tar: No such file or directory; restore the shard"):
            list(loader)


def test_bytes_from_elsewhere_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that disagrees with the plan: two samples exchanged where it is written."""

    def exchanged(dataset: Dataset, ids: np.ndarray, folder: Path) -> tuple[list[str], list[str]]:
        return write_segment(dataset, np.concatenate([ids[1::-1], ids[2:]]), folder)

    monkeypatch.setattr("shards.reading.pipelines.write_segment", exchanged)
    dataset = make_dataset(tmp_path, [jpeg_bytes(seed, 40, 40) for seed in range(12)], per_tar=5)
    with train(dataset, check_sources=False) as loader:  # the first batch is always compared
        with pytest.raises(RuntimeError, match=r"the bytes of '.*' were served where '.*' was planned \(row 0\)"):
            list(loader)


def test_image_of_another_size_than_indexed_is_named(dataset: Dataset) -> None:
    """The crop lies outside the image: DALI says so without a name."""
    height = dataset.height.copy()
    height[20] = 4000
    with train(dataclasses.replace(dataset, height=height)) as loader:
        with pytest.raises(UndecodableSample, match=r"00020 \(id 20\): 40 x 50 pixels where the index says 4000 x 50"):
            list(loader)


@pytest.mark.parametrize(
    ("own", "node", "ranks", "expected"),
    [
        (128, 128, 8, 16),  # nobody is bound
        (16, 128, 8, 16),  # every rank has cores of its own
        (64, 128, 8, 16),  # four ranks share a processor
        (14, 128, 8, 14),  # bound to fewer
        (2, 2, 8, 1),
        (7, 7, 2, 3),
    ],
)
def test_ranks_share_the_cores_of_their_node(own: int, node: int, ranks: int, expected: int) -> None:
    assert cores.share(own, node, ranks) == expected


def test_a_gpu_leaves_cores_to_torch() -> None:
    assert [cores.decoding_threads(number, gpu=True) for number in (1, 2, 3, 16)] == [1, 1, 1, 14]
    assert [cores.decoding_threads(number, gpu=False) for number in (1, 2, 16)] == [1, 2, 16]


def test_cores_of_the_node_are_the_launchers_within_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher, the parent, has cores 0 to 7, this process is bound to 2 and 3."""
    bound = {0: {2, 3}, os.getppid(): set(range(8))}
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda process: bound[process])
    assert cores.node_cores({}) == 8
    assert cores.node_cores({"SLURM_CPUS_ON_NODE": "6"}) == 6  # slurmstepd runs outside the job
    assert [cores.node_cores({"SLURM_CPUS_ON_NODE": text}) for text in ("", "0", "12", "two")] == [8] * 4
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    assert [cores.cores_per_rank(ranks) for ranks in (1, 2, 4, 8, 16)] == [2, 2, 2, 1, 1]
    bound[os.getppid()] = {2, 3}
    assert [cores.cores_per_rank(ranks) for ranks in (1, 2, 4)] == [2, 1, 1]
    tasks = {"SLURM_CPUS_ON_NODE": "64", "SLURM_STEP_NUM_TASKS": "16"}  # srun, and a script that is bound as its rank
    assert [cores.node_cores(tasks | {"WORLD_SIZE": size}) for size in ("16", "128")] == [64, 2]  # 128: torchrun's

    def gone(process: int) -> set[int]:
        if process:
            raise ProcessLookupError
        return {2, 3}

    monkeypatch.setattr(cores.os, "sched_getaffinity", gone)
    assert cores.node_cores({}) == 2


@pytest.mark.parametrize(("threads", "expected"), [(0, 5), (3, 3)])
def test_threads_are_the_share_unless_given(
    dataset: Dataset, threads: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(loader, "cores_per_rank", lambda ranks: asked.append(ranks) or 5)
    data = dataclasses.replace(DATA, threads=threads)
    feed = loader._feed(dataset, "evaluate", data, 0, torch.device("cpu"), 4, masks=NO_MASK)
    assert feed.num_threads == expected and asked == [4] * (not threads)
