"""dtm_student_*, dtm_finetune_*, dtm_teacher_*: networks with given weights and what they make of given images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from golden_files import FP32_TOL, GOLDEN, SAMPLES, Golden
from golden_morphing import loss_settings, replay, schedules
from golden_weights import own_names, place_clip, place_whole
from torch import Tensor, nn

from engine.models.beit import MaskedBeit
from engine.models.classifier import build_classifier
from engine.models.transfer import TABLES, merged_tables, transfer_encoder
from engine.objectives.dtm import DynamicTokenMorphing
from engine.teachers import Teacher, clip_network
from recipes.schema import Model

State = dict[str, Tensor]

FP64_TOL = 1e-11  # of what went through a network; these goldens were computed in fp64
HEADS = 2  # of networks whose files do not say (README of the goldens)
INDEX = "relative_position_index"  # constant buffers of theirs
FIXED = {"qkv_bias": True, "ln_eps": 1e-6}  # of a BEiT; ours can do no other way
POSITIONS = {
    "use_rel_pos_bias": "rel_pos_bias",
    "use_shared_rel_pos_bias": "shared_rel_pos_bias",
    "use_abs_pos_emb": "abs_pos_emb",
}
SHAPES = {"img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "output_dim", "init_values"}
KNOWN = SHAPES | FIXED.keys() | POSITIONS.keys()  # of `cfg`


class Width(nn.Module):
    """All of a teacher that an objective needs before it sees an image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


# --- networks by their weights --------------------------------------------------------------------------------------


def beit_of(weights: State, cfg: dict[str, Any]) -> Model:
    """The model section of a BEiT by its weights; `cfg` says what no shape does, and must not contradict."""
    for name, value in FIXED.items():
        assert cfg.get(name, value) == value, f"{name}={cfg[name]}: ours has {value}"
    unknown = {name: value for name, value in cfg.items() if value and name not in KNOWN}  # switched off it is nothing
    assert not unknown, f"cfg: nothing is known of {unknown}"
    tables = [name for name in weights if name.endswith("relative_position_bias_table")]
    width, _, _, patch_size = weights["patch_embed.proj.weight"].shape
    found = {
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": depth_of(weights),
        "num_heads": weights[tables[0]].shape[1] if tables else cfg.get("num_heads", HEADS),
        "mlp_ratio": len(weights["blocks.0.mlp.fc1.bias"]) / width,
        "use_rel_pos_bias": any(name.startswith("blocks.") for name in tables),
        "use_shared_rel_pos_bias": any(not name.startswith("blocks.") for name in tables),
        "use_abs_pos_emb": "pos_embed" in weights,
    }
    for name, value in found.items():
        assert cfg.get(name, value) == value, f"{name}={cfg[name]} in cfg, {value} by the weights"
    scale = cfg.get("init_values") or 0.1  # where there is one, its value is in the weights
    return Model(
        architecture="beit",
        init_values=scale if "blocks.0.gamma_1" in weights else None,
        **{POSITIONS.get(name, name): value for name, value in found.items()},
    )


def depth_of(names: Iterable[str]) -> int:
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def check_indices(golden: Golden, network: nn.Module) -> None:
    """Which entry of a table belongs to which pair of patches."""
    buffers = dict(network.named_buffers())
    for key in golden.keys("w."):
        if key.endswith(INDEX):
            golden.same(key, buffers[key.removeprefix("w.")])


# --- the student ----------------------------------------------------------------------------------------------------


def check_student(golden: Golden) -> None:
    weights, images = golden.state("w."), golden.tensor("x")
    drawn = schedules(golden) if "m" in golden else []
    settings = loss_settings(golden, num_schedules=max(1, len(drawn)), num_masked=0)
    objective = DynamicTokenMorphing(
        settings,
        beit_of(weights, golden.config()),
        images.shape[-1],
        teacher=Width(len(weights["lm_head.weight"])),
        seed=0,
    ).double()
    replay(objective, drawn)
    place_whole(objective, weights)
    check_indices(golden, objective.encoder)
    mask = golden.tensor("mask").flatten(1)
    tokens = objective.encoder(images, mask, objective.mask_token)
    predictions = objective.predict(images, mask)
    golden.close("features_with_cls", tokens, FP64_TOL, FP64_TOL)
    golden.close("patch_features", tokens[:, 1:], FP64_TOL, FP64_TOL)
    golden.close("head_out", predictions, FP64_TOL, FP64_TOL)
    golden.close("head_out_nomask", objective.predict(images, None), FP64_TOL, FP64_TOL)
    if "v" in golden:
        places = torch.zeros(len(images), dtype=torch.int64)
        loss = objective.compare(predictions, golden.tensor("v"), places, 0, mask)["loss"]
        golden.close("loss", loss, FP64_TOL, FP64_TOL)
        loss.backward()
        check_gradients(golden, "g.", objective, weights)


def check_gradients(golden: Golden, prefix: str, objective: nn.Module, weights: State) -> None:
    """Those that the file has, under the names of its weights."""
    own = {name: parameter.grad for name, parameter in objective.named_parameters() if parameter.grad is not None}
    theirs = {key.removeprefix(prefix): key for key in golden.keys(prefix)}
    for name, key in own_names(weights, theirs).items():
        assert name in own, f"{golden.name}: {key}: {name} has no gradient here"
        golden.close(key, own[name])


