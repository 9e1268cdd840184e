"""From a recipe's model section to its encoder, and to the words in which timm builds the same."""

from __future__ import annotations

from torch import nn

from engine.models.beit import MaskedBeit, beit_arguments
from engine.models.encoders import MaskedVisionTransformer, timm_arguments
from recipes.schema import Model

ENCODERS = {"vit": MaskedVisionTransformer, "beit": MaskedBeit}
# timm's entry points; the arguments beside them give the real sizes.
TIMM = {"vit": ("vit_base_patch16_224", timm_arguments), "beit": ("beit_base_patch16_224", beit_arguments)}


def build_encoder(model: Model, image_size: int) -> nn.Module:
    """A fresh encoder; called with images [B, 3, S, S] alone it gives all tokens [B, 1 + N, D]."""
    return ENCODERS[model.architecture](model, image_size)


def timm_model(model: Model, image_size: int) -> tuple[str, dict]:
    """Name and arguments with which `timm.create_model` builds the same encoder without a head."""
    name, arguments = TIMM[model.architecture]
    return name, arguments(model, image_size)
