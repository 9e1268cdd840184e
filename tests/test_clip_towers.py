"""Files of CLIP's image towers, of any size that OpenAI's layout has: what they compute, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clip_towers import patch_targets, random_tower
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.teacher_sources import require_teacher
from engine.teachers import open_teacher
from engine.weights.released import from_clip
from recipes import registry
from recipes.overrides import apply_overrides
from recipes.schema import Recipe


def demo(*overrides: str) -> Recipe:
    return apply_overrides(registry.load("vit_ti_dtm_demo"), list(overrides))


def prefixed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As OpenAI keeps them: beside a text tower."""
    return {f"visual.{name}": value for name, value in weights.items()} | {"token_embedding.weight": torch.zeros(3)}


@pytest.mark.parametrize("rename", [dict, prefixed, from_clip], ids=["tower", "whole CLIP", "timm's names"])
@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ({}, ()),
        ({"width": 192, "depth": 3, "projection": 40}, ()),
        ({"width": 64, "depth": 1, "projection": None}, ()),
        (
            {"patch_size": 16, "grid": 2},
            ("model.patch_size=16", "objective.max_steps=4", "objective.num_masked=1", "objective.min_block=1"),
        ),
        ({"patch_size": 4, "grid": 8}, ("model.patch_size=4",)),
    ],
)
def test_every_size_is_read_from_the_file(sizes, changes, rename, tmp_path):
    """Width, depth, heads, patches and projection; without one the tokens after the last norm are the targets."""
    weights, images = random_tower(**sizes), torch.randn(2, 3, 32, 32)
    torch.save(rename(weights), tmp_path / "clip.pt")
    recipe = require_teacher("vit_ti_dtm_demo", demo(f"teacher={tmp_path / 'clip.pt'}", *changes), download=False)
    teacher, expected = open_teacher(recipe), patch_targets(weights, images)
    assert (teacher.num_patches, teacher.width) == tuple(expected.shape[1:])
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-4)


def files_of(weights: dict[str, Tensor], folder: Path) -> list[Path]:
    """The same weights in every kind of file; the last is TorchScript, as OpenAI's is."""
    files = [folder / name for name in ("clip.safetensors", "clip.pt", "clip.bin", "script.pt")]
    save_file(weights, files[0])
    torch.save(weights, files[1])
    torch.save({"epoch": 1, "state_dict": weights}, files[2])
    holder = nn.Module()
    for name, value in weights.items():
        *path, last = name.split(".")
        part = holder
        for step in path:
            if not hasattr(part, step):
                part.add_module(step, nn.Module())
            part = getattr(part, step)
        part.register_buffer(last, value)
    torch.jit.save(torch.jit.script(holder), files[3])
    return files


@pytest.mark.filterwarnings("ignore")  # TorchScript is old, but so is OpenAI's file
def test_files_of_every_kind(tmp_path):
    weights = prefixed(random_tower())
    identities = {open_teacher(demo(f"teacher={file}")).identity for file in files_of(weights, tmp_path)}
    assert len(identities) == 1
    half = {name: value.half() for name, value in weights.items()}
    torch.save(half, tmp_path / "half.pt")
    assert open_teacher(demo(f"teacher={tmp_path}/half.pt")).identity not in identities
    (tmp_path / "noise.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="noise.pt: not a file of weights"):
        open_teacher(demo(f"teacher={tmp_path}/noise.pt"))
    (tmp_path / "noise.safetensors").write_bytes(b"\x05" + b"\0" * 7 + b"no weights")
    with pytest.raises(ValueError, match="noise.safetensors: not a file of weights"):
        open_teacher(demo(f"teacher={tmp_path}/noise.safetensors"))


@pytest.mark.parametrize("rename", [prefixed, from_clip], ids=["OpenAI's names", "timm's names"])
def test_another_grid_is_refused_before_a_network_is_built(rename, tmp_path, monkeypatch):
    """From the header of a safetensors file already when the program starts, of others when their shapes are read."""
    monkeypatch.setattr("engine.teachers.clip_network", lambda *_, **__: pytest.fail("a network was built"))
    weights = rename(random_tower(patch_size=16, grid=2))
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "clip.safetensors")
    torch.save(weights, tmp_path / "clip.pt")
    reason = "clip.(pt|safetensors): sees 4 patches where the student has 16"
    with pytest.raises(ValueError, match=reason):
        require_teacher("vit_ti_dtm_demo", demo(f"teacher={tmp_path}/clip.safetensors"), download=False)
    for file in ("clip.safetensors", "clip.pt"):
        with pytest.raises(ValueError, match=reason):
            open_teacher(demo(f"teacher={tmp_path}/{file}"))


def test_what_is_no_tower_of_openais_is_refused(tmp_path):
    """Wider towers have heads of other widths, which no shape shows: guessing would give other features in silence."""
    for width, reason in ((1280, "1280 channels wide; OpenAI's towers have at most 1024"), (96, "96 channels wide")):
        torch.save(random_tower(width=width, depth=1), tmp_path / "wide.pt")
        with pytest.raises(ValueError, match=f"wide.pt: {reason}"):
            open_teacher(demo(f"teacher={tmp_path}/wide.pt"))
    convolutional = {"visual.conv1.weight": torch.zeros(32, 3, 3, 3), "visual.layer1.0.conv1.weight": torch.zeros(1)}
    save_file(convolutional, tmp_path / "rn50.safetensors")
    with pytest.raises(ValueError, match="rn50.safetensors: not an image tower of CLIP's .* begins with"):
        open_teacher(demo(f"teacher={tmp_path}/rn50.safetensors"))
    lacking = random_tower()
    del lacking["ln_pre.weight"]
    torch.save(lacking, tmp_path / "lacking.pt")
    with pytest.raises(ValueError, match="lacking.pt: not an image tower of CLIP's .*norm_pre.weight"):
        open_teacher(demo(f"teacher={tmp_path}/lacking.pt"))
