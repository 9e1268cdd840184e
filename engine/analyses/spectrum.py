"""How many directions features use: the spectrum of their covariance.

LUT's paper compares the logarithms of two encoders' spectra layer by layer; its definition is not published, this one
is ours. The effective rank is that of Roy and Vetterli (EUSIPCO 2007).
"""

from __future__ import annotations

import torch
from torch import Tensor


def covariance_spectrum(features: Tensor) -> Tensor:
    """Singular values [D], the largest first, of the covariance of features [M, D] of M images or tokens.

    Centred, divided by M, in float64. ValueError for fewer than two rows.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features {tuple(features.shape)}: a matrix of 2 rows or more is needed; one row per image")
    centred = features.double() - features.double().mean(dim=0)
    return torch.linalg.svdvals(centred.T @ centred / len(centred))


def log_spectrum(spectrum: Tensor) -> Tensor:
    """Natural logarithm of singular values; that of a vanished one is the smallest there is, not minus infinity."""
    return spectrum.clamp_min(torch.finfo(spectrum.dtype).tiny).log()


def effective_rank(spectrum: Tensor) -> Tensor:
    """exp of the entropy of singular values [D] as shares of their sum: 1 for one direction, D for all alike."""
    shares = spectrum / spectrum.sum()
    return torch.special.entr(shares).sum().exp()
