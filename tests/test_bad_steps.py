"""A step without a finite loss or gradient: it changes nothing, its images are named, and too many end the run."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler
from runs import ROOT, TIMEOUT, TINY, Finished, environment, launch, read_lines, train
from tiny_lut import batch_of, tiny_lut
from torch import nn

from engine.bad_steps import BAD_STEPS, MOST_IN_WINDOW, WINDOW, BadSteps, Safeguard
from engine.console import Console
from engine.runtime import Runtime
from engine.shell import DIVERGED, Diverged, exit_code
from recipes import registry
from recipes.overrides import apply_overrides
from shards.dataset import open_dataset
from shards.draws.order import GlobalOrder

ALONE = Runtime(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))

# --- runs on two ranks ----------------------------------------------------------------------------------------------

BAD, STEPS = 3, 5
# Two micro-steps per step: the second of step 3 on rank 1 is the sixth.
LOSS, GRADIENT, SKIP = "step.loss=nan@6#1", "step.backward=nan@6#1", f"skip={BAD}"
CASES = {
    "stage0": "zero.stage=0,precision=fp32",
    "stage2": "zero.stage=2,precision=bf16_params",
    "stage3": "zero.stage=3,precision=bf16",
}


def together(folder: Path, shards: Path, *runs: str, recipe: str, settings: tuple[str, ...] = ()) -> Path:
    """All runs one after the other in the same two ranks."""
    command = launch(
        ROOT / "tests" / "bad_step_worker.py", str(folder), *runs, "--", "--recipe", recipe, *TINY, *settings,
        f"data.train={shards}/train", "data.val=", f"run.steps={STEPS}", "run.save_every=1", "run.keep=9",
        "zero.param_persistence_threshold=0", launcher="torchrun", ranks=2,
    )  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd="/", env=environment(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def weights(run: Path) -> dict[str, bytes]:
    """Everything that the last checkpoint exports: encoder, the rest, moving averages."""
    last = run / "checkpoints" / f"step_{STEPS:08d}"
    return {str(path.relative_to(last)): path.read_bytes() for path in last.rglob("*.safetensors")}


def assert_as_if_left_out(bad: Path, left_out: Path) -> None:
    """The same bits before, after and at the end; in the step itself the bad run has no loss."""
    theirs, ours = (read_lines(run / "metrics.jsonl") for run in (left_out, bad))
    assert [line["loss_hex"] for line in ours if line["step"] != BAD] == [
        line["loss_hex"] for line in theirs if line["step"] != BAD
    ]
    assert len({line["loss_hex"] for line in ours}) == STEPS and len(ours) == STEPS
    assert weights(bad) == weights(left_out) and "encoder/model.safetensors" in weights(bad)


@pytest.fixture(scope="module")
def mae(shards, tmp_path_factory) -> Path:
    """ZeRO 1 in fp32: a bad loss, the same in two pieces, and the step left out."""
    first = f"pieces:{LOSS}:precision=fp32,run.stop_after={BAD}"
    runs = (f"loss:{LOSS}:precision=fp32", first, "pieces::precision=fp32,--resume", f"skip:{SKIP}:precision=fp32")
    return together(tmp_path_factory.mktemp("mae"), shards, *runs, recipe="vit_ti_mae_demo")


@pytest.fixture(scope="module")
def lut(shards, tmp_path_factory) -> Path:
    """Batch norm, a moving average, autocast."""
    runs = (f"gradient:{GRADIENT}:", f"skip:{SKIP}:")
    settings = ("objective.head_hidden=32", "objective.norm_batch=8")
    return together(tmp_path_factory.mktemp("lut"), shards, *runs, recipe="vit_ti_lut_demo", settings=settings)


def test_a_step_without_a_finite_loss_changes_nothing(mae):
    assert_as_if_left_out(mae / "loss", mae / "skip")
    lines = {line["step"]: line for line in read_lines(mae / "loss/metrics.jsonl")}
    assert lines[BAD]["loss"] is None and lines[BAD + 1]["loss"] > 0


@pytest.mark.long
def test_a_step_without_a_finite_gradient_changes_neither_statistics_nor_average(lut):
    assert_as_if_left_out(lut / "gradient", lut / "skip")
    assert "outside.safetensors" in weights(lut / "gradient")
    assert math.isfinite(read_lines(lut / "gradient/metrics.jsonl")[BAD - 1]["loss"])
    (record,) = read_lines(lut / "gradient" / BAD_STEPS)
    assert record["step"] == BAD and record["suspects"] == [] and record["loss"] > 0


def test_its_images_are_named(mae, shards):
    """All of the global batch in its order; suspects are those of rank 1's second micro-step, the last four."""
    (record,) = read_lines(mae / "loss" / BAD_STEPS)
    dataset = open_dataset(shards / "train")
    order = GlobalOrder(dataset.tar, seed=0, global_batch=16)
    assert record["keys"] == [dataset.name(i) for i in order.global_batch_ids(BAD - 1)]
    assert record["suspects"] == record["keys"][12:] and record["loss"] is None and record["step"] == BAD


