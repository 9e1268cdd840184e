"""lut_aug*: LUT's augmentations of one image, by PIL bit for bit and by DALI within its rounding."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import numpy as np
import torch
from golden_files import Golden
from images import encode
from operators import apply, level_difference
from PIL import Image

from recipes.schema import Data
from shards.augment import graphs, photometry, reference
from shards.draws import augmentations as draws
from shards.draws.augmentations import SECOND, Effect, Jitter

Row = dict[str, np.ndarray]  # one sample's draws

OPERATIONS = ("brightness", "contrast", "saturation", "hue")
FLOAT_ATOL = 2e-6  # of normalised pixels, about 2 wide
# DALI: mean absolute difference of an image, in levels of 255. Hue passes a space of 8 bits there and back.
JITTER_LEVELS = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 1.1}
ORDER_LEVELS = 2.0  # of four operations, one after the other
EFFECT_LEVELS = {Effect.GRAY: 0.01, Effect.SOLARIZE: 0.0, Effect.BLUR: 1.0}


def check_views(golden: Golden) -> None:
    golden.leave("versions", *(key for key in golden.keys("view") if key.endswith("_repr")))
    if "img" in golden:
        check_framing(golden)
        check_two_views(golden)
    if "base" in golden:
        check_jitter(golden)
        check_effects(golden)
        golden.close("normalized", normalised(golden.take("base")), 0, FLOAT_ATOL)


def law(side: int) -> Data:
    """LUT's augmentation (docs/methods.md)."""
    return Data(
        image_size=side, crop="src", brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_prob=0.8, threads=1
    )


def jitter_row(order: tuple[int, ...], b: float = 1, c: float = 1, s: float = 1, h: float = 0) -> Row:
    """One sample's row, from the released program's factors."""
    sixths = np.trunc(255 * h) * 6 / 255
    padded = np.array([*order, *[Jitter.NONE] * 4][:4], np.int32)
    row = {"order": padded, "brightness": b, "contrast": c, "saturation": s, "hue": sixths}
    return {name: np.asarray(value, np.int32 if name == "order" else np.float32) for name, value in row.items()}


def rows(*samples: Row) -> draws.Draws:
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def normalised(pixels: np.ndarray) -> np.ndarray:
    """A square image as it goes into a network."""
    whole = {"resized": np.array(pixels.shape[:2]), "corner": np.array([0, 0])}
    return reference.evaluate(encode(Image.fromarray(pixels), "PNG"), whole, law(len(pixels)))[0]


# --- which part of the image ----------------------------------------------------------------------------------------


def check_framing(golden: Golden) -> None:
    image = Image.fromarray(golden.take("img"))
    for key in golden.keys("src_resize"):
        check_resize(golden, key, image)
    for key in golden.keys("src_pad"):
        check_padding(golden, key, image)
    for key in golden.keys("src_out"):
        data = law(len(golden.take(key)))
        top, left, mirror = golden.take(key.replace("out", "par")).tolist()
        drawn = {"resized": resized(image, data), "corner": np.array([top, left]), "mirror": mirror}
        golden.same(key, reference.framed(image, drawn, data))
    for key in golden.keys("rrc_out"):
        top, left, height, width = golden.take(key.replace("out", "par")).tolist()
        drawn = {"corner": np.array([top, left]), "shape": np.array([height, width]), "mirror": 0}
        golden.same(key, reference.framed(image, drawn, Data(image_size=len(golden.take(key)))))
    for key in golden.keys("eval"):
        data = law(len(golden.take(key)))
        shape = (np.array([image.height]), np.array([image.width]))
        drawn = draws.evaluate(data, 0, 0, np.arange(1), *shape)
        (view,) = reference.evaluate(encode(image, "PNG"), {name: column[0] for name, column in drawn.items()}, data)
        golden.same(key, np.rint(255 * (view.transpose(1, 2, 0) * data.std + data.mean)))


def resized(image: Image.Image, data: Data) -> np.ndarray:
    """Size after the resize, (vertical, horizontal)."""
    shape = (np.array([image.height]), np.array([image.width]))
    return draws.framing(data, 0, 0, np.arange(1), *shape)["resized"][0]


def canvas(image: Image.Image, data: Data, padding: int) -> np.ndarray:
    """The resized and padded image, from as many crops as cover it."""
    size, side = resized(image, data), data.image_size
    data = Data(image_size=side, crop="src", crop_padding=padding)
    whole = np.zeros((*(size + 2 * padding), 3), np.uint8)
    for top in {*range(0, len(whole) - side, side), len(whole) - side}:
        for left in {*range(0, whole.shape[1] - side, side), whole.shape[1] - side}:
            drawn = {"resized": size, "corner": np.array([top, left]), "mirror": 0}
            whole[top : top + side, left : left + side] = reference.framed(image, drawn, data)
    return whole


