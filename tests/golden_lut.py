"""lut_*: one step of LUT with given weights; its momentum and learning rates; the parameters of every size."""

from __future__ import annotations

import copy
import math
import re
from types import SimpleNamespace

import numpy as np
import torch
from golden_analyses import check_analyses
from golden_dtm import check_gradients, depth_of
from golden_files import FP32_TOL, Golden
from golden_mae import check_masks, check_reconstruction, decoder_of, encoder_of, released_config
from golden_views import check_views
from golden_weights import own_names, place_whole
from torch import Tensor

from engine.ema import cosine_momentum, update_average
from engine.masks import disjoint_masks
from engine.objectives.context_tokens import pooled
from engine.objectives.contract import AVERAGE
from engine.objectives.contrast import contextual_loss
from engine.objectives.lut import ContextualAutoencoder
from engine.params import parameter_groups
from engine.schedules import warmup_cosine
from recipes.methods import Lut
from recipes.schema import Model, Optim

State = dict[str, Tensor]

ACT_KEYS = ("head_act_layer", "head_act", "act_layer", "act")
NORM_KEYS = ("head_norm_layer", "head_norm", "norm_layer", "norm")
MOMENTUM = re.compile(r"ema_([\d.]+)_(\d+)x(\d+)")  # start, epochs, steps per epoch
EPOCHS = 1600  # of ema_big
ADAMW = dict(betas=(0.9, 0.95), eps=1e-8)
STEP_ATOL = 1e-7  # of a weight after AdamW, which divides by gradients
TABLE_RTOL = 1e-12


def check_lut(golden: Golden) -> None:
    """Any file of the family, by what is in it."""
    if golden.path.suffix == ".json":
        check_sizes(golden)
    elif "imgs1" in golden:
        check_core(golden)
    elif "img" in golden or "base" in golden:
        check_views(golden)
    elif golden.keys("ema_") or golden.keys("abs_lr_"):
        check_schedules(golden)
    else:
        check_analyses(golden)


# --- one step -------------------------------------------------------------------------------------------------------


def check_core(golden: Golden) -> None:
    """With the activation that the file names; if it names none, with the one that reproduces it."""
    failures = []
    for act in activations(golden):
        trial = Golden(golden.path, golden.content)
        try:
            check_step(trial, act)
        except AssertionError as failure:
            failures.append(failure)
        else:
            golden.untouched, golden.compared = trial.untouched, trial.compared
            return
    raise failures[0]


def activations(golden: Golden) -> list[str]:
    """Candidates: what a key says, else what the name of the file says, else both; without heads there is none."""
    if max(num_linear(golden, part) for part in ("head", "predictor")) < 2:
        return ["relu"]
    said = ["gelu" if "gelu" in str(golden.content[key]).lower() else "relu" for key in ACT_KEYS if key in golden]
    return said[:1] or [act for act in ("gelu", "relu") if act in golden.name][:1] or ["relu", "gelu"]


def num_linear(golden: Golden, part: str) -> int:
    return sum(np.ndim(golden.content[key]) == 2 for key in golden.keys(f"s/{part}."))


def norm_of(weights: State) -> str:
    """What stands between the linear layers of projector and predictor, by the weights that it has."""
    names = [name for name in weights if name.startswith(("head.", "predictor."))]
    if any(name.endswith("running_mean") for name in names):
        return "bn"
    return "ln" if any(weights[name].ndim == 1 for name in names) else "none"


