"""What gives the targets: CLIP, one of our own encoders, any ViT of timm, all frozen, or the image's own pixels.

An objective holds its teacher by `keep_outside`: in nobody's parameters() or state dict, not divided by ZeRO, not
saved, never set to training.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models import vision_library  # noqa: F401  timm imports only after it
from engine.models.patches import patchify
from engine.teacher_sources import (
    CLIP,
    PIXELS,
    TeacherSource,
    find_teacher,
    require_fitting,
    require_same_grid,
)
from engine.weights.files import read_weight_file
from engine.weights.released import from_clip
from recipes.checks import require
from recipes.schema import Data, Recipe

# isort: split
import timm

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_WIDTH = 512  # of the visual projection of ViT-B/16
CLIP_HEAD_WIDTH = 64  # channels of an attention head in all of OpenAI's towers
CLIP_WIDEST = 1024  # ViT-L; wider ones of others (1280 and more) have heads of 80 channels and more, no file says how


class Teacher(nn.Module):
    """A timm model, computed in `dtype`.

    `identity` is the sha256 of its weights (names and fp32 values), `width` the length T of its targets, `num_patches`
    how many there are per image.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, rescale: tuple[Tensor, Tensor] | None = None) -> None:
        """`rescale` = (factor, offset) [3, 1, 1] each turns the student's images into the teacher's."""
        super().__init__()
        self.identity = weights_hash(network)
        self.network = network.to(dtype)
        self.dtype = dtype
        factor, offset = rescale or (None, None)
        self.register_buffer("factor", factor)
        self.register_buffer("offset", offset)
        self.num_patches: int = network.patch_embed.num_patches
        self.width: int = network.num_classes or network.num_features

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features fp32 [B, N, T] of every patch of images [B, 3, S, S], normalised as the student sees them.

        The last norm is applied to all tokens, the class token is dropped, and CLIP's visual projection follows where
        the network has it as its head. Nothing is normalised.
        """
        if self.factor is not None:
            images = images * self.factor + self.offset
        with torch.autocast(images.device.type, enabled=False):
            tokens = self.network.forward_features(images.to(self.dtype))
            return self.network.head(tokens[:, self.network.num_prefix_tokens :]).float()


class PixelTeacher(nn.Module):
    """The targets are the patches of the image as the student sees it, normalised and unmasked: T = 3 p p."""

    identity = PIXELS  # there are no weights to hash

    def __init__(self, patch_size: int, num_patches: int) -> None:
        super().__init__()
        self.patch_size, self.num_patches = patch_size, num_patches
        self.width = 3 * patch_size**2

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Pixels fp32 [B, N, p p 3] of images [B, 3, S, S]."""
        return patchify(images.float(), self.patch_size)


def open_teacher(recipe: Recipe) -> Teacher | PixelTeacher:
    """The teacher of a recipe, in bf16 unless the run is in fp32.

    ValueError where it is not there, is something else than it should be, or has another number of patches.
    """
    source = find_teacher(recipe.teacher)
    if source is None:
        raise ValueError(f"teacher={recipe.teacher}: neither a file of weights nor a folder with an exported encoder")
    require_fitting(source, recipe)
    if source.kind == "pixels":
        return PixelTeacher(recipe.model.patch_size, recipe.num_patches)
    with torch.random.fork_rng(devices=[]):  # its first, random weights must not change the student's
        network = open_network(source, recipe)
    require_same_grid(recipe, network.patch_embed.num_patches)
    dtype = torch.float32 if recipe.precision == "fp32" else torch.bfloat16
    return Teacher(network, dtype, rescaling(recipe, source, network))


def rescaling(recipe: Recipe, source: TeacherSource, network: nn.Module) -> tuple[Tensor, Tensor] | None:
    """How the student's images become the teacher's.

    CLIP gets them as they are, as in the released program, unless objective.teacher_norm=clip; any other teacher gets
    what it was trained on, which its timm configuration says.
    """
    if source.is_clip:
        return to_input(recipe.data, CLIP_MEAN, CLIP_STD) if recipe.objective.teacher_norm == "clip" else None
    mean, std = tuple(network.pretrained_cfg["mean"]), tuple(network.pretrained_cfg["std"])
    return None if (mean, std) == (recipe.data.mean, recipe.data.std) else to_input(recipe.data, mean, std)


