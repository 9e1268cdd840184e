"""What one image costs in training: the student, what is put on top of it, and the teachers."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.costs.layers import (
    CHANNELS,
    Cost,
    beit,
    block,
    layer_norm,
    linear,
    perceptron,
    total,
    vit,
)
from recipes.methods import Dtm, Lut, Mae, MaeDtm
from recipes.methods.mae import num_kept
from recipes.schema import Recipe
from recipes.sections.model import Model

CLIP_TOWER = Model(embed_dim=768, depth=12, num_heads=12)  # ViT-B/16, the teacher of DTM's paper
CLIP_WIDTH = 512  # of its projection
PIXELS = "pixels"  # a recipe's teacher that is no network


@dataclass(frozen=True, kw_only=True)
class Training:
    """The parts; FLOPs and kept numbers are per image."""

    encoder: Cost
    decoder: Cost = Cost()
    heads: Cost = Cost()
    average: Cost = Cost()  # the moving average: only its forward pass
    teacher: Cost = Cost()  # frozen: likewise

    @property
    def student(self) -> Cost:
        """Everything that is trained."""
        return total(self.encoder, self.decoder, self.heads)

    @property
    def flops(self) -> float:
        """Of a whole step, forward and backward, per image."""
        return self.student.flops + self.student.backward + self.average.flops + self.teacher.flops

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return round(self.student.parameters)


def training_cost(recipe: Recipe) -> Training:
    """The parts of a recipe. Morphing's own products (below 1 % of DTM's) are not counted.

    Of a teacher that is neither CLIP's ViT-B/16 nor the pixels nothing is known here: it counts nothing.
    """
    match recipe.objective:
        case Lut():
            return lut_cost(recipe)
        case Mae():
            return mae_cost(recipe)
        case Dtm():
            return dtm_cost(recipe)
        case MaeDtm():
            return mae_dtm_cost(recipe)


def mae_cost(recipe: Recipe) -> Training:
    kept = num_kept(recipe.num_patches, recipe.objective.mask_ratio)
    encoder = vit(recipe.model, kept)
    return Training(encoder=encoder, decoder=pixel_decoder(recipe, kept))


def lut_cost(recipe: Recipe) -> Training:
    """Two views for the student, of which one is decoded, and two for the average (one with symmetric=false)."""
    settings, model, patches = recipe.objective, recipe.model, recipe.num_patches
    kept = num_kept(patches, settings.mask_ratio)
    seen = [kept, min(kept, patches - kept)][: 2 if settings.symmetric else 1]
    encoder, decoder = vit(model, kept), pixel_decoder(recipe, kept)
    rows = float(len(seen))
    targets = rows
    if "tokenwise" in settings.bc_tokens:
        rows = targets = sum(seen) + len(seen) * (settings.bc_tokens == "pooled_tokenwise")
    heads = head_cost(settings, model, rows, settings.head_depth)
    heads += head_cost(settings, model, rows, settings.predictor_depth)
    for other in seen[1:]:
        encoder += vit(model, other).again()
    if settings.bc_tokens == "masked":
        heads += linear(len(seen), settings.decoder_embed_dim, model.embed_dim, bias=False)
        for other in seen[1:]:
            decoder += decoder_body(recipe, other).again()
    average = vit(model, num_kept(patches, settings.teacher_mask_ratio)).used(len(seen))
    average += Cost(parameters=(1 + patches) * model.embed_dim)  # its positions, which nobody trains
    average += head_cost(settings, model, targets, settings.head_depth)
    return Training(encoder=encoder, decoder=decoder, heads=heads, average=average)


def head_cost(settings: Lut, model: Model, rows: float, depth: int) -> Cost:
    return perceptron(rows, model.embed_dim, hidden=settings.head_hidden, depth=depth, norm=settings.head_norm)


def dtm_cost(recipe: Recipe) -> Training:
    teacher, width = teacher_cost(recipe)
    grid = recipe.data.image_size // recipe.model.patch_size
    encoder = beit(recipe.model, grid) + Cost(parameters=recipe.model.embed_dim)  # and the mask token
    return Training(encoder=encoder, heads=linear(grid**2, recipe.model.embed_dim, width), teacher=teacher)


def mae_dtm_cost(recipe: Recipe) -> Training:
    teacher, width = teacher_cost(recipe)
    kept = num_kept(recipe.num_patches, recipe.objective.mask_ratio)
    decoder = decoder_body(recipe, kept) + linear(recipe.num_patches, recipe.objective.decoder_embed_dim, width)
    return Training(encoder=vit(recipe.model, kept), decoder=decoder, teacher=teacher)


def pixel_decoder(recipe: Recipe, kept: int) -> Cost:
    """MAE's decoder; pixels are predicted where they were masked, and the error is kept in 32 bits."""
    masked, values = recipe.num_patches - kept, CHANNELS * recipe.model.patch_size**2
    prediction = linear(masked, recipe.objective.decoder_embed_dim, values)
    return decoder_body(recipe, kept) + prediction + Cost(wide=masked * values)


def decoder_body(recipe: Recipe, kept: int) -> Cost:
    """MAE's decoder up to its last norm, on all tokens."""
    settings, tokens = recipe.objective, 1 + recipe.num_patches
    width = settings.decoder_embed_dim
    layers = [block(tokens, width, settings.decoder_num_heads, recipe.model.mlp_ratio)] * settings.decoder_depth
    embedding = linear(1 + kept, recipe.model.embed_dim, width) + Cost(parameters=width)  # and the mask token
    return total(embedding, *layers, layer_norm(tokens, width))


def teacher_cost(recipe: Recipe) -> tuple[Cost, int]:
    """A frozen teacher and the width of its targets; CLIP's where the recipe names none yet."""
    if recipe.teacher == PIXELS:
        return Cost(), CHANNELS * recipe.model.patch_size**2
    if not knows_teacher(recipe):
        return Cost(), CLIP_WIDTH
    patches, width = recipe.num_patches, CLIP_TOWER.embed_dim
    tower = vit(CLIP_TOWER, patches) + layer_norm(1 + patches, width)  # one norm before the blocks, too
    positions = Cost(parameters=patches * width)  # and the class token's, where timm has the patches' bias
    return tower + positions + linear(patches, width, CLIP_WIDTH), CLIP_WIDTH


def knows_teacher(recipe: Recipe) -> bool:
    """Whether the teacher's cost is known: CLIP's ViT-B/16 (nothing named, or a file of weights), or the pixels."""
    return recipe.teacher == PIXELS or not recipe.teacher or recipe.teacher.endswith((".pt", ".safetensors", ".bin"))
