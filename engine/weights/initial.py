"""Weights to start from: another program's checkpoint, or one of ours.

An objective has parts (encoder, decoder, head, ...). A part is taken whole: one that the source lacks entirely keeps
its fresh weights and one that the objective lacks is left aside, and both are said; one that is there in pieces, or in
other shapes, is refused with the list. Without the encoder nothing is loaded at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoints.folders import MANIFEST
from engine.models.build import build_encoder
from engine.models.positions import sincos_positions
from engine.objectives.contract import AVERAGE, Objective
from engine.weights.export import ENCODER, encoder_part, find_checkpoint, read_parts
from engine.weights.files import State, read_weight_file
from engine.weights.released import is_clip, recognise
from recipes.schema import Recipe

LISTED = 4  # names of each kind that a refusal shows


@dataclass(frozen=True)
class Source:
    """Weights under our names, and where they are from."""

    origin: str  # for people: place, layout, hash
    weights: State
    average: State | None  # of the moving average, by the same names


@dataclass(frozen=True)
class Placement:
    """What became of a source: parts with their number of tensors, and parts that only one side has."""

    loaded: dict[str, int]
    fresh: tuple[str, ...]  # only in the objective: still random
    unused: tuple[str, ...]  # only in the source
    averaged: tuple[str, ...]  # parts of the moving average with weights of their own; else it copies the student

    def __str__(self) -> str:
        loaded = ", ".join(f"{part} ({count} tensors)" for part, count in self.loaded.items())
        notes = [f"loaded {loaded}"]
        notes += [f"not in it: {', '.join(self.fresh)}"] if self.fresh else []
        notes += [f"left aside {', '.join(self.unused)}"] if self.unused else []
        notes += [f"moving average of {', '.join(self.averaged)}"] if self.averaged else []
        return "; ".join(notes)


def open_source(place: str, setting: str = "init") -> Source:
    """The weights at `place`: a file of another program, or a run, a checkpoint or an imported folder of ours.

    ValueError, beginning with `setting`, where there is nothing of the kind or its layout is not known.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        checkpoint = find_checkpoint(path)
        weights, average = read_parts(checkpoint)
        return Source(f"{checkpoint} (ours)", weights, average)
    if not path.is_file():
        raise ValueError(f"{setting}={place}: does not exist; name a file of weights, or a folder with {MANIFEST}")
    file = read_weight_file(path, setting)
    layout = recognise(file.weights)
    if layout is None:
        raise ValueError(f"{setting}={place}: {unknown_reason(file.weights)}")
    average = None if file.average is None else layout.translate(file.average)
    remark = ", positions that are not sine-cosine and stay fixed" if has_other_positions(file.weights) else ""
    origin = f"{place} ({layout.title} layout, sha256 {file.sha256}{remark})"
    return Source(origin, layout.translate(file.weights), average)


def has_other_positions(state: State) -> bool:
    """Whether a ViT's position table is another than MAE's and LUT's fixed one, as of supervised ViTs or DINO."""
    table = state.get("pos_embed")
    if table is None or table.ndim != 3 or "blocks.0.attn.q_bias" in state or table.shape[2] % 4:
        return False
    grid_size = round((table.shape[1] - 1) ** 0.5)
    expected = sincos_positions(table.shape[2], grid_size)
    return expected.shape == table.shape and not torch.allclose(table.float(), expected, atol=1e-3)


def unknown_reason(state: State) -> str:
    if is_clip(state):
        return "holds CLIP's image tower, which is a teacher and no encoder to train; write teacher=FILE"
    return (
        f"not in a layout of MAE, LUT, DTM or BEiT v2 (it begins with {listing(state)}); none of its {len(state)} "
        "tensors would be used"
    )