# --- fine-tuning ----------------------------------------------------------------------------------------------------


def check_finetune(golden: Golden) -> None:
    """The classifier with its weights, and how it came by them."""
    weights, images = golden.state("w."), golden.tensor("x")
    model = beit_of(weights, golden.config())
    classifier = classifier_of(model, weights, images.shape[-1])
    learned = {name: value for name, value in weights.items() if not name.endswith(INDEX)}
    classifier.load_state_dict(learned, strict=True)
    check_indices(golden, classifier)
    pooled = classifier.forward_head(classifier.forward_features(images), pre_logits=True)
    golden.close("pooled", pooled, FP64_TOL, FP64_TOL)
    golden.close("logits", classifier(images), FP64_TOL, FP64_TOL)
    check_transfer(
        golden, weights, classifier_of(model, weights, images.shape[-1]), MaskedBeit(model, images.shape[-1])
    )


def classifier_of(model: Model, weights: State, image_size: int) -> nn.Module:
    """With fresh weights, in fp64."""
    pooling = "avg" if "fc_norm.weight" in weights else "token"
    num_classes = len(weights["head.weight"])
    return build_classifier(model, image_size, num_classes=num_classes, global_pool=pooling).double().eval()


def check_transfer(golden: Golden, weights: State, classifier: nn.Module, similar: MaskedBeit) -> None:
    """What a pre-trained student gives to the classifier, by value where its file is there, else by names alone."""
    source = student_of(weights)
    if source is None:
        encoder, others = similar.double().state_dict(), {"mask_token", "lm_head.weight", "lm_head.bias"}
        transfer = transfer_encoder(classifier, encoder)
    else:
        names = own_names(source, {name: name for name in source})
        encoder = {ours[8:]: source[theirs] for ours, theirs in names.items() if ours.startswith("encoder.")}
        others = {theirs for ours, theirs in names.items() if not ours.startswith("encoder.")}
        transfer = transfer_encoder(classifier, encoder, tables=tables_of(encoder, weights))
        for name, value in classifier.state_dict().items():
            same = name in transfer.fresh or torch.equal(value, weights[name])
            assert same, f"{golden.name}: {name} came over wrongly"
    indices = {name for name in weights if name.endswith(INDEX)}
    check_names(golden, "missing", set(transfer.fresh) | indices)
    check_names(golden, "unexpected", set(transfer.unused) | others)


def check_names(golden: Golden, key: str, ours: set[str]) -> None:
    """The order of a report does not matter."""
    if key in golden:
        theirs = golden.take(key).tolist()
        assert len(theirs) == len(set(theirs)) and set(theirs) == ours, f"{golden.name}: {key}: {set(theirs) ^ ours}"
        golden.count(key)


def student_of(weights: State) -> State | None:
    """The weights of the student that was fine-tuned, where its file lies beside this one or among the samples."""
    for folder in (GOLDEN, SAMPLES):
        for path in sorted(folder.glob("dtm_student_*.npz")):
            source = Golden(path).state("w.")
            ours, theirs = (state.get("patch_embed.proj.weight") for state in (weights, source))
            if ours is not None and theirs is not None and torch.equal(ours, theirs):
                return source
    return None


def tables_of(encoder: State, weights: State) -> str:
    """By which rule the student's tables became those of the classifier; AssertionError if by none of ours."""
    for tables in TABLES:
        try:
            merged = merged_tables(encoder, tables)
        except ValueError:  # there is no such table
            continue
        if all(torch.equal(weights[n], v) for n, v in merged.items() if n.endswith("table") and n in weights):
            return tables
    raise AssertionError(f"no rule of {TABLES} makes these tables of the student's")


# --- the teacher ----------------------------------------------------------------------------------------------------


def check_teacher(golden: Golden) -> None:
    weights, heads = golden.state("w."), golden.config().get("num_heads", HEADS)
    weights = {name: value.float() for name, value in weights.items()}
    sizes = [key[1:] for key in golden.keys("x") if key == "x" or key[1:].isdigit()]
    for size in sizes:  # "", and the side of other images
        images = golden.tensor(f"x{size}").float()
        network = clip_network(images.shape[-1], **tower_shape(weights, heads)).eval()
        place_clip(network, weights, golden.name)
        tokens = network.forward_features(images)
        golden.close(f"patch_tokens_ln_post{size}", tokens[:, 1:], FP32_TOL, FP32_TOL)
        golden.close(f"cls_embed{size}", network.head(tokens[:, 0]), FP32_TOL, FP32_TOL)
        teacher = Teacher(network, torch.float32)
        assert teacher.num_patches == tokens.shape[1] - 1
        golden.close(f"patch_targets{size}", teacher(images), FP32_TOL, FP32_TOL)


def tower_shape(weights: State, num_heads: int) -> dict[str, int | float]:
    """timm's arguments for a tower under OpenAI's names; without a projection the tokens are the targets."""
    width, _, _, patch_size = weights["conv1.weight"].shape
    hidden = weights["transformer.resblocks.0.mlp.c_fc.bias"]
    return dict(
        patch_size=patch_size,
        embed_dim=width,
        depth=len({name.split(".")[2] for name in weights if name.startswith("transformer.resblocks.")}),
        num_heads=num_heads,
        mlp_ratio=len(hidden) / width,
        num_classes=weights["proj"].shape[1] if "proj" in weights else 0,
    )
