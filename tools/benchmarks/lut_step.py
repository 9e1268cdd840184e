"""A step of LUT (ViT-S, batch 8, fp32), against the released program or the same written the textbook way.

The textbook way: the views go through student and teacher one after the other, every patch is embedded and every
decoded one becomes pixels, attention is written out, the optimizer goes tensor by tensor, and the moving average is of
the whole network.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.ema import cosine_momentum
from engine.masks import disjoint_masks, gather_tokens
from engine.meter import gradient_norm
from engine.objectives.lut import ContextualAutoencoder
from engine.params import parameter_groups
from engine.weights.initial import Source, place
from engine.weights.released import LUT
from recipes.methods import Lut
from recipes.schema import Optim
from tools.benchmarks.released import released
from tools.benchmarks.side_by_side import Row, Settings
from tools.benchmarks.steps import (
    TOTAL,
    OurStep,
    Size,
    Step,
    on_this_machine,
    scaler,
    step_rows,
    without_fused_attention,
)

OPTIM = Optim(global_batch=8, micro_batch=8, lr=1e-4)


def suite(settings: Settings) -> Iterator[Row]:
    """Operators and images per CPU second of a step."""
    torch.manual_seed(0)
    size = Size.of(settings)
    shape = (size.images, 3, size.image_size, size.image_size)
    batch = SimpleNamespace(views=(torch.randn(shape), torch.randn(shape)), noise=noise_of(size))
    ours = OurStep(objective_of(size), batch, OPTIM)
    yield from step_rows("LUT", ours, settings, size, released_step, textbook_step)


def objective_of(size: Size) -> ContextualAutoencoder:
    settings = Lut(w_bc=1.0, head_hidden=size.hidden, **decoder_of(size))
    return ContextualAutoencoder(settings, size.model, size.image_size)


def decoder_of(size: Size) -> dict[str, int]:
    """Ours and the released program have the same names for it."""
    return dict(zip(("decoder_embed_dim", "decoder_depth", "decoder_num_heads"), size.decoder, strict=True))


def noise_of(size: Size, seed: int = 1) -> Tensor:
    """What the released program's masking draws first after `seed`."""
    torch.manual_seed(seed)
    return torch.rand(size.images, size.num_patches)


# --- the released program -------------------------------------------------------------------------------------------


def released_step(settings: Settings, size: Size, ours: OurStep) -> Step:
    """Its own training loop over one batch; its weights, the moving average's too, become ours."""
    shape = dict(img_size=size.image_size, patch_size=16, embed_dim=size.model.embed_dim, depth=size.model.depth)
    with released(settings.reference, "lut") as load:
        network = load("models.models_lut").MaskedAutoencoderViT_LUT(
            **shape, num_heads=size.model.num_heads, head_mlp_dim=size.hidden, norm_pix_loss=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6), **decoder_of(size),
        )  # fmt: skip
        without_fused_attention(network)
        momenta = [cosine_momentum(ours.objective.settings.momentum, step / TOTAL) for step in range(TOTAL)]
        average = load("util.model_ema_sched").ModelEma_sched(network, momenta)
        loop, grad_scaler = load("engines.engine_lut").train_one_epoch, load("util.misc").NativeScalerWithGradNormCount
    place(
        ours.objective, Source("released", LUT.translate(network.state_dict()), LUT.translate(average.ema.state_dict()))
    )
    groups = parameter_groups(network, OPTIM.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)
    # The rate is constant: between equal bounds. A batch of one epoch each: then its steps count as ours do.
    rates = dict(lr=OPTIM.lr, min_lr=OPTIM.lr, warmup_epochs=0, epochs=TOTAL, accum_iter=1)
    args = SimpleNamespace(**rates, mask_ratio=0.75, w_mae=1.0, w_bc=1.0)
    with on_this_machine():
        loss_scaler = scaler(grad_scaler)

    def step(number: int) -> dict[str, float]:
        torch.manual_seed(1)  # then its mask is that of `noise_of`
        batches = [(list(ours.batch.views), None)]
        with on_this_machine():
            found = loop(
                network, batches, optimizer, torch.device("cpu"), number, loss_scaler, average, args=args
            )  # fmt: skip
        return {"loss": found["loss"], "mae": found["mae_loss"], "bc": found["bc_loss"]}

    return step


