"""DTM's ablations on ViT-B/16: each recipe is vit_b_dtm with one choice exchanged (Kim et al., ICLR 2025, 2401.00254).

Which comparisons the paper makes is known from reviews of it and from the released program's flags; the tables with
their numbers were not obtained. What a setting does stands in docs/methods.md and recipes/methods/morphing.py.
"""

from collections.abc import Collection
from dataclasses import replace

from recipes import sizes
from recipes.dtm import DRAWS, GROUPING, LOSS, PRECISION, vit_b_dtm
from recipes.mae import mae
from recipes.methods import MaeDtm
from recipes.overrides import apply_overrides
from recipes.registry import recipe
from recipes.schema import Recipe

MIDDLE = (
    "schedule: 98 tokens and 7 steps are the middle of the ranges; the numbers of the paper's ablation are not known"
)
UNVERIFIED = "the paper's own choice could not be verified"


def variant(*overrides: str, without: Collection[str] = (), remark: str = "") -> Recipe:
    """vit_b_dtm with `overrides`; of its departures those in `without` no longer hold, and `remark` is a new one."""
    base = vit_b_dtm()
    kept = [departure for departure in base.departures if departure not in without]
    return replace(apply_overrides(base, list(overrides)), departures=(*kept, *filter(None, [remark])))


# --- schedule -------------------------------------------------------------------------------------------------------


@recipe
def vit_b_dtm_token_wise() -> Recipe:
    """DTM's baseline without morphing: ViT-B/16, the teacher's tokens compared one by one.

    Source: the paper's baseline; morphing gives 1.1 points more, as a review quotes it. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_token_wise data.train=DIR teacher=FILE
    """
    return variant("objective.max_removed=0", "objective.num_schedules=1", without=[GROUPING])


@recipe
def vit_b_dtm_fixed() -> Recipe:
    """DTM, ViT-B/16 with a fixed schedule: always 98 tokens removed in 7 steps, instead of drawing both.

    One grouping per step: two would be the same.
    Source: the paper's ablation of the dynamic schedule (a fixed one is worse, as a review quotes it). Not yet run
    here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_fixed data.train=DIR teacher=FILE
    """
    tokens = ["objective.min_removed=98", "objective.max_removed=98"]
    steps = ["objective.min_steps=7", "objective.max_steps=7"]
    return variant(*tokens, *steps, "objective.num_schedules=1", remark=MIDDLE)


@recipe
def vit_b_dtm_constant_tokens() -> Recipe:
    """DTM, ViT-B/16 with a constant number of tokens: always 98 removed, only the number of steps is drawn.

    Source: the paper's ablation of the schedule; the released program has a flag that it does not read. Not yet run
    here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_constant_tokens data.train=DIR teacher=FILE
    """
    return variant("objective.min_removed=98", "objective.max_removed=98", remark=MIDDLE)


@recipe
def vit_b_dtm_constant_steps() -> Recipe:
    """DTM, ViT-B/16 with a constant number of steps: always 7, only the number of tokens is drawn.

    Source: the paper's ablation of the schedule; the released program has a flag that it does not read. Not yet run
    here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_constant_steps data.train=DIR teacher=FILE
    """
    return variant("objective.min_steps=7", "objective.max_steps=7", remark=MIDDLE)


@recipe
def vit_b_dtm_exact_counts() -> Recipe:
    """DTM, ViT-B/16 that removes exactly the drawn number of tokens wherever the steps can.

    Source: the paper's text, where the number of tokens left is what is drawn; the released program rounds (docs/
    methods.md). Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_exact_counts data.train=DIR teacher=FILE
    """
    return variant("objective.counts=exact")


@recipe
def vit_b_dtm_one_schedule() -> Recipe:
    """DTM, ViT-B/16 with one grouping per step instead of the mean over two.

    Source: the released program's choice of one or two. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_one_schedule data.train=DIR teacher=FILE
    """
    return variant("objective.num_schedules=1", remark="schedules: one; the released program documents two")


# --- distance -------------------------------------------------------------------------------------------------------


@recipe
def vit_b_dtm_cosine() -> Recipe:
    """DTM, ViT-B/16 with the negative cosine as the distance of group means.

    Source: the released program's flag. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_cosine data.train=DIR teacher=FILE
    """
    return variant("objective.loss=negcosine", without=[LOSS], remark=f"loss: negative cosine; {UNVERIFIED}")


@recipe
def vit_b_dtm_l1() -> Recipe:
    """DTM, ViT-B/16 with the absolute error as the distance of group means.

    Source: the released program's flag. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_l1 data.train=DIR teacher=FILE
    """
    return variant("objective.loss=l1", without=[LOSS], remark=f"loss: absolute error; {UNVERIFIED}")


@recipe
def vit_b_dtm_l2() -> Recipe:
    """DTM, ViT-B/16 with the squared error as the distance of group means.

    Source: the released program's flag. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_l2 data.train=DIR teacher=FILE
    """
    return variant("objective.loss=l2", without=[LOSS], remark=f"loss: squared error; {UNVERIFIED}")


