"""dtm_morph_*: groups, means, loss and its gradient for given targets; dtm_schedule*: how many tokens are removed."""

from __future__ import annotations

import numpy as np
import torch
from golden_files import FP32_TOL, Golden
from torch import Tensor, nn

from engine.morphing import Groups, group_tokens, morph, normalize_channels, removed_per_step, step_counts, unmorph
from engine.objectives.comparison import Draw, MorphedComparison
from recipes.methods import Dtm

FP64_TOL = 1e-12
KINDS = {"l1": "l1", "l2": "l2", "negcosine": "negcosine"}  # the released names -> ours


def replay(objective: MorphedComparison, drawn: list[Draw]) -> None:
    """Let an objective use schedules that were drawn elsewhere."""
    objective.draws = lambda block, step, num_tokens: drawn


def loss_settings(golden: Golden, **others: int) -> Dtm:
    """What the file says of its loss, which is by default the released program's and ours; and other settings."""
    released = str(golden.take("loss_type", "smoothl1"))
    kind = "smooth_l1" if released.startswith("smoothl1") else KINDS.get(released)
    assert kind, f"{golden.name}: loss_type {released} is not known"
    beta = {"beta": float(golden.take("beta", Dtm.beta))}
    return Dtm(
        loss=kind,
        normalize_target=bool(golden.take("normalize_target", np.False_)),
        **(beta if kind == "smooth_l1" else {}),
        **others,
    )


def schedules(golden: Golden) -> list[Draw]:
    removed, steps = (np.atleast_1d(golden.take(name)) for name in ("m", "k"))
    drawn = [Draw(int(m), int(k)) for m, k in zip(removed, steps, strict=True)]
    if "L" in golden:
        golden.same("L", len(drawn))
    return drawn


def check_morphing(golden: Golden) -> None:
    drawn = schedules(golden)
    settings = loss_settings(golden, num_schedules=len(drawn))
    objective = MorphedComparison(settings, teacher=nn.Identity(), seed=0)
    replay(objective, drawn)
    targets, outputs = (torch.from_numpy(golden.take(name)) for name in ("v", "u"))
    golden.same("n_max", targets.shape[1])
    per_step = [removed_per_step(*draw, targets.shape[1]) for draw in drawn]
    golden.same("r", np.reshape(per_step, np.shape(golden.take("m"))))
    for number, draw in enumerate(drawn):
        check_groups(golden, f"s{number}_", draw, targets, outputs, settings)
    tolerance = FP64_TOL if targets.dtype == torch.float64 else FP32_TOL
    for dtype in {targets.dtype, torch.float64}:
        predicted = outputs.to(dtype, copy=True).requires_grad_()
        places = torch.zeros(len(targets), dtype=torch.int64)
        loss = objective.compare(predicted, targets.to(dtype), places, 0)["loss"]
        loss.backward()
        golden.close("loss", loss, tolerance, tolerance)
        golden.close("grad_u", predicted.grad, tolerance, tolerance)


def check_groups(golden: Golden, prefix: str, draw: Draw, targets: Tensor, outputs: Tensor, settings: Dtm) -> None:
    """One schedule: which tokens are together, in which order, and what the loss compares."""
    groups = group_tokens(targets, *draw)
    golden.same(f"{prefix}row", groups.labels)
    golden.same(f"{prefix}group", smallest_member(groups.labels))
    golden.same(f"{prefix}source", groups.membership.to(torch.uint8))
    golden.same(f"{prefix}size", groups.sizes.to(torch.int64))
    golden.same(f"{prefix}trace", trace(draw, targets.shape[1]))
    tolerance = FP64_TOL if targets.dtype == torch.float64 else FP32_TOL
    for name, tokens in (("v", targets), ("u", outputs)):
        means = morph(tokens, groups)
        golden.close(f"{prefix}morphed_{name}", means, tolerance, tolerance)
        spread = unmorph(means, groups)
        compared = normalize_channels(spread) if name == "v" and settings.normalize_target else spread
        golden.close(f"{prefix}unmorphed_{name}", compared, tolerance, tolerance)
    check_partition(golden, groups)


def check_partition(golden: Golden, groups: Groups) -> None:
    """Token 0 is a singleton everywhere (README of the goldens)."""
    assert (groups.labels[:, 0] == 0).all() and (groups.sizes[:, 0] == 1).all(), f"{golden.name}: token 0 was merged"


def smallest_member(labels: Tensor) -> Tensor:
    """Groups named by their first token, whatever their order."""
    return torch.tensor([[row.index(label) for label in row] for row in labels.tolist()])


def trace(draw: Draw, num_tokens: int) -> list[int]:
    """Tokens before each of the steps and at the end; alone, if no step was to remove any."""
    left = [num_tokens]
    for count in step_counts(*draw, num_tokens, counts="released", protect_first=True):
        left.append(left[-1] - count)
    listed = draw.num_steps if removed_per_step(*draw, num_tokens) else 0  # those that found too few tokens, too
    return left + left[-1:] * (listed + 1 - len(left))


def check_schedule(golden: Golden) -> None:
    """Every (removed, steps) of N tokens: tokens a step removes, and how many are left."""
    tables = {name: np.zeros_like(golden.take(name)) for name in ("r", "nbar") if name in golden}
    for name, table in tables.items():
        num_tokens = len(table) - 1
        for removed, steps in np.ndindex(table.shape):
            if steps == 0:  # unused
                table[removed, 0] = golden.take(name)[removed, 0]
            elif name == "r":
                table[removed, steps] = removed_per_step(removed, steps, num_tokens)
            else:
                counts = step_counts(removed, steps, num_tokens, counts="released", protect_first=True)
                table[removed, steps] = num_tokens - sum(counts)
        golden.same(name, table)
    if "n2_quirk" in golden:  # both schedules compare with n1, though the second was drawn from 0 ... n2
        rows = [
            [n1, n2, m, k, removed_per_step(m, k, n1), removed_per_step(m, k, n2)]
            for n1, n2, m, k, *_ in golden.take("n2_quirk").tolist()
        ]
        golden.same("n2_quirk", rows)
