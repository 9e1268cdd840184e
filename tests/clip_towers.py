"""Random CLIP image towers in OpenAI's layout, and what they compute, written out from the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_WIDTH = 64  # in all of OpenAI's towers


def random_tower(
    width: int = 128, depth: int = 2, patch_size: int = 8, grid: int = 4, projection: int | None = 24, seed: int = 0
) -> dict[str, Tensor]:
    """Weights by OpenAI's names, without the prefix `visual.`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 0.1, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(*shape, generator=generator)

    weights = {
        "class_embedding": normal(width),
        "positional_embedding": normal(grid**2 + 1, width),
        "conv1.weight": normal(width, 3, patch_size, patch_size),
    }
    for norm in ("ln_pre", "ln_post", *(f"transformer.resblocks.{n}.ln_{i}" for n in range(depth) for i in (1, 2))):
        weights |= {f"{norm}.weight": normal(width, mean=1.0), f"{norm}.bias": normal(width)}
    for number in range(depth):
        block = f"transformer.resblocks.{number}"
        weights |= {
            f"{block}.attn.in_proj_weight": normal(3 * width, width),
            f"{block}.attn.in_proj_bias": normal(3 * width),
            f"{block}.attn.out_proj.weight": normal(width, width),
            f"{block}.attn.out_proj.bias": normal(width),
            f"{block}.mlp.c_fc.weight": normal(4 * width, width),
            f"{block}.mlp.c_fc.bias": normal(4 * width),
            f"{block}.mlp.c_proj.weight": normal(width, 4 * width),
            f"{block}.mlp.c_proj.bias": normal(width),
        }
    return weights | ({"proj": normal(width, projection)} if projection else {})


def patch_targets(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """[B, N, T] of images [B, 3, S, S]: last norm on all tokens, class token dropped, projection where there is one."""
    width = len(weights["class_embedding"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def attention(x: Tensor, name: str) -> Tensor:
        qkv = x @ weights[f"{name}.in_proj_weight"].T + weights[f"{name}.in_proj_bias"]
        heads = []
        for start in range(0, width, HEAD_WIDTH):
            q, k, v = (part[..., start : start + HEAD_WIDTH] for part in qkv.chunk(3, dim=-1))
            heads.append((q @ k.mT / HEAD_WIDTH**0.5).softmax(dim=-1) @ v)
        return linear(torch.cat(heads, dim=-1), f"{name}.out_proj")

    kernel = weights["conv1.weight"]
    patches = F.conv2d(images, kernel, stride=kernel.shape[-1]).flatten(2).mT
    x = torch.cat([weights["class_embedding"].expand(len(images), 1, -1), patches], dim=1)
    x = norm(x + weights["positional_embedding"], "ln_pre")
    for number in range(sum(name.endswith("c_fc.weight") for name in weights)):
        block = f"transformer.resblocks.{number}"
        x = x + attention(norm(x, f"{block}.ln_1"), f"{block}.attn")
        hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(hidden * torch.sigmoid(1.702 * hidden), f"{block}.mlp.c_proj")
    tokens = norm(x, "ln_post")[:, 1:]
    return tokens @ weights["proj"] if "proj" in weights else tokens
