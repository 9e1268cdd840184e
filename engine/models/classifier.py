"""An encoder with a classifier on top, as it is fine-tuned: timm's own models, so state-dict keys are timm's.

Every weight is trained, a Vision Transformer's position table included, which pre-training kept fixed.
"""

from __future__ import annotations

import dataclasses

from torch import nn

from engine.models import vision_library  # noqa: F401  timm imports only after it
from engine.models.beit import beit_arguments
from engine.models.encoders import timm_arguments
from recipes.checks import require
from recipes.schema import Model

# isort: split
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer

POOLINGS = ("avg", "token")
VIT_HEAD_STD = 2e-5  # of the released fine-tuning of MAE and LUT; timm's BEiT scales its head by 0.001 itself


def build_classifier(
    model: Model, image_size: int, *, num_classes: int, global_pool: str = "avg"
) -> VisionTransformer | Beit:
    """timm's model with a fresh classifier: images [B, 3, S, S] -> logits [B, num_classes].

    `global_pool` "avg": mean of the patch tokens of the last block, then a LayerNorm of its own (`fc_norm`; MAE,
    appendix A.1; BEiT); "token": the last norm of the class token. `model.drop_path` is that of the last block, growing
    linearly from 0 at the first. ValueError for another pooling or without classes.
    """
    require(global_pool in POOLINGS, f"global_pool={global_pool}: one of {', '.join(POOLINGS)} is needed")
    require(num_classes >= 1, f"num_classes={num_classes}: at least 1 is needed")
    shape = dict(drop_path_rate=model.drop_path, num_classes=num_classes, global_pool=global_pool)
    if model.architecture == "beit":
        return build_beit(per_block(model), image_size, shape)
    network = VisionTransformer(**timm_arguments(model, image_size) | shape)
    nn.init.normal_(network.head.weight, std=VIT_HEAD_STD)
    return network


def build_beit(model: Model, image_size: int, shape: dict) -> Beit:
    network = Beit(**beit_arguments(model, image_size) | shape)
    for block in network.blocks:
        block.attn.qkv_bias_separate = True  # 16 bits and ZeRO stage 3 need it (beit.py)
    return network


def per_block(model: Model) -> Model:
    """The same model with a table of relative positions in every block where the blocks shared one (DTM, as BEiT)."""
    relative = model.rel_pos_bias or model.shared_rel_pos_bias
    return dataclasses.replace(model, rel_pos_bias=relative, shared_rel_pos_bias=False)
