"""The suites of whole steps: both sides compute the same, and ours launches a quarter of the released program's."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recipes.sections.model import Model
from tools.benchmarks import dtm_step, lut_step
from tools.benchmarks.operators import operators
from tools.benchmarks.released import released
from tools.benchmarks.side_by_side import Settings
from tools.benchmarks.steps import OurStep, Size, require_equal

# isort: split
import timm

RELEASED_LUT = 6920  # operators per step of ViT-S (specs/performance.md, 3b)
RELEASED_DTM = 3443  # those of the released DTM, as `tools/benchmark.py dtm_step --reference` counts them
LARGE = Model(embed_dim=64, depth=12, num_heads=2)  # as many layers as ViT-S; widths change no launch


@pytest.mark.parametrize("suite", [lut_step.suite, dtm_step.suite])
def test_a_suite_compares_with_a_textbook_form(suite):
    launches, speed = suite(Settings(rounds=1, scale=0.05))
    assert launches.ours < launches.theirs and "operators" in launches.name
    assert speed.ours > 0 and speed.theirs > 0


def test_what_does_not_compute_the_same_is_not_timed():
    require_equal("x", 0, {"loss": 1.0, "more": 2.0}, {"loss": 1.000001})
    with pytest.raises(RuntimeError, match="x: step 2: loss is 1 here and 1.001 there"):
        require_equal("x", 2, {"loss": 1.0}, {"loss": 1.001})


def launches(step: OurStep) -> int:
    step(0)
    return sum(operators(lambda: step(1)).names.values())


def test_a_step_of_lut_launches_a_quarter():
    size = Size(model=LARGE, image_size=64, images=2, hidden=64)
    batch = SimpleNamespace(views=(torch.randn(2, 3, 64, 64),) * 2, noise=torch.rand(2, 16))
    assert launches(OurStep(lut_step.objective_of(size), batch, lut_step.OPTIM)) <= RELEASED_LUT / 4


def test_a_step_of_dtm_launches_half():
    """Its draws decide how many: this is the mean over a few steps of the same run."""
    size = Size.of(Settings(scale=0.05), **vars(LARGE) | dtm_step.BEIT)
    images = torch.randn(2, 3, 64, 64)
    batch = SimpleNamespace(views=(images,), mask=torch.rand(2, 16) < 0.4, positions=torch.arange(2))
    step = OurStep(dtm_step.objective_of(size), batch, dtm_step.OPTIM)
    step(0)
    counts = [sum(operators(lambda number=number: step(number)).names.values()) for number in range(1, 5)]
    assert sum(counts) / len(counts) <= RELEASED_DTM / 2


# --- released programs are imported from where they are -------------------------------------------------------------


@pytest.fixture
def clones(tmp_path) -> Path:
    """Two programs of our own that look like them: packages of the same names, modules that today's world lacks."""
    for program, value in (("lut", 1), ("dtm", 2)):
        package = tmp_path / program / "models"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "net.py").write_text(
            "import numpy as np\nfrom torch._six import inf\nfrom timm.models.registry import register_model\n"
            f"VALUE, KIND = {value}, np.float\n@register_model\ndef vit_base_patch16_224(): return inf\n"
        )
        (package / "broken.py").write_text("import no_such_module_of_theirs")
    (tmp_path / "dtm" / "bm").mkdir()
    for name in ("__init__", "merge"):
        (tmp_path / "dtm" / "bm" / f"{name}.py").write_text("MERGES = True\n")
    (tmp_path / "dtm" / "models" / "outer.py").write_text("import tome.merge\nfrom net import VALUE\n")
    return tmp_path


def test_programs_are_kept_apart_and_leave_nothing(clones):
    before, path = set(sys.modules), list(sys.path)
    found = {}
    for program in ("lut", "dtm"):
        with released(clones, program) as load:
            found[program] = load("models.net")
    assert (found["lut"].VALUE, found["dtm"].VALUE) == (1, 2) and found["lut"].KIND is float
    assert timm.create_model("vit_base_patch16_224", depth=1) is not None  # timm's own, not theirs
    assert sys.path == path and "float" not in vars(np)
    assert not {name for name in set(sys.modules) - before if name.startswith(("models", "torch._six", "util"))}


def test_modules_that_were_never_shipped_have_stand_ins(clones):
    with released(clones, "dtm") as load:
        assert load("models.outer").tome.merge.MERGES


def test_what_fails_leaves_nothing(clones):
    """A folder that is not there, a module that cannot be imported, a mistake of whoever imports."""
    before, path = dict(sys.modules), list(sys.path)
    for folder, name in ((clones / "nowhere", "models.net"), (clones, "models.broken"), (clones, "models.net")):
        with pytest.raises((FileNotFoundError, RuntimeError, ZeroDivisionError)), released(folder, "lut") as load:
            load(name)
            raise ZeroDivisionError
        assert sys.path == path and "float" not in vars(np)
        assert {name: sys.modules.get(name) for name in before} == before and "models" not in sys.modules


def test_what_cannot_be_imported_is_named(clones):
    with released(clones, "lut") as load, pytest.raises(RuntimeError, match="no_such_module_of_theirs"):
        load("models.broken")
