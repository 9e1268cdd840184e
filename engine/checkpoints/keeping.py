"""The checkpoints of one run: what happens when writing fails, and when the old ones go.

A file counts as proven when it was read again from the disk, after it was flushed, and had the hash that it had when it
was written. Each checkpoint is proven once per process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from engine.agreement import RankFailure, shared, together_on_main
from engine.checkpoints.folders import BROKEN, REPLACED, TEMPORARY, complete_checkpoints, set_aside, sweep
from engine.checkpoints.progress import folder_bytes, watched
from engine.checkpoints.saving import Saved, save
from engine.checkpoints.space import expected_bytes, require_space
from engine.checkpoints.verifying import damage, manifest_of
from engine.fault_points import reached
from engine.runtime import Runtime
from recipes.schema import Run

TRIES = 2  # of one save
FAILURES = 3  # saves in a row; then even a run that may go on stops


class SaveError(RuntimeError):
    """No checkpoint could be written, and the run must not go on as if there were one. Raised on all ranks alike."""


class Keeper:
    """Saves into `root` and prunes it, by the settings `run`. All methods are collective."""

    def __init__(self, root: Path, run: Run, runtime: Runtime, warn: Callable[[str], None] = print) -> None:
        """`warn` is told, on every rank, of what went wrong and does not end the run."""
        self.root, self.run, self.runtime, self.warn = root, run, runtime, warn
        self.failures = 0  # saves in a row
        self.proven: set[str] = set()  # names of checkpoints

    def save(
        self,
        model_engine,
        *,
        step: int,
        last: bool,
        state: dict[str, Tensor],
        facts: dict,
        write_more: Callable[[Path], None],
        say: Callable[[str], None],
    ) -> Saved | None:
        """Save, prove, prune. None where that failed and the run may go on without (`run.on_failed_save`).

        `state` is the objective's weights, for the size. SaveError where it must not: by that policy, at the `last`
        step, or the third time in a row.
        """
        self.tidy()  # run.keep may be less than it was, and this save needs the room
        try:
            saved = self.try_to_save(model_engine, step, state, facts, write_more, say)
        except RankFailure as error:
            self.failures += 1
            self.tell_failure(step, error, last)
            return None
        self.failures = 0
        self.tidy()
        return saved

    def tell_failure(self, step: int, error: RankFailure, last: bool) -> None:
        """A warning, or SaveError where the run has to stop."""
        complete = together_on_main(lambda: complete_checkpoints(self.root), self.runtime)
        left = f"the newest checkpoint is {complete[0].name}" if complete else "there is no checkpoint yet"
        what = f"checkpoint of step {step} could not be saved ({error}); {left}"
        if last or self.run.on_failed_save == "stop":
            raise SaveError(f"{what}; make room or repair the disk, then add --resume")
        if self.failures >= FAILURES:
            raise SaveError(f"{what}; {self.failures} saves in a row have failed; repair that, then add --resume")
        self.warn(f"{what}; trying again at the next save")

    def try_to_save(self, model_engine, step: int, state, facts: dict, write_more, say) -> Saved:
        """Up to TRIES times; RankFailure on all ranks."""
        together_on_main(lambda: self.root.mkdir(parents=True, exist_ok=True), self.runtime)
        for left in reversed(range(TRIES)):
            if self.runtime.is_main:
                sweep(self.root)
            expected = together_on_main(lambda: expected_bytes(self.root, state), self.runtime)
            together_on_main(lambda expected=expected: require_space(self.root, expected), self.runtime)
            listener = say if self.runtime.is_main else None
            try:
                with watched(self.written, expected, f"step {step}: saving", listener):
                    saved = save(self.root, model_engine, self.runtime, step=step, facts=facts, write_more=write_more)
                self.prove(saved.folder, saved.manifest)
                return saved
            except RankFailure:
                if not left:
                    raise

    def written(self) -> int:
        """Bytes of the checkpoint that is being written."""
        return sum(map(folder_bytes, self.root.glob(f"{TEMPORARY}*")))

    def prove(self, folder: Path, manifest: dict) -> None:
        """RankFailure, and the checkpoint set aside, where the disk does not give back what was written."""
        problem = damage(folder, manifest, self.runtime, opened=False)
        if problem:
            together_on_main(lambda: set_aside(folder, BROKEN), self.runtime)
            raise RankFailure(f"what was written cannot be read again: {problem}")
        self.proven.add(folder.name)

    def tidy(self) -> None:
        """Prune; where that fails, a warning is enough."""
        try:
            self.prune()
        except RankFailure as error:
            self.warn(f"{self.root}: old checkpoints could not be deleted ({error})")

    def prune(self) -> None:
        """Delete complete checkpoints beyond the newest `run.keep`, if all of these are proven."""
        folders = together_on_main(lambda: complete_checkpoints(self.root), self.runtime)
        kept, old = folders[: self.run.keep], folders[self.run.keep :]
        if not old:
            return
        for folder in kept:
            if folder.name not in self.proven and not self.is_proven(folder):
                return
        reached("prune.begin")
        together_on_main(lambda: self.delete(old), self.runtime)

    def delete(self, folders: list[Path]) -> None:
        """One rename each before they go: half a checkpoint never looks like a whole one."""
        for folder in folders:
            set_aside(folder, REPLACED)
            reached("prune.middle")
        sweep(self.root)

    def is_proven(self, folder: Path) -> bool:
        """Whether a checkpoint of before this process has its hashes; a broken one is set aside, and said."""
        manifest, problem = shared(manifest_of(folder) if self.runtime.is_main else None, self.runtime)
        problem = problem or damage(folder, manifest, self.runtime, opened=False)
        if problem is None:
            self.proven.add(folder.name)
            return True
        self.warn(f"{folder}: {problem}; it is set aside as {BROKEN}*")
        together_on_main(lambda: set_aside(folder, BROKEN), self.runtime)
        return False
