"""mae_*: MAE with given weights, the fine-tuned ViT, its parameter groups, learning rates, positions and LARS."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from golden_dtm import HEADS, check_gradients, depth_of
from golden_files import FP32_TOL, Golden
from golden_optim import numbers_of
from golden_weights import place_whole
from torch import Tensor

from engine.analyses.attention import attention_maps
from engine.lars import Lars
from engine.masks import RandomMask, gather_tokens, random_mask
from engine.models.classifier import build_classifier
from engine.models.patches import patchify, unpatchify
from engine.models.positions import sincos_positions
from engine.models.transfer import interpolate_positions
from engine.objectives.mae import MaskedAutoencoder
from engine.params import layer_decay_groups, set_learning_rate
from engine.schedules import warmup_cosine
from recipes.methods import Mae
from recipes.schema import Model

State = dict[str, Tensor]

# The numbers of `cfg`, in its order; a file without one has two heads everywhere (README of the goldens).
CFG = ("img", "patch", "chans", "d", "depth", "heads", "dec_d", "dec_depth", "dec_heads", "mlp_ratio", "head_hidden")
CFG += ("depth_head", "depth_pred")
SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
SIZES |= {"medium": (512, 12, 8), "huge": (1280, 32, 16)}  # width, depth, heads (lut.md 1.2)
FP32_ATOL = 1e-7  # tables that are stored in fp64 and were computed through fp32
LR_RTOL = 1e-6
SCALE = 0.65  # of the group in the last column of lr_rows
LARS = {"lr": 0.1, "wd": 0.01}  # README of the goldens


def check_mae(golden: Golden) -> None:
    """Any file of the family, by what is in it."""
    if golden.path.suffix == ".json":
        check_layer_decay(golden)
    elif "s/head.weight" in golden:
        check_classifier(golden)
    elif golden.keys("s/"):
        check_autoencoder(golden)
    else:
        check_tables(golden)


# --- networks by their weights --------------------------------------------------------------------------------------


def released_config(golden: Golden) -> dict[str, int]:
    """`cfg` by name; empty where there is none."""
    numbers = golden.take("cfg").tolist() if "cfg" in golden else []
    assert len(numbers) <= len(CFG), f"{golden.name}: cfg has {len(numbers)} numbers, {len(CFG)} are known"
    return dict(zip(CFG, numbers, strict=False))


def encoder_of(weights: State, cfg: dict[str, Any]) -> Model:
    """The model section of a ViT by its weights; `cfg` says what no shape does, and must not contradict."""
    width, _, _, patch_size = weights["patch_embed.proj.weight"].shape
    found = {"patch": patch_size, "d": width, "depth": depth_of(weights)}
    found["mlp_ratio"] = len(weights["blocks.0.mlp.fc1.bias"]) / width
    for name, value in found.items():
        assert cfg.get(name, value) == value, f"{name}={cfg[name]} in cfg, {value} by the weights"
    return Model(
        embed_dim=width,
        depth=found["depth"],
        num_heads=cfg.get("heads", HEADS),
        patch_size=patch_size,
        mlp_ratio=found["mlp_ratio"],
    )


def decoder_of(weights: State, cfg: dict[str, Any]) -> dict[str, int]:
    """The decoder's settings, likewise."""
    found = {
        "dec_d": len(weights["decoder_embed.weight"]),
        "dec_depth": len({name.split(".")[1] for name in weights if name.startswith("decoder_blocks.")}),
    }
    for name, value in found.items():
        assert cfg.get(name, value) == value, f"{name}={cfg[name]} in cfg, {value} by the weights"
    return {
        "decoder_embed_dim": found["dec_d"],
        "decoder_depth": found["dec_depth"],
        "decoder_num_heads": cfg.get("dec_heads", HEADS),
    }


# --- pre-training ---------------------------------------------------------------------------------------------------


def check_autoencoder(golden: Golden) -> None:
    weights, images, noise = golden.state("s/"), golden.tensor("imgs"), golden.tensor("noise")
    cfg = released_config(golden)
    settings = Mae(
        **decoder_of(weights, cfg),
        mask_ratio=float(golden.take("mask_ratio", 0.75)),
        norm_pix_loss=bool(golden.take("norm_pix", True)),
    )
    objective = MaskedAutoencoder(settings, encoder_of(weights, cfg), images.shape[-1]).double()
    place_whole(objective, weights)
    masking = random_mask(noise, settings.mask_ratio)
    check_masks(golden, masking, "")
    golden.close("latent", objective.encoder(images, masking.ids_keep))
    pred, _ = objective.reconstruct(images, noise)
    check_reconstruction(golden, objective, images, pred, masking.mask, "")
    loss = objective(SimpleNamespace(views=(images,), noise=noise), 0)["loss"]
    golden.close("mae_loss", loss)
    loss.backward()
    check_gradients(golden, "g/", objective, weights)


def check_masks(golden: Golden, mask: RandomMask, view: str) -> None:
    """Of a view, "" where there is one: which patches are kept, in which order, and their way back."""
    if view in ("", "1"):  # the noise is shared, and so is what is made of it
        golden.same("ids_restore", mask.ids_restore)
        golden.same("ids_shuffle", mask.ids_restore.argsort(dim=1))
        golden.same("len_keep", mask.ids_keep.shape[1])
    golden.same(f"ids_keep{view}", mask.ids_keep)
    golden.same(f"mask{view}", mask.mask.float())


