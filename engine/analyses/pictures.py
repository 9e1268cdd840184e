"""Tensors of images as one PNG: rows and columns with white margins."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SMALLEST = 96  # pixels an image is shown at, at least


def write_rows(path: Path, rows: list[Tensor]) -> None:
    """Write images [B, 3, S, S] with pixels in [0, 1], one row after the other."""
    framed = [F.pad(images, (1, 1, 1, 1), value=1.0).permute(1, 2, 0, 3).flatten(2) for images in rows]
    pixels = (torch.cat(framed, dim=1) * 255).round().clamp(0, 255).byte()  # [3, H, W]
    picture = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
    zoom = -(-SMALLEST // rows[0].shape[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)


def to_pixels(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised images [B, 3, S, S] as pixels in [0, 1]."""
    return (images * std.view(3, 1, 1) + mean.view(3, 1, 1)).clamp(0, 1)


def hide(pixels: Tensor, mask: Tensor, patch_size: int, gray: float = 0.5) -> Tensor:
    """Pixels [B, 3, S, S] with the patches where `mask` bool [B, N] is set painted gray."""
    side = pixels.shape[-1] // patch_size
    cells = mask.view(-1, 1, side, side).float()
    return torch.where(F.interpolate(cells, scale_factor=patch_size) > 0, gray, pixels)
