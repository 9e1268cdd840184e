"""Which patches a teacher finds alike: the groups of dynamic token morphing, painted over the image (DTM, Figure 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.patches import patchify, unpatchify
from engine.morphing import Groups, morph, unmorph


@torch.no_grad()
def morph_map(groups: Groups, pixels: Tensor, patch_size: int) -> Tensor:
    """`pixels` [B, 3, S, S] with every patch in the mean colour of its group of patches."""
    patches = patchify(pixels, patch_size)  # [B, N, p p 3]
    colours = patches.unflatten(2, (patch_size**2, 3)).mean(dim=2)  # [B, N, 3]
    means = unmorph(morph(colours, groups), groups)
    return unpatchify(means.unsqueeze(2).expand(-1, -1, patch_size**2, -1).flatten(2), patch_size)
