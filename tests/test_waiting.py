"""Where a step makes the host wait for the device: nowhere in an objective, once in the optimizer's step."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import tiny_dtm
import tiny_lut
import torch
from runs import ROOT, TIMEOUT, environment
from torch import Tensor

from engine.bad_steps import Safeguard
from engine.meter import gradient_norm
from engine.objectives.contract import Objective
from engine.objectives.mae import MaskedAutoencoder
from recipes.methods import Mae

META = torch.device("meta")  # holds shapes and no numbers: reading one fails, as do shapes that depend on them


def tiny_mae() -> MaskedAutoencoder:
    return MaskedAutoencoder(Mae(**tiny_lut.DECODER), tiny_lut.TINY, 32).train()


OBJECTIVES = {
    "mae": (tiny_mae, tiny_lut.batch_of()),
    "lut": (tiny_lut.tiny_lut, tiny_lut.batch_of()),
    "lut, one by one": (
        partial(tiny_lut.tiny_lut, bc_tokens="pooled_tokenwise", bc_loss="infonce"),
        tiny_lut.batch_of(),
    ),
    "lut, masked": (partial(tiny_lut.tiny_lut, bc_tokens="masked", teacher_bn="batch"), tiny_lut.batch_of()),
    "dtm": (tiny_dtm.tiny, tiny_dtm.batch_of(4)),
    "mae_dtm": (tiny_dtm.tiny_mae, tiny_dtm.batch_of(4)),
}


def on_device(batch: SimpleNamespace) -> SimpleNamespace:
    """As the loader gives it: places in the global batch stay on the CPU."""
    parts = {name: value.to(META) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    parts |= {"views": tuple(view.to(META) for view in batch.views), "sample_ids": torch.arange(5, device=META)}
    if hasattr(batch, "positions"):
        parts["positions"] = batch.positions
    return SimpleNamespace(**parts)


def step(objective: Objective, batch: SimpleNamespace) -> dict[str, Tensor]:
    """A whole step but for DeepSpeed."""
    guard = Safeguard(objective, stage=1)
    guard.begin()
    metrics = objective(batch, 0)
    guard.watched(metrics["loss"], batch).backward()
    gradient_norm(objective)
    objective.after_step(0, 10)
    return metrics


@pytest.fixture
def meta_without_autocast(monkeypatch):
    """torch knows no autocast for the device without numbers."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_objective_reads_the_device(name, meta_without_autocast):
    make, batch = OBJECTIVES[name]
    objective = make().to(META)
    metrics = step(objective, on_device(batch))
    assert all(value.device == META for value in metrics.values())
    with pytest.raises(RuntimeError, match="meta"):  # what would have happened
        metrics["loss"].item()


@pytest.mark.long
def test_what_deepspeed_reads(tmp_path):
    """ZeRO decides on the host whether a step is applied; the optimizer is torch's fused one at every stage."""
    command = [sys.executable, str(ROOT / "tests" / "waiting_worker.py"), *"0123"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for stage in "012":
        # The first of them waits; after it nothing is queued, so the others find their numbers ready.
        assert found[stage]["step"] == {"aten._local_scalar_dense": 3 if stage in "12" else 1}
    for part in ("before", "after"):
        assert all(found[stage][part] == {} for stage in found)
    assert all(found[stage]["optimizer"] == ["aten._fused_adamw_"] for stage in found)
