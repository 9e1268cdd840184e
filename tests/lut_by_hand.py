"""LUT's contextual loss written out: one image after the other, in plain loops, after docs/methods.md."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from engine.objectives.contract import AVERAGE
from engine.objectives.lut import ContextualAutoencoder


def contextual_loss(objective: ContextualAutoencoder, batch: SimpleNamespace) -> Tensor:
    """The term that w_bc weighs, by the objective's own networks and settings."""
    settings, (clean, strong), num_patches = objective.settings, batch.views, 16
    kept = [orders(noise)[: int(num_patches * (1 - settings.mask_ratio))] for noise in batch.noise[:, :num_patches]]
    after = [orders(noise)[len(k) : 2 * len(k)] for noise, k in zip(batch.noise[:, :num_patches], kept, strict=True)]
    directions = [(clean, kept, strong)]  # student's view, what it keeps, teacher's view
    if settings.symmetric:
        directions.append((strong, after, clean))
    losses = []
    for seen, places, whole in directions:
        parts = ("pooled", "tokenwise") if settings.bc_tokens == "pooled_tokenwise" else (settings.bc_tokens,)
        losses += [one_direction(objective, part, seen, places, whole, batch.noise[:, num_patches:]) for part in parts]
    return torch.stack(losses).sum() / len(directions)


def orders(noise: Tensor) -> list[int]:
    return sorted(range(len(noise)), key=lambda place: noise[place].item())


def one_direction(
    objective: ContextualAutoencoder, part: str, seen: Tensor, places: list[list[int]], whole: Tensor, hiding: Tensor
) -> Tensor:
    settings, average = objective.settings, objective.outside[AVERAGE]
    queries, keys = [], []
    for row, kept in enumerate(places):
        tokens = objective.encoder(seen[row : row + 1], torch.tensor([kept]))[0]
        with torch.no_grad():
            shown = None
            if settings.teacher_mask_ratio:
                shown = torch.tensor([orders(hiding[row])[: int(16 * (1 - settings.teacher_mask_ratio))]])
            target = average["encoder"](whole[row : row + 1], shown)[0]
        if part == "pooled":
            queries.append(sum(tokens[1:]) / len(kept))
            keys.append(sum(target[1:]) / (len(target) - 1))
        elif part == "cls":
            queries.append(tokens[0])
            keys.append(target[0])
        elif part == "masked":
            queries.append(decoded_mean(objective, tokens, kept))
            keys.append(sum(target[1:]) / (len(target) - 1))
        else:
            queries += [tokens[1 + number] for number in range(len(kept))]
            keys += [target[1 + place] for place in kept]
    predicted = network(objective.predictor, network(objective.head, torch.stack(queries), True), True)
    with torch.no_grad():
        wanted = network(average["head"], torch.stack(keys), settings.teacher_bn == "batch")
    return compared(predicted, wanted, settings.bc_loss, settings.bc_temperature)


def decoded_mean(objective: ContextualAutoencoder, tokens: Tensor, kept: list[int]) -> Tensor:
    """The decoder by hand: every place gets its token or the mask token; mean of the masked places afterwards."""
    decoder, embedded = objective.decoder, objective.decoder.embed(tokens)
    places = [embedded[1 + kept.index(place)] if place in kept else decoder.mask_token[0, 0] for place in range(16)]
    out = decoder.norm(decoder.blocks(torch.stack([embedded[0], *places])[None] + decoder.pos_embed))[0]
    masked = [out[1 + place] for place in range(16) if place not in kept]
    return objective.masked_embed(sum(masked) / len(masked))


def network(head: torch.nn.Module, rows: Tensor, by_batch: bool) -> Tensor:
    """A projector over all rows; `by_batch`: batch norm by the rows' own mean and biased variance."""
    for layer in head:
        if hasattr(layer, "running_mean"):
            mean = rows.mean(0) if by_batch else layer.running_mean
            var = ((rows - mean) ** 2).mean(0) if by_batch else layer.running_var
            rows = (rows - mean) / (var + layer.eps) ** 0.5 * layer.weight + layer.bias
        else:
            rows = layer(rows)
    return rows


def compared(predicted: Tensor, wanted: Tensor, kind: str, temperature: float) -> Tensor:
    losses = []
    units = [row / row.norm() for row in wanted]
    for row, target in zip(predicted, units, strict=True):
        unit = row / row.norm()
        if kind == "l2norm":
            losses.append(2 - 2 * unit @ target)
        elif kind == "smooth_l1":
            losses.append(sum(d * d / 2 if d.abs() < 1 else d.abs() - 0.5 for d in unit - target))
        else:
            all_keys = sum(torch.exp(unit @ other / temperature) for other in units)
            losses.append(2 * temperature * (torch.log(all_keys) - unit @ target / temperature))
    return sum(losses) / len(losses)
