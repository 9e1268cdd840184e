"""What other people load images with: a torch DataLoader over PIL, WebDataset, torchvision on tensors, SPDL.

All are given our draws, so that all make the same images; ours has to draw them in the time that is measured. The
operations are torchvision's, in the order of the released programs: LUT's two views resize each for itself, DTM's
jitter sees the whole image.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

import engine.models.vision_library  # noqa: F401  (lets torchvision import beside a CPU build of torch)
from recipes.schema import Data
from shards.augment.reference import decode, read_image
from shards.augment.views import find_view
from shards.dataset import Dataset
from shards.draws.augmentations import SECOND, Draws, Effect, Jitter

Picture = Image.Image | Tensor  # a Tensor is uint8 [3, H, W]
Sample = tuple[int, *tuple[Tensor, ...]]  # id, and a float32 [3, S, S] per image of the view


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """Which images are wanted: all of `dataset` as `view` makes them in epoch 0 of seed 0, in batches."""

    dataset: Dataset
    view: str
    data: Data
    batch: int
    draws: Draws

    @classmethod
    def of(cls, dataset: Dataset, view: str, data: Data, batch: int) -> Task:
        draws = find_view(view).drawn(dataset, data, 0, 0, np.arange(len(dataset)))
        return cls(dataset=dataset, view=view, data=data, batch=batch, draws=draws)

    def sample(self, number: int, picture: Picture) -> Sample:
        """One sample's id and images."""
        row = {name: column[number] for name, column in self.draws.items()}
        return number, *(_normalised(image, self.data) for image in VIEWS[self.view](picture, row, self.data))


Peer = Callable[[Task], Iterable[list[Tensor]]]  # batches of ids, images, ...


def peers() -> dict[str, Peer]:
    """Those that are installed; the first is what ours is asked to be faster than."""
    found: dict[str, Peer] = {"torch DataLoader and PIL": pil_loader}
    if find_spec("webdataset"):
        found["webdataset and PIL"] = webdataset_loader
    decoder = "torchvision.io" if has_tensor_decoder() else "PIL's decoder"
    found[f"torchvision on tensors, {decoder}"] = tensor_loader
    if find_spec("spdl"):
        found["SPDL and PIL"] = spdl_loader
    return found


class _Pictures(torch.utils.data.Dataset):
    """Samples by number, each read from its place in its tar, as from a file of its own."""

    def __init__(self, task: Task, opened: Callable[[bytes], Picture]) -> None:
        self._task, self._opened = task, opened

    def __len__(self) -> int:
        return len(self._task.dataset)

    def __getitem__(self, number: int) -> Sample:
        return self._task.sample(number, self._opened(read_image(self._task.dataset, number)))


def pil_loader(task: Task) -> DataLoader:
    """In this process, the cheapest: one worker yielded 7 to 13 % fewer images per second of processor time."""
    return DataLoader(_Pictures(task, decode), batch_size=task.batch)


def tensor_loader(task: Task) -> DataLoader:
    """torchvision on uint8 tensors, the fastest way it has; decoded by its extension where that loads."""
    return DataLoader(_Pictures(task, tensor_decoder()), batch_size=task.batch)


def webdataset_loader(task: Task) -> DataLoader:
    """The tars from their beginning to their end."""
    import webdataset

    numbers = {key.decode(): number for number, key in enumerate(task.dataset.key)}
    tars = [str(path) for path in task.dataset.paths]
    samples = webdataset.WebDataset(tars, shardshuffle=False).map(
        lambda sample: task.sample(numbers[sample["__key__"]], decode(sample["jpg"]))
    )
    return DataLoader(samples, batch_size=task.batch)


def spdl_loader(task: Task) -> Iterator[list[Tensor]]:
    """SPDL's pipeline in one thread; its own decoder needs FFmpeg's libraries, PIL does not."""
    from spdl.pipeline import PipelineBuilder

    pictures = _Pictures(task, decode)
    pipeline = (
        PipelineBuilder()
        .add_source(range(len(pictures)))
        .pipe(pictures.__getitem__)
        .aggregate(task.batch)
        .pipe(default_collate)
        .add_sink(2)
        .build(num_threads=1)
    )
    with pipeline.auto_stop():
        yield from pipeline.get_iterator()


