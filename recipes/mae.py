"""MAE: Masked Autoencoders Are Scalable Vision Learners (He et al., CVPR 2022, arXiv 2111.06377).

Pre-training as in the paper's appendix A.1, Table 8: AdamW (0.9, 0.95), weight decay 0.05, base learning rate 1.5e-4
with the linear rule at batch 4096, 40 epochs of warm-up, cosine to zero, random resized crop and flip only, no
drop path, no clipping. 1600 epochs, the length of the paper's best results (Table 3).
"""

from recipes import sizes
from recipes.methods import Mae
from recipes.registry import recipe
from recipes.schema import Data, Model, Optim, Recipe, Run

DEPARTURES = (
    "precision: bf16 autocast, no loss scaling (the released program: fp16 autocast with loss scaling)",
    "data order and random numbers: pure functions of the seed (the released program: one stream per worker)",
)


def mae(model: Model, *, micro_batch: int, epochs: float = 1600) -> Recipe:
    """The paper's recipe for one size; `micro_batch` only says how the 4,096 images are divided."""
    return Recipe(
        model=model,
        objective=Mae(
            mask_ratio=0.75,
            norm_pix_loss=True,
            decoder_embed_dim=512,
            decoder_depth=8,
            decoder_num_heads=16,
        ),
        optim=Optim(
            global_batch=4096,
            micro_batch=micro_batch,
            blr=1.5e-4,
            lr_rule="linear",
            min_lr=0.0,
            warmup_epochs=40,
            weight_decay=0.05,
            betas=(0.9, 0.95),
            eps=1e-8,
            clip_grad=0.0,
        ),
        data=Data(crop="rrc", scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), hflip=0.5),
        run=Run(epochs=epochs),
        departures=DEPARTURES,
    )


@recipe
def vit_s_mae() -> Recipe:
    """MAE, ViT-S/16, 1600 epochs of ImageNet-1K at 224 px.

    The MAE paper trains no ViT-S; this is its recipe at that size, as LUT's table (README of naver-ai/lut) reports
    it: 81.4 % ImageNet-1K top-1 after fine-tuning. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_s_mae data.train=DIR
    """
    return mae(sizes.VIT_S, micro_batch=256)


@recipe
def vit_b_mae() -> Recipe:
    """MAE, ViT-B/16, 1600 epochs of ImageNet-1K at 224 px.

    Paper, Table 3: 83.6 % ImageNet-1K top-1 after fine-tuning; 68.0 % by linear probe. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_mae data.train=DIR
    """
    return mae(sizes.VIT_B, micro_batch=128)


@recipe
def vit_l_mae() -> Recipe:
    """MAE, ViT-L/16, 1600 epochs of ImageNet-1K at 224 px.

    Paper, Table 3: 85.9 % ImageNet-1K top-1 after fine-tuning; 75.8 % by linear probe. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_l_mae data.train=DIR
    """
    return mae(sizes.VIT_L, micro_batch=64)
