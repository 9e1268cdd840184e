"""Token morphing in shapes that depend on nothing that is drawn, for compilers and CUDA graphs.

The same groups as morphing.py, which is the reference. How many tokens each step removes is a tensor, so all images and
all their schedules are one batch; the loop runs as often as the longest schedule could, and a step that removes nothing
changes nothing. An image's tokens lie in the first places of a Gram matrix that stays N x N. Nothing is sorted, nothing
is counted on the host, and every sum is a matrix product, which adds in the same order every time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.morphing import even_odd_cosines, membership_of, morphed_loss


class StackedGroups(NamedTuple):
    """L partitions of the N tokens of each image, one after the other, into N groups each, of which the last are empty.

    What `engine.morphing.morphed_loss` asks of groups; with these it gives the mean over the partitions.
    """

    labels: Tensor  # int64 [B, L, N], group of every token within each partition
    membership: Tensor  # [B, L N, N] of 0 and 1
    sizes: Tensor  # [B, L N], tokens of every group
    shares: None = None  # every token of a group weighs 1 in its mean

    def sums(self, values: Tensor) -> Tensor:
        """Sums over the members of every group: [B, N, T] -> [B, L N, T]."""
        return self.membership @ values


class Joins(NamedTuple):
    """One step of every row: which tokens are merged, and in which order they and the others stand afterwards."""

    places: Tensor  # int64 [R, N], where each token goes
    joined: Tensor  # [R, odd, even], 1 where a token in an even place joins one in an odd place
    sources: Tensor  # int64 [R, N], what stands in every place afterwards: even tokens by number, then odd ones


def padded_counts(schedules: Sequence[Sequence[int]], num_steps: int) -> Tensor:
    """Schedules as `engine.morphing.step_counts` gives them, each at most `num_steps` long: int64 [num_steps, S]."""
    rows = [[*counts, *[0] * (num_steps - len(counts))] for counts in schedules]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), num_steps).T.contiguous()


# --- one step -------------------------------------------------------------------------------------------------------


def join_step(
    gram: Tensor, labels: Tensor, left: Tensor, count: Tensor, protect_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of R rows that merges `count` int64 [R] tokens of each: what it makes of the first three arguments.

    `gram` [R, N, N] of scalar products, of which the first `left` int64 [R] are of tokens; `labels` int64 [R, N].
    """
    joins = join_places(gram, left, count, protect_first)
    return join_rows(join_rows(gram, joins).mT, joins), joins.places.gather(1, labels), left - count


