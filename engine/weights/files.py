"""Files of weights that others wrote: read without running anything of theirs.

torch's pickles are opened with `weights_only`, so a file can hold tensors and plain containers and nothing that acts;
argparse's Namespace, which the released programs store beside their weights, is such a container. TorchScript is read
as an archive (torchscript_tensors.py), and safetensors hold nothing but tensors.
"""

from __future__ import annotations

import argparse
import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.weights.torchscript import torchscript_tensors

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

    ValueError, beginning with `setting`, where it is no file of weights, holds something that would have to be run, or
    numbers that are none.
    """
    what = f"{setting}={path}"
    content = read_content(path, what)
    average = content.get(AVERAGE)
    weights = next(filter(None, (plain_names(content.get(name), what) for name in CONTAINERS)), None)
    weights = weights or plain_names(content, what)
    if not weights:
        found = ", ".join(map(str, list(content)[:3])) or "nothing"
        raise ValueError(f"{what}: holds no tensors (it begins with {found}); a state dict is needed")
    return WeightFile(path, file_hash(path), weights, plain_names(average, what) or None)


def read_content(path: Path, what: str) -> dict:
    try:
        content = load_file(path) if path.suffix == ".safetensors" else load_pickle(path)
    except (
        Exception
    ) as error:  # torch, zipfile, pickle and safetensors raise a dozen kinds on bytes that are no weights
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, UnpicklingError):
            reason = "it holds more than tensors and plain values, or is no file of torch's; nothing in it was run"
        raise ValueError(f"{what}: not a file of weights ({reason[:200]}); download it again, or convert it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what}: holds a {type(content).__name__}; a state dict is needed")
    return content


def load_pickle(path: Path) -> object:
    """What torch wrote into a file, with TorchScript as its tensors by name."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of TorchScript, which is met below
            return torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if "TorchScript" not in str(error):
            raise
        return torchscript_tensors(path)


def plain_names(state: object, what: str) -> State:
    """The tensors of a state dict, without what data-parallel and other wrappers put before their names."""
    named: State = {}
    for key, value in state.items() if isinstance(state, dict) else ():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            continue
        name = key
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        if name in named:
            raise ValueError(f"{what}: {name} is there twice, as {key} and without its prefix; keep one")
        if value.layout != torch.strided or value.is_meta or value.is_complex():
            raise ValueError(f"{what}: {key} is no plain tensor of real numbers; save it as one")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{what}: {key} holds numbers that are not finite; take an earlier checkpoint")
        named[name] = value
    return named


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
