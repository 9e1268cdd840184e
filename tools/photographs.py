"""Small gray JPEGs cut from the photographs that come inside scikit-image and scikit-learn: the demo's data set.

Eighteen photographs are the classes. Each is divided into 2 x 4 cells; two cells are for validation, so no pixel is
in both parts. A crop is a random window of 40 to 96 pixels whose brightness and contrast are drawn anew, so that a
class cannot be told by its gray level. Deterministic: the same seed gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
    "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg",
    "rocket.jpg", "china.jpg", "flower.jpg",
)  # fmt: skip
ROWS, COLUMNS = 2, 4
VALIDATION_CELLS = {(0, 1), (1, 3)}
WINDOW = (40, 96)  # pixels, both sides
SIDE = 48  # pixels of the JPEG
MIN_STD = 10.0  # gray levels; flatter windows show nothing
TRIES = 50
QUALITY = 95


def sources() -> list[Path]:
    """The photographs on this machine; FileNotFoundError names the ones that are missing."""
    import skimage
    import sklearn

    folders = [Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"]
    found = {path.name: path for folder in folders for path in folder.iterdir() if path.name in PHOTOGRAPHS}
    missing = [name for name in PHOTOGRAPHS if name not in found]
    if missing:
        raise FileNotFoundError(f"photographs not inside scikit-image or scikit-learn: {', '.join(missing)}")
    return [found[name] for name in PHOTOGRAPHS]


def cells(image: np.ndarray, validation: bool) -> list[np.ndarray]:
    """The cells of a gray image [H, W] that belong to training or to validation."""
    height, width = image.shape[0] // ROWS, image.shape[1] // COLUMNS
    return [
        image[row * height : (row + 1) * height, column * width : (column + 1) * width]
        for row in range(ROWS)
        for column in range(COLUMNS)
        if ((row, column) in VALIDATION_CELLS) == validation
    ]


def crop(parts: list[np.ndarray], rng: np.random.Generator) -> Image.Image:
    """One window with fresh brightness and contrast, perhaps mirrored."""
    for _ in range(TRIES):
        part = parts[rng.integers(len(parts))]
        side = min(int(rng.integers(WINDOW[0], WINDOW[1] + 1)), *part.shape)
        top, left = (int(rng.integers(length - side + 1)) for length in part.shape)
        window = part[top : top + side, left : left + side].astype(np.float64)
        if window.std() >= MIN_STD:
            break
    window = (window - window.mean()) / max(window.std(), 1.0)
    gray = np.clip(rng.uniform(100, 155) + rng.uniform(25, 55) * window, 0, 255).astype(np.uint8)
    image = Image.fromarray(gray[:, ::-1] if rng.integers(2) else gray)
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def make_photographs(folder: Path, *, per_class: int, validation: bool, seed: int) -> int:
    """Write `per_class` JPEGs for each photograph into `folder`/CLASS/; the number of images."""
    for number, path in enumerate(sources()):
        rng = np.random.Generator(np.random.PCG64([seed, number, validation]))
        parts = cells(np.asarray(Image.open(path).convert("L")), validation)
        target = folder / path.stem
        target.mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            crop(parts, rng).save(target / f"{path.stem}_{index:04d}.jpg", quality=QUALITY)
    return per_class * len(PHOTOGRAPHS)