def test_a_run_that_is_resumed_behind_a_bad_step_is_the_same_run(mae):
    assert weights(mae / "pieces") == weights(mae / "loss")
    assert (mae / "pieces" / BAD_STEPS).read_bytes() == (mae / "loss" / BAD_STEPS).read_bytes()
    assert Finished(0, "", mae / "pieces").losses == Finished(0, "", mae / "loss").losses


def test_the_save_after_a_bad_step_waits_for_a_good_one(mae):
    saved = [int(path.name[-8:]) for path in sorted((mae / "loss/checkpoints").glob("step_*"))]
    assert saved == [step for step in range(1, STEPS + 1) if step != BAD]


@pytest.mark.long
def test_at_every_stage_and_precision(shards, tmp_path):
    runs = [f"{name}_{how}:{fault}:{own}" for name, own in CASES.items()
            for how, fault in (("loss", LOSS), ("gradient", GRADIENT), ("skip", SKIP))]  # fmt: skip
    together(tmp_path, shards, *runs, recipe="vit_ti_mae_demo")
    for name in CASES:
        for how in ("loss", "gradient"):
            assert_as_if_left_out(tmp_path / f"{name}_{how}", tmp_path / f"{name}_skip")


@pytest.mark.long
def test_three_in_a_row_end_the_run(shards, tmp_path, monkeypatch):
    """By another code than other failures; the checkpoint from before them stays the newest."""
    monkeypatch.setenv("MASKWRIGHT_FAULT", ";".join(f"step.loss:nan@{micro_step}" for micro_step in (32, 33, 37)))
    arguments = (f"data.train={shards}/train", "data.val=", "precision=fp32", "run.steps=20", "run.save_every=1")
    run = train(tmp_path / "run", *arguments, succeeds=False)
    assert run.returncode == DIVERGED and "3. time in a row (run.max_bad_steps=3)" in run.output
    assert "Traceback" not in run.output and run.newest_checkpoint().name == "step_00000007"
    assert [line["step"] for line in read_lines(run.folder / BAD_STEPS)] == [8, 9, 10]


# --- the record and its limits --------------------------------------------------------------------------------------


def bad_steps(folder: Path, shards: Path, *overrides: str, done: int = 0) -> BadSteps:
    console = Console(folder, enabled=True, total_steps=9, start_step=done)
    recipe = apply_overrides(registry.load("vit_ti_mae_demo"), list(overrides))
    return BadSteps(console, open_dataset(shards / "train"), ALONE, recipe, done=done)


def micro_steps(*losses: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.tensor([2 * i, 2 * i + 1]), torch.tensor(loss)) for i, loss in enumerate(losses)]


def test_too_many_in_a_row(shards, tmp_path):
    bad = bad_steps(tmp_path, shards, "run.max_bad_steps=2")
    for step in (3, 5, 7):
        bad.note(step, micro_steps(1.0, math.nan))
    with pytest.raises(Diverged, match=r"^step 8: the loss inf is no number, for the 2\. time in a row") as raised:
        bad.note(8, micro_steps(math.inf, 1.0))
    assert exit_code(raised.value) == 3 and str(tmp_path / BAD_STEPS) in str(raised.value)
    assert [line["step"] for line in read_lines(tmp_path / BAD_STEPS)] == [3, 5, 7, 8]


def test_too_many_lately(shards, tmp_path):
    """Eleven in a thousand steps are too many, ten are not."""
    bad = bad_steps(tmp_path, shards)
    steps = [10 + 100 * i for i in range(MOST_IN_WINDOW)]
    for step in (*steps, steps[0] + WINDOW):  # the first of them is a thousand steps ago by then
        bad.note(step, micro_steps(math.nan))
    with pytest.raises(Diverged, match="in 11 of the last 1,000 steps"):
        bad.note(steps[0] + WINDOW + 2, micro_steps(math.nan))


