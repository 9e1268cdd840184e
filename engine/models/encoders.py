"""timm's Vision Transformer, able to see only some of its patches. State-dict keys are timm's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.masks import gather_tokens
from engine.models import vision_library  # noqa: F401  timm imports only after it
from engine.models.initialization import TOKEN_STD, initialize
from engine.models.patches import cut_patches
from engine.models.positions import sincos_positions
from engine.models.stochastic_depth import with_tensor_rates
from recipes.schema import Model

# isort: split
from timm.models.vision_transformer import VisionTransformer


class PatchProjection(nn.Conv2d):
    """The patch embedding's convolution, also for patches that are already cut out: [B, K, 3 p p] -> [B, K, D].

    Masked methods embed only what they keep. It is one module with one forward so that ZeRO stage 3 gathers its weight.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        return F.linear(x, self.weight.flatten(1), self.bias) if x.ndim == 3 else super().forward(x)


class MaskedVisionTransformer(VisionTransformer):
    """A ViT with a class token and fixed sine-cosine positions; `forward` returns all tokens after the last norm."""

    def __init__(self, model: Model, image_size: int) -> None:
        super().__init__(**timm_arguments(model, image_size), drop_path_rate=model.drop_path)
        self.patch_size = model.patch_size
        with_tensor_rates(self.blocks)
        self.patch_embed.proj = PatchProjection(3, model.embed_dim, model.patch_size, model.patch_size)
        self.apply(initialize)
        nn.init.normal_(self.cls_token, std=TOKEN_STD)
        self.pos_embed.data = sincos_positions(model.embed_dim, image_size // model.patch_size)
        self.pos_embed.requires_grad_(False)

    def forward(self, images: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """Tokens [B, 1 + K, D] of the patches `ids_keep` [B, K] (all N where it is None) of images [B, 3, S, S]."""
        if ids_keep is None:
            return self.forward_features(images)
        x = self.patch_embed.proj(gather_tokens(cut_patches(images, self.patch_size), ids_keep))
        x = x + gather_tokens(self.pos_embed[:, 1:].expand(len(x), -1, -1), ids_keep)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return self.norm(self.blocks(torch.cat([cls, x], dim=1)))


def timm_arguments(model: Model, image_size: int) -> dict:
    """Arguments with which `timm.create_model` builds the same encoder without a head."""
    return dict(
        img_size=image_size,
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_ratio,
        num_classes=0,
        global_pool="token",
    )
