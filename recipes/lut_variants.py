"""What LUT's ablations compare, at ViT-B and 400 epochs: each differs from `vit_b_lut_400ep` by what its name says.

Kim et al., ECCV 2024, arXiv 2310.13593. The paper names the comparisons; its program has no switch for most of them, so
definitions are ours (docs/methods.md) and stand among the departures. Which numbers the paper found was not obtained.
"""

from dataclasses import replace

from recipes import sizes
from recipes.lut import lut
from recipes.mae import mae
from recipes.overrides import apply_overrides
from recipes.registry import recipe
from recipes.schema import Recipe

TOKENS = "objective.bc_tokens: the paper compares such tokens, the released program has no switch; defined here"
DISTANCE = "objective.bc_loss: the paper compares such a distance, the released program has no switch; defined here"
TARGETS = (
    "objective.teacher_mask_ratio: the paper masks the teacher, shares and draws are ours; the same places are hidden "
    "in both views"
)


def changed(base: Recipe, *overrides: str, departures: tuple[str, ...] = ()) -> Recipe:
    """`base` with some fields changed and more points that are not the paper's."""
    return replace(apply_overrides(base, list(overrides)), departures=(*base.departures, *departures))


# --- the two that are compared --------------------------------------------------------------------------------------


@recipe
def vit_b_lut_400ep() -> Recipe:
    """LUT, ViT-B/16, 400 epochs: the length of the paper's ablations, the base of every vit_b_lut_400ep_* recipe.

    Paper, as a review quotes it: 83.6 % ImageNet-1K top-1 after fine-tuning. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep data.train=DIR
    """
    return lut(sizes.VIT_B, w_bc=0.25, micro_batch=128, epochs=400)


@recipe
def vit_b_mae_400ep() -> Recipe:
    """MAE, ViT-B/16, 400 epochs: the baseline of LUT's ablations.

    mmselfsup reports 83.1 % ImageNet-1K top-1 after fine-tuning for MAE at this length. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_mae_400ep data.train=DIR
    """
    return mae(sizes.VIT_B, micro_batch=128, epochs=400)


# --- crop -----------------------------------------------------------------------------------------------------------


@recipe
def vit_b_lut_400ep_rrc() -> Recipe:
    """vit_b_lut_400ep with random resized crops for both views.

    Paper, ablation of the crop: LUT is better with simple resized crops. Area 0.2 to 1 and ratio 3/4 to 4/3 are MAE's.
    Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep_rrc data.train=DIR
    """
    ours = "data.scale, data.ratio: MAE's; the paper's for this comparison are not known"
    return changed(vit_b_lut_400ep(), "data.crop=rrc", departures=(ours,))


@recipe
def vit_b_mae_400ep_src() -> Recipe:
    """vit_b_mae_400ep with LUT's simple resized crop.

    Paper of LUT, ablation of the crop: MAE is better with random resized crops. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_mae_400ep_src data.train=DIR
    """
    return changed(vit_b_mae_400ep(), "data.crop=src")


@recipe
def vit_b_lut_400ep_shared_crop() -> Recipe:
    """vit_b_lut_400ep whose views show the same crop, flipped alike; only colours differ.

    The paper's motive for simple crops is that views are aligned; its program draws them independently. The base of
    the token-wise recipes, which need it. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep_shared_crop data.train=DIR
    """
    ours = "data.shared_crop: ours; the released program draws both crops independently"
    return changed(vit_b_lut_400ep(), "data.shared_crop=true", departures=(ours,))


# --- distance -------------------------------------------------------------------------------------------------------


@recipe
def vit_b_lut_400ep_infonce() -> Recipe:
    """vit_b_lut_400ep with InfoNCE among the images of all ranks in the place of the squared distance.

    Paper, ablation of the distance. 2 tau x cross-entropy with tau 0.2 is MoCo v3's. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep_infonce data.train=DIR
    """
    return changed(vit_b_lut_400ep(), "objective.bc_loss=infonce", departures=(DISTANCE,))


@recipe
def vit_b_lut_400ep_smooth_l1() -> Recipe:
    """vit_b_lut_400ep with smooth L1 (beta 1) of the normalised vectors in the place of their squared distance.

    Paper, ablation of the distance. While no channel differs by more than 1 it is half the squared distance. Not yet
    run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep_smooth_l1 data.train=DIR
    """
    return changed(vit_b_lut_400ep(), "objective.bc_loss=smooth_l1", departures=(DISTANCE,))


# --- what is compared -----------------------------------------------------------------------------------------------


@recipe
def vit_b_lut_400ep_cls() -> Recipe:
    """vit_b_lut_400ep that compares class tokens in the place of pooled patch tokens.

    Paper, ablation of the supervised token: pooled tokens are better. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep_cls data.train=DIR
    """
    return changed(vit_b_lut_400ep(), "objective.bc_tokens=cls", departures=(TOKENS,))


@recipe
def vit_b_lut_400ep_tokenwise() -> Recipe:
    """vit_b_lut_400ep_shared_crop that compares every kept patch with the teacher's token at the same place.

    Paper, ablation of aggregation: worse than aggregated tokens. Batch norm sees every kept patch. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep_tokenwise data.train=DIR
    """
    return changed(vit_b_lut_400ep_shared_crop(), "objective.bc_tokens=tokenwise", departures=(TOKENS,))


