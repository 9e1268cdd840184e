"""A pre-trained encoder's weights for a classifier: which are taken, and how its positions are carried over."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models import vision_library  # noqa: F401  timm imports only after it
from recipes.checks import require

# isort: split
from timm.layers import resize_rel_pos_bias_table

State = dict[str, Tensor]

TABLES = ("both", "shared", "block")
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
BLOCK_TABLE = "blocks.{}.attn.relative_position_bias_table"
FRESH = ("head.", "fc_norm.")  # what no pre-trained encoder brings


class Transfer(NamedTuple):
    """What became of an encoder's weights, by timm's names."""

    fresh: tuple[str, ...]  # only in the classifier: keep their initial values
    unused: tuple[str, ...]  # only in the encoder


def transfer_encoder(classifier: nn.Module, encoder: State, *, tables: str = "both") -> Transfer:
    """Give `classifier` (classifier.py) the weights of a pre-trained encoder, under timm's names.

    Position tables of another image size are interpolated; those of BEiT are merged by `merged_tables`. ValueError
    where anything but the head and its norm is missing, or a shape is another.
    """
    wanted = classifier.state_dict()
    given = resized(merged_tables(encoder, tables), wanted, classifier.patch_embed.grid_size[0])
    fresh = tuple(name for name in wanted if name not in given)
    missing = [name for name in fresh if not name.startswith(FRESH)]
    require(not missing, f"encoder: {len(missing)} weights are missing ({', '.join(missing[:4])}); give another one")
    for name in wanted.keys() & given.keys():
        ours, theirs = tuple(wanted[name].shape), tuple(given[name].shape)
        require(ours == theirs, f"encoder: {name} is {theirs} and must be {ours}; give one of the classifier's size")
    classifier.load_state_dict({name: given.get(name, wanted[name]) for name in wanted}, strict=True)
    return Transfer(fresh, tuple(name for name in given if name not in wanted))


def merged_tables(encoder: State, tables: str = "both") -> State:
    """A BEiT's relative positions with one table per block and none shared (DTM's fine-tuning).

    `tables` "both": the sum of a block's own and the shared one, of those that there are, which changes no attention;
    "shared": the shared one alone; "block": each block's own alone. What has no relative positions comes back as it is.
    ValueError for another choice, or a table that is not there.
    """
    require(tables in TABLES, f"tables={tables}: one of {', '.join(TABLES)} is needed")
    merged = {name: value for name, value in encoder.items() if name != SHARED_TABLE}
    shared = encoder.get(SHARED_TABLE)
    own = BLOCK_TABLE.format(0) in encoder
    if shared is None and not own:
        return merged
    require(tables != "shared" or shared is not None, "tables=shared: the encoder's blocks share none; choose both")
    require(tables != "block" or own, "tables=block: the encoder's blocks have none of their own; choose both")
    if shared is not None and tables != "block":
        depth = sum(name.endswith(".norm1.weight") for name in encoder)
        for block in range(depth):
            name = BLOCK_TABLE.format(block)
            merged[name] = shared + merged[name] if own and tables == "both" else shared.clone()
    return merged


def resized(encoder: State, wanted: State, grid_size: int) -> State:
    """The encoder's weights with position tables for grid_size x grid_size patches, where it has another number."""
    changed = dict(encoder)
    for name, table in encoder.items():
        if name not in wanted or table.shape == wanted[name].shape:
            continue
        if name == "pos_embed":
            changed[name] = interpolate_positions(table, grid_size)
        elif name.endswith("relative_position_bias_table"):
            # BEiT's rule, places in a geometric progression; timm interpolates between them linearly, not by cubics.
            changed[name] = resize_rel_pos_bias_table(table, (grid_size, grid_size), tuple(wanted[name].shape))
    return changed


def interpolate_positions(positions: Tensor, grid_size: int) -> Tensor:
    """Position table [1, 1 + M, D] of a square grid for another one: [1, 1 + grid_size^2, D] (MAE's fine-tuning).

    Bicubic over the patches, corners not aligned; the class token's row stays. The same grid is left as it is.
    """
    cls, patches = positions[:, :1], positions[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    require(side**2 == patches.shape[1], f"positions: {patches.shape[1]} patches are no square grid; M = side^2")
    if side == grid_size:
        return positions
    table = patches.transpose(1, 2).unflatten(2, (side, side))  # [1, D, side, side]
    table = F.interpolate(table, size=(grid_size, grid_size), mode="bicubic", align_corners=False)
    return torch.cat([cls, table.flatten(2).transpose(1, 2)], dim=1)
