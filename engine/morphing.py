"""Token morphing: which tokens of an image are alike, and a loss between the means of the groups (DTM, section 3).

The tokens of the targets are merged step by step: each step divides them into two sets, by the parity of their place or
at random, finds for every token of the first set its most similar token of the second, and merges the best pairs. What
comes out is a partition of the tokens of each image. Students and targets are then compared group by group, each group
weighted by its size: equal to giving every token its group's mean and comparing token by token.

Only angles between means decide what is merged, so the steps work on the Gram matrix of an image's tokens: merging two
adds their rows and their columns, and the channels are read once. Shapes shrink from step to step and depend on
(removed, num_steps); fixed_morphing.py finds the same groups in shapes that do not. Sums over groups are added in a
fixed order on every device, so a resumed run is an unbroken one; nothing here waits for the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE_EPS = 1e-6  # added to a group's size; the released program has it, and the goldens show it
NORMALIZE_EPS = 1e-6  # in the variance of a normalised target
COSINE_EPS = 1e-6


class Groups(NamedTuple):
    """A partition of the N tokens of each image into G groups; only k-means leaves groups empty."""

    labels: Tensor  # int64 [B, N], group of every token, 0 ... G - 1
    sizes: Tensor  # [B, G], tokens of every group, in the dtype of the targets
    shares: Tensor | None = None  # [B, N], weight of a token in its group's mean, in all its size; None: each 1

    @property
    def membership(self) -> Tensor:
        """[B, G, N] of 0 and 1, in the dtype of the sizes."""
        return membership_of(self.labels, self.sizes.shape[1], self.sizes.dtype)

    @property
    def weights(self) -> Tensor:
        """[B, G, N], the shares of the members."""
        return self.membership if self.shares is None else self.membership * self.shares[:, None]

    def sums(self, values: Tensor) -> Tensor:
        """Sums over the members of every group: [B, N, T] -> [B, G, T]."""
        return group_sums(values, self.labels, self.sizes.shape[1])


# --- how many tokens a step removes ---------------------------------------------------------------------------------


def removed_per_step(removed: int, num_steps: int, num_tokens: int) -> int:
    """Tokens that each of `num_steps` steps removes, so that all of them remove about `removed` of `num_tokens`.

    Rounded up, unless that would remove more tokens than there are.
    """
    rounded_up = math.ceil(removed / num_steps)
    return removed // num_steps if rounded_up * num_steps > num_tokens else rounded_up


def step_counts(removed: int, num_steps: int, num_tokens: int, *, counts: str, protect_first: bool) -> list[int]:
    """Tokens that step after step removes, steps without any left out.

    `counts` is "released" (the same number in every step, `removed_per_step`) or "exact" (`exact_counts`). Either way
    a step merges tokens of one set into those of the other, so of t tokens it removes at most half, (t - 1) // 2 where
    the first token is protected and t // 2 where it is not.
    """
    num_protected = int(protect_first)
    if counts == "exact":
        return [count for count in exact_counts(removed, num_steps, num_tokens, num_protected) if count]
    per_step, taken = removed_per_step(removed, num_steps, num_tokens), []
    for _ in range(num_steps):
        count = min(per_step, (num_tokens - num_protected) // 2)
        if count == 0:
            break
        taken.append(count)
        num_tokens -= count
    return taken


def exact_counts(removed: int, num_steps: int, num_tokens: int, num_protected: int) -> list[int]:
    """`removed` tokens, or as many as `num_steps` steps can remove, divided among them as evenly as their caps allow.

    Filled from the last step, which finds the fewest tokens, to the first: a step that ends with t tokens can have
    removed at most t - num_protected, and what it could not take is left to those before it.
    """
    left = num_tokens
    for _ in range(num_steps):
        left -= (left - num_protected) // 2
    left = max(left, num_tokens - removed)  # at the end of all steps
    removed, taken = num_tokens - left, []
    for steps in range(num_steps, 0, -1):
        count = min(removed // steps, left - num_protected)
        taken.append(count)
        removed, left = removed - count, left + count
    return taken[::-1]


# --- which tokens are merged ----------------------------------------------------------------------------------------


@torch.no_grad()
def group_tokens(
    targets: Tensor,
    removed: int,
    num_steps: int,
    *,
    counts: str = "released",
    protect_first: bool = True,
    weighting: str = "size",
    keys: Tensor | None = None,
) -> Groups:
    """Partition the tokens of `targets` [B, N, T] in `num_steps` steps that aim at N - `removed` groups.

    How many tokens a step removes say `counts` and `protect_first` (`step_counts`). With `protect_first` token 0 always
    stays alone: the released program protects it in the belief that it is a class token, and its results come from
    that. `weighting` "size": a group's mean is that of its tokens; "step": each step takes the plain mean of what it
    merges, however many tokens that stands for, as the product of row-normalised matrices in the paper. `keys` int64
    [B, num_steps, N] of random numbers: the two sets of step i are drawn by keys [:, i]; None: by parity.
    """
    labels = torch.arange(targets.shape[1], device=targets.device).expand(targets.shape[:2])
    gram = targets @ targets.mT  # of sums of tokens by "size", which point where their means do
    shares = targets.new_ones(targets.shape[:2])
    schedule = step_counts(removed, num_steps, targets.shape[1], counts=counts, protect_first=protect_first)
    for number, count in enumerate(schedule):
        if keys is None:
            places = merge_places(gram, count, protect_first)
        else:
            places = shuffled_merge_places(gram, count, protect_first, keys[:, number, : gram.shape[1]])
        num_left = gram.shape[1] - count
        labels = places.gather(1, labels)
        gram = group_sums(group_sums(gram, places, num_left).mT, places, num_left)
        if weighting == "step":
            totals = group_sizes(places, num_left, gram.dtype)
            gram = gram / (totals[:, :, None] * totals[:, None, :])
            shares = shares / totals.gather(1, labels)
    sizes = group_sizes(labels, gram.shape[1], targets.dtype)
    return Groups(labels, sizes, shares * sizes.gather(1, labels) if weighting == "step" else None)


def merge_places(gram: Tensor, num_merged: int, protect_first: bool = True) -> Tensor:
    """Where each of t tokens goes when `num_merged` of those in even places join one in an odd place.

    `gram` [B, t, t] of their scalar products. int64 [B, t] of places 0 ... t - num_merged - 1: the even tokens that
    stay, in their order, then the odd ones. Of equal similarities the lower place counts as the greater one. The first
    token stays where it is protected.
    """
    similarity, partner = even_odd_cosines(gram).max(dim=-1)  # [B, even]; the first maximum
    if protect_first:
        similarity[:, 0] = -torch.inf
    merged_ids = similarity.argsort(dim=1, descending=True, stable=True)[:, :num_merged]
    merged = torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, merged_ids, True)
    num_kept = similarity.shape[1] - num_merged
    places = torch.empty(gram.shape[:2], dtype=torch.int64, device=gram.device)
    places[:, 0::2] = torch.where(merged, num_kept + partner, (~merged).cumsum(dim=1) - 1)
    places[:, 1::2] = torch.arange(num_kept, num_kept + gram.shape[1] // 2, device=gram.device)
    return places


def even_odd_cosines(gram: Tensor) -> Tensor:
    """Cosines of the tokens in even places with those in odd ones: [B, t, t] -> [B, even, odd]. Of a zero token: 0."""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    inverse = squares.rsqrt().masked_fill(squares <= 0, 0)  # of the lengths; below 0 by rounding alone
    return gram[:, 0::2, 1::2] * inverse[:, 0::2, None] * inverse[:, None, 1::2]


def shuffled_merge_places(gram: Tensor, num_merged: int, protect_first: bool, keys: Tensor) -> Tensor:
    """`merge_places` after the t tokens were put into the order of their `keys` int64 [B, t].

    A protected first token keeps its place. The result is by the places before the shuffle: int64 [B, t].
    """
    first = int(protect_first)
    drawn = keys[:, first:].argsort(dim=1, stable=True) + first
    order = torch.cat([torch.zeros_like(keys[:, :first]), drawn], dim=1)  # token of every shuffled place
    shuffled = gram.gather(1, order[:, :, None].expand_as(gram)).gather(2, order[:, None, :].expand_as(gram))
    return torch.empty_like(order).scatter_(1, order, merge_places(shuffled, num_merged, protect_first))


# --- sums over groups -----------------------------------------------------------------------------------------------


def group_sums(values: Tensor, labels: Tensor, num_groups: int) -> Tensor:
    """Sums of `values` [B, N, T] by the labels [B, N] of their rows: [B, num_groups, T].

    On the CPU rows are added one after the other. Elsewhere that would be in a random order, so it is a matrix product.
    """
    if values.device.type != "cpu":
        return membership_of(labels, num_groups, values.dtype) @ values
    rows = labels + num_groups * torch.arange(len(labels))[:, None]
    sums = values.new_zeros(len(labels) * num_groups, values.shape[-1])
    return sums.index_add_(0, rows.flatten(), values.flatten(0, 1)).unflatten(0, (len(labels), num_groups))


def group_sizes(labels: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    """Rows of every label [B, N]: [B, num_groups]. Ones add up to the same in any order."""
    ones = torch.ones(labels.shape, dtype=dtype, device=labels.device)
    return ones.new_zeros(len(labels), num_groups).scatter_add_(1, labels, ones)


def membership_of(labels: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    """[B, num_groups, N] with 1 where a token [B, N] has the group's label, else 0."""
    groups = torch.arange(num_groups, device=labels.device)
    return (labels[:, None, :] == groups[:, None]).to(dtype)