# --- the textbook way -----------------------------------------------------------------------------------------------


class TextbookLut(nn.Module):
    """The modules of an objective of ours, used one view at a time."""

    def __init__(self, ours: ContextualAutoencoder) -> None:
        super().__init__()
        self.encoder, self.decoder = deepcopy(ours.encoder), deepcopy(ours.decoder)
        self.head, self.predictor = deepcopy(ours.head), deepcopy(ours.predictor)
        without_fused_attention(self)

    def encode(self, images: Tensor, ids_keep: Tensor | None) -> Tensor:
        """All patches are embedded, then some of them kept."""
        encoder = self.encoder
        x = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
        if ids_keep is not None:
            x = gather_tokens(x, ids_keep)
        cls = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(x), -1, -1)
        return encoder.norm(encoder.blocks(torch.cat([cls, x], dim=1)))

    def reconstruction(self, images: Tensor, latent: Tensor, ids_restore: Tensor, mask: Tensor) -> Tensor:
        """Every patch is predicted, the hidden ones count (lut.md 1.4)."""
        decoder, side = self.decoder, self.encoder.patch_size
        tokens = decoder.embed(latent)
        hidden = decoder.mask_token.expand(len(tokens), ids_restore.shape[1] + 1 - tokens.shape[1], -1)
        patches = gather_tokens(torch.cat([tokens[:, 1:], hidden], dim=1), ids_restore)
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + decoder.pos_embed
        predicted = decoder.pred(decoder.norm(decoder.blocks(tokens)))[:, 1:]
        target = F.unfold(images, side, stride=side).transpose(1, 2).unflatten(2, (3, -1)).transpose(2, 3).flatten(2)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        error = ((predicted - target) ** 2).mean(-1)
        return (error * mask).sum() / mask.sum()

    def project(self, tokens: Tensor, *, student: bool) -> Tensor:
        rows = self.head(tokens[:, 1:].mean(1))
        return self.predictor(rows) if student else rows


def textbook_step(ours: OurStep) -> Step:
    student = TextbookLut(ours.objective).train()
    teacher = deepcopy(student).eval().requires_grad_(False)
    groups = parameter_groups(student, OPTIM.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, foreach=False, fused=False)
    views, masks = ours.batch.views, disjoint_masks(ours.batch.noise, 0.75)

    def losses() -> tuple[Tensor, Tensor]:
        tokens = [student.encode(view, mask.ids_keep) for view, mask in zip(views, masks, strict=True)]
        mae = student.reconstruction(views[0], tokens[0], masks[0].ids_restore, masks[0].mask)
        predictions = [student.project(rows, student=True) for rows in tokens]
        with torch.no_grad():
            targets = [teacher.project(teacher.encode(view, None), student=False) for view in views]
        cosines = [F.cosine_similarity(a, b) for a, b in zip(predictions, targets[::-1], strict=True)]
        return mae, sum((2 - 2 * cosine).mean() for cosine in cosines) / 2

    def step(number: int) -> dict[str, float]:
        optimizer.zero_grad()
        mae, context = losses()
        (mae + context).backward()
        gradient_norm(student)
        optimizer.step()
        move(student, teacher, cosine_momentum(ours.objective.settings.momentum, number / TOTAL))
        return {"loss": (mae + context).item(), "mae": mae.item(), "bc": context.item()}

    return step


@torch.no_grad()
def move(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """The moving average of every tensor, one after the other."""
    for theirs, ours in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True):
        theirs.copy_(theirs * momentum + (1 - momentum) * ours)
