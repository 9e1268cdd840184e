"""Token morphing: matching, grouping, loss and backward, against the released program or the paper's dense matrices.

16 images of 196 tokens of 512 channels in fp32, for five schedules (r tokens removed by each of k steps). Ours is the
form that a CPU runs; how it agrees with the form in fixed shapes, which a GPU runs, is a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.fixed_morphing import fixed_comparison, padded_counts, stacked_groups
from engine.morphing import SIZE_EPS, Groups, group_tokens, morphed_loss, step_counts
from tools.benchmarks.memory import peak_megabytes
from tools.benchmarks.released import released
from tools.benchmarks.side_by_side import Row, Settings, compared, interleaved, smaller

SCHEDULES = ((98, 1), (25, 4), (14, 7), (7, 14), (14, 14))  # tokens that a step removes, steps
MOST_STEPS = 14
IMAGES, TOKENS, CHANNELS = 16, 196, 512
BETA = 2.0
TOLERANCE = 1e-9  # relative, in fp64: there no likeness is decided by rounding

# Targets, removed by a step, steps -> [B, G, N] of 0 and 1; predictions, targets, (r, k) -> loss, gradient.
Sources = Callable[[Tensor, int, int], Tensor]
Step = Callable[[Tensor, Tensor, tuple[int, int]], tuple[Tensor, Tensor]]


def suite(settings: Settings) -> Iterator[Row]:
    """Rows of speed and memory for every schedule, of the form in fixed shapes, and of the agreement of the two."""
    torch.set_num_threads(1)
    num_images = settings.scaled(IMAGES, 2)
    targets, outputs = smooth_tokens(num_images, seed=0), gaussian_tokens(num_images, seed=1).requires_grad_()
    if settings.reference:
        with released(settings.reference, "dtm") as load:
            sources, other = partial(released_sources, load("bm.merge")), "the released program"
    else:
        sources, other = dense_sources, "dense matrices"
    for schedule in SCHEDULES:
        yield from schedule_rows(outputs, targets, schedule, sources, other, settings.rounds)
    yield fixed_row(outputs, targets, (14, 7), sources, other, settings.rounds)
    for kind, tokens in (("gaussian", gaussian_tokens), ("smooth", smooth_tokens), ("tied", tied_tokens)):
        yield agreement(kind, tokens(settings.scaled(4 * IMAGES, 2), seed=2))


def schedule_rows(
    outputs: Tensor, targets: Tensor, schedule: tuple[int, int], sources: Sources, other: str, rounds: int
) -> Iterator[Row]:
    """Images per CPU second and peak memory at one schedule; RuntimeError where the two do not compute the same."""
    removed, steps = schedule
    groups, source = group_tokens(targets.double(), removed * steps, steps), sources(targets.double(), removed, steps)
    if not torch.equal(groups.membership, source):
        raise RuntimeError(f"(r, k)={schedule}: ours and {other} divide the same tokens into different groups")
    dense = partial(dense_step, sources=sources)
    check_equal(f"(r, k)={schedule}", plain_step, dense, outputs, targets, schedule)
    works = [partial(step, outputs, targets, schedule) for step in (plain_step, dense)]
    name = f"morphing (r, k) = {schedule}, against {other}"
    yield compared(name, len(targets), interleaved(works, rounds, time.process_time), "images/s")
    yield smaller(f"its memory at (r, k) = {schedule}", *map(peak_megabytes, works), "MB")


def fixed_row(
    outputs: Tensor, targets: Tensor, schedule: tuple[int, int], sources: Sources, other: str, rounds: int
) -> Row:
    """The form for GPUs, all its iterations, here on the CPU."""
    dense = partial(dense_step, sources=sources)
    check_equal(f"fixed shapes, (r, k)={schedule}", fixed_step, dense, outputs, targets, schedule)
    works = [partial(step, outputs, targets, schedule) for step in (fixed_step, dense)]
    name = f"in fixed shapes, not compiled, (r, k) = {schedule}, against {other}"
    return compared(name, len(targets), interleaved(works, rounds, time.process_time), "images/s")


def check_equal(
    name: str, ours: Step, theirs: Step, outputs: Tensor, targets: Tensor, schedule: tuple[int, int]
) -> None:
    """RuntimeError where losses or gradients differ in fp64."""
    inputs = outputs.detach().double().requires_grad_(), targets.double()
    (loss, gradient), (other_loss, other_gradient) = (step(*inputs, schedule) for step in (ours, theirs))
    off = ((loss - other_loss).abs() / other_loss).item()
    worst = ((gradient - other_gradient).abs().max() / other_gradient.abs().max()).item()
    if not max(off, worst) < TOLERANCE:
        raise RuntimeError(f"{name}: losses differ by {off:.1e}, gradients by {worst:.1e} (relative), not {TOLERANCE}")


def agreement(kind: str, targets: Tensor) -> Row:
    """Share of images that both of our forms divide in the same way, over all schedules."""
    schedules = [counts_of(schedule) for schedule in SCHEDULES]
    counts = padded_counts(schedules, MOST_STEPS)[:, None].expand(-1, len(targets), -1)
    fixed = stacked_groups(targets, counts).labels  # [B, schedules, N]
    plain = torch.stack([group_tokens(targets, r * k, k).labels for r, k in SCHEDULES], dim=1)
    share = (fixed == plain).all(dim=2).double().mean().item()
    name = f"images grouped alike by plain and fixed shapes, {kind} tokens ({plain[..., 0].numel()})"
    return Row(name=name, ratio=share, ours=share, theirs=1.0, unit="share")


def counts_of(schedule: tuple[int, int]) -> list[int]:
    removed, steps = schedule
    return step_counts(removed * steps, steps, TOKENS, counts="released", protect_first=True)


# --- what is compared -----------------------------------------------------------------------------------------------


def plain_step(outputs: Tensor, targets: Tensor, schedule: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Ours on a CPU: the loss and its gradient [B, N, T]."""
    removed, steps = schedule
    groups: Groups = group_tokens(targets, removed * steps, steps)
    return differentiated(
        morphed_loss(outputs, targets, groups, kind="smooth_l1", beta=BETA, normalize_target=False), outputs
    )


