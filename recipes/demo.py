"""The demo: small enough for two CPU cores, the same code path as ImageNet."""

from dataclasses import replace

from recipes.methods import Dtm, Lut, Mae
from recipes.registry import recipe
from recipes.schema import Data, Evaluation, Model, Optim, Recipe, Run

VIT_TI_DEMO = Model(embed_dim=96, depth=4, num_heads=3, patch_size=8)


@recipe
def vit_ti_mae_demo() -> Recipe:
    """MAE, a 0.5 M parameter ViT on 32 px crops of 18 photographs: a run of `make demo`, a minute on two idle cores.

    Ours, not a paper's: what it shows is that the whole system trains and that features improve.

    Command: make demo
    """
    return Recipe(
        model=VIT_TI_DEMO,
        objective=Mae(decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=4),
        optim=Optim(global_batch=64, micro_batch=32, lr=1.5e-3, warmup_epochs=8, clip_grad=3.0),
        data=Data(image_size=32, scale=(0.3, 1.0), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), eval_crop=1.0),
        precision="fp32",
        evaluation=Evaluation(knn_train_samples=3600, knn_val_samples=900),
        run=Run(epochs=100, steps=1400, log_every=50, save_every=700, eval_every=350),
    )


@recipe
def vit_ti_lut_demo() -> Recipe:
    """LUT on the demo's photographs, the same ViT and decoder as MAE's.

    Ours, not a paper's: the same code as LUT on ImageNet, with small heads and a faster moving average.

    Command: deepspeed engine/train.py --recipe vit_ti_lut_demo data.train=runs/demo/shards/train
    """
    mae = vit_ti_mae_demo()
    jitter = dict(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_prob=0.8)
    return replace(
        mae,
        objective=Lut(**vars(mae.objective), head_hidden=256, momentum=0.99, norm_batch=64),
        optim=replace(mae.optim, micro_batch=64),
        data=replace(mae.data, crop="src", **jitter),
    )


@recipe
def vit_ti_dtm_demo() -> Recipe:
    """DTM on the demo's photographs, a 0.5 M parameter BEiT taught by an encoder that the demo has trained before.

    Ours, not a paper's: the same code as DTM on ImageNet, with `teacher=` the folder of the MAE run.

    Command: deepspeed engine/train.py --recipe vit_ti_dtm_demo data.train=runs/demo/shards/train teacher=runs/demo/mae
    """
    mae = vit_ti_mae_demo()
    return replace(
        mae,
        model=replace(VIT_TI_DEMO, architecture="beit", init_values=0.1),
        objective=Dtm(num_masked=6, min_block=2),
        optim=replace(mae.optim, betas=(0.9, 0.98), min_lr=1e-5, warmup_end="within"),
        run=replace(mae.run, steps=700),
    )