@recipe
def vit_b_lut_400ep_pooled_tokenwise() -> Recipe:
    """vit_b_lut_400ep_shared_crop with the token-wise loss added to that of pooled tokens, by the same heads.

    Paper, ablation of aggregation: worse than aggregated tokens alone. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep_pooled_tokenwise data.train=DIR
    """
    return changed(vit_b_lut_400ep_shared_crop(), "objective.bc_tokens=pooled_tokenwise", departures=(TOKENS,))


@recipe
def vit_b_lut_400ep_masked() -> Recipe:
    """vit_b_lut_400ep_teacher_batch_bn that steers the decoded masked tokens in the place of the encoded visible ones.

    Paper, ablation of the supervised tokens: it tries masked ones too, and supervises unmasked ones. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep_masked data.train=DIR
    """
    return changed(vit_b_lut_400ep_teacher_batch_bn(), "objective.bc_tokens=masked", departures=(TOKENS,))


# --- the teacher ----------------------------------------------------------------------------------------------------


@recipe
def vit_b_lut_400ep_teacher_mask_25() -> Recipe:
    """vit_b_lut_400ep whose teacher does not see a quarter of the patches.

    Paper, ablation of target masking: none is best, and masked teachers fall below MAE. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep_teacher_mask_25 data.train=DIR
    """
    return changed(vit_b_lut_400ep(), "objective.teacher_mask_ratio=0.25", departures=(TARGETS,))


@recipe
def vit_b_lut_400ep_teacher_mask_50() -> Recipe:
    """vit_b_lut_400ep whose teacher does not see half of the patches.

    As vit_b_lut_400ep_teacher_mask_25. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep_teacher_mask_50 data.train=DIR
    """
    return changed(vit_b_lut_400ep(), "objective.teacher_mask_ratio=0.5", departures=(TARGETS,))


@recipe
def vit_b_lut_400ep_teacher_mask_75() -> Recipe:
    """vit_b_lut_400ep whose teacher sees as few patches as the student.

    As vit_b_lut_400ep_teacher_mask_25. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep_teacher_mask_75 data.train=DIR
    """
    return changed(vit_b_lut_400ep(), "objective.teacher_mask_ratio=0.75", departures=(TARGETS,))


@recipe
def vit_b_lut_400ep_teacher_batch_bn() -> Recipe:
    """vit_b_lut_400ep whose teacher's batch norm uses the statistics of its own batch, as in BYOL.

    The paper does not say which; its program uses averaged running statistics. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep_teacher_batch_bn data.train=DIR
    """
    ours = "objective.teacher_bn: the released program has running statistics only"
    return changed(vit_b_lut_400ep(), "objective.teacher_bn=batch", departures=(ours,))


# --- heads, direction, learning rate --------------------------------------------------------------------------------


@recipe
def vit_b_lut_400ep_one_way() -> Recipe:
    """vit_b_lut_400ep as the paper's figure draws it: the masked clean view predicts the full strong one only.

    The released program goes both ways. By our count 47.0 G multiply-accumulates per image in the place of 77.8 G. Not
    yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep_one_way data.train=DIR
    """
    ours = "objective.symmetric=false: as the paper's figure; the released program goes both ways"
    return changed(vit_b_lut_400ep(), "objective.symmetric=false", departures=(ours,))


@recipe
def vit_b_lut_400ep_no_predictor() -> Recipe:
    """vit_b_lut_400ep without the predictor, as the paper's figure draws the heads.

    The released program has one of two layers; `--depth_pred 0` takes it away. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep_no_predictor data.train=DIR
    """
    ours = "objective.predictor_depth=0: as the paper's figure; the released program documents 2"
    return changed(vit_b_lut_400ep(), "objective.predictor_depth=0", departures=(ours,))


@recipe
def vit_b_lut_400ep_head_ln() -> Recipe:
    """vit_b_lut_400ep with LayerNorm (eps 1e-6) in projector and predictor: nothing depends on the batch.

    A switch of the released program. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep_head_ln data.train=DIR
    """
    ours = "objective.head_norm=ln: the paper's runs have batch norm"
    return changed(vit_b_lut_400ep(), "objective.head_norm=ln", departures=(ours,))


@recipe
def vit_b_lut_400ep_head_no_norm() -> Recipe:
    """vit_b_lut_400ep without normalisation in projector and predictor.

    What the released program does where nothing is said; its documented commands ask for batch norm. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep_head_no_norm data.train=DIR
    """
    ours = "objective.head_norm=none: the paper's runs have batch norm"
    return changed(vit_b_lut_400ep(), "objective.head_norm=none", departures=(ours,))


@recipe
def vit_b_lut_400ep_linear_lr() -> Recipe:
    """vit_b_lut_400ep with MAE's learning-rate rule, which LUT's help text names: blr x batch / 256.

    At batch 4096 both rules give 2.4e-3, so this is the same run; it is here for other batches, for example
    `optim.global_batch=1024`: 6e-4 in the place of 1.2e-3. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_lut_400ep_linear_lr data.train=DIR optim.global_batch=1024
    """
    ours = "optim.lr_rule=linear: as the help text of the released program, which computes the square root"
    return changed(vit_b_lut_400ep(), "optim.lr_rule=linear", departures=(ours,))


# --- MAE ------------------------------------------------------------------------------------------------------------


@recipe
def vit_b_mae_400ep_raw_pixels() -> Recipe:
    """vit_b_mae_400ep that predicts pixels as they are, not normalised per patch.

    MAE's paper, Table 1d: normalised ones are better. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_mae_400ep_raw_pixels data.train=DIR
    """
    return changed(vit_b_mae_400ep(), "objective.norm_pix_loss=false")