def check_resize(golden: Golden, key: str, image: Image.Image) -> None:
    """src_resize{S}, its size (width first); of the image on its side; of a smaller, square part of it, blown up."""
    data, pixels = law(int(re.search(r"\d+|$", key)[0] or min(golden.take(key).shape[:2]))), golden.take(key)
    if key.endswith("_size_wh"):
        golden.same(key, resized(image, data)[::-1])
    elif key.endswith("_square_up"):
        parts = (image.crop((0, 0, side, side)) for side in range(1, min(image.size) + 1))  # which one is not said
        assert any(np.array_equal(canvas(part, data, 0), pixels) for part in parts), f"{golden.name}: {key}"
        golden.count(key)
    else:
        tall = image.transpose(Image.Transpose.TRANSPOSE)
        golden.same(key, canvas(tall if key.endswith("_tall") else image, data, 0))


def check_padding(golden: Golden, key: str, image: Image.Image) -> None:
    padding = int(key.removeprefix("src_pad"))
    data = law(min(golden.take(key).shape[:2]) - 2 * padding)
    golden.same(key, canvas(image, data, padding))
    golden.same(key, apply(lambda nodes, _: graphs._reflected(nodes, padding), [canvas(image, data, 0)])[0])


# --- its colours ----------------------------------------------------------------------------------------------------


def check_jitter(golden: Golden) -> None:
    """Single operations, named by their factor, and whole jitters."""
    samples: dict[str, Row] = {}
    for key in golden.keys():
        operation, _, factor = key.partition("_")
        if operation in OPERATIONS:
            samples[key] = jitter_row((OPERATIONS.index(operation),), **{operation[0]: float(factor)})
        elif re.fullmatch(r"jitter\d+", key):
            samples[key] = jitter_row(tuple(golden.take(f"{key}_order")), *golden.take(f"{key}_bcsh"))
    base = golden.take("base")
    for key, row in samples.items():
        golden.same(key, reference.jittered(Image.fromarray(base), row))
    if samples:
        found = apply(
            lambda nodes, drawn: photometry.jitter(nodes, drawn), [base] * len(samples), rows(*samples.values())
        )
        for key, difference in zip(samples, level_difference(found, [golden.take(k) for k in samples]), strict=True):
            assert difference <= JITTER_LEVELS.get(key.partition("_")[0], ORDER_LEVELS), (key, difference)


def check_effects(golden: Golden) -> None:
    base = golden.take("base")
    for key in golden.keys():
        kind, sigma, threshold = effect_of(key)
        if kind is None:
            continue
        drawn = {"effect": np.array([kind], np.int32), "sigma": draws.sigmas(np.array([sigma], np.float32))}
        row = {name: values[0] for name, values in drawn.items()}
        golden.same(key, reference.changed(Image.fromarray(base), row, threshold))
        graph: Callable = lambda nodes, d, limit=threshold: photometry.effect(nodes, d, limit)  # noqa: E731
        (difference,) = level_difference(apply(graph, [base], drawn), [golden.take(key)])
        assert difference <= EFFECT_LEVELS[kind], (key, difference)


def effect_of(key: str) -> tuple[Effect | None, float, int]:
    """What a key names: the effect, a blur's sigma, the threshold of a solarisation."""
    if key == "gray":
        return Effect.GRAY, 1.0, 128
    if found := re.fullmatch(r"solarize(\d+)", key):
        return Effect.SOLARIZE, 1.0, int(found[1])
    if found := re.fullmatch(r"blur_([\d.]+)", key):
        return Effect.BLUR, float(found[1]), 128
    return None, 1.0, 128


# --- both together --------------------------------------------------------------------------------------------------


def check_two_views(golden: Golden) -> None:
    """Both views of the image, drawn as the released program draws them after seeding."""
    image = Image.fromarray(golden.take("img"))
    for key in golden.keys("two_view_seed"):
        data = law(golden.take(key).shape[-1])
        drawn = released_draws(int(key.removeprefix("two_view_seed")), resized(image, data), data)
        views = reference.pretrain_lut(encode(image, "PNG"), drawn, data)
        golden.close(key, np.stack(views), 0, FLOAT_ATOL)


def released_draws(seed: int, size: np.ndarray, data: Data) -> draws.Draws:
    """In the released program's own order, from torch's and Python's generators."""
    tensors, plain = torch.Generator().manual_seed(seed), random.Random(seed)
    drawn: draws.Draws = {"resized": size}
    for ending in ("", SECOND):
        spare = size + 2 * data.crop_padding - data.image_size
        corner = [torch.randint(0, int(room) + 1, (1,), generator=tensors).item() for room in spare]
        drawn |= {"corner" + ending: np.array(corner), "mirror" + ending: chance(tensors) < 0.5}
    jitter = jitter_row(())
    if chance(tensors) <= data.jitter_prob:
        order = torch.randperm(4, generator=tensors).tolist()
        strengths = (data.brightness, data.contrast, data.saturation)
        limits = [*((1 - strength, 1 + strength) for strength in strengths), (-data.hue, data.hue)]
        factors = [torch.empty(1).uniform_(*limit, generator=tensors).item() for limit in limits]
        jitter = jitter_row(tuple(order), *factors)
    effect, sigma = plain.choices(range(3))[0], 0.0
    if effect == Effect.BLUR:
        plain.random()
        sigma = plain.uniform(*data.blur_sigma)
    return {**drawn, **jitter, "effect": np.int32(effect), "sigma": [sigma]}


def chance(tensors: torch.Generator) -> float:
    return torch.rand(1, generator=tensors).item()
