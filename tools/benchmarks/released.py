"""The released programs of LUT and DTM, imported from where the user has them, on today's torch, timm and numpy.

They were written for torch 1.13, timm 0.4.12 and numpy 1.x, and lack modules that they import. What is missing stands
here as ours and is gone again afterwards, with the programs' own modules: both have packages of the same names.
"""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

Load = Callable[[str], ModuleType]

# Packages whose own __init__ asks for what is not needed here: text tokenizers, setuptools.
BARE = {"lut": (), "dtm": ("vqkd_teacher", "vqkd_teacher.clip")}
ALIASES = {"lut": {}, "dtm": {"tome": "bm", "tome.merge": "bm.merge"}}  # what it imports: where it lies
EXTRA_PATHS = {"lut": (), "dtm": ("models",)}  # folders whose modules it imports without the folder's name


@contextmanager
def released(reference: Path, program: str) -> Iterator[Load]:
    """A function that imports a module of `program`, lut or dtm, from its clone `reference`/`program`.

    Build what you need inside: afterwards the objects go on working, but nothing more can be imported. The function
    raises RuntimeError that says what was missing.
    """
    folder = reference.resolve() / program
    before, path = dict(sys.modules), list(sys.path)
    own = {entry.stem for entry in folder.iterdir() if entry.is_dir() or entry.suffix == ".py"}
    own |= {extra.stem for name in EXTRA_PATHS[program] for extra in (folder / name).glob("*.py")}
    own |= {name.partition(".")[0] for name in ALIASES[program]}
    forget(own)
    made = numpy_names()
    sys.path[:0] = [str(folder), *(str(folder / name) for name in EXTRA_PATHS[program])]
    importlib.invalidate_caches()
    try:
        sys.modules.update(stand_ins(program, folder))
        yield lambda name: imported(program, name, folder)
    finally:
        sys.path[:] = path
        forget(own)
        for name in stand_ins(program, folder):
            sys.modules.pop(name, None)
        sys.modules.update({name: module for name, module in before.items() if name not in sys.modules})
        for name in made:
            delattr(sys.modules["numpy"], name)


def imported(program: str, name: str, folder: Path) -> ModuleType:
    """The module `name`; RuntimeError where it, or what it imports, is not there."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for alias, target in ALIASES[program].items():
                sys.modules.setdefault(alias, importlib.import_module(target))
            return importlib.import_module(name)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise RuntimeError(
            f"reference={folder.parent}: {program}'s module {name} cannot be imported: {error}; "
            f"is {folder} a clone of naver-ai/{program}?"
        ) from error


def forget(roots: set[str]) -> None:
    """Take the modules of these packages out of what is imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] in roots]:
        del sys.modules[name]


def stand_ins(program: str, folder: Path) -> dict[str, ModuleType]:
    """Modules that are gone, were never shipped, or would do something outside of the benchmark."""
    import torch

    unchanged = {"register_model": lambda function: function}  # in timm's list its models would replace timm's own
    modules = {"torch._six": {"inf": math.inf}, "timm.models.registry": unchanged}
    modules["util.utils_dino"] = {"trunc_normal_": torch.nn.init.trunc_normal_}
    modules["tensorboardX"] = {"SummaryWriter": None}
    found = {name: module_of(name, values) for name, values in modules.items()}
    for name in BARE[program]:
        found[name] = ModuleType(name)
        found[name].__path__ = [str(folder.joinpath(*name.split(".")))]
    return found


def module_of(name: str, values: dict[str, object]) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(values)
    return module


def numpy_names() -> list[str]:
    """Give numpy its old name for Python's float back where it has lost it; the names that were given."""
    import numpy as np

    if "float" in vars(np):
        return []
    np.float = float
    return ["float"]