@recipe
def vit_b_dtm_normalized_target() -> Recipe:
    """DTM, ViT-B/16 with group means of the targets normalised over their channels.

    Source: the released program's flag. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_normalized_target data.train=DIR teacher=FILE
    """
    return variant(
        "objective.normalize_target=true", remark="targets: normalised; the released program leaves them as they are"
    )


# --- morphing -------------------------------------------------------------------------------------------------------


@recipe
def vit_b_dtm_kmeans() -> Recipe:
    """DTM, ViT-B/16 that groups by k-means of the teacher's tokens instead of bipartite matching.

    Source: the paper's comparison (much slower for a similar gain, as a review quotes it). Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_kmeans data.train=DIR teacher=FILE
    """
    remark = "grouping: 10 iterations of k-means on the unit sphere from random tokens; the paper's are not known"
    return variant("objective.morphing=kmeans", without=[GROUPING], remark=remark)


@recipe
def vit_b_dtm_random_split() -> Recipe:
    """DTM, ViT-B/16 that divides the tokens of a step into two sets at random, not by the parity of their place.

    Source: the paper's Algorithm 1. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_random_split data.train=DIR teacher=FILE
    """
    remark = "grouping: the first patch stays alone, as in the released program; the paper protects none"
    return variant("objective.split=random", without=[GROUPING], remark=remark)


@recipe
def vit_b_dtm_as_written() -> Recipe:
    """DTM, ViT-B/16 with the morphing of the paper's text wherever the released program differs from it.

    Sets divided at random, no patch protected, the drawn number of tokens removed exactly, and each step the plain mean
    of what it merges. Source: the paper's Algorithm 1 and text (docs/methods.md). Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_as_written data.train=DIR teacher=FILE
    """
    sets = ["objective.split=random", "objective.protect_first=false"]
    return variant(*sets, "objective.counts=exact", "objective.weighting=step", without=[GROUPING])


# --- supervision, positions, teacher --------------------------------------------------------------------------------


@recipe
def vit_b_dtm_masked_only() -> Recipe:
    """DTM, ViT-B/16 whose loss counts the masked patches only.

    Source: the paper's frame of masked image modelling; the released program compares all patches. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_masked_only data.train=DIR teacher=FILE
    """
    return variant("objective.loss_on=masked", remark="supervision: masked patches; the released program compares all")


@recipe
def vit_b_dtm_shared_positions() -> Recipe:
    """DTM, ViT-B/16 with one table of relative positions that all blocks share, and none per block.

    Source: the released program's flags; BEiT v2 pre-trains so. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_shared_positions data.train=DIR teacher=FILE
    """
    return variant("model.rel_pos_bias=false", remark="positions: no tables per block; the released program has them")


@recipe
def vit_b_dtm_absolute_positions() -> Recipe:
    """DTM, ViT-B/16 with learned absolute positions and no relative ones.

    Source: the released program's flags. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_absolute_positions data.train=DIR teacher=FILE
    """
    return variant(
        "model.rel_pos_bias=false",
        "model.shared_rel_pos_bias=false",
        "model.abs_pos_emb=true",
        remark="positions: absolute; the released program biases attention by relative ones",
    )


@recipe
def vit_b_dtm_clip_norm() -> Recipe:
    """DTM, ViT-B/16 whose teacher gets images normalised as CLIP was trained, not as the student sees them.

    Source: CLIP's own preprocessing; the released program gives it the student's images. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_clip_norm data.train=DIR teacher=FILE
    """
    return variant(
        "objective.teacher_norm=clip", remark="teacher: images normalised as CLIP was trained; released: as the student"
    )


@recipe
def vit_b_dtm_pixels() -> Recipe:
    """DTM, ViT-B/16 without a teacher: targets and groups come from the normalised pixels of the patches.

    Ours, not the paper's: what morphing gives when nothing has been learned before. Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_dtm_pixels data.train=DIR
    """
    return variant("teacher=pixels", remark="targets: the image's own pixels; the paper's are CLIP's features")


@recipe
def vit_b_mae_dtm() -> Recipe:
    """DTM on an MAE host: ViT-B/16, MAE's decoder predicts CLIP's tokens, compared in groups; 300 epochs.

    Source: the paper adds DTM to MAE with CLIP's features as targets (+0.5 points of ImageNet-1K top-1 after
    fine-tuning, as a review quotes it). Not yet run here.

    Command: deepspeed engine/train.py --recipe vit_b_mae_dtm data.train=DIR teacher=FILE
    """
    host = "host: MAE's mask, decoder, optimiser and augmentation, 300 epochs; what the paper took for it is not known"
    return replace(
        mae(sizes.VIT_B, micro_batch=128, epochs=300),
        objective=MaeDtm(mask_ratio=0.75, decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16),
        departures=(host, GROUPING, LOSS, PRECISION, DRAWS),
    )
