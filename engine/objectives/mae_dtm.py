"""DTM on an MAE host: MAE predicts a frozen teacher's tokens, not pixels, compared in groups (arXiv 2401.00254)."""

from __future__ import annotations

from torch import Tensor

from engine.masks import RandomMask, random_mask
from engine.models.decoder import build_decoder
from engine.models.encoders import MaskedVisionTransformer
from engine.objectives.comparison import MorphedComparison
from engine.teachers import Teacher
from recipes.methods import MaeDtm
from recipes.schema import Model
from shards.draws.masks import MaskDraws
from shards.reading.loader import Batch


class MorphedAutoencoder(MorphedComparison):
    """MAE's encoder on the visible patches, its decoder on all, distance to the teacher's group means."""

    view = "pretrain_mae"

    def __init__(self, settings: MaeDtm, model: Model, image_size: int, *, teacher: Teacher, seed: int) -> None:
        super().__init__(settings, teacher=teacher, seed=seed)
        self.masks = MaskDraws(num_noise=model.num_patches(image_size))
        self.encoder = MaskedVisionTransformer(model, image_size)
        self.decoder = build_decoder(settings, model, image_size, num_values=teacher.width)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images = batch.views[0]
        targets = self.teacher(images)  # [B, N, T]
        predictions, masking = self.predict(images, batch.noise)
        return self.compare(predictions, targets, batch.positions, step, masking.mask)

    def predict(self, images: Tensor, noise: Tensor) -> tuple[Tensor, RandomMask]:
        """Predicted features [B, N, T] of images [B, 3, S, S] under noise [B, N], and the mask used."""
        masking = random_mask(noise, self.settings.mask_ratio)
        latent = self.encoder(images, masking.ids_keep)  # [B, 1 + K, D]
        return self.decoder(latent, masking.ids_restore), masking