# --- the comparison -------------------------------------------------------------------------------------------------


def morph(tokens: Tensor, groups: Groups) -> Tensor:
    """Means of the groups [B, G, T] of tokens [B, N, T]; of an empty group 0."""
    weighted = tokens if groups.shares is None else tokens * groups.shares[..., None]
    return groups.sums(weighted) / (groups.sizes[..., None] + SIZE_EPS)


def unmorph(means: Tensor, groups: Groups) -> Tensor:
    """Every token's group mean: [B, G, T] -> [B, N, T]."""
    return means.gather(1, groups.labels[..., None].expand(-1, -1, means.shape[-1]))


def morphed_loss(
    predictions: Tensor,
    targets: Tensor,
    groups: Groups,
    *,
    kind: str,
    beta: float,
    normalize_target: bool,
    chosen: Tensor | None = None,
) -> Tensor:
    """Mean over images, tokens and channels of the distance between group means of predictions and targets [B, N, T].

    Computed over groups weighted by size, which equals the mean over un-morphed tokens; where `chosen` bool [B, N] is
    given, over those of an image that it names (at least one), so that a group weighs by its members among them.
    """
    means, target_means = morph(predictions, groups), morph(targets, groups)
    if normalize_target:
        target_means = normalize_channels(target_means)
    counted = groups.sizes if chosen is None else groups.sums(chosen[..., None].to(groups.sizes.dtype))[..., 0]
    weight = counted / counted.sum(dim=1, keepdim=True)
    return (distance(means, target_means, kind, beta) * weight).sum(dim=1).mean()


def distance(predictions: Tensor, targets: Tensor, kind: str, beta: float) -> Tensor:
    """Distance of each vector [..., T], averaged over its channels: [...]."""
    if kind == "negcosine":
        return 1 - F.cosine_similarity(predictions, targets, dim=-1, eps=COSINE_EPS)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(predictions, targets, beta=beta, reduction="none").mean(dim=-1)
    error = predictions - targets
    return (error.abs() if kind == "l1" else error.square()).mean(dim=-1)


def normalize_channels(vectors: Tensor) -> Tensor:
    """Each vector [..., T] with mean 0 and (unbiased) variance 1 over its channels."""
    mean, variance = vectors.mean(dim=-1, keepdim=True), vectors.var(dim=-1, keepdim=True)
    return (vectors - mean) / (variance + NORMALIZE_EPS).sqrt()
