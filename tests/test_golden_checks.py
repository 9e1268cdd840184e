"""The checks of test_golden.py can fail: a file of every family with one number changed, one key added, one taken away.

Always on the samples, whatever GOLDEN_DIR says.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_families import check, golden_paths
from golden_files import SAMPLES, Golden, load

# A sample of every family, and which of its keys suffice: all, or one part among others alike.
FILES = {
    "dtm_morph_negcosine.npz": "",
    "dtm_schedule.npz": "",
    "dtm_masks.npz": "small_",
    "dtm_student_both_rpb.npz": "",
    "dtm_finetune_both.npz": "",
    "dtm_teacher_clip.npz": "",
    "dtm_optim.npz": "",
    "lut_core.npz": "",
    "lut_schedules.npz": "",
    "lut_params.json": "small/",
    "lut_aug.npz": "",
    "lut_analysis.npz": "",
    "mae_core.npz": "",
    "mae_misc.npz": "",
    "mae_vit_gap.npz": "",
    "mae_layer_decay.json": "vit_small",
}
ONE_SIDED = "f32_maxdiff"  # a bound: a larger one is no contradiction


def content_of(name: str) -> dict[str, Any]:
    return {key: value for key, value in load(SAMPLES / name).items() if key.startswith(FILES[name])}


def compared(name: str, content: dict[str, Any]) -> list[str]:
    """One key of every kind that the check compares: numbers in names do not count, nor which weight it is."""
    golden = Golden(SAMPLES / name, content)
    check(golden)
    kinds = {}
    for key in golden.compared:
        if not key.startswith(ONE_SIDED):
            depth = key.count("/") if "decay=" in key or "_0.1" in key else 2 if name.endswith("json") else 1
            kinds.setdefault(re.sub(r"[\d.]+", "#", "/".join(re.split(r"/|(?<=^g)\.", key)[:depth])), key)
    return list(kinds.values())


def changed(key: str, value: Any) -> Any:
    """The same with one entry wrong: the last, which is a result where settings stand in the same row."""
    if isinstance(value, int):
        return value + 1
    if isinstance(value, list):
        *rest, last = value
        wrong = {str: lambda: last + "x", dict: lambda: last | {"lr_scale": 0.5}}.get(type(last), lambda: last + 1)
        return [*rest, wrong()]
    array = np.array(value)
    entry = array.reshape(-1)
    place = len(entry) // 2 if key.startswith("lr_e") else -1  # of such a table the end tells the minimum
    if array.dtype.kind == "U":
        entry[place] = entry[place][::-1]
    elif array.dtype.kind == "f":
        entry[place] += 0.1 * max(1, abs(entry[place]))
    else:
        entry[place] ^= 1
    return array


def test_all_families_are_tried():
    names = {path.name for path in golden_paths(SAMPLES)}
    assert names >= FILES.keys()
    morphs = {name for name in names if name.startswith("dtm_morph_")}
    assert names - FILES.keys() == morphs - FILES.keys() and len(names) == 27


@pytest.mark.parametrize("name", FILES)
def test_a_changed_number_is_found(name: str) -> None:
    content = content_of(name)
    keys = compared(name, content)
    assert keys
    for key in keys:
        with pytest.raises(AssertionError):
            check(Golden(SAMPLES / name, content | {key: changed(key, content[key])}))
            pytest.fail(f"{key} was changed and nobody saw")


@pytest.mark.parametrize("name", FILES)
def test_a_key_that_nobody_knows_is_found(name: str) -> None:
    unknown = {"novelty": 1 if name.endswith("json") else np.ones(3)}
    if name == "lut_params.json":
        unknown = {"small/novelty": 1}
    with pytest.raises(AssertionError, match="nothing is known of (small/)?novelty"):
        check(Golden(SAMPLES / name, content_of(name) | unknown))


def only(*prefixes: str) -> Callable[[str], bool]:
    return lambda key: key.startswith(prefixes)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("mae_core.npz", only("s/", "imgs", "noise", "mask_ratio", "norm_pix")),
        ("dtm_student_both_rpb.npz", lambda key: key in ("cfg", "x", "mask") or key[:2] == "w." and "index" not in key),
        ("dtm_morph_l2.npz", lambda key: key in ("u", "v", "m", "k")),
    ],
)
def test_a_file_of_inputs_alone_is_found(name: str, inputs: Callable[[str], bool]) -> None:
    content = {key: value for key, value in load(SAMPLES / name).items() if inputs(key)}
    with pytest.raises(AssertionError, match="nothing in it was compared"):
        check(Golden(SAMPLES / name, content))


def test_files_of_no_family_and_folders_without_files_are_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no dtm_"):
        golden_paths(tmp_path)
    np.savez(tmp_path / "dtm_other.npz", x=np.ones(1))
    (path,) = golden_paths(tmp_path)
    with pytest.raises(AssertionError, match="dtm_other: none of the families"):
        check(Golden(path))
