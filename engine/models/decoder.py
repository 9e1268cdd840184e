"""MAE's decoder: a narrow transformer that predicts the pixels of every patch from the visible tokens."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from engine.masks import gather_tokens
from engine.models import vision_library  # noqa: F401  timm imports only after it
from engine.models.initialization import TOKEN_STD, initialize
from engine.models.positions import sincos_positions
from recipes.methods import Mae, MaeDtm
from recipes.schema import Model

# isort: split
from timm.models.vision_transformer import Block

NORM_EPS = 1e-6


class Decoder(nn.Module):
    """[B, 1 + K, width] visible tokens in shuffled order -> num_values numbers per patch.

    MAE, section 3, "MAE decoder"; the class token goes through and is dropped at the end.
    """

    def __init__(
        self,
        width: int,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        num_patches: int,
        num_values: int,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(width, embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        positions = sincos_positions(embed_dim, round(num_patches**0.5))
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        norm = partial(nn.LayerNorm, eps=NORM_EPS)
        block = partial(Block, embed_dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm)
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))
        self.norm = norm(embed_dim)
        self.pred = nn.Linear(embed_dim, num_values)
        self.apply(initialize)
        nn.init.normal_(self.mask_token, std=TOKEN_STD)

    def forward(
        self, tokens: Tensor, ids_restore: Tensor, ids: Tensor | None = None, *, predict: bool = True
    ) -> Tensor:
        """Predictions [B, N, num_values] in the order of the image, or of its patches `ids` [B, M] alone.

        Without `predict` the tokens [B, N or M, embed_dim] that the last layer, `pred`, would predict from.
        """
        x = self.embed(tokens)
        cls, visible = x[:, :1], x[:, 1:]
        num_masked = ids_restore.shape[1] - visible.shape[1]
        masked = self.mask_token.to(x.dtype).expand(len(x), num_masked, -1)
        x = gather_tokens(torch.cat([visible, masked], dim=1), ids_restore)
        x = torch.cat([cls, x], dim=1) + self.pos_embed  # fp32 under autocast: branches add up in what norms read
        x = self.blocks(x)[:, 1:]
        x = self.norm(x if ids is None else gather_tokens(x, ids))
        return self.pred(x) if predict else x


def build_decoder(settings: Mae | MaeDtm, model: Model, image_size: int, num_values: int) -> Decoder:
    """The decoder of an autoencoder of that encoder, which predicts `num_values` numbers per patch."""
    return Decoder(
        model.embed_dim,
        embed_dim=settings.decoder_embed_dim,
        depth=settings.decoder_depth,
        num_heads=settings.decoder_num_heads,
        mlp_ratio=model.mlp_ratio,
        num_patches=model.num_patches(image_size),
        num_values=num_values,
    )