def objective_of(golden: Golden, weights: State, act: str) -> ContextualAutoencoder:
    """Our module in fp64, by the shapes of the weights and the scalars of the file."""
    cfg = released_config(golden)
    depths = {part: num_linear(golden, part) for part in ("head", "predictor")}
    for name, part in (("depth_head", "head"), ("depth_pred", "predictor")):
        assert cfg.get(name, depths[part]) == depths[part], f"{golden.name}: {name}={cfg[name]}, {depths[part]} in fact"
    with_layers = max(depths.values()) > 1
    settings = Lut(
        **decoder_of(weights, cfg),
        mask_ratio=float(golden.take("mask_ratio", 0.75)),
        norm_pix_loss=bool(golden.take("norm_pix", True)),
        w_mae=float(golden.take("w_mae", 1.0)),
        w_bc=float(golden.take("w_bc", 0.25)),
        momentum=min(Lut.momentum, float(golden.take("ema_decay", 1.0))),
        head_depth=depths["head"],
        predictor_depth=depths["predictor"],
        head_hidden=next((len(weights[f"{part}.0.weight"]) for part in depths if depths[part] > 1), 1),
        head_norm=norm_of(weights) if with_layers else "bn",
        head_act=act,
    )
    objective = ContextualAutoencoder(settings, encoder_of(weights, cfg), golden.take("imgs1").shape[-1]).double()
    objective.outside[AVERAGE].double()
    return objective


def check_step(golden: Golden, act: str) -> None:
    golden.leave(*ACT_KEYS, *NORM_KEYS)  # the weights say the second
    weights, average = golden.state("s/"), golden.state("t/")
    objective = objective_of(golden, weights, act)
    place_whole(objective, weights, average or None)
    views, noise = (golden.tensor("imgs1"), golden.tensor("imgs2")), golden.tensor("noise")
    check_forward(golden, copy.deepcopy(objective), views, noise)
    check_single_precision(golden, copy.deepcopy(objective).float(), views, noise)
    start = copy.deepcopy(objective)
    metrics = objective(SimpleNamespace(views=views, noise=noise), 0)
    check_losses(golden, objective, metrics, weights)
    check_update(golden, objective, weights)
    check_average(golden, objective, start, average)


def check_forward(
    golden: Golden, objective: ContextualAutoencoder, views: tuple[Tensor, Tensor], noise: Tensor
) -> None:
    """Masks, tokens and projections, view by view, of the student and of the teacher."""
    masks = disjoint_masks(noise, objective.settings.mask_ratio)
    check_masks(golden, masks[0], "1")
    check_masks(golden, masks[1], "2")
    latents = objective.encode(views, [mask.ids_keep for mask in masks])
    for number, (images, latent) in enumerate(zip(views, latents, strict=True), 1):
        golden.close(f"latent{number}", latent)
        golden.close(f"pooled{number}", pooled(latent))
        golden.close(f"t_latent{number}", objective.outside[AVERAGE]["encoder"](images))
    golden.close("t_embed_view1_full", objective.encoder.patch_embed(views[0]))  # the student's, in spite of its name
    pred = objective.decoder(latents[0], masks[0].ids_restore)
    check_reconstruction(golden, objective, views[0], pred, masks[0].mask, "1")
    predictions, _ = objective.predictions(*views, noise)
    targets = objective.targets(*views, noise)
    golden.close("student_q", torch.cat(predictions))
    golden.close("teacher_q", torch.cat(targets))
    pairs = {"bc_view2_vs_t1": (predictions[1], targets[0]), "bc_view1_vs_t2": (predictions[0], targets[1])}
    for key, (ours, theirs) in pairs.items():
        rows = zip(ours.split(1), theirs.split(1), strict=True)
        golden.close(key, torch.stack([contextual_loss(*row) for row in rows]))


def check_single_precision(
    golden: Golden, objective: ContextualAutoencoder, views: tuple[Tensor, Tensor], noise: Tensor
) -> None:
    """In fp32 we are as far from fp64 as the released program is."""
    objective.outside[AVERAGE].float()
    views = tuple(images.float() for images in views)
    predictions, mae = objective.predictions(*views, noise)
    golden.close("f32_mae_loss", mae, FP32_TOL, FP32_TOL)
    found = {"q": predictions, "tq": objective.targets(*views, noise)}
    for name, double in (("q", "student_q"), ("tq", "teacher_q")):
        if f"f32_maxdiff_{name}" in golden and double in golden:
            difference = np.abs(torch.cat(tuple(found[name])).detach().numpy() - golden.take(double)).max()
            assert difference <= max(FP32_TOL, 10 * golden.take(f"f32_maxdiff_{name}")), (name, difference)
            golden.count(f"f32_maxdiff_{name}")


