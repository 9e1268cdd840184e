"""Weights of the released programs, by their own names, into our modules."""

from __future__ import annotations

from torch import Tensor, nn

DECODER_KEYS = {
    "decoder_embed.": "decoder.embed.",
    "decoder_pos_embed": "decoder.pos_embed",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
    "mask_token": "decoder.mask_token",
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