def to_input(data: Data, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Factor and offset [3, 1, 1] from images normalised by `data` to images normalised by `mean` and `std`."""
    data_mean, data_std, mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std, mean, std))
    return data_std / std, (data_mean - mean) / std


def open_network(source: TeacherSource, recipe: Recipe) -> nn.Module:
    """The teacher as a timm model whose head is its projection, or nothing."""
    image_size = recipe.data.image_size
    if source.kind == "folder":
        return timm.create_model(f"local-dir:{source.place}", pretrained=True, num_classes=0)
    if source.kind == "file":
        return open_clip_file(Path(source.place), recipe)
    # timm gives its CLIP models the projection as a head; a classifier of ImageNet is no feature. Without pooling the
    # last norm stays where all tokens pass it: models that average have theirs after the pooling.
    head = {} if source.is_clip else {"num_classes": 0, "global_pool": ""}
    try:
        network = timm.create_model(source.place, pretrained=True, img_size=image_size, **head)
        require_tokens(network.eval(), image_size)
    except (RuntimeError, OSError, TypeError, AssertionError, AttributeError) as error:
        # an unknown name, no network, or no transformer whose tokens are its patches
        raise ValueError(
            f"teacher=timm:{source.place}: timm could not provide it as a ViT of {image_size} px: "
            f"{error or type(error).__name__}; choose another one"
        ) from error
    return network


@torch.no_grad()
def require_tokens(network: nn.Module, image_size: int) -> None:
    """AssertionError or AttributeError unless the network gives one token per patch after its prefix tokens."""
    tokens = network.forward_features(torch.zeros(1, 3, image_size, image_size))
    promised = (1, network.num_prefix_tokens + network.patch_embed.num_patches, network.num_features)
    assert tuple(tokens.shape) == promised, f"features {tuple(tokens.shape)} where {promised} are needed"


def open_clip_file(path: Path, recipe: Recipe) -> nn.Module:
    """The image tower of a file, at the recipe's image size; ValueError where there is none, or one of another grid."""
    state = read_weight_file(path, "teacher").weights
    arguments = tower_arguments(from_clip(state), f"teacher={path}")
    require_same_grid(recipe, (recipe.data.image_size // arguments["patch_size"]) ** 2)
    network = clip_network(recipe.data.image_size, **arguments)
    load_clip(network, state, f"teacher={path}")
    return network


def tower_arguments(weights: dict[str, Tensor], what: str) -> dict[str, int | float]:
    """timm's arguments for the tower that has these weights (timm's names), all read from their shapes.

    How many heads there are is in no shape: OpenAI's have 64 channels each. Without a projection the head is nothing.
    """
    try:
        width, _, _, patch_size = weights["patch_embed.proj.weight"].shape
        hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        found = ", ".join(list(weights)[:3])
        raise ValueError(
            f"{what}: not an image tower of CLIP's (a ViT); the file begins with {found}. "
            "For an encoder of your own give its folder"
        ) from error
    require(
        width % CLIP_HEAD_WIDTH == 0 and width <= CLIP_WIDEST,
        f"{what}: {width} channels wide; OpenAI's towers have at most {CLIP_WIDEST}, in heads of {CLIP_HEAD_WIDTH}; "
        "how many heads another tower has the file does not say; write teacher=timm:NAME",
    )
    return {
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "num_heads": width // CLIP_HEAD_WIDTH,
        "mlp_ratio": hidden / width,
        "num_classes": len(weights["head.weight"]) if "head.weight" in weights else 0,
    }


def clip_network(image_size: int, **changes: int | float) -> nn.Module:
    """CLIP's image tower ViT-B/16 with QuickGELU, its visual projection as head; `changes` are timm's arguments."""
    arguments = {"num_classes": CLIP_WIDTH, **changes}
    return timm.create_model(CLIP.partition(".")[0], img_size=image_size, **arguments)


def load_clip(network: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Put CLIP's weights, under OpenAI's or timm's names, into `network`; ValueError where they are not its weights."""
    weights = from_clip(state)
    if "pos_embed" in weights:
        weights["pos_embed"] = resize_positions(weights["pos_embed"], network.patch_embed.grid_size[0])
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        reason = str(error).partition("\n")[2].strip().partition("\n")[0][:200]
        raise ValueError(
            f"{what}: not an image tower of CLIP's ({reason}). For an encoder of your own give its folder"
        ) from error


def resize_positions(positions: Tensor, grid_size: int) -> Tensor:
    """Position table [1, 1 + M, D] of a square grid for another one: [1, 1 + grid_size^2, D].

    Bicubic with the scale (grid_size + 0.1) / sqrt(M), as the released program does for other image sizes. The same
    grid is left as it is.
    """
    cls, patches = positions[:, :1], positions[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    if side == grid_size:
        return positions
    table = patches.transpose(1, 2).unflatten(2, (side, side)).float()
    scale = (grid_size + 0.1) / side
    resized = F.interpolate(table, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([cls, resized.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)


def weights_hash(network: nn.Module) -> str:
    """sha256 over names, shapes and fp32 values of a network's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
