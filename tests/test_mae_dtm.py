"""DTM on an MAE host: what its encoder sees, what is compared, and that it learns."""

from __future__ import annotations

import pytest
import torch
from tiny_dtm import TINY_DECODER, batch_of, tiny_mae
from torch import nn

from recipes.methods import MaeDtm


def test_mae_host_sees_the_visible_patches_and_says_something_of_all():
    objective, batch = tiny_mae(), batch_of(3)
    predictions, masking = objective.predict(batch.views[0], batch.noise)
    assert predictions.shape == (3, 16, objective.teacher.width) and (masking.mask.sum(1) == 12).all()
    row, column = divmod(masking.mask[0].nonzero()[0].item(), 4)
    changed = batch.views[0].clone()
    changed[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 1
    assert torch.equal(objective.predict(changed, batch.noise)[0], predictions)
    row, column = divmod((~masking.mask[0]).nonzero()[0].item(), 4)
    changed[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 1
    assert (objective.predict(changed, batch.noise)[0] != predictions)[0].any()
    assert objective.view == "pretrain_mae" and objective.masks.num_noise == 16


@pytest.mark.parametrize("loss_on", ["all", "masked", "visible"])
def test_mae_host_compares_as_dtm(loss_on):
    """Without morphing: the distance to the teacher's tokens, over those that its random mask hides or leaves."""
    settings = MaeDtm(max_removed=0, num_schedules=1, loss_on=loss_on, **TINY_DECODER)
    objective, batch = tiny_mae(settings), batch_of(4)
    predictions, masking = objective.predict(batch.views[0], batch.noise)
    counted = {"all": masking.mask | True, "masked": masking.mask, "visible": ~masking.mask}[loss_on]
    targets = objective.teacher(batch.views[0])
    expected = nn.functional.smooth_l1_loss(predictions[counted], targets[counted], beta=2.0)
    assert objective(batch, 0)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_mae_host_learns_and_leaves_the_teacher_alone():
    objective, batch = tiny_mae(), batch_of(8)
    assert not any("teacher" in name for name in [*objective.state_dict(), *dict(objective.named_modules())])
    assert objective.facts() == {"teacher": objective.teacher.identity}
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = objective(batch, 0)["loss"]
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
    assert {name.partition(".")[0] for name in objective.state_dict()} == {"encoder", "decoder"}
