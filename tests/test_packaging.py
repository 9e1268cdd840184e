"""The scripts run from any folder, installed or not, and the wheel holds every package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [
    "engine/train.py",
    *(f"tools/{p.name}" for p in (ROOT / "tools").glob("*.py") if "__main__" in p.read_text()),
]


def run(*command: str, cwd: str = "/") -> subprocess.CompletedProcess:
    plain = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=plain, timeout=300)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself_from_anywhere(script):
    """`--help` from / without the project on the path, with an example, and without importing torch."""
    code = (
        "import runpy, sys; sys.modules['torch'] = None; "
        f"sys.argv = ['x', '--help']; sys.path[0] = {str((ROOT / script).parent)!r}; "
        f"runpy.run_path({str(ROOT / script)!r}, run_name='__main__')"
    )
    done = run(sys.executable, "-I", "-c", code)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and "example" in done.stdout


def test_the_project_is_not_needed_in_the_environment(tmp_path):
    """A copy of the tree that was never installed finds its own modules, not another copy's."""
    for name in ("recipes", "shards", "engine", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "recipes" / "mae.py").write_text(
        (ROOT / "recipes/mae.py").read_text().replace("vit_s_mae", "vit_x_mae")
    )
    done = run(sys.executable, str(tmp_path / "engine/train.py"), "--list")
    assert "vit_x_mae" in done.stdout and "vit_s_mae" not in done.stdout


def test_the_wheel_is_whole(tmp_path):
    """Built from a copy: setuptools leaves a folder `build` behind, and takes what an old one holds."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "tests", "*.egg-info"))
    options = ("--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path))
    done = run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=str(source))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("maskwright-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for package in ("recipes", "shards", "engine", "tools"):
        for path in (ROOT / package).rglob("*.py"):
            assert str(path.relative_to(ROOT)) in inside
