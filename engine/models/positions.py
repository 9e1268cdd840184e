"""Fixed two-dimensional sine-cosine position tables (MAE, appendix A.1; MoCo v3)."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_positions(embed_dim: int, grid_size: int) -> Tensor:
    """Table float32 [1, 1 + grid_size^2, embed_dim]; row 0 (the class token) is zero.

    The first half of the channels encodes the column, the second half the row; each half is sines, then cosines, of
    position x 10000^(-k / (embed_dim / 4)), computed in float64.
    """
    quarter = embed_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies  # [S, D/4]
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [S, D/2]
    columns = axis[None, :, :].expand(grid_size, -1, -1)
    rows = axis[:, None, :].expand(-1, grid_size, -1)
    table = torch.cat([columns, rows], dim=-1).reshape(grid_size**2, embed_dim)
    return torch.cat([torch.zeros(1, embed_dim, dtype=torch.float64), table])[None].float()