def check_losses(golden: Golden, objective: ContextualAutoencoder, metrics: dict[str, Tensor], weights: State) -> None:
    """Losses, what the forward pass made of batch norm's statistics, and gradients: of each loss and of their sum."""
    golden.close("bc_loss", metrics["bc"])
    golden.close("total_loss", metrics["loss"])
    golden.close("mae_loss", metrics["mae"])
    state, prefix = objective.state_dict(), "s_bn_after_fwd/"
    for name, key in own_names(weights, {key.removeprefix(prefix): key for key in golden.keys(prefix)}).items():
        golden.close(key, state[name])
    trained = {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}
    if "grad_names" in golden:
        theirs = golden.take("grad_names").tolist()
        ours = list(own_names(weights, {name: name for name in theirs}))
        assert set(ours) == trained.keys(), f"{golden.name}: grad_names: {set(ours) ^ trained.keys()}"
        golden.same("grad_names", theirs)
        for key, loss in (("gradnorm_mae", metrics["mae"]), ("gradnorm_bc", metrics["bc"])):
            golden.close(key, gradient_norms(loss, [trained[name] for name in ours]))
    metrics["loss"].backward()
    check_gradients(golden, "g/", objective, weights)
    gradients = [parameter.grad for parameter in trained.values() if parameter.grad is not None]
    golden.close("grad_norm_total", torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])))


def gradient_norms(loss: Tensor, parameters: list[Tensor]) -> list[float]:
    """0 for what the loss does not depend on."""
    if not loss.requires_grad:
        return [0.0] * len(parameters)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return [0.0 if gradient is None else gradient.norm().item() for gradient in gradients]


def check_update(golden: Golden, objective: ContextualAutoencoder, weights: State) -> None:
    """One AdamW step with our parameter groups."""
    lr = float(golden.take("adamw_lr", 1e-3))
    torch.optim.AdamW(parameter_groups(objective, 0.05, objective.no_decay), lr=lr, **ADAMW).step()
    state, prefix = objective.state_dict(), "s_after/"
    for name, key in own_names(weights, {key.removeprefix(prefix): key for key in golden.keys(prefix)}).items():
        golden.close(key, state[name], atol=STEP_ATOL)


def check_average(
    golden: Golden, objective: ContextualAutoencoder, start: ContextualAutoencoder, average: State
) -> None:
    """The moving average after the step. The released one keeps decoder and predictor too, though they never run."""
    golden.leave("ema_it")  # the decay says it
    if "ema_decay" not in golden or not average:
        return
    decay, momentum = float(golden.take("ema_decay")), objective.settings.momentum
    progress = math.acos(2 * (decay - 1) / (momentum - 1) - 1) / math.pi if momentum < 1 else 0.0
    objective.after_step(progress, 1)
    place_whole(start, average, average)  # all of the released average
    update_average(objective, start, decay)
    held, whole, prefix = objective.outside_state(), start.state_dict(), "t_after/"
    for name, key in own_names(average, {key.removeprefix(prefix): key for key in golden.keys(prefix)}).items():
        golden.close(key, whole[name], atol=STEP_ATOL)
        if f"{AVERAGE}.{name}" in held:
            golden.close(key, held[f"{AVERAGE}.{name}"], atol=STEP_ATOL)


# --- tables ---------------------------------------------------------------------------------------------------------


