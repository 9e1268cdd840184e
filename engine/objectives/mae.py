"""MAE: hide three quarters of the patches, encode the rest, predict the hidden pixels (arXiv 2111.06377)."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.masks import RandomMask, gather_tokens, random_mask
from engine.models.decoder import build_decoder
from engine.models.encoders import MaskedVisionTransformer
from engine.models.patches import patchify
from engine.objectives.contract import Objective
from recipes.methods import Mae
from recipes.schema import Model
from shards.draws.masks import MaskDraws
from shards.reading.loader import Batch

PIXEL_EPS = 1e-6  # in the variance of a patch's pixels


class MaskedAutoencoder(Objective):
    """Encoder on the visible patches, decoder on all, mean squared error on the masked."""

    view = "pretrain_mae"

    def __init__(self, settings: Mae, model: Model, image_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.patch_size = model.patch_size
        self.num_patches = model.num_patches(image_size)
        self.masks = MaskDraws(num_noise=self.num_patches)
        self.encoder = MaskedVisionTransformer(model, image_size)
        self.decoder = build_decoder(settings, model, image_size, num_values=3 * model.patch_size**2)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images = batch.views[0]
        pred, masking = self.reconstruct(images, batch.noise, masked_only=True)
        return {"loss": self.reconstruction_loss(images, pred, masking.ids_masked)}

    def reconstruct(self, images: Tensor, noise: Tensor, *, masked_only: bool = False) -> tuple[Tensor, RandomMask]:
        """Predicted patches [B, N, p p 3] of images [B, 3, S, S] under noise [B, N], and the mask used.

        `masked_only`: of the masked patches alone, which are all that the loss looks at, in the order of `ids_masked`.
        """
        masking = random_mask(noise, self.settings.mask_ratio)
        latent = self.encoder(images, masking.ids_keep)  # [B, 1 + K, D]
        return self.decoder(latent, masking.ids_restore, masking.ids_masked if masked_only else None), masking

    def reconstruction_loss(self, images: Tensor, pred: Tensor, ids: Tensor) -> Tensor:
        """Mean squared error of the predictions [B, M, p p 3] of the patches `ids` [B, M], in fp32 (section 3)."""
        with torch.autocast(images.device.type, enabled=False):
            target = gather_tokens(patchify(images, self.patch_size), ids)
            target = target.to(torch.promote_types(pred.dtype, torch.float32))
            if self.settings.norm_pix_loss:
                target = normalize_patches(target)
            return (pred.to(target.dtype) - target).square().mean()


def normalize_patches(patches: Tensor) -> Tensor:
    """Each patch [..., V] with mean 0 and variance 1 over its values (Table 1d)."""
    mean, std = pixel_moments(patches)
    return (patches - mean) / std


def pixel_moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (unbiased) [..., 1] of the values of each patch [..., V]."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + PIXEL_EPS).sqrt()
