"""A released checkpoint as a folder of ours, which everything that takes a checkpoint then takes.

It has the exported encoder for timm and, where the file holds the whole objective, the rest of it; a manifest says
which file it came from, by its hash. There is no optimiser's state: training begins from it by `init=FOLDER`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints.folders import FORMAT
from engine.checkpoints.hashing import hash_files
from engine.checkpoints.saving import publish
from engine.objectives.build import build_objective
from engine.runtime import Runtime
from engine.weights.export import write_encoder, write_weights
from engine.weights.initial import Placement, Source, open_source, place, place_encoder
from recipes.overrides import leaves, show
from recipes.schema import Recipe


@dataclass(frozen=True)
class Imported:
    """What was taken from a source, and whether the folder holds a whole objective or the encoder alone."""

    source: Source
    placement: Placement
    whole: bool


def import_weights(file: str, folder: Path, name: str, recipe: Recipe, runtime: Runtime) -> Imported:
    """Write `folder` from a released checkpoint that fits the recipe called `name`.

    A method with a teacher is imported whole only if the recipe names it. ValueError where the folder exists already or
    the file does not fit; nothing is left behind then.
    """
    if folder.exists():
        raise ValueError(f"{folder}: exists already; choose another folder")
    source = open_source(file, "FILE")
    temporary = folder.with_name(f".{folder.name}.importing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        placement, facts, absent = write_parts(temporary, source, recipe)
        manifest = {
            "format": FORMAT,
            "step": 0,
            "name": name,
            "recipe": {path: show(value) for path, value in leaves(recipe).items()},
            "objective": facts,
            "source": source.origin,
            "absent": absent,
            "files": hash_files(temporary, runtime),
        }
        publish(temporary, folder, manifest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Imported(source, placement, not absent)


def write_parts(folder: Path, source: Source, recipe: Recipe) -> tuple[Placement, dict[str, str], list[str]]:
    """Write the tensors; what was taken, the objective's facts, and which of its parts the source did not have."""
    if recipe.objective.has_teacher and not recipe.teacher:
        encoder, placement = place_encoder(recipe, source)
        write_encoder(folder / "encoder", recipe, encoder)
        return placement, {}, ["all but the encoder (no teacher is named)"]
    objective = build_objective(recipe)
    placement = place(objective, source, "FILE")
    state = {
        name: value for name, value in objective.state_dict().items() if name.partition(".")[0] in placement.loaded
    }
    # Of a moving average that the source has not, only a whole objective gets the copy that training would begin with.
    outside = objective.outside_state() if placement.averaged or not placement.fresh else {}
    write_weights(folder, recipe, state, outside)
    return placement, objective.facts(), list(placement.fresh)
