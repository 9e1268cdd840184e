"""Images as sequences of patches, row by row, and back."""

from __future__ import annotations

from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, 3, S, S] -> [B, N, p p 3]; inside a patch: row, column, channel, with the channel fastest (MAE)."""
    return windows(images, patch_size).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def cut_patches(images: Tensor, patch_size: int) -> Tensor:
    """[B, 3, S, S] -> [B, N, 3 p p] with the channel slowest, the order of a convolution's weight.

    One copy, where unfold makes one per image.
    """
    return windows(images, patch_size).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def windows(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] as [B, C, rows, p, columns, p], without a copy where images lie in one piece."""
    batch, channels, height, width = images.shape
    return images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify` for square images: [B, N, p p 3] -> [B, 3, S, S]."""
    batch, num_patches, values = patches.shape
    side = round(num_patches**0.5)
    channels = values // patch_size**2
    grid = patches.reshape(batch, side, side, patch_size, patch_size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, side * patch_size, side * patch_size)
