"""The tensors of a TorchScript file (OpenAI's CLIP), without running it.

`torch.jit.load` runs what a module does when it is unpacked, which may write to any file. Here the archive is opened as
what it is, a zip with a pickle of nested attributes and one file per storage, and every class in it becomes a bag of
attributes that does nothing.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Attributes:
    """A module of the file: its attributes by name."""

    def __setstate__(self, state: object) -> None:
        self.state = state if isinstance(state, dict) else {}


def torchscript_tensors(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by name; pickle.UnpicklingError where the file holds anything but modules and tensors."""
    with zipfile.ZipFile(path) as archive:
        (root,) = (name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(f"{root}data.pkl") as stream:
            module = InertUnpickler(stream, archive, root).load()
    found: dict[str, Tensor] = {}
    collect(module, "", found)
    return found


def collect(module: object, prefix: str, found: dict[str, Tensor]) -> None:
    for name, value in getattr(module, "state", {}).items():
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, Attributes):
            collect(value, f"{prefix}{name}.", found)


class InertUnpickler(pickle.Unpickler):
    """Knows tensors and plain values; any class of the file is `Attributes`, anything else is refused."""

    def __init__(self, stream, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(stream)
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "__torch__":
            return Attributes
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuild
        if module == "torch.jit._pickle":  # typed lists and tags, for attributes that are no tensors
            return first_argument
        raise pickle.UnpicklingError(f"{module}.{name} is neither a module nor a tensor")

    def persistent_load(self, pid: tuple) -> Tensor:
        _, dtype, key, *_ = pid
        return torch.frombuffer(bytearray(self.archive.read(f"{self.root}data/{key}")), dtype=dtype)


def rebuild(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: object) -> Tensor:
    return storage.as_strided(size, stride, offset).clone()


def first_argument(value: object, *_: object) -> object:
    return value
