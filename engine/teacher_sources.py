"""Where a frozen teacher comes from: found, or explained, before anything heavy is imported.

Also what can be known of it without that: which patches it sees, from its name, its configuration or its file's header.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from recipes.checks import require
from recipes.schema import Recipe

CLIP = "vit_base_patch16_clip_quickgelu_224.openai"  # timm's name of the teacher that the paper uses
CLIP_HEAD = "_clip_"  # in the names of timm's models that have CLIP's projection
TIMM = "timm:"
PIXELS = "pixels"


class MissingTeacher(ValueError):
    """No teacher where the recipe looks for one; the message is the whole help page."""


@dataclass(frozen=True)
class TeacherSource:
    """A file of CLIP's weights, the folder of an exported encoder, a name for timm's hub, or the image's own pixels."""

    kind: Literal["file", "folder", "timm", "pixels"]
    place: str

    @property
    def is_clip(self) -> bool:
        return self.kind == "file" or (self.kind == "timm" and CLIP_HEAD in self.place)


def find_teacher(teacher: str) -> TeacherSource | None:
    """What `Recipe.teacher` names; None where there is nothing of the kind.

    A folder may be a run's (its newest complete checkpoint is meant), a checkpoint's, or an exported encoder's.
    """
    if teacher == PIXELS:
        return TeacherSource("pixels", "")
    if teacher.startswith(TIMM):
        return TeacherSource("timm", teacher.removeprefix(TIMM))
    path = Path(teacher).expanduser()
    if teacher and path.is_file():
        return TeacherSource("file", str(path))
    checkpoints = sorted(path.glob("checkpoints/step_*/manifest.json"), reverse=True)
    folders = [path, path / "encoder", *(manifest.parent / "encoder" for manifest in checkpoints)]
    for folder in folders if teacher else ():
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return TeacherSource("folder", str(folder))
    return None


def require_teacher(name: str, recipe: Recipe, *, download: bool) -> Recipe:
    """The recipe with its teacher's place made definite: absolute, and of a run the checkpoint that is newest now.

    MissingTeacher with the commands that help, where a recipe needs a teacher and has none; ValueError where the one it
    has cannot teach it. `download` is the user's permission to fetch one from timm's hub.
    """
    if not recipe.objective.has_teacher:
        return recipe
    source = find_teacher(recipe.teacher)
    if source is None:
        raise MissingTeacher(missing_page(name, recipe.teacher, missing_reason(recipe.teacher)))
    require_fitting(source, recipe)
    if source.kind == "timm" and not download:
        reason = "fetching it from timm's hub takes your permission: add --download"
        raise MissingTeacher(missing_page(name, recipe.teacher, reason))
    if source.kind in ("timm", "pixels"):
        return recipe
    return replace(recipe, teacher=str(Path(source.place).resolve()))


# --- whether it can teach -------------------------------------------------------------------------------------------


def require_fitting(source: TeacherSource, recipe: Recipe) -> None:
    """ValueError where the teacher has another grid than the student, or no use for objective.teacher_norm=clip.

    The grid only as far as it can be told without loading anything.
    """
    require(
        recipe.objective.teacher_norm == "student" or source.is_clip,
        f"objective.teacher_norm={recipe.objective.teacher_norm}: teacher={recipe.teacher} is not CLIP and gets images "
        "as it was trained on; set objective.teacher_norm=student",
    )
    if source.kind == "folder":
        arguments = folder_arguments(Path(source.place))
        image_size = arguments.get("img_size", recipe.data.image_size)
        require(
            image_size == recipe.data.image_size,
            f"teacher={recipe.teacher}: takes images of {image_size} pixels where data.image_size="
            f"{recipe.data.image_size}; choose a teacher of that size, or set data.image_size={image_size}",
        )
    patch_size = known_patch_size(source)
    if patch_size is not None:
        require_same_grid(recipe, (recipe.data.image_size // patch_size) ** 2)


def require_same_grid(recipe: Recipe, num_patches: int) -> None:
    """ValueError with both numbers where a teacher that sees `num_patches` has another grid than the student."""
    require(
        num_patches == recipe.num_patches,
        f"teacher={recipe.teacher}: sees {num_patches} patches where the student has {recipe.num_patches} "
        "(data.image_size / model.patch_size, squared); choose a teacher with the same grid",
    )


def known_patch_size(source: TeacherSource) -> int | None:
    """Side of a teacher's patches in pixels, from what stands beside its weights; None where nothing says it."""
    if source.kind == "folder":
        return folder_arguments(Path(source.place)).get("patch_size")
    if source.kind == "timm":
        named = re.search(r"patch(\d+)", source.place)
        return int(named[1]) if named else None
    if source.place.endswith(".safetensors"):
        return header_patch_size(Path(source.place))
    return None


def folder_arguments(folder: Path) -> dict:
    """With which arguments timm makes the model of an exported folder; ValueError where its config.json is broken."""
    try:
        return json.loads((folder / "config.json").read_text()).get("model_args", {})
    except json.JSONDecodeError as error:
        raise ValueError(f"teacher={folder}: config.json is no JSON ({error}); export the encoder again") from error


def header_patch_size(path: Path) -> int | None:
    """Side of the patches of the image tower in a safetensors file; None where its header shows none."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")  # of the JSON that follows: names, shapes, offsets
        if not 0 < length < path.stat().st_size:
            return None
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return None
    tower = any(name.endswith(("class_embedding", "cls_token")) for name in header)  # and no convolutional network
    weights = [header[name]["shape"] for name in header if name.endswith(("conv1.weight", "patch_embed.proj.weight"))]
    return weights[0][-1] if tower and weights else None


# --- what is said without -------------------------------------------------------------------------------------------


def missing_reason(teacher: str) -> str:
    if not teacher:
        return "no teacher is named"
    if Path(teacher).expanduser().is_dir():
        return "this folder holds neither a complete checkpoint nor an exported encoder"
    return "does not exist"


def missing_page(name: str, teacher: str, reason: str) -> str:
    return f"""teacher={teacher}: {reason}.

{name} learns from the patch features of a frozen teacher: CLIP ViT-B/16 of OpenAI in the paper.

  deepspeed engine/train.py --recipe {name} teacher=FILE

    FILE: OpenAI's ViT-B-16.pt, or the same weights as open_clip or timm save them (.pt, .bin, .safetensors); also its
    other ViTs, where the grid of patches is the student's (LAION's weights compute GELU: for them timm:NAME)

  deepspeed engine/train.py --recipe {name} teacher=FOLDER

    FOLDER: of a run of yours, of one of its checkpoints, or an exported encoder; same data.image_size and patches

  deepspeed engine/train.py --recipe {name} --download teacher={TIMM}{CLIP}

    fetches the weights by timm (network; kept in its cache); any other name of timm's will do too

  deepspeed engine/train.py --recipe {name} teacher={PIXELS}

    no network: the targets are the normalised pixels of the image's own patches"""
