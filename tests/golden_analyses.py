"""lut_analysis*: how far attention reaches, how many directions features use, which patches speak for a class."""

from __future__ import annotations

import numpy as np
import torch
from golden_files import GOLDEN, SAMPLES, Golden
from torch import Tensor

from engine.analyses.attention import average_attention_distance, patch_distances
from engine.analyses.gradcam import class_activation_map, min_max
from engine.analyses.spectrum import covariance_spectrum, effective_rank, log_spectrum

RULES = {"aad_renorm": True, "aad_raw": False}
SPECTRUM_ATOL = 1e-8  # the smallest of them are differences of large numbers


def check_analyses(golden: Golden) -> None:
    if "dist_px" in golden or golden.keys("aad_"):
        check_distances(golden)
    if "feat" in golden:
        spectrum = covariance_spectrum(golden.tensor("feat"))
        golden.close("cov_sv", spectrum, atol=SPECTRUM_ATOL)
        golden.close("log_sv", log_spectrum(spectrum), atol=SPECTRUM_ATOL)
        golden.close("effective_rank", effective_rank(spectrum), atol=SPECTRUM_ATOL)
    if "cam_act" in golden:
        cam = class_activation_map(golden.tensor("cam_act"), golden.tensor("cam_grad"))
        golden.close("cam", cam)
        golden.close("cam_norm", min_max(cam))


def check_distances(golden: Golden) -> None:
    """Attention is in the file, or in that of a fine-tuned ViT beside it."""
    sources = [golden.tensor("attn")] if "attn" in golden else attention_beside(golden)
    patch_size = 8  # README of the goldens, where the file has no distances
    if "dist_px" in golden:
        patch_size = round(float(np.unique(golden.take("dist_px"))[1]))
    maps = next((maps for maps in sources if fits(golden, maps, patch_size)), sources[0])
    golden.close("dist_px", distances_of(maps, patch_size))
    for key in RULES:
        golden.close(key, average(maps, patch_size, key))


def distances_of(maps: Tensor, patch_size: int) -> Tensor:
    return patch_distances(round((maps.shape[-1] - 1) ** 0.5), patch_size)


def average(maps: Tensor, patch_size: int, key: str) -> Tensor:
    """Average attention distance [layers, H] of maps [layers, B, H, L, L]."""
    distances = distances_of(maps, patch_size)
    return torch.stack([average_attention_distance(layer, distances, renormalize=RULES[key]) for layer in maps])


def fits(golden: Golden, maps: Tensor, patch_size: int) -> bool:
    """Whether these are the maps that the file was made of, by one of its results."""
    key = next(key for key in (*RULES, "dist_px") if key in golden)
    ours = average(maps, patch_size, key) if key in RULES else distances_of(maps, patch_size)
    theirs = golden.content[key]
    return ours.shape == theirs.shape and np.allclose(ours, theirs)


def attention_beside(golden: Golden) -> list[Tensor]:
    """Attention [layers, B, H, L, L] of every file that has it, here or among the samples."""
    folders = dict.fromkeys((golden.path.parent, GOLDEN, SAMPLES))
    files = (Golden(path) for folder in folders for path in sorted(folder.glob("mae_vit*.npz")))
    found = [file.tensor("attn") for file in files if "attn" in file]
    assert found, f"{golden.name}: no mae_vit*.npz with the attention beside it"
    return found
