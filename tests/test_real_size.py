"""ViT-B at 224 px on real JPEGs: six steps through the launcher, killed after three, resumed, bitwise the same.

The recipes differ from the released ones in batch, steps and places only.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from conftest import make_shards
from PIL import Image
from runs import TIMEOUT, TRAIN, Finished, environment, kill_when, launch, read_lines
from safetensors.torch import save_file

from recipes import registry
from recipes.overrides import apply_overrides, difference

pytestmark = pytest.mark.long

SMALLER = ("optim.global_batch=4", "optim.micro_batch=2", "run.steps=6", "run.log_every=1", "run.save_every=3")
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "ihc.png", "hubble_deep_field.jpg")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Shards of twelve colour JPEGs of 300 to 500 px, cut from photographs inside scikit-image."""
    skimage = pytest.importorskip("skimage")
    root = tmp_path_factory.mktemp("photographs")
    for number, name in enumerate(PHOTOGRAPHS):
        image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        folder = root / "images" / f"class_{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        for part in range(2):
            left = part * (image.width - image.width * 3 // 4)
            piece = image.crop((left, 0, left + image.width * 3 // 4, image.height))
            piece.thumbnail((500, 500), Image.Resampling.BICUBIC)
            piece.save(folder / f"{Path(name).stem}_{part}.jpg", quality=92)
    return make_shards(root / "images", root / "train", samples_per_shard=5)


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory) -> Path:
    """Weights with the names and sizes of OpenAI's CLIP ViT-B/16, random: nothing can be downloaded here."""
    from engine.teachers import clip_network

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "clip.safetensors"
    save_file({name: value.contiguous() for name, value in clip_network(224).state_dict().items()}, path)
    return path


@pytest.mark.parametrize("name", ["vit_b_lut", "vit_b_dtm"])
def test_vit_b_is_killed_and_resumed_bitwise(name, photographs, tmp_path, request):
    places = [f"data.train={photographs}"]
    if name == "vit_b_dtm":
        places.append(f"teacher={request.getfixturevalue('clip_file')}")
    recipe = registry.load(name)
    changed = difference(recipe, apply_overrides(recipe, [*SMALLER, *places]))
    assert {path for path in changed} <= {field.partition("=")[0] for field in (*SMALLER, *places)}

    whole = run(name, tmp_path / "whole", *places)
    broken = tmp_path / "broken"
    command = start(name, broken, *places)
    kill_when(lambda: (broken / "checkpoints/step_00000003/manifest.json").exists(), command, broken)
    assert [line["step"] for line in read_lines(broken / "metrics.jsonl")][:3] == [1, 2, 3]
    resumed = run(name, broken, *places, "--resume")
    assert "resume      from step 3" in resumed.output
    assert len(whole.losses) == 6 and resumed.losses == whole.losses
    print(name, next(line for line in whole.output.splitlines() if line.startswith("memory")))


def start(name: str, folder: Path, *arguments: str) -> list[str]:
    return launch(TRAIN, "--recipe", name, *SMALLER, f"run.out={folder}", *arguments, launcher="deepspeed")


def run(name: str, folder: Path, *arguments: str) -> Finished:
    command = start(name, folder, *arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment(folder.parent))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Finished(done.returncode, done.stdout + done.stderr, folder)
