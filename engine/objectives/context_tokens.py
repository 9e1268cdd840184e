"""What of a view is compared with the other view: its mean, its class token, every patch, or what was decoded of it.

Each is a set of rows, one per image or one per image and patch, that go through the projector.
"""

from __future__ import annotations

from torch import Tensor

from engine.masks import gather_tokens

# objective.bc_tokens: the kinds of rows whose losses are added up.
ROWS = {
    "pooled": ("pooled",),
    "cls": ("cls",),
    "tokenwise": ("tokenwise",),
    "pooled_tokenwise": ("pooled", "tokenwise"),
    "masked": ("pooled",),  # the teacher's; the student's are decoded
}


def pooled(tokens: Tensor) -> Tensor:
    """Mean of the patch tokens: [B, 1 + K, D] -> [B, D]."""
    return tokens[:, 1:].mean(dim=1)


def rows_of(kind: str, tokens: Tensor, ids: Tensor | None = None) -> Tensor:
    """Rows of tokens [B, 1 + M, D]: pooled, cls [B, D]; tokenwise [B M, D], or [B K, D] of the patches `ids` [B, K]."""
    if kind == "pooled":
        return pooled(tokens)
    if kind == "cls":
        return tokens[:, 0]
    patches = tokens[:, 1:]
    return (patches if ids is None else gather_tokens(patches, ids)).flatten(0, 1)
