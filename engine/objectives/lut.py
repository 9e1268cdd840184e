"""LUT: MAE that also learns what the visible patches say about the whole image (arXiv 2310.13593, ECCV 2024).

A clean view is reconstructed as in MAE. Beside that, the visible patches of each view, encoded, pooled and projected,
predict what a moving average of the encoder makes of the other view, unmasked. Settings exchange what is compared
(context_tokens.py), by which distance (contrast.py), what the average sees, and who predicts: both views, or the clean
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from engine.ema import cosine_momentum, update_average
from engine.masks import RandomMask, disjoint_masks, random_mask
from engine.models.heads import RankBatchNorm, projection_head
from engine.models.initialization import initialize
from engine.objectives.context_tokens import ROWS, rows_of
from engine.objectives.contract import AVERAGE
from engine.objectives.contrast import contextual_loss
from engine.objectives.mae import MaskedAutoencoder
from recipes.methods import Lut
from recipes.schema import Model
from shards.draws.masks import MaskDraws
from shards.reading.loader import Batch


class ContextualAutoencoder(MaskedAutoencoder):
    """MAE's encoder and decoder, a projector and a predictor, and the moving average of encoder and projector."""

    view = "pretrain_lut"

    def __init__(self, settings: Lut, model: Model, image_size: int) -> None:
        super().__init__(settings, model, image_size)
        layers = dict(hidden=settings.head_hidden, norm=settings.head_norm, act=settings.head_act)
        self.head = projection_head(model.embed_dim, depth=settings.head_depth, **layers)
        self.predictor = projection_head(model.embed_dim, depth=settings.predictor_depth, **layers)
        self.head.apply(initialize)
        self.predictor.apply(initialize)
        if settings.bc_tokens == "masked":  # the decoder is narrower than what the projector takes
            self.masked_embed = nn.Linear(settings.decoder_embed_dim, model.embed_dim, bias=False).apply(initialize)
        if settings.teacher_mask_ratio:
            self.masks = MaskDraws(num_noise=2 * self.num_patches)  # the first N as ever, the others for the teacher
        self.num_directions = 2 if settings.symmetric else 1
        # Only what the teacher runs is averaged. It is held outside: no gradient, no ZeRO, no `.train()`.
        average = nn.ModuleDict({"encoder": deepcopy(self.encoder), "head": deepcopy(self.head)})
        for layer in average["head"]:
            if isinstance(layer, RankBatchNorm):
                layer.eval_by_batch = settings.teacher_bn == "batch"
        self.keep_outside(AVERAGE, average, moves=True)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        clean, strong = batch.views
        targets = self.targets(clean, strong, batch.noise)
        predictions, mae = self.predictions(clean, strong, batch.noise)
        context = self.context(predictions, targets)
        return {"loss": self.settings.w_mae * mae + self.settings.w_bc * context, "mae": mae, "bc": context}

    # --- the student ------------------------------------------------------------------------------------------------

    def predictions(self, clean: Tensor, strong: Tensor, noise: Tensor) -> tuple[list[Tensor], Tensor]:
        """Student: the predicted projections [R, D] of its views, and MAE's loss on the clean one.

        The views keep disjoint patches and go through the encoder as one batch; batch norm sees them one by one. With
        objective.symmetric=false the clean view is the only one. Of bc_tokens=pooled_tokenwise all pooled rows come
        first. `noise` [B, N], or [B, 2 N] with the teacher's.
        """
        masks = self.student_masks(noise)
        latents = self.encode((clean, strong)[: len(masks)], [mask.ids_keep for mask in masks])  # each [B, 1 + K, D]
        if self.settings.bc_tokens == "masked":
            pred, rows = self.decode_views(latents, masks)
        else:
            pred = self.decoder(latents[0], masks[0].ids_restore, masks[0].ids_masked)
            rows = [rows_of(kind, tokens) for kind in ROWS[self.settings.bc_tokens] for tokens in latents]
        projections = [self.predictor(self.head(row)) for row in rows]
        return projections, self.reconstruction_loss(clean, pred, masks[0].ids_masked)

    def student_masks(self, noise: Tensor) -> tuple[RandomMask, ...]:
        """The mask of every view that the student sees."""
        return disjoint_masks(noise[:, : self.num_patches], self.settings.mask_ratio)[: self.num_directions]

    def encode(self, views: Sequence[Tensor], ids_keep: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Kept tokens of the views: as one batch, unless the second keeps fewer patches (mask_ratio below 1/2)."""
        if len(views) == 2 and ids_keep[0].shape == ids_keep[1].shape:
            return self.encoder(torch.cat(views), torch.cat(ids_keep)).chunk(2)
        return tuple(self.encoder(view, ids) for view, ids in zip(views, ids_keep, strict=True))

    def decode_views(self, latents: Sequence[Tensor], masks: Sequence[RandomMask]) -> tuple[Tensor, list[Tensor]]:
        """Predicted masked patches of the clean view; of every view the mean decoded token of its masked places [B, D].

        A linear layer of its own brings that mean from the decoder's width to the encoder's, which the projector takes;
        the moving average's projector goes on seeing means of encoded tokens.
        """
        decoded = [
            self.decoder(tokens, mask.ids_restore, mask.ids_masked, predict=False)
            for tokens, mask in zip(latents, masks, strict=True)
        ]
        return self.decoder.pred(decoded[0]), [self.masked_embed(tokens.mean(dim=1)) for tokens in decoded]

    # --- the teacher ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def targets(self, clean: Tensor, strong: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """Teacher: the projections [R, D] of its views, all patches seen unless teacher_mask_ratio hides some.

        Order and rows as in `predictions`; with objective.symmetric=false the strong view is the only one. `noise` as
        there: it is needed where tokens are compared one by one, or some are hidden.
        """
        settings, average, views = self.settings, self.outside[AVERAGE], (clean, strong)[-self.num_directions :]
        ids_keep = None
        if settings.teacher_mask_ratio:  # the same places in both views
            kept = random_mask(noise[:, self.num_patches :], settings.teacher_mask_ratio).ids_keep
            ids_keep = kept.repeat(len(views), 1)
        tokens = average["encoder"](torch.cat(views), ids_keep).chunk(len(views))
        targets: list[Tensor] = []
        for kind in ROWS[settings.bc_tokens]:
            ids: list[Tensor | None] = [None] * len(views)
            if kind == "tokenwise":  # where the student saw the other view
                ids = [mask.ids_keep for mask in self.student_masks(noise)][::-1]
            targets += self.project(average["head"], [rows_of(kind, *pair) for pair in zip(tokens, ids, strict=True)])
        return tuple(targets)

    def project(self, head: nn.Module, rows: list[Tensor]) -> Sequence[Tensor]:
        """The views' rows through the teacher's projector: together, unless batch statistics must be of one view."""
        if self.settings.teacher_bn == "batch":
            return [head(row) for row in rows]
        return head(torch.cat(rows)).split([len(row) for row in rows])

    # --- both -------------------------------------------------------------------------------------------------------

    def context(self, predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Each view's predictions against the targets of the other: mean over directions, kinds of rows added up."""
        step, kind, temperature = self.num_directions, self.settings.bc_loss, self.settings.bc_temperature
        losses = [
            contextual_loss(prediction, target, kind=kind, temperature=temperature)
            for first in range(0, len(targets), step)
            for prediction, target in zip(
                predictions[first : first + step][::-1], targets[first : first + step], strict=True
            )
        ]
        return sum(losses) / step

    def after_step(self, step: int, total_steps: int) -> None:
        """Move the average; its momentum goes from 0.996 to 1 over the run."""
        momentum = cosine_momentum(self.settings.momentum, step / total_steps)
        student = nn.ModuleDict({"encoder": self.encoder, "head": self.head})
        update_average(student, self.outside[AVERAGE], momentum)