def place(objective: Objective, source: Source, setting: str = "init") -> Placement:
    """Put a source into an objective; ValueError listing every name that is missing, unknown or of another shape.

    The moving average, where the objective has one, gets its own weights if the source has them, else the encoder's.
    """
    what = f"{setting}={source.origin}"
    wanted, given = by_part(objective.state_dict()), by_part(source.weights)
    shared = fitting_parts(wanted, given, what)
    average = objective.outside[AVERAGE] if AVERAGE in objective.moving else None
    averaged = None if average is None or source.average is None else by_part(source.average)
    if averaged is not None:  # known to fit before anything is changed
        averaged_parts = fitting_parts(by_part(average.state_dict()), averaged, f"{what}: its moving average")
    state = objective.state_dict()
    for part in shared:
        state |= given[part]
    objective.load_state_dict(state, strict=True)
    if average is not None:
        begun = (
            objective.state_dict() if averaged is None else objective.state_dict() | merged(averaged, averaged_parts)
        )
        average.load_state_dict({name: begun[name] for name in average.state_dict()}, strict=True)
    return Placement(
        loaded={part: len(given[part]) for part in shared},
        fresh=tuple(part for part in wanted if part not in given),
        unused=tuple(part for part in given if part not in wanted),
        averaged=() if averaged is None else tuple(averaged_parts),
    )


def fitting_parts(wanted: dict[str, State], given: dict[str, State], what: str) -> list[str]:
    """The parts that both have; ValueError where their names or shapes differ, or the encoder is not among them."""
    shared = [part for part in wanted if part in given]
    if "encoder" not in shared:
        raise ValueError(f"{what}: has no encoder, only {listing(given)}")
    require_fit({k: wanted[k] for k in shared}, {k: given[k] for k in shared}, what)
    return shared


def merged(parts: dict[str, State], names: Iterable[str]) -> State:
    return {name: value for part in names for name, value in parts[part].items()}


def place_encoder(recipe: Recipe, source: Source, setting: str = "init") -> tuple[State, Placement]:
    """The encoder of a source alone, under timm's names; ValueError where it is not the recipe's."""
    given = by_part(source.weights)
    if "encoder" not in given:
        raise ValueError(f"{setting}={source.origin}: has no encoder, only {listing(given)}")
    fresh = build_encoder(recipe.model, recipe.data.image_size).state_dict()
    wanted = {ENCODER + name: value for name, value in fresh.items()}
    require_fit({"encoder": wanted}, {"encoder": given["encoder"]}, f"{setting}={source.origin}")
    unused = tuple(part for part in given if part != "encoder")
    return encoder_part(source.weights), Placement({"encoder": len(wanted)}, (), unused, averaged=())


def begin_from(init: str, objective: Objective) -> str:
    """Give an objective the weights at `init`; one line that says what came from where. ValueError as `place`."""
    source = open_source(init)
    placement = place(objective, source)
    return f"{source.origin}: {placement}{'; what is not in it begins random' if placement.fresh else ''}"


def by_part(state: State) -> dict[str, State]:
    """A state dict by the first component of its names."""
    parts: dict[str, State] = {}
    for name, value in state.items():
        parts.setdefault(name.partition(".")[0], {})[name] = value
    return parts


def require_fit(wanted: dict[str, State], given: dict[str, State], what: str) -> None:
    """ValueError with the lists where parts do not have the same names and shapes."""
    problems = []
    for part, ours in wanted.items():
        theirs = given[part]
        missing, unknown = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
        shapes = [
            f"{name} {tuple(theirs[name].shape)} (here {tuple(ours[name].shape)})"
            for name in ours
            if name in theirs and theirs[name].shape != ours[name].shape
        ]
        problems += [f"{len(missing)} missing: {listing(sorted(missing))}"] if missing else []
        problems += [f"{len(unknown)} unknown: {listing(sorted(unknown))}"] if unknown else []
        problems += [f"{len(shapes)} of other shapes: {listing(shapes)}"] if shapes else []
    if problems:
        raise ValueError(
            f"{what}: does not fit this recipe's model ({'; '.join(problems)}); choose the recipe of its size, "
            "method and data.image_size"
        )


def listing(names: Iterable[str]) -> str:
    names = list(names)
    more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
