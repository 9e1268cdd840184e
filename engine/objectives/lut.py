"""LUT: MAE that also learns what the visible patches say about the whole image (arXiv 2310.13593, ECCV 2024).

A clean view is reconstructed as in MAE. Beside that, the visible patches of each view, encoded, pooled and projected,
predict what a moving average of the encoder makes of the other view, unmasked.
"""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.ema import cosine_momentum, update_average
from engine.masks import disjoint_masks
from engine.models.heads import projection_head
from engine.models.initialization import initialize
from engine.objectives.mae import MaskedAutoencoder
from recipes.methods import Lut
from recipes.schema import Model
from shards.loader import Batch

AVERAGE = "average"


class ContextualAutoencoder(MaskedAutoencoder):
    """MAE's encoder and decoder, a projector and a predictor, and the moving average of encoder and projector."""

    view = "pretrain_lut"

    def __init__(self, settings: Lut, model: Model, image_size: int) -> None:
        super().__init__(settings, model, image_size)
        width, hidden = model.embed_dim, settings.head_hidden
        self.head = projection_head(width, hidden=hidden, depth=settings.head_depth)
        self.predictor = projection_head(width, hidden=hidden, depth=settings.predictor_depth)
        self.head.apply(initialize)
        self.predictor.apply(initialize)
        # Only what the teacher runs is averaged. It is held outside: no gradient, no ZeRO, no `.train()`.
        average = nn.ModuleDict({"encoder": deepcopy(self.encoder), "head": deepcopy(self.head)})
        self.keep_outside(AVERAGE, average, moves=True)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        clean, strong = batch.views
        targets = self.targets(clean, strong)
        predictions, mae = self.predictions(clean, strong, batch.noise)
        context = (distance(predictions[1], targets[0]) + distance(predictions[0], targets[1])) / 2
        return {"loss": self.settings.w_mae * mae + self.settings.w_bc * context, "mae": mae, "bc": context}

    def predictions(self, clean: Tensor, strong: Tensor, noise: Tensor) -> tuple[list[Tensor], Tensor]:
        """Student: the predicted projections [B, D] of both views, and MAE's loss on the clean one.

        The views keep disjoint patches and go through the encoder as one batch; batch norm sees them one by one.
        """
        first, second = disjoint_masks(noise, self.settings.mask_ratio)
        latents = self.encode((clean, strong), (first.ids_keep, second.ids_keep))  # each [B, 1 + K, D]
        pred = self.decoder(latents[0], first.ids_restore)
        projections = [self.predictor(self.head(pooled(tokens))) for tokens in latents]
        return projections, self.reconstruction_loss(clean, pred, first.mask)

    def encode(self, views: tuple[Tensor, Tensor], ids_keep: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Kept tokens of both views: as one batch, unless the second keeps fewer patches (mask_ratio below 1/2)."""
        if ids_keep[0].shape == ids_keep[1].shape:
            return self.encoder(torch.cat(views), torch.cat(ids_keep)).chunk(2)
        return tuple(self.encoder(view, ids) for view, ids in zip(views, ids_keep, strict=True))

    @torch.no_grad()
    def targets(self, clean: Tensor, strong: Tensor) -> tuple[Tensor, ...]:
        """Teacher: the projections [B, D] of both views, all patches seen."""
        average = self.outside[AVERAGE]
        tokens = average["encoder"](torch.cat([clean, strong]))
        return average["head"](pooled(tokens)).chunk(2)

    def after_step(self, step: int, total_steps: int) -> None:
        """Move the average; its momentum goes from 0.996 to 1 over the run."""
        momentum = cosine_momentum(self.settings.momentum, step / total_steps)
        average = self.outside[AVERAGE]
        update_average(self.encoder, average["encoder"], momentum)
        update_average(self.head, average["head"], momentum)


def pooled(tokens: Tensor) -> Tensor:
    """Mean of the patch tokens: [B, 1 + K, D] -> [B, D]."""
    return tokens[:, 1:].mean(dim=1)


def distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of the squared distance of the two vectors [B, D] at length 1: 2 - 2 cos, fp32."""
    with torch.autocast(prediction.device.type, enabled=False):
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        difference = F.normalize(prediction.to(dtype), dim=1) - F.normalize(target.to(dtype), dim=1)
        return difference.square().sum(dim=1).mean()
