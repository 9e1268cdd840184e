"""The demo: small enough for two CPU cores, the same code path as ImageNet (specs of the demo: README, "Demo")."""

from recipes.registry import recipe
from recipes.schema import Data, Evaluation, Mae, Model, Optim, Recipe, Run

VIT_TI_DEMO = Model(embed_dim=96, depth=4, num_heads=3, patch_size=8)


@recipe
def vit_ti_mae_demo() -> Recipe:
    """MAE, a 0.5 M parameter ViT on 32 px crops of 18 photographs: `make demo`, about two minutes on two cores.

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
