"""Files of weights that others wrote: read without running anything of theirs.

torch's pickles are opened with `weights_only`, so a file can hold tensors and plain containers and nothing that acts;
argparse's Namespace, which the released programs store beside their weights, is such a container. TorchScript (OpenAI's
CLIP) and safetensors hold tensors by construction.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

WEIGHTS, AVERAGE = "model", "model_ema"  # the released programs' names for a network and its moving average
CONTAINERS = (WEIGHTS, "state_dict", "module", "model_state_dict")  # under which files keep a state dict
PREFIXES = ("module.", "_orig_mod.", "base_encoder.", "backbone.", "ema.")  # what wrappers put before every name
CHUNK = 1 << 22  # bytes

State = dict[str, Tensor]


@dataclass(frozen=True)
class WeightFile:
    """A file's tensors by name, those of its moving average where it has one, and its sha256."""

    path: Path
    sha256: str
    weights: State
    average: State | None = None


def read_weight_file(path: Path, setting: str) -> WeightFile:
    """Everything that `path` holds of weights.

    ValueError, beginning with `setting`, where it is no file of weights or holds something that would have to be run.
    """
    content = read_content(path, setting)
    average = content.get(AVERAGE)
    for container in CONTAINERS:
        inner = content.get(container)
        if isinstance(inner, dict):
            content = inner
            break
    weights = plain_names(content)
    if not weights:
        found = ", ".join(map(str, list(content)[:3])) or "nothing"
        raise ValueError(f"{setting}={path}: holds no tensors (it begins with {found}); a state dict is needed")
    return WeightFile(path, file_hash(path), weights, plain_names(average) if isinstance(average, dict) else None)


def read_content(path: Path, setting: str) -> dict:
    try:
        content = load_file(path) if path.suffix == ".safetensors" else load_pickle(path)
    except (UnpicklingError, SafetensorError, RuntimeError, EOFError, LookupError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{setting}={path}: not a file of weights ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{setting}={path}: holds a {type(content).__name__}; a state dict is needed")
    return content


def load_pickle(path: Path) -> object:
    """What torch wrote into a file, with TorchScript as its state dict."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if "TorchScript" not in str(error):
            raise
        return dict(torch.jit.load(path, map_location="cpu").state_dict())


def plain_names(state: dict) -> State:
    """The tensors of a state dict, without what data-parallel and other wrappers put before their names."""
    named = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            for prefix in PREFIXES:
                name = name.removeprefix(prefix)
            named[name] = value
    return named


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
