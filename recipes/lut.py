"""LUT: Learning with Unmasked Tokens Drives Stronger Vision Learners (Kim et al., ECCV 2024, arXiv 2310.13593).

Pre-training as docs/methods.md has it, with the choices of its table where paper and program disagree:
AdamW (0.9, 0.95), weight decay 0.05, batch 4096, base learning rate 1.5e-4 with the rule blr x sqrt(batch) / 4 (2.4e-3
at 4096), 40 epochs of warm-up, cosine to zero, 1600 epochs; two simple-resized-crop views, the second one distorted;
projector and predictor of two layers, 4096 wide, with batch norm; moving average from 0.996 to 1.
"""

from recipes import sizes
from recipes.methods import Lut
from recipes.registry import recipe
from recipes.schema import Data, Model, Optim, Recipe, Run

DEPARTURES = (
    "precision: bf16 autocast, no loss scaling (the released program: fp16 autocast with loss scaling)",
    "data order and random numbers: pure functions of the seed (the released program: one stream per worker)",
    "the moving average holds what it runs, encoder and projector (the released program also averages decoder and "
    "predictor, which it never runs); its momentum counts optimizer steps, not micro-steps",
)


def lut(
    model: Model, *, w_bc: float, micro_batch: int, epochs: float = 1600, departures: tuple[str, ...] = ()
) -> Recipe:
    """The paper's recipe for one size; `micro_batch` x 8 ranks is the paper's 1,024 images under batch norm."""
    return Recipe(
        model=model,
        objective=Lut(
            mask_ratio=0.75,
            norm_pix_loss=True,
            decoder_embed_dim=512,
            decoder_depth=8,
            decoder_num_heads=16,
            w_mae=1.0,
            w_bc=w_bc,
            symmetric=True,
            bc_tokens="pooled",
            bc_loss="l2norm",
            momentum=0.996,
            teacher_mask_ratio=0.0,
            teacher_bn="running",
            head_depth=2,
            predictor_depth=2,
            head_hidden=4096,
            head_norm="bn",
            head_act="relu",
            norm_batch=1024,
        ),
        optim=Optim(
            global_batch=4096,
            micro_batch=micro_batch,
            blr=1.5e-4,
            lr_rule="sqrt",
            min_lr=0.0,
            warmup_epochs=40,
            weight_decay=0.05,
            betas=(0.9, 0.95),
            eps=1e-8,
            clip_grad=0.0,
        ),
        data=Data(
            crop="src",
            crop_padding=4,
            hflip=0.5,
            shared_crop=False,
            brightness=0.4,
            contrast=0.4,
            saturation=0.2,
            hue=0.1,
            jitter_prob=0.8,
            solarize_threshold=128,
            blur_sigma=(0.1, 2.0),
        ),
        run=Run(epochs=epochs),
        departures=(*DEPARTURES, *departures),
    )


@recipe
def vit_s_lut() -> Recipe:
    """LUT, ViT-S/16, 1600 epochs of ImageNet-1K at 224 px.

    README of naver-ai/lut: 82.0 % ImageNet-1K top-1 after fine-tuning. Not yet run here. Weight of the contextual loss
    1.0, as the paper has it for ViT-S.

    Command: deepspeed engine/train.py --recipe vit_s_lut data.train=DIR
    """
    return lut(sizes.VIT_S, w_bc=1.0, micro_batch=128)


@recipe
def vit_b_lut() -> Recipe:
    """LUT, ViT-B/16, 1600 epochs of ImageNet-1K at 224 px.

    README of naver-ai/lut: 84.2 % ImageNet-1K top-1 after fine-tuning. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut data.train=DIR
    """
    return lut(sizes.VIT_B, w_bc=0.25, micro_batch=128)


@recipe
def vit_l_lut() -> Recipe:
    """LUT, ViT-L/16, 1600 epochs of ImageNet-1K at 224 px.

    README of naver-ai/lut: 86.0 % ImageNet-1K top-1 after fine-tuning. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_l_lut data.train=DIR
    """
    unknown = "objective.w_bc=0.25: neither paper nor program gives the weight for ViT-L; ViT-B's is used"
    return lut(sizes.VIT_L, w_bc=0.25, micro_batch=128, departures=(unknown,))