def fixed_step(outputs: Tensor, targets: Tensor, schedule: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Ours on a GPU: `plain_step` in shapes that hold every schedule."""
    counts = padded_counts([counts_of(schedule)] * len(targets), MOST_STEPS)[..., None]
    settings = dict(protect_first=True, kind="smooth_l1", beta=BETA, normalize_target=False)
    return differentiated(fixed_comparison(outputs, targets, counts, None, **settings)[0], outputs)


def dense_step(outputs: Tensor, targets: Tensor, schedule: tuple[int, int], sources: Sources) -> tuple[Tensor, Tensor]:
    """The paper's form: sources as matrices, every token in place of its group's mean, all of them compared."""
    source = sources(targets, *schedule)
    spread, target_spread = (
        source.mT @ (source @ x / (source.sum(-1)[..., None] + SIZE_EPS)) for x in (outputs, targets)
    )
    return differentiated(F.smooth_l1_loss(spread, target_spread, beta=BETA), outputs)


def differentiated(loss: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(loss, outputs)
    return loss.detach(), gradient


@torch.no_grad()
def released_sources(merging: ModuleType, targets: Tensor, removed: int, steps: int) -> Tensor:
    """By the released program's own functions (its module bm.merge), with the first token protected as there."""
    tokens, sizes, source = targets, None, None
    for _ in range(steps):
        merge, _ = merging.bipartite_soft_matching(tokens, removed, True, False)
        source = merging.merge_source(merge, tokens, source)
        tokens, sizes = merging.merge_wavg(merge, tokens, sizes)
    return source.to(targets.dtype)


@torch.no_grad()
def dense_sources(targets: Tensor, removed: int, steps: int) -> Tensor:
    """By the paper's product of matrices, one per step, without anything that only indices would allow."""
    source = torch.eye(targets.shape[1], dtype=targets.dtype).expand(len(targets), -1, -1)
    for count in step_counts(removed * steps, steps, targets.shape[1], counts="released", protect_first=True):
        tokens = source @ targets / source.sum(-1)[..., None]
        directions = F.normalize(tokens, dim=-1)
        similarity = directions[:, 0::2] @ directions[:, 1::2].mT  # [B, even, odd]
        best, partner = similarity.max(dim=-1)
        best[:, 0] = -torch.inf
        merged, kept = best.argsort(dim=1, descending=True).split([count, best.shape[1] - count], dim=1)
        one = torch.eye(tokens.shape[1], dtype=tokens.dtype).expand(len(tokens), -1, -1)  # rows that pick a token
        even, odd = one[:, 0::2], one[:, 1::2]
        joins = F.one_hot(partner.gather(1, merged), odd.shape[1]).to(tokens.dtype).mT  # [B, odd, merged]
        picked = even.gather(1, merged[..., None].expand(-1, -1, tokens.shape[1]))
        stays = even.gather(1, kept.sort(dim=1).values[..., None].expand(-1, -1, tokens.shape[1]))
        source = torch.cat([stays, odd + joins @ picked], dim=1) @ source
    return source


# --- tokens ---------------------------------------------------------------------------------------------------------


def gaussian_tokens(num_images: int, seed: int) -> Tensor:
    """[B, N, T] without any likeness."""
    return torch.randn(num_images, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(seed))


def smooth_tokens(num_images: int, seed: int) -> Tensor:
    """[B, N, T] whose neighbours on the grid are alike, as a teacher's are: a coarse field, enlarged, under noise."""
    generator, side = torch.Generator().manual_seed(seed), round(TOKENS**0.5)
    coarse = torch.randn(num_images, CHANNELS, 5, 5, generator=generator)
    field = F.interpolate(coarse, (side, side), mode="bilinear").flatten(2).mT
    return field + 0.3 * torch.randn(num_images, TOKENS, CHANNELS, generator=generator)


def tied_tokens(num_images: int, seed: int) -> Tensor:
    """[B, N, T] of whole numbers in a few directions, so that many similarities are equal and all sums exact."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(num_images, TOKENS, CHANNELS)
    tokens[..., :3] = torch.randint(-1, 2, (num_images, TOKENS, 3), generator=generator).float()
    return tokens
