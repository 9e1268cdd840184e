"""timm's BEiT, able to see some of its patches through a mask token only. State-dict keys are timm's.

The student of DTM (docs/methods.md). Its positions are chosen by the recipe: attention biased by relative position, by
a table per block, by one that all blocks share, or by both, added up; and learned absolute ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.models import vision_library  # noqa: F401  timm imports only after it
from engine.models.encoders import PatchProjection, timm_arguments
from recipes.schema import Model

# isort: split
from timm.models.beit import Beit

INIT_STD = 0.02


class MaskedBeit(Beit):
    """A BEiT of all patches; `forward` returns all tokens after the last norm.

    The mask token belongs to the objective, which passes it in: what is exported is timm's model and no more.
    """

    def __init__(self, model: Model, image_size: int) -> None:
        super().__init__(**beit_arguments(model, image_size), drop_path_rate=model.drop_path)
        self.patch_embed.proj = PatchProjection(3, model.embed_dim, model.patch_size, model.patch_size)
        for block in self.blocks:
            # timm would give the product of 16-bit weights a 32-bit bias (k_bias is an fp32 buffer), which fails, and
            # read qkv.weight outside of qkv's forward, where ZeRO stage 3 gathers it. Added afterwards, neither.
            block.attn.qkv_bias_separate = True
        self.apply(initialize_beit)
        truncated_normal(self.cls_token)
        if self.pos_embed is not None:
            truncated_normal(self.pos_embed)
        self.fix_init_weight()  # the last matrix of both branches of block l by 1 / sqrt(2 l)

    def forward(self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Tokens [B, 1 + N, D] of images [B, 3, S, S]; where `mask` bool [B, N] is set, `mask_token` [1, 1, D] is seen.

        Without a mask it is timm's `forward_features`.
        """
        x = self.patch_embed(images)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed  # after the mask token: a hidden patch still says where it is
        shared_bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        for block in self.blocks:
            x = block(x, shared_rel_pos_bias=shared_bias)
        return self.norm(x)


def initialize_beit(module: nn.Module) -> None:
    """Truncated normal weights of linear layers and convolutions, biases 0; for `nn.Module.apply`.

    Tables of positions (0), norms (1 and 0) and branch scales have their values from timm already.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        truncated_normal(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def truncated_normal(weight: Tensor) -> None:
    """Normal with standard deviation 0.02, drawn again outside of one standard deviation (effectively 0.0108)."""
    nn.init.trunc_normal_(weight, std=INIT_STD, a=-INIT_STD, b=INIT_STD)


def beit_arguments(model: Model, image_size: int) -> dict:
    """Arguments with which `timm.create_model` builds the same encoder without a head."""
    positions = dict(
        use_abs_pos_emb=model.abs_pos_emb,
        use_rel_pos_bias=model.rel_pos_bias,
        use_shared_rel_pos_bias=model.shared_rel_pos_bias,
    )
    scale = model.init_values or 0.0  # timm puts the entry point's 0.1 in the place of None; 0 means no scale there
    return timm_arguments(model, image_size) | positions | dict(init_values=scale)
