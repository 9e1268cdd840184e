"""Weights of the released programs, by their own names, into our modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DECODER_KEYS = {
    "decoder_embed.": "decoder.embed.",
    "decoder_pos_embed": "decoder.pos_embed",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
    "mask_token": "decoder.mask_token",
}

CLIP_KEYS = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.": "patch_embed.proj.",
    "ln_pre.": "norm_pre.",
    "ln_post.": "norm.",
    "transformer.resblocks.": "blocks.",
}
CLIP_BLOCK_KEYS = {
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".attn.in_proj_": ".attn.qkv.",
    ".attn.out_proj.": ".attn.proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def from_mae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the released MAE (encoder under timm's names, `decoder_*`, `mask_token`) under our names."""
    return {mae_key(key): value for key, value in state.items()}


def mae_key(key: str) -> str:
    for theirs, ours in DECODER_KEYS.items():
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    return f"encoder.{key}"


def load_mae(objective: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a released MAE checkpoint's `model` dict; RuntimeError names every missing or unexpected key."""
    objective.load_state_dict(from_mae(state), strict=True)


def from_lut(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the released LUT (MAE's names, `head.*`, `predictor.*`) under our names."""
    return {key if key.startswith(("head.", "predictor.")) else mae_key(key): value for key, value in state.items()}


def load_lut(objective: nn.Module, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
    """Load a released LUT checkpoint's `model` and `model_ema` dicts.

    Of the teacher, what it runs (encoder and projector) is taken. RuntimeError names every missing or unexpected key.
    """
    objective.load_state_dict(from_lut(student), strict=True)
    average = {f"average.{key}": value for key, value in from_lut(teacher).items()}
    wanted = objective.outside_state().keys()
    objective.load_outside_state({key: value for key, value in average.items() if key in wanted})


def from_dtm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the released DTM's student (BEiT's names, `lm_head`, `mask_token`) under our names.

    Its tables of relative positions are constants, which timm makes anew.
    """
    return {dtm_key(key): value for key, value in state.items() if not key.endswith("relative_position_index")}


def dtm_key(key: str) -> str:
    if key == "mask_token":
        return key
    return key.replace("lm_head.", "head.") if key.startswith("lm_head.") else f"encoder.{key}"


def load_dtm(objective: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a released DTM checkpoint's `model` dict; RuntimeError names every missing or unexpected key."""
    objective.load_state_dict(from_dtm(state), strict=True)


def from_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's image tower as timm names it, the visual projection as `head`.

    `state` may have OpenAI's names (open_clip's are the same), under `visual.` beside a text tower or alone; what has
    timm's names already is returned as it is, with the projection's missing bias.
    """
    if any(key.startswith("visual.") for key in state):
        state = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    weights = {clip_key(key): value for key, value in state.items() if key != "proj"}
    if "proj" in state:
        weights["head.weight"] = state["proj"].T
    if "class_embedding" in state:
        weights["cls_token"] = weights["cls_token"].view(1, 1, -1)
        weights["pos_embed"] = weights["pos_embed"].unsqueeze(0)
    if "head.weight" in weights:
        weights.setdefault("head.bias", torch.zeros(len(weights["head.weight"])))
    return weights


def clip_key(key: str) -> str:
    for theirs, ours in CLIP_KEYS.items():
        if key.startswith(theirs):
            key = ours + key[len(theirs) :]
    for theirs, ours in CLIP_BLOCK_KEYS.items():
        key = key.replace(theirs, ours)
    return key
