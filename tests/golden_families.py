"""Which check a golden file goes through, by the beginning of its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from golden_dtm import check_finetune, check_student, check_teacher
from golden_files import Golden
from golden_lut import check_lut
from golden_mae import check_mae
from golden_masks import check_masks
from golden_morphing import check_morphing, check_schedule
from golden_optim import check_optim

FAMILIES: dict[str, Callable[[Golden], None]] = {
    "dtm_morph": check_morphing,
    "dtm_schedule": check_schedule,
    "dtm_masks": check_masks,
    "dtm_student": check_student,
    "dtm_finetune": check_finetune,
    "dtm_teacher": check_teacher,
    "dtm_optim": check_optim,
    "lut_": check_lut,
    "mae_": check_mae,
}


def golden_paths(folder: Path) -> list[Path]:
    """The files of all families in a folder, and any that only look like one; ValueError where there is none."""
    files = (path for method in ("dtm", "lut", "mae") for path in folder.glob(f"{method}_*"))
    found = sorted(path for path in files if path.suffix in (".npz", ".json"))
    if not found:
        raise ValueError(f"GOLDEN_DIR={folder}: no dtm_*, lut_* or mae_* file of numbers; name a folder of goldens")
    return found


def check(golden: Golden) -> None:
    """Compare all that is in a file; AssertionError where something differs, is not known, or nothing is there."""
    family = next((family for family in FAMILIES if golden.name.startswith(family)), None)
    assert family, f"{golden.name}: none of the families {', '.join(FAMILIES)}"
    FAMILIES[family](golden)
    golden.finish()