def test_a_resumed_run_goes_on_counting(shards, tmp_path):
    bad = bad_steps(tmp_path, shards)
    for step in (4, 5, 8):
        bad.note(step, micro_steps(math.nan))
    again = bad_steps(tmp_path, shards, done=5)
    assert again.steps == [4, 5] and again.in_a_row(5) == 2
    with pytest.raises(Diverged, match="3. time in a row"):
        again.note(6, micro_steps(math.nan))
    assert [line["step"] for line in read_lines(tmp_path / BAD_STEPS)] == [4, 5, 6]
    assert bad_steps(tmp_path, shards).steps == [] and not (tmp_path / BAD_STEPS).read_text()


def test_an_overflow_of_fp16_is_no_bad_step(shards, tmp_path):
    """DeepSpeed looks for the largest scale of the loss; a loss that is no number itself is none of its business."""
    bad = bad_steps(tmp_path, shards, "precision=fp16")
    for step in range(1, 6):
        bad.note(step, micro_steps(1.0, 2.0))
    assert not bad.steps and not (tmp_path / BAD_STEPS).exists()
    bad.note(6, micro_steps(1.0, math.nan))
    assert bad.steps == [6]


def test_a_full_disk_does_not_end_the_run(shards, tmp_path, capsys):
    bad = bad_steps(tmp_path, shards)
    (tmp_path / BAD_STEPS).symlink_to("/dev/full")
    bad.note(3, micro_steps(math.nan))
    assert bad.steps == [3] and "No space left" in capsys.readouterr().err


# --- the step that can be taken back --------------------------------------------------------------------------------


def test_a_finite_loss_keeps_its_bits_and_gradients():
    guard = Safeguard(nn.Linear(2, 2), stage=1)
    for value in (1.7, -0.3, 1e-30):
        guard.begin()
        leaf = torch.tensor(value, requires_grad=True)
        loss = guard.watched(leaf, SimpleNamespace(sample_ids=torch.arange(2)))
        loss.backward()
        assert loss.item() == leaf.item() and leaf.grad.item() == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_spoils_every_gradient(value):
    """Also where the gradient would be finite: the loss is infinite by a constant."""
    layer = nn.Linear(2, 2)
    guard = Safeguard(layer, stage=1)
    guard.begin()
    loss = layer(torch.ones(1, 2)).sum() + torch.tensor(value)
    guard.watched(loss, SimpleNamespace(sample_ids=torch.arange(1))).backward()
    assert all(parameter.grad.isnan().all() for parameter in layer.parameters())


@pytest.mark.parametrize("applied", [True, False])
def test_running_statistics_are_taken_back_with_the_step(applied):
    objective = tiny_lut()
    engine = SimpleNamespace(step=lambda: None, get_global_grad_norm=lambda: 1.0, was_step_applied=lambda: applied)
    before = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    guard = Safeguard(objective, stage=1)
    for _ in range(2):  # the second step begins with what the first left
        guard.begin()
        objective(batch_of(), 0)
        assert guard.step(engine) is applied
    same = [bool((buffer == before[name]).all()) for name, buffer in objective.named_buffers()]
    assert len(same) > 2 and (not any(same) if applied else all(same))


def test_an_overflow_without_end_is_a_divergence(monkeypatch):
    """fp16 halves the scale of the loss until there is nothing to halve; DeepSpeed then raises a bare Exception."""
    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)  # it prints on rank 0
    scaler = loss_scaler.DynamicLossScaler(
        4, scale_window=1000, min_scale=1, delayed_shift=1, consecutive_hysteresis=False
    )
    engine = SimpleNamespace(step=lambda: scaler.update_scale(True), get_global_grad_norm=lambda: -1.0)
    engine.was_step_applied = lambda: False
    guard = Safeguard(tiny_lut(), stage=2)
    guard.begin()
    assert not guard.step(engine) and not guard.step(engine)  # 4 -> 2 -> 1
    with pytest.raises(Diverged, match="at every scale of the loss"):
        guard.step(engine)
    engine.step = lambda: (_ for _ in ()).throw(RuntimeError("another loss scale"))
    with pytest.raises(RuntimeError, match="another"):
        guard.step(engine)


def test_the_record_is_json_of_one_line_per_step(shards, tmp_path):
    bad_steps(tmp_path, shards).note(1, micro_steps(2.0, math.nan))
    (line,) = (tmp_path / BAD_STEPS).read_text().splitlines()
    dataset = open_dataset(shards / "train")
    names = [dataset.name(i) for i in range(4)]
    assert json.loads(line) == {"step": 1, "loss": None, "keys": names, "suspects": names[2:]}