def check_schedules(golden: Golden) -> None:
    for key in golden.keys("ema_"):
        if found := MOMENTUM.fullmatch(key):
            start, total = float(found[1]), int(found[2]) * int(found[3])
            golden.close(key, [cosine_momentum(start, step / total) for step in range(total)], TABLE_RTOL, 0)
    if "ema_big_val" in golden:
        total = EPOCHS * int(golden.take("ema_big_niter"))
        ours = [cosine_momentum(Lut.momentum, int(index) / total) for index in golden.take("ema_big_idx")]
        golden.close("ema_big_val", ours, TABLE_RTOL, 0)
    if "ema_warmup" in golden:
        golden.close("ema_warmup", warmed_up_momentum(golden.take("ema_warmup")), TABLE_RTOL, 0)
    for key, factor in (("abs_lr_pretrain", 1.0), ("abs_lr_finetune", 0.5)):  # sqrt(batch) / 4, and / 8
        if key in golden:
            batches = golden.take(key)[:, 0].astype(int)
            blr = golden.take(key)[0, 2] * 256 / batches[0]
            rates = [[rate(size, blr * factor, "sqrt"), rate(size, blr, "linear")] for size in batches.tolist()]
            golden.close(key, np.column_stack([batches, rates]), TABLE_RTOL, 0)


def rate(global_batch: int, blr: float, rule: str) -> float:
    return Optim(global_batch=global_batch, micro_batch=1, blr=blr, lr_rule=rule).peak_lr


def warmed_up_momentum(table: np.ndarray) -> list[float]:
    """The released program's table with a linear beginning that its recipes do not use; its length is read off."""
    steps = 1 + next(step for step in range(1, len(table)) if table[step] == table[step - 1])
    warmup, peak = steps - 1, table[steps - 1]
    ramp = dict(peak=peak - table[0], minimum=0.0, warmup=warmup, total=warmup, peak_within=True)
    rising = [table[0] + warmup_cosine(step, **ramp) for step in range(warmup)]
    left = len(table) - warmup
    return rising + [cosine_momentum(peak, step / left) for step in range(left)]


# --- sizes ----------------------------------------------------------------------------------------------------------


def check_sizes(golden: Golden) -> None:
    for size in dict.fromkeys(key.partition("/")[0] for key in golden.keys()):
        prefix = f"{size}/shapes/"
        shapes = {key.removeprefix(prefix): torch.empty(golden.take(key), device="meta") for key in golden.keys(prefix)}
        decay, no_decay = (golden.take(f"{size}/{name}") for name in ("decay", "no_decay"))
        objective = of_size(shapes, [*decay, *no_decay])
        for part in ("encoder", "decoder", "head", "predictor"):
            golden.same(f"{size}/{part}", sum(p.numel() for p in getattr(objective, part).parameters()))
        state = objective.state_dict()
        for name, key in own_names(shapes, {key.removeprefix(prefix): key for key in golden.keys(prefix)}).items():
            golden.same(key, tuple(state[name].shape))
        names = {id(parameter): name for name, parameter in objective.named_parameters()}
        for group in parameter_groups(objective, 0.05, objective.no_decay):
            key = f"{size}/{group['name']}"
            theirs = own_names(shapes, {name: name for name in golden.take(key)})
            ours = [names[id(parameter)] for parameter in group["params"]]
            assert set(ours) == theirs.keys() and len(ours) == len(golden.take(key)), f"{golden.name}: {key}"
            golden.count(key)


def of_size(shapes: State, names: list[str]) -> ContextualAutoencoder:
    """On the meta device. Attention heads have 64 channels, the decoder has 16 of them (lut.md 1.2)."""
    width, _, _, patch_size = shapes["patch_embed.proj.weight"].shape
    side = math.isqrt(shapes["pos_embed"].shape[1] - 1) * patch_size
    model = Model(embed_dim=width, depth=depth_of(names), num_heads=width // 64, patch_size=patch_size)
    settings = Lut(
        decoder_embed_dim=shapes["decoder_embed.weight"].shape[0],
        decoder_depth=len({name.split(".")[1] for name in names if name.startswith("decoder_blocks.")}),
        head_hidden=shapes["head.0.weight"].shape[0],
    )
    with torch.device("meta"):
        return ContextualAutoencoder(settings, model, side)
