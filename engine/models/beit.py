"""timm's BEiT, able to see some of its patches through a mask token only. State-dict keys are timm's.

The student of DTM (docs/methods.md). Its positions are chosen by the recipe: attention biased by relative position, by
a table per block, by one that all blocks share, or by both, added up; and learned absolute ones. The biases of all
blocks are made together, once per forward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models import vision_library  # noqa: F401  timm imports only after it
from engine.models.encoders import PatchProjection, timm_arguments
from engine.models.stochastic_depth import with_tensor_rates
from recipes.schema import Model

# isort: split
from timm.models.beit import Attention, Beit

INIT_STD = 0.02
ALIGNMENT = 8  # numbers: a fused kernel with a bias reads it in rows that begin at multiples of 16 bytes


class QueryKeyValue(nn.Linear):
    """timm's projection without a bias of its own, which takes one from outside into the same product."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, self.weight, bias.to(self.weight.dtype))  # k_bias is an fp32 buffer also of 16-bit weights


class BiasedAttention(Attention):
    """timm's attention whose bias of positions is given whole, its own table included."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Tokens [B, L, D]; `shared_rel_pos_bias` [1, H, L, L] is added to the products of queries and keys."""
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        qkv = self.qkv(x, bias).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = qkv.unbind(0)  # [B, H, L, D / H]
        if self.fused_attn:
            x = F.scaled_dot_product_attention(queries, keys, values, attn_mask=shared_rel_pos_bias)
        else:
            scores = queries * self.scale @ keys.mT
            scores = scores if shared_rel_pos_bias is None else scores + shared_rel_pos_bias
            x = self.attn_drop(scores.softmax(dim=-1)) @ values  # who looks at attention hooks attn_drop
        return self.proj(x.transpose(1, 2).flatten(2))


class MaskedBeit(Beit):
    """A BEiT of all patches; `forward` returns all tokens after the last norm.

    The mask token belongs to the objective, which passes it in: what is exported is timm's model and no more.
    """

    def __init__(self, model: Model, image_size: int) -> None:
        super().__init__(**beit_arguments(model, image_size), drop_path_rate=model.drop_path)
        self.patch_embed.proj = PatchProjection(3, model.embed_dim, model.patch_size, model.patch_size)
        for block in self.blocks:  # another forward for the same parameters; made anew, they would be drawn anew
            block.attn.__class__, block.attn.qkv.__class__ = BiasedAttention, QueryKeyValue
        with_tensor_rates(self.blocks)
        index = self.relative_position_index()
        if index is not None:
            padding = -len(index) % ALIGNMENT
            self.register_buffer("padded_index", F.pad(index, (0, padding)), persistent=False)
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
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # fp32 under autocast, as all blocks' outputs
        if self.pos_embed is not None:
            x = x + self.pos_embed  # after the mask token: a hidden patch still says where it is
        for block, bias in zip(self.blocks, self.position_biases(x.device, x.dtype), strict=True):
            x = block(x, shared_rel_pos_bias=bias)
        return self.norm(x)

    def relative_position_index(self) -> Tensor | None:
        """timm's row of a table for every pair of tokens, int64 [L, L]."""
        sources = [self.rel_pos_bias, *(block.attn for block in self.blocks)]
        found = [getattr(source, "relative_position_index", None) for source in sources]
        return next((index for index in found if index is not None), None)

    def position_biases(self, device: torch.device, dtype: torch.dtype) -> list[Tensor | None]:
        """The bias [1, H, L, L] of every block: its own table and the shared one, summed, in the dtype of its products.

        One look-up for all blocks: its gradient is one sum per row of the tables, which on a GPU has a fixed order.
        Rows are the beginning of longer ones, aligned as the fused kernel needs them: else it would copy each.
        """
        own = [block.attn.relative_position_bias_table for block in self.blocks]
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias.relative_position_bias_table
        if own[0] is None and shared is None:
            return [None] * len(own)
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        tables = shared if own[0] is None else torch.stack(own, dim=1)  # [R, H] or [R, blocks, H]
        if own[0] is not None and shared is not None:
            tables = tables + shared.unsqueeze(1)
        biases = tables.flatten(1)[self.padded_index.flatten()]  # [L x padded L, blocks x H]
        biases = biases.mT.to(dtype, memory_format=torch.contiguous_format)
        num_tokens = len(self.padded_index)
        biases = biases.view(-1, 1, self.blocks[0].attn.num_heads, *self.padded_index.shape)[..., :num_tokens]
        return list(biases.expand(len(own), -1, -1, -1, -1).unbind(0))


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
