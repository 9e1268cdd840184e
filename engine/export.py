"""Weights outside DeepSpeed: the encoder as a folder that timm loads, and the whole objective back from a checkpoint.

`timm.create_model("local-dir:FOLDER", pretrained=True)` gives the same features. The decoder and the mask token are
left out (timm would take a dict holding `mask_token` for DINOv2).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.models.build import build_encoder, timm_model
from engine.objectives.build import build_objective
from engine.objectives.contract import Objective
from engine.runtime import import_deepspeed
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
    write_tensors(folder / REST, {name: value for name, value in state.items() if not name.startswith(ENCODER)})
    write_tensors(folder / OUTSIDE, outside)


def write_tensors(path: Path, state: dict[str, Tensor]) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, path)


def read_outside(folder: Path, objective: Objective) -> None:
    """Give an objective the moving averages that a checkpoint holds."""
    objective.load_outside_state(load_file(folder / OUTSIDE))


def read_recipe(checkpoint: Path) -> Recipe:
    """The recipe that a checkpoint was trained by; ValueError where the folder is no checkpoint."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        overrides = [f"{path}={value}" for path, value in manifest["recipe"].items()]
        return apply_overrides(registry.load(manifest["name"]), overrides)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{checkpoint}: no complete checkpoint (RUN/checkpoints/step_*): {error}") from error


def read_encoder(checkpoint: Path, device: torch.device) -> tuple[nn.Module, Recipe]:
    """The encoder of a checkpoint folder, in evaluation mode, with the recipe it was trained by."""
    recipe = read_recipe(checkpoint)
    return plain_encoder(recipe, load_file(checkpoint / "encoder" / WEIGHTS), device), recipe


def read_objective(checkpoint: Path) -> tuple[Objective, Recipe]:
    """The whole objective of a checkpoint folder in evaluation mode; a frozen teacher is opened where it was."""
    recipe = read_recipe(checkpoint)
    objective = build_objective(recipe)
    encoder = load_file(checkpoint / "encoder" / WEIGHTS)
    rest = load_file(checkpoint / REST)
    objective.load_state_dict({ENCODER + name: value for name, value in encoder.items()} | rest, strict=True)
    read_outside(checkpoint, objective)
    return objective.eval().requires_grad_(False), recipe


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
