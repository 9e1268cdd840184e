"""Another number of ranks: DeepSpeed's universal checkpoint, made when it is needed, and mended where it is wrong.

ZeRO divides the optimizer's state (stage 3 the weights too) by the number of ranks, and its files fit no other number.
DeepSpeed's converter cuts them into one folder per parameter, from which any number of ranks can load.

Three things go wrong on that way in DeepSpeed 0.19.8, and are put right here: at stage 3 every parameter group gets the
settings of the first one, all groups share one tensor that counts Adam's steps (it would run ahead as many times as
there are groups), and at every stage buffers and frozen parameters stay as they were initialised.
"""

from __future__ import annotations

import io
import shutil
import threading
import uuid
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from engine.agreement import RankFailure, shared
from engine.checkpoints.folders import TEMPORARY
from engine.checkpoints.manifests import total_bytes
from engine.checkpoints.progress import folder_bytes, watched
from engine.checkpoints.space import require_space
from engine.objectives.contract import Objective
from engine.runtime import Runtime, import_deepspeed
from engine.weights.export import read_parts

POLL = 0.5  # seconds; also how often the waiting ranks hear that rank 0 is alive


@contextmanager
def universal_form(folder: Path, manifest: dict, runtime: Runtime, say: Callable[[str], None] | None) -> Iterator[Path]:
    """A folder beside the checkpoint `folder` with its universal form, gone afterwards. Collective.

    Whoever is killed in between leaves it under a name that the next resume or save sweeps away. RankFailure on all
    ranks where it cannot be written.
    """
    box = folder.with_name(f"{TEMPORARY}universal-{shared(uuid.uuid4().hex[:8], runtime)}")
    try:
        convert_while_all_wait(folder, box, total_bytes(manifest), runtime, say)
        yield box / folder.name
    finally:
        if runtime.is_main:
            shutil.rmtree(box, ignore_errors=True)


def convert_while_all_wait(folder: Path, box: Path, expected: int, runtime: Runtime, say) -> None:
    """Convert on rank 0, in a thread; the others hear from it often, so that no collective runs out of patience."""
    failures: list[Exception] = []
    worker = threading.Thread(target=convert, args=(folder, box, expected, failures), daemon=True)
    with watched(lambda: folder_bytes(box), expected, f"converting {folder.name}", say):
        if runtime.is_main:
            worker.start()
        while shared(worker.is_alive(), runtime):
            worker.join(POLL) if runtime.is_main else None
    problem = shared(str(failures[0]) if failures else None, runtime)
    if problem is not None:
        raise RankFailure(f"--resume: {folder}: could not be converted for {runtime.world_size} ranks ({problem})")


def convert(folder: Path, box: Path, expected: int, failures: list[Exception]) -> None:
    """DeepSpeed's converter, without its chatter. It also writes a pointer beside its output: hence the box."""
    import_deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    settings = Namespace(
        input_folder=str(folder),
        output_folder=str(box / folder.name),
        num_extract_workers=1,  # more would be processes of their own
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # else it wants a mark that it would write there itself
    )
    try:
        require_space(folder.parent, expected)
        (box / folder.name).mkdir(parents=True)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            ds_to_universal.main(settings)
    except Exception as error:  # noqa: BLE001  told to all ranks by the caller
        failures.append(error)


@contextmanager
def repaired(model_engine) -> Iterator[None]:
    """Around a load of the universal form: parameter groups keep their own settings, each counts its own steps."""
    groups = model_engine.optimizer.param_groups
    settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    yield
    for group, own in zip(model_engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    for parameter, state in model_engine.optimizer.optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].to(parameter.device, copy=True)


@torch.no_grad()
def load_what_universal_leaves_out(folder: Path, objective: Objective) -> None:
    """Buffers and frozen parameters, from the exported weights. Collective at ZeRO stage 3."""
    saved, _ = read_parts(folder)
    for name, buffer in objective.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])
    zero = import_deepspeed().zero
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            with zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
                parameter.copy_(saved[name])
