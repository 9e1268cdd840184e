"""Token morphing: which tokens of an image are alike, and a loss between the means of the groups (DTM, section 3).

The tokens of the targets are merged step by step: each step divides them into two sets, by the parity of their place or
at random, finds for every token of the first set its most similar token of the second, and merges the best pairs. What
comes out is a partition of the tokens of each image. Students and targets are then compared group by group, each group
weighted by its size: equal to giving every token its group's mean and comparing token by token.

Pure tensor functions. Sums over groups are matrix products with the membership, not scattered additions: on a GPU the
latter add in a random order, and a resumed run would differ from an unbroken one. Shapes depend on (removed,
num_steps) only, so nothing here waits for the device.
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
    membership: Tensor  # [B, G, N] of 0 and 1, in the dtype of the targets
    sizes: Tensor  # [B, G], tokens of every group, in the same dtype
    weights: Tensor  # [B, G, N], of each token in its group's mean; a group's add up to its size


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
    tokens, sizes = targets, targets.new_ones(targets.shape[:2])
    weights = sizes  # [B, N], of each token in its group's mean, by step
    schedule = step_counts(removed, num_steps, targets.shape[1], counts=counts, protect_first=protect_first)
    for number, count in enumerate(schedule):
        if keys is None:
            places = merge_places(tokens, count, protect_first)
        else:
            places = shuffled_merge_places(tokens, count, protect_first, keys[:, number, : tokens.shape[1]])
        step = membership_of(places, tokens.shape[1] - count, tokens.dtype)
        sums = step @ (tokens * sizes[..., None] if weighting == "size" else tokens)
        labels, sizes = places.gather(1, labels), (step @ sizes[..., None])[..., 0]
        totals = sizes if weighting == "size" else step.sum(dim=2)
        tokens = sums / totals[..., None]
        if weighting == "step":
            weights = weights / totals.gather(1, labels)
    membership = membership_of(labels, tokens.shape[1], targets.dtype)
    if weighting == "size":
        return Groups(labels, membership, sizes, membership)
    return Groups(labels, membership, sizes, membership * (weights * sizes.gather(1, labels))[:, None])


def merge_places(tokens: Tensor, num_merged: int, protect_first: bool = True) -> Tensor:
    """Where each of the tokens [B, t, T] goes when `num_merged` of those in even places join one in an odd place.

    int64 [B, t] of places 0 ... t - num_merged - 1: the even tokens that stay, in their order, then the odd ones. Of
    equal similarities the lower place counts as the greater one. The first token stays where it is protected.
    """
    directions = F.normalize(tokens, dim=-1, eps=torch.finfo(tokens.dtype).tiny)
    similarity, partner = (directions[:, 0::2] @ directions[:, 1::2].mT).max(dim=-1)  # [B, even]; the first maximum
    if protect_first:
        similarity[:, 0] = -torch.inf
    merged_ids = similarity.argsort(dim=1, descending=True, stable=True)[:, :num_merged]
    merged = torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, merged_ids, True)
    num_kept = similarity.shape[1] - num_merged
    places = torch.empty(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    places[:, 0::2] = torch.where(merged, num_kept + partner, (~merged).cumsum(dim=1) - 1)
    places[:, 1::2] = torch.arange(num_kept, num_kept + tokens.shape[1] // 2, device=tokens.device)
    return places


def shuffled_merge_places(tokens: Tensor, num_merged: int, protect_first: bool, keys: Tensor) -> Tensor:
    """`merge_places` after the tokens [B, t, T] were put into the order of their `keys` int64 [B, t].

    A protected first token keeps its place. The result is by the places before the shuffle: int64 [B, t].
    """
    first = int(protect_first)
    drawn = keys[:, first:].argsort(dim=1, stable=True) + first
    order = torch.cat([torch.zeros_like(keys[:, :first]), drawn], dim=1)  # token of every shuffled place
    shuffled = tokens.gather(1, order[..., None].expand_as(tokens))
    return torch.empty_like(order).scatter_(1, order, merge_places(shuffled, num_merged, protect_first))


def membership_of(labels: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    """[B, num_groups, N] with 1 where a token [B, N] has the group's label, else 0."""
    groups = torch.arange(num_groups, device=labels.device)
    return (labels[:, None, :] == groups[:, None]).to(dtype)


# --- the comparison -------------------------------------------------------------------------------------------------


def morph(tokens: Tensor, groups: Groups) -> Tensor:
    """Means of the groups [B, G, T] of tokens [B, N, T]; of an empty group 0."""
    return (groups.weights @ tokens) / (groups.sizes[..., None] + SIZE_EPS)


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
    if chosen is None:
        weight = groups.sizes / groups.labels.shape[1]  # sums to 1 over the groups
    else:
        counted = chosen.to(groups.membership.dtype)[..., None]
        weight = (groups.membership @ counted)[..., 0] / counted.sum(dim=1)
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