def has_tensor_decoder() -> bool:
    """Whether torchvision's decoder works: its extension does not load beside a CPU build of torch."""
    from torchvision.io import decode_jpeg

    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, "JPEG")
    try:
        decode_jpeg(torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8))
    except RuntimeError:
        return False
    return True


def tensor_decoder() -> Callable[[bytes], Tensor]:
    """Encoded bytes to uint8 [3, H, W]."""
    if not has_tensor_decoder():
        return lambda encoded: torch.from_numpy(np.array(decode(encoded))).permute(2, 0, 1)
    from torchvision.io import ImageReadMode, decode_image

    return lambda encoded: decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ImageReadMode.RGB)


# --- the views ------------------------------------------------------------------------------------------------------


def _normalised(picture: Picture, data: Data) -> Tensor:
    from torchvision.transforms.v2 import functional as F

    pixels = F.to_dtype(F.to_image(picture), torch.float32, scale=True)
    return F.normalize(pixels, data.mean, data.std, inplace=True).as_subclass(Tensor)


def _framed(picture: Picture, row: Draws, data: Data) -> Picture:
    """Random resized crop or simple resized crop, and the flip."""
    from torchvision.transforms.v2 import functional as F

    (top, left), side = row["corner"].tolist(), [data.image_size, data.image_size]
    if data.crop == "rrc":
        picture = F.resized_crop(picture, top, left, *row["shape"].tolist(), side, F.InterpolationMode.BICUBIC)
    else:
        picture = F.resize(picture, row["resized"].tolist(), F.InterpolationMode.BICUBIC)
        picture = F.crop(F.pad(picture, [data.crop_padding], padding_mode="reflect"), top, left, *side)
    return F.horizontal_flip(picture) if row["mirror"] else picture


def _jittered(picture: Picture, row: Draws) -> Picture:
    from torchvision.transforms.v2 import functional as F

    for operation in row["order"].tolist():
        if operation == Jitter.BRIGHTNESS:
            picture = F.adjust_brightness(picture, float(row["brightness"]))
        elif operation == Jitter.CONTRAST:
            picture = F.adjust_contrast(picture, float(row["contrast"]))
        elif operation == Jitter.SATURATION:
            picture = F.adjust_saturation(picture, float(row["saturation"]))
        elif operation == Jitter.HUE:
            turns = row["hue"] / 6  # a whole number of 1/255, which torchvision cuts off: not to lose the last one
            picture = F.adjust_hue(picture, float(turns + np.sign(turns) * 1e-4))
    return picture


def _changed(picture: Picture, row: Draws, threshold: int) -> Picture:
    from torchvision.transforms.v2 import functional as F

    if row["effect"] == Effect.GRAY:
        return F.rgb_to_grayscale(picture, 3)
    if row["effect"] == Effect.SOLARIZE:
        return F.solarize(picture, threshold)
    sigma = float(row["sigma"][0])
    if isinstance(picture, Image.Image):
        return picture.filter(ImageFilter.GaussianBlur(sigma))
    return F.gaussian_blur(picture, 2 * int(3 * sigma + 0.5) + 1, float(row["sigma"][1]))


def _pretrain_mae(picture: Picture, row: Draws, data: Data) -> tuple[Picture, ...]:
    return (_framed(picture, row, data),)


def _pretrain_dtm(picture: Picture, row: Draws, data: Data) -> tuple[Picture, ...]:
    return (_framed(_jittered(picture, row), row, data),)


def _pretrain_lut(picture: Picture, row: Draws, data: Data) -> tuple[Picture, ...]:
    second = {**row, **{name.removesuffix(SECOND): value for name, value in row.items() if name.endswith(SECOND)}}
    strong = _changed(_jittered(_framed(picture, second, data), row), row, data.solarize_threshold)
    return _framed(picture, row, data), strong


def _evaluate(picture: Picture, row: Draws, data: Data) -> tuple[Picture, ...]:
    from torchvision.transforms.v2 import functional as F

    picture = F.resize(picture, row["resized"].tolist(), F.InterpolationMode.BICUBIC)
    return (F.crop(picture, *row["corner"].tolist(), data.image_size, data.image_size),)


VIEWS: dict[str, Callable[[Picture, Draws, Data], tuple[Picture, ...]]] = {
    "evaluate": _evaluate,
    "pretrain_mae": _pretrain_mae,
    "pretrain_dtm": _pretrain_dtm,
    "pretrain_lut": _pretrain_lut,
}
