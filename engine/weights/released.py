"""Checkpoints of other programs: which layout a file has, and what its tensors are called here.

Known are the released layouts of MAE, LUT, DTM and BEiT v2, whole or encoder only, and those of CLIP (OpenAI,
open_clip, timm). A name here is a path in an objective: `encoder.` and timm's name, `decoder.`, `head.`, `predictor.`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.weights.files import State

BEIT_CODES = 8192  # words of BEiT v2's codebook, which its head predicts (arXiv 2208.06366, section 3.1)

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


@dataclass(frozen=True)
class Layout:
    """How a program names its weights."""

    title: str
    translate: Callable[[State], State]  # to the names of an objective of ours


def recognise(state: State) -> Layout | None:
    """The layout of a released pre-training checkpoint, by its names; None for any other file, CLIP's included."""
    if "patch_embed.proj.weight" not in state or is_clip(state):
        return None
    if "blocks.0.attn.q_bias" in state:
        return BEIT if is_codebook_beit(state) else DTM
    if any(name.startswith(("head.0.", "predictor.0.")) for name in state):
        return LUT
    return MAE


def from_mae(state: State) -> State:
    """The released MAE: an encoder under timm's names, `decoder_*`, `mask_token`."""
    return {mae_key(key): value for key, value in state.items()}


def mae_key(key: str) -> str:
    for theirs, ours in DECODER_KEYS.items():
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    return f"encoder.{key}"


def from_lut(state: State) -> State:
    """The released LUT: MAE's names, `head.*` (the projector), `predictor.*`."""
    return {key if key.startswith(("head.", "predictor.")) else mae_key(key): value for key, value in state.items()}


def from_dtm(state: State) -> State:
    """The released DTM's student: BEiT's names, `lm_head`, `mask_token`.

    Its indices of relative positions are constants, which timm makes anew.
    """
    return {dtm_key(key): value for key, value in state.items() if not key.endswith("relative_position_index")}


def dtm_key(key: str) -> str:
    if key == "mask_token":
        return key
    return key.replace("lm_head.", "head.") if key.startswith("lm_head.") else f"encoder.{key}"


def from_beit(state: State) -> State:
    """BEiT v2 as pre-trained: DTM's names, but its head predicts words of a codebook; it may have late class layers."""
    parts = {"lm_head.": "codebook_head.", "encoder.cls_pt_layers.": "class_layers."}
    codes = {key: value for key, value in state.items() if key.startswith("lm_head.")}
    rest = from_dtm({key: value for key, value in state.items() if key not in codes})
    renamed = {}
    for key, value in (codes | rest).items():
        theirs = next((theirs for theirs in parts if key.startswith(theirs)), "")
        renamed[parts[theirs] + key[len(theirs) :] if theirs else key] = value
    return renamed


def is_codebook_beit(state: State) -> bool:
    head = state.get("lm_head.weight")
    late = any(key.startswith("cls_pt_layers.") for key in state)
    return late or (head is not None and len(head) == BEIT_CODES)


MAE, LUT = Layout("MAE", from_mae), Layout("LUT", from_lut)
DTM, BEIT = Layout("DTM", from_dtm), Layout("BEiT v2", from_beit)


def is_clip(state: State) -> bool:
    """Whether these are weights of CLIP's image tower, under OpenAI's, open_clip's or timm's names."""
    return "norm_pre.weight" in state or any(key.endswith("class_embedding") for key in state)


def from_clip(state: State) -> State:
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