def join_places(gram: Tensor, left: Tensor, count: Tensor, protect_first: bool) -> Joins:
    """A step that merges `count` int64 [R] of the even tokens among the first `left` int64 [R] of each row.

    As `engine.morphing.merge_places` on the scalar products of those alone. `gram` [R, N, N].
    """
    slots = torch.arange(gram.shape[1], device=gram.device)
    even, odd = slots[: (len(slots) + 1) // 2], slots[: len(slots) // 2]  # by number
    present = 2 * even < left[:, None]
    cosines = even_odd_cosines(gram).masked_fill((2 * odd + 1 >= left[:, None])[:, None], -torch.inf)
    similarity, partner = cosines.max(dim=-1)  # [R, even]; the first maximum
    free = present & (even >= int(protect_first))
    merged = rank(similarity.masked_fill(~free, -torch.inf)) < count[:, None]
    kept = present & ~merged
    num_kept, kept_place = ((left + 1) // 2 - count)[:, None], kept.cumsum(dim=1) - 1
    pairs = torch.where(merged, num_kept + partner, kept_place), num_kept + odd
    active = (count > 0)[:, None]
    places = torch.where(active, interleaved(*pairs), slots)
    # The even token of every place below num_kept; those that are not kept are written where nothing is read.
    stay = torch.zeros_like(places).scatter_(1, torch.where(kept, kept_place, len(slots) - 1), even.expand_as(kept))
    followed = torch.where(slots < num_kept, stay, (len(even) + slots - num_kept).clamp(max=len(slots) - 1))
    unchanged = interleaved(even[None], len(even) + odd[None])
    joined = merged[:, None] & (partner[:, None] == odd[:, None])
    return Joins(places, joined.to(gram.dtype), torch.where(active, followed, unchanged))


def rank(values: Tensor) -> Tensor:
    """How many of the others in its row are greater, or equal and before it: [R, A] -> int64 [R, A]."""
    mine, others = values[:, :, None], values[:, None, :]
    earlier = torch.ones(values.shape[1], values.shape[1], dtype=torch.bool, device=values.device).tril(-1)
    return ((others > mine) | ((others == mine) & earlier)).sum(dim=-1)


def interleaved(even: Tensor, odd: Tensor) -> Tensor:
    """What belongs to even places [R, (N + 1) // 2] and to odd ones [R, N // 2], in order: [R, N]."""
    num_odd = odd.shape[1]
    pairs = torch.stack([even[:, :num_odd], odd], dim=-1).flatten(1)
    return torch.cat([pairs, even[:, num_odd:]], dim=1)


def join_rows(gram: Tensor, joins: Joins) -> Tensor:
    """The rows of `gram` [R, N, N] after the step: those that stay, and sums of those that were merged."""
    even, odd = gram[:, 0::2], gram[:, 1::2]
    rows = torch.cat([even, torch.baddbmm(odd, joins.joined, even)], dim=1)
    return rows.gather(1, joins.sources[:, :, None].expand_as(rows))


# --- all steps, and the comparison ----------------------------------------------------------------------------------


@torch.no_grad()
def stacked_groups(
    targets: Tensor, counts: Tensor, *, protect_first: bool = True, step: Callable[..., tuple] = join_step
) -> StackedGroups:
    """Partition the tokens of `targets` [B, N, T] by L schedules each; group means are those of their tokens.

    `counts` int64 [K, B, L] on the device of the targets: tokens that step after step removes, at most half (less the
    protected first one) of those that are left, then zeros. The steps are those of `engine.morphing.group_tokens` by
    parity, and so are the labels. `step`: `join_step`, or what a compiler made of it: one graph for all K.
    """
    num_images, num_tokens = targets.shape[:2]
    num_steps, _, num_schedules = counts.shape
    gram = (targets @ targets.mT).repeat_interleave(num_schedules, dim=0)  # [R, N, N], R = B L
    labels = torch.arange(num_tokens, device=targets.device).repeat(len(gram), 1)
    left = counts.new_full((len(gram),), num_tokens)
    for count in counts.flatten(1)[: num_steps * (num_tokens > 1)]:
        gram, labels, left = step(gram, labels, left, count, protect_first)
    membership = membership_of(labels, num_tokens, targets.dtype).unflatten(0, (num_images, num_schedules))
    return StackedGroups(
        labels.unflatten(0, (num_images, num_schedules)), membership.flatten(1, 2), membership.sum(dim=-1).flatten(1)
    )


def fixed_comparison(
    predictions: Tensor,
    targets: Tensor,
    counts: Tensor,
    chosen: Tensor | None,
    *,
    protect_first: bool,
    step: Callable[..., tuple] = join_step,
    **distance,
) -> tuple[Tensor, Tensor]:
    """Loss of predictions against targets [B, N, T], and mean number of groups, over all images and their L schedules.

    `counts`, `protect_first` and `step` as in `stacked_groups`; `chosen` and `distance` as in
    `engine.morphing.morphed_loss`.
    """
    groups = stacked_groups(targets, counts, protect_first=protect_first, step=step)
    num_groups = targets.shape[1] - counts.sum(dim=0).to(targets.dtype).mean()
    return morphed_loss(predictions, targets, groups, chosen=chosen, **distance), num_groups
