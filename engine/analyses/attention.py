"""How far attention reaches: the distance, in pixels, of what a patch attends to (Dosovitskiy et al., 2021, Figure 11).

LUT's paper shows it for the last layers, one value per head; its definition is not published, this one is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def patch_distances(grid_size: int, patch_size: int) -> Tensor:
    """Distances in pixels, float64 [N, N], of the centres of the N = grid_size^2 patches, row by row."""
    places = torch.arange(grid_size, dtype=torch.float64) * patch_size
    centres = torch.cartesian_prod(places, places)  # [N, 2]
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


def average_attention_distance(attention: Tensor, distances: Tensor, *, renormalize: bool = True) -> Tensor:
    """Mean distance [H] of what the patches attend to, over images and patches, for attention [B, H, 1 + N, 1 + N].

    The class token is left out, as one that asks and as one that is looked at; with `renormalize` what a patch gives to
    the others adds up to 1 again, otherwise the class token's share counts as no distance. `distances` [N, N].
    """
    among = attention[:, :, 1:, 1:].to(distances.dtype)
    if renormalize:
        among = among / among.sum(dim=-1, keepdim=True)
    return (among * distances).sum(dim=-1).mean(dim=(0, 2))


@torch.no_grad()
def attention_maps(network: nn.Module, images: Tensor) -> Tensor:
    """Attention [layers, B, H, L, L] of a ViT or BEiT of timm's over images [B, 3, S, S]; each row adds up to 1."""
    attentions = [block.attn for block in network.blocks]
    fused, maps, handles = [attention.fused_attn for attention in attentions], [], []
    for attention in attentions:
        attention.fused_attn = False  # the fused kernel never holds the map
        hook = attention.attn_drop.register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0]))
        handles.append(hook)
    try:
        network(images)
    finally:
        for attention, was, handle in zip(attentions, fused, handles, strict=True):
            attention.fused_attn = was
            handle.remove()
    return torch.stack(maps)