def check_reconstruction(
    golden: Golden, objective: MaskedAutoencoder, images: Tensor, pred: Tensor, mask: Tensor, view: str
) -> None:
    golden.close("pred", pred)
    ids = mask.nonzero()[:, 1].unflatten(0, (len(mask), -1))
    golden.close("mae_loss", objective.reconstruction_loss(images, gather_tokens(pred, ids), ids))
    patches = patchify(images, objective.patch_size)
    golden.same(f"patchified{view}", patches)
    assert torch.equal(unpatchify(patches, objective.patch_size), images)
    golden.close(f"unpatchified_pred{view}", unpatchify(pred, objective.patch_size))


# --- fine-tuning ----------------------------------------------------------------------------------------------------


def check_classifier(golden: Golden) -> None:
    weights, images = golden.state("s/"), golden.tensor("imgs")
    cfg = released_config(golden)
    if "attn" in golden:
        cfg["heads"] = golden.take("attn").shape[2]
    pooling = "avg" if "fc_norm.weight" in weights else "token"
    network = build_classifier(
        encoder_of(weights, cfg), images.shape[-1], num_classes=len(weights["head.weight"]), global_pool=pooling
    )
    network.double().eval().load_state_dict(weights, strict=True)
    golden.close("features", network.forward_head(network.forward_features(images), pre_logits=True))
    golden.close("logits", network(images))
    golden.close("attn", attention_maps(network, images))


def check_layer_decay(golden: Golden) -> None:
    """Keys are a model's name, then `global_pool=...` and `decay=...`, `n_params`, or `drop_path_...` alone."""
    for key in golden.keys():
        name, *said = key.split("/")
        facts = dict(fact.split("=") for fact in said if "=" in fact)
        found = re.fullmatch(r"\w*?vit_(\w+?)_patch(\d+)", name)
        if not found:
            continue
        (width, depth, heads), patch_size = SIZES[found[1]], int(found[2])
        drop_path = next(
            (float(fact.removeprefix("drop_path_")) for fact in said if fact.startswith("drop_path_")), 0.0
        )
        model = Model(embed_dim=width, depth=depth, num_heads=heads, patch_size=patch_size, drop_path=drop_path)
        pooling = "token" if facts.get("global_pool") == "False" else "avg"
        with torch.device("meta"):
            network = build_classifier(model, 224, num_classes=1000, global_pool=pooling)
        if said[-1] == "n_params":
            golden.same(key, sum(parameter.numel() for parameter in network.parameters()))
        elif drop_path:
            ours = [getattr(block.drop_path1, "drop_prob", 0.0) for block in network.blocks]
            assert ours == [getattr(block.drop_path2, "drop_prob", 0.0) for block in network.blocks]
            golden.close(key, ours, atol=FP32_ATOL)
        else:
            check_decay_groups(golden, key, network, float(facts["decay"]))


def check_decay_groups(golden: Golden, key: str, network: torch.nn.Module, layer_decay: float) -> None:
    """The same parameters with the same two numbers, whatever the groups are called."""
    groups = golden.take(key)
    weight_decay = max(group["weight_decay"] for group in groups)
    ours = numbers_of(network, layer_decay_groups(network, weight_decay, layer_decay=layer_decay))
    theirs = {name: (group["weight_decay"], group["lr_scale"]) for group in groups for name in group["params"]}
    assert ours.keys() == theirs.keys(), f"{golden.name}: {key}: {ours.keys() ^ theirs.keys()}"
    np.testing.assert_allclose([ours[name] for name in theirs], list(theirs.values()), rtol=1e-12, err_msg=key)
    assert sum(len(group["params"]) for group in groups) == len(theirs)
    golden.count(key)


# --- tables ---------------------------------------------------------------------------------------------------------


def check_tables(golden: Golden) -> None:
    if "lr_rows" in golden:
        golden.close("lr_rows", [learning_rates(row) for row in golden.take("lr_rows").tolist()], LR_RTOL, 1e-16)
    for key in golden.keys("sincos_"):
        if found := re.fullmatch(r"sincos_(\d+)_(\d+)(_rows)?", key):
            table = sincos_positions(int(found[1]), int(found[2]))[0]
            golden.close(key, table[golden.take("sincos_rows")] if found[3] else table, 0, FP32_ATOL)
    if "interp_in" in golden:
        for key in golden.keys("interp_"):
            if found := re.fullmatch(r"interp_(\d+)", key):
                table = torch.from_numpy(golden.take("interp_in"))
                tolerance = {} if table.dtype == torch.float64 else dict(rtol=FP32_TOL, atol=FP32_TOL)
                golden.close(key, interpolate_positions(table, int(found[1])), **tolerance)
    if golden.keys("lars_"):
        check_lars(golden)


def learning_rates(row: list[float]) -> list[float]:
    """Settings of a row of lr_rows, the learning rate, and that of a group with a factor of its own."""
    peak, minimum, warmup, epochs, epoch = row[:5]
    lr = warmup_cosine(epoch, peak=peak, minimum=minimum, warmup=warmup, total=epochs)
    groups: list[dict] = [{}, {"lr_scale": SCALE}]
    set_learning_rate(groups, lr)
    return [*row[:5], *(group["lr"] for group in groups)]


def check_lars(golden: Golden) -> None:
    """Steps with given gradients, of a matrix w and a vector b."""
    numbers = {name: float(golden.take(f"lars_{name}", value)) for name, value in LARS.items()}
    parameters = {name: torch.nn.Parameter(golden.tensor(f"lars_{name}0")) for name in ("w", "b")}
    optimizer = Lars(parameters.values(), numbers["lr"], weight_decay=numbers["wd"])
    for step in range(len(golden.take("lars_gw"))):
        for name, parameter in parameters.items():
            parameter.grad = golden.tensor(f"lars_g{name}")[step]
        optimizer.step()
        for name, parameter in parameters.items():
            golden.close(f"lars_{name}{step + 1}", parameter)
