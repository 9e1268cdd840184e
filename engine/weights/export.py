"""Weights outside DeepSpeed: the encoder as a folder that timm loads, and the whole objective back from a checkpoint.

`timm.create_model("local-dir:FOLDER", pretrained=True)` gives the same features. The decoder and the mask token are
left out (timm would take a dict holding `mask_token` for DINOv2).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.checkpoints import manifests
from engine.checkpoints.finite import first_not_finite
from engine.checkpoints.folders import MANIFEST, CheckpointError, complete_checkpoints
from engine.checkpoints.hashing import hash_file
from engine.models.build import build_encoder, timm_model
from engine.objectives.build import build_objective
from engine.objectives.contract import AVERAGE, Objective
from engine.runtime import import_deepspeed
from engine.teacher_sources import require_teacher
from recipes import registry
from recipes.overrides import apply_overrides
from recipes.schema import Recipe

WEIGHTS = "model.safetensors"
ENCODER = "encoder."  # where an objective keeps its encoder
REST = "rest.safetensors"  # weights that are not the encoder's: decoder, heads
OUTSIDE = "outside.safetensors"  # moving averages, exactly as they are
GATHER = 64  # parameters gathered at a time under ZeRO stage 3


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """All weights of a module in fp32 on the CPU, on every rank. Collective under ZeRO stage 3."""
    state = {name: value.detach().float().cpu() for name, value in module.state_dict().items()}
    partitioned = [(n, p) for n, p in module.named_parameters() if hasattr(p, "ds_id")]
    if partitioned:
        zero = import_deepspeed().zero
        for start in range(0, len(partitioned), GATHER):
            names, parameters = zip(*partitioned[start : start + GATHER], strict=True)
            with zero.GatheredParameters(list(parameters)):
                state |= {n: p.detach().float().cpu().clone() for n, p in zip(names, parameters, strict=True)}
    return state


def encoder_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's weights, under timm's names, of an objective's state."""
    return {name.removeprefix(ENCODER): value for name, value in state.items() if name.startswith(ENCODER)}


def plain_encoder(recipe: Recipe, state: dict[str, Tensor], device: torch.device) -> nn.Module:
    """An encoder outside DeepSpeed holding `state`, in evaluation mode."""
    encoder = build_encoder(recipe.model, recipe.data.image_size)
    encoder.load_state_dict(state, strict=True)
    return encoder.to(device).eval().requires_grad_(False)


def write_weights(folder: Path, recipe: Recipe, state: dict[str, Tensor], outside: dict[str, Tensor]) -> None:
    """Write into a checkpoint: `encoder/`, as timm wants it, the rest of an objective's state, and its averages."""
    write_encoder(folder / "encoder", recipe, encoder_part(state))
    rest = {name: value for name, value in state.items() if not name.startswith(ENCODER)}
    for name, tensors in ((REST, rest), (OUTSIDE, outside)):
        if tensors:
            write_tensors(folder / name, tensors)


def write_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Write a safetensors file; OSError where it cannot be written or a tensor is not finite."""
    place = first_not_finite(state)
    if place is not None:
        raise OSError(f"{path.name}: {place} is not finite")
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def read_outside(folder: Path, objective: Objective) -> None:
    """Give an objective the moving averages that a checkpoint holds."""
    objective.load_outside_state(read_tensors(folder, OUTSIDE))


def find_checkpoint(path: Path) -> Path:
    """`path` where it is a checkpoint, or the newest complete one of the run `path`; ValueError else."""
    if (path / MANIFEST).is_file():
        return path
    complete = complete_checkpoints(path / "checkpoints")
    if not complete:
        raise ValueError(f"{path}: no complete checkpoint (RUN/checkpoints/step_*), nor a run that holds one")
    return complete[0]


def read_manifest(checkpoint: Path) -> tuple[dict, Recipe]:
    """A checkpoint's manifest and the recipe that it was trained by; ValueError where the folder is no checkpoint."""
    manifest = read_manifest_file(checkpoint)
    overrides = [f"{path}={value}" for path, value in manifest["recipe"].items()]
    return manifest, apply_overrides(registry.load(manifest["name"]), overrides)


def read_encoder(checkpoint: Path, device: torch.device) -> tuple[nn.Module, Recipe]:
    """The encoder of a checkpoint folder, in evaluation mode, with the recipe it was trained by."""
    _, recipe = read_manifest(checkpoint)
    return plain_encoder(recipe, read_tensors(checkpoint, f"encoder/{WEIGHTS}"), device), recipe


def read_objective(checkpoint: Path, teacher: str | None = None, download: bool = False) -> tuple[Objective, Recipe]:
    """The whole objective of a checkpoint folder in evaluation mode, with the recipe it was trained by.

    A frozen teacher is opened where it was, or at the place `teacher`; ValueError where it is not there, where it is
    to be fetched without `download`, or has other weights than the one that taught.
    """
    manifest, recipe = read_manifest(checkpoint)
    recipe = replace(recipe, teacher=teacher) if teacher else recipe
    objective = build_objective(require_teacher(manifest["name"], recipe, download=download))
    if objective.facts() != manifest.get("objective", {}):
        raise ValueError(f"teacher={recipe.teacher}: has other weights than the teacher of {checkpoint}; name that one")
    if manifest.get("absent"):
        absent = ", ".join(manifest["absent"])
        raise ValueError(f"{checkpoint}: was imported without {absent}; only its encoder's features can be used")
    objective.load_state_dict(read_parts(checkpoint)[0], strict=True)
    read_outside(checkpoint, objective)
    return objective.eval().requires_grad_(False), recipe


def read_parts(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """An objective's weights from a checkpoint folder, and those of its moving average, by the same names.

    A folder that was imported from a part of a checkpoint has no more than that part.
    """
    weights = {ENCODER + name: value for name, value in read_tensors(checkpoint, f"encoder/{WEIGHTS}").items()}
    weights |= read_tensors(checkpoint, REST)
    average = {
        name.removeprefix(f"{AVERAGE}."): value
        for name, value in read_tensors(checkpoint, OUTSIDE).items()
        if name.startswith(f"{AVERAGE}.")
    }
    return weights, average or None


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint, nothing where its manifest promises no such file.

    ValueError where the file is missing or is not the one that was written.
    """
    promised = read_manifest_file(checkpoint)["files"].get(name)
    if promised is None:
        return {}
    path = checkpoint / name
    if not path.is_file() or hash_file(path) != promised:
        state = "is missing" if not path.is_file() else "has not the size or hash of the manifest"
        raise ValueError(f"{path}: {state}; take another checkpoint, or import it again")
    return load_file(path)


def read_manifest_file(checkpoint: Path) -> dict:
    """A checkpoint's manifest; ValueError where the folder is no checkpoint."""
    try:
        return manifests.read_manifest(checkpoint)
    except CheckpointError as error:
        raise ValueError(f"{checkpoint}: no complete checkpoint (RUN/checkpoints/step_*): {error}") from error


def write_encoder(folder: Path, recipe: Recipe, state: dict[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors` for timm into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, state)
    size = recipe.data.image_size
    architecture, arguments = timm_model(recipe.model, size)
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": recipe.model.embed_dim,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "maskwright",
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "mean": list(recipe.data.mean),
            "std": list(recipe.data.std),
            "interpolation": "bicubic",
            "crop_pct": recipe.data.eval_crop,
            "num_classes": 0,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
