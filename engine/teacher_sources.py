"""Where a frozen teacher comes from: found, or explained, before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from recipes.methods import Dtm
from recipes.schema import Recipe

CLIP = "vit_base_patch16_clip_quickgelu_224.openai"  # timm's name of the teacher that the paper uses
TIMM = "timm:"


class MissingTeacher(ValueError):
    """No teacher where the recipe looks for one; the message is the whole help page."""


@dataclass(frozen=True)
class TeacherSource:
    """A file of CLIP's weights, the folder of an exported encoder, or a name for timm's hub."""

    kind: Literal["file", "folder", "timm"]
    place: str


def find_teacher(teacher: str) -> TeacherSource | None:
    """What `Recipe.teacher` names; None where there is nothing of the kind.

    A folder may be a run's (its newest complete checkpoint is meant), a checkpoint's, or an exported encoder's.
    """
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

    MissingTeacher with the commands that help, where a recipe needs a teacher and has none. `download` is the user's
    permission to fetch one from timm's hub.
    """
    if not isinstance(recipe.objective, Dtm):
        return recipe
    source = find_teacher(recipe.teacher)
    if source is None:
        raise MissingTeacher(missing_page(name, recipe.teacher, missing_reason(recipe.teacher)))
    if source.kind == "timm" and not download:
        reason = "fetching it from timm's hub takes your permission: add --download"
        raise MissingTeacher(missing_page(name, recipe.teacher, reason))
    if source.kind == "timm":
        return recipe
    return replace(recipe, teacher=str(Path(source.place).resolve()))


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

    FILE: OpenAI's ViT-B-16.pt, or the same weights as open_clip or timm save them (.pt, .bin, .safetensors)

  deepspeed engine/train.py --recipe {name} teacher=FOLDER

    FOLDER: of a run of yours, of one of its checkpoints, or an exported encoder; same data.image_size and patches

  deepspeed engine/train.py --recipe {name} --download teacher={TIMM}{CLIP}

    fetches the weights by timm (network; kept in its cache); any other name of timm's will do too"""
