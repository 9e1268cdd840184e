"""Which patches a model sees. Noise comes from the sample's own draws, so a mask never depends on batch or rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RandomMask(NamedTuple):
    """Random masking of N patches, K of them kept (MAE, section 3)."""

    ids_keep: Tensor  # int64 [B, K], patches that are seen, in shuffled order
    ids_masked: Tensor  # int64 [B, N - K], the others, in shuffled order
    ids_restore: Tensor  # int64 [B, N], place of every patch in the shuffled sequence
    mask: Tensor  # bool [B, N], True = masked


def random_mask(noise: Tensor, mask_ratio: float) -> RandomMask:
    """Keep the K = int(N (1 - mask_ratio)) patches with the smallest noise [B, N]; ties go to the lower index."""
    return disjoint_masks(noise, mask_ratio)[0]


def disjoint_masks(noise: Tensor, mask_ratio: float) -> tuple[RandomMask, RandomMask]:
    """Two masks from one noise [B, N]: the first keeps the K smallest, the second the K after them (LUT, 1.3).

    Where 2 K > N the second keeps only the N - K that are left. Each has its own patches first in its sequence.
    """
    num_patches = noise.shape[1]
    num_keep = int(num_patches * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1, stable=True)
    places = torch.arange(num_patches, device=noise.device).expand_as(ids_shuffle)
    ids_restore = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, places)  # the inverse, without a second sort
    first = masked_beyond(num_keep, ids_shuffle, ids_restore)
    ids_shuffle = ids_shuffle.roll(-num_keep, dims=1)  # the first view's patches come last
    return first, masked_beyond(
        min(num_keep, num_patches - num_keep), ids_shuffle, (ids_restore - num_keep) % num_patches
    )


def masked_beyond(num_keep: int, ids_shuffle: Tensor, ids_restore: Tensor) -> RandomMask:
    """The mask that keeps the first patches of a shuffled sequence [B, N]; `ids_restore` is its inverse."""
    return RandomMask(ids_shuffle[:, :num_keep], ids_shuffle[:, num_keep:], ids_restore, ids_restore >= num_keep)


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` [B, K] of `tokens` [B, N, D] as [B, K, D]."""
    return torch.gather(tokens, 1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
