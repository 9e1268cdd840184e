"""Make `.venv` with everything the project needs, once, with one line per step: `make setup`.

Standard library only: it runs before anything is installed. torch comes first and pinned (an unpinned torch brings
gigabytes of CUDA to a machine without a GPU), DeepSpeed after it.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKER = "maskwright-ready"  # in the environment: what was installed from


def steps(python: Path, extras: str) -> list[tuple[str, list[str]]]:
    """Title and command of every step."""
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-c", str(ROOT / "constraints.txt")]
    return [
        ("pip and setuptools", [*pip, "-U", "pip", "setuptools>=77", "wheel"]),
        ("torch", [*pip, "torch", "numpy"]),
        ("DALI, timm, webdataset, rich and the others", [*pip, *requirements(python, extras, without="deepspeed")]),
        ("DeepSpeed", [*pip, "--no-build-isolation", "deepspeed"]),
        ("maskwright itself", [*pip, "--no-build-isolation", "--no-deps", "-e", str(ROOT)]),
    ]


def requirements(python: Path, extras: str, *, without: str) -> list[str]:
    """The project's dependencies and the chosen extras, as pyproject.toml lists them."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [need for extra in extras.split(",") if extra for need in project["optional-dependencies"][extra]]
    return [need for need in [*project["dependencies"], *optional] if not need.startswith(without)]


def run_step(number: int, count: int, title: str, command: list[str]) -> None:
    """Run one command behind a moving line; its output is shown only if it fails."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        for wheel in itertools.cycle("|/-\\"):
            line = f"[{number}/{count}] {title} {time.monotonic() - began:4.0f} s"
            if process.poll() is not None:
                break
            if sys.stdout.isatty():
                print(f"\r{line} {wheel}", end="", flush=True)
            time.sleep(0.2)
        print(f"\r{line}  " if sys.stdout.isatty() else line, flush=True)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{log.read()}\n{title} could not be installed: {' '.join(command)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="example: python3 tools/install.py .venv --extras demo,tests"
    )
    parser.add_argument("folder", nargs="?", default=".venv", help="virtual environment to make (default: .venv)")
    parser.add_argument("--extras", default="demo,tests", help="extras of pyproject.toml, separated by commas")
    args = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036  this runs on whatever `python3` is
        sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make setup PYTHON=python3.11")
    folder = Path(args.folder).resolve()
    wanted = f"{args.extras}\n{(ROOT / 'pyproject.toml').read_text()}{(ROOT / 'constraints.txt').read_text()}"
    marker = folder / MARKER
    if marker.exists() and marker.read_text() == wanted:
        return
    print(f"Installing into {folder} (once; a few minutes, depending on the network)")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    plan = steps(python, args.extras)
    for number, (title, command) in enumerate(plan, start=1):
        run_step(number, len(plan), title, command)
    marker.write_text(wanted)


if __name__ == "__main__":
    main()
