"""What is said before the first step and after the last: what is missing, what exactly will run, what is left."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from engine.checkpoints.folders import complete_checkpoints
from engine.plan import Plan
from recipes import registry
from recipes.methods import Lut
from recipes.overrides import difference, show
from recipes.schema import Data, Recipe
from shards import remote
from shards.dataset import Dataset, is_dataset, is_foreign
from shards.foreign.index_files import find_tars

ROOT = Path(__file__).resolve().parents[1]

# Fields that change neither the weights (but for rounding) nor the schedule of a run: where things are, how fast, how
# often one looks.
HARMLESS = {
    "data.train", "data.val", "data.eval_crop", "data.threads", "data.prefetch", "data.hw_decoder_load",
    "data.on_bad_sample", "data.max_bad_fraction", "data.timeout", "data.cache", "data.fetch_tries",
    "compile",  # rounding; a resume says so
    "teacher",  # its place; that its weights are the same is checked by their hash
    "init",  # read at step 0 only
}  # fmt: skip

DECISIVE = {"run.epochs", "run.steps", "run.seed"}  # in the section `run`, all of whose other fields are harmless

# Fields that decide which tensors a checkpoint holds.
STRUCTURAL = ("model.", "zero.stage", "precision", "data.image_size", "objective.decoder", "objective.head",
              "objective.predictor", "objective.bc_tokens")  # fmt: skip


class MissingInput(ValueError):
    """No shards where the recipe looks for them; the message is the whole help page."""


def is_harmless(path: str) -> bool:
    """Whether a recipe field changes nothing of what is learned."""
    return path in HARMLESS or path.startswith("evaluation.") or (path.startswith("run.") and path not in DECISIVE)


def may_differ(path: str) -> bool:
    """Whether a recipe field may differ between a run and its continuation.

    A global batch divided otherwise gives the same sums but for rounding, as another number of ranks does.
    """
    return is_harmless(path) or path == "optim.micro_batch"


def is_structural(path: str) -> bool:
    """Whether a checkpoint cannot be loaded at all where this recipe field differs."""
    return path.startswith(STRUCTURAL)


def training_folder(data: Data) -> Path:
    """`data.train`; where it is empty, $MASKWRIGHT_DATA/train, then data/imagenet/train."""
    if data.train:
        return Path(data.train).expanduser()
    root = os.environ.get("MASKWRIGHT_DATA")
    return Path(root).expanduser() / "train" if root else Path("data/imagenet/train")


def validation_folder(data: Data) -> Path | None:
    """`data.val`; where it is empty, the folder `val` beside the training folder if it holds shards."""
    if data.val:
        return Path(data.val).expanduser()
    beside = training_folder(data).parent / "val"
    return beside if is_dataset(beside) else None


def fetch_remote(data: Data) -> Data:
    """The section with folders of data.cache in the place of URLs. What is not there yet is fetched, and that is said.

    Errors as `shards.remote.fetch`.
    """
    places = {"train": data.train, "val": data.val}
    for name, place in places.items():
        if remote.is_url(place):
            folder = remote.fetch(
                place,
                remote.cache_folder(data.cache),
                setting=f"data.{name}",
                tries=data.fetch_tries,
                say=lambda text: print(text, flush=True),
            )
            places[name] = str(folder)
    return replace(data, **places)


def require_data(name: str, recipe: Recipe) -> Recipe:
    """The recipe with folders in the place of URLs; MissingInput with the commands that help where there is no data."""
    recipe = replace(recipe, data=fetch_remote(recipe.data))
    train, val = training_folder(recipe.data), validation_folder(recipe.data)
    for field, folder in (("data.train", train), ("data.val", val)):
        if folder is not None and not is_dataset(folder):
            if is_foreign(folder):
                raise MissingInput(unindexed_page(field, folder))
            state = "holds no shards of ours (no manifest.json)" if folder.is_dir() else "does not exist"
            raise MissingInput(missing_page(name, field, folder, state))
    return recipe


def require_init(name: str, recipe: Recipe) -> Recipe:
    """The recipe with the place of its first weights made absolute; MissingInput where nothing is there."""
    if not recipe.init:
        return recipe
    path = Path(recipe.init).expanduser()
    if not path.exists():
        raise MissingInput(
            f"init={recipe.init}: does not exist; name a run or a checkpoint of ours, a folder of tools/"
            "import_weights.py, or a released checkpoint of MAE, LUT, DTM or BEiT v2"
        )
    return replace(recipe, init=str(path.resolve()))


def unindexed_page(field: str, folder: Path) -> str:
    """What to do about tars that are not ours: they are used where they are, once they are indexed."""
    tool = ROOT / "tools" / "index_shards.py"
    return f"""{field}={folder}: {len(find_tars(folder)):,} tars without an index.

Shards that somebody else made are used where they are; only an index is made, and the tars are not written to:

  python {tool} {shlex.quote(str(folder))}

Then the same command again."""


def missing_page(name: str, field: str, folder: Path, state: str) -> str:
    """One screen: what is missing, the commands that make it, and where else it could be."""
    tool = ROOT / "tools" / "make_shards.py"
    train = folder if field == "data.train" else folder.parent / "train"
    val = folder if field == "data.val" else folder.parent / "val"
    return f"""{field}={folder}: this folder {state}.

{name} trains on a folder of WebDataset shards. To make one from images in class folders, for example ImageNet:

  python {tool} /path/to/imagenet/train {train}
  python {tool} /path/to/imagenet/val {val} --no-shuffle
  python {tool.with_name("verify_shards.py")} {train}

Shards that somebody else made need no conversion: python {tool.with_name("index_shards.py")} DIR

Then the same command again. Shards elsewhere:

  deepspeed {ROOT / "engine" / "train.py"} --recipe {name} data.train=DIR
  export MASKWRIGHT_DATA=DIR          once, for DIR/train and DIR/val

No data at hand:  make demo           with photographs that come inside two Python packages"""


def start_lines(
    name: str,
    recipe: Recipe,
    plan: Plan,
    world_size: int,
    train: Dataset,
    val: Dataset | None,
    *,
    compiled: str = "",
    teacher: str = "",
    init: str = "",
) -> list[str]:
    """The run in a few lines: sizes, learning rate, precision, data, and every departure from the paper.

    `compiled` says what of the networks is, `teacher` is the hash of the weights of DTM's teacher, `init` says what the
    first weights were taken from.
    """
    optim, run = recipe.optim, recipe.run
    rule = "given" if optim.lr is not None else f"{optim.blr:g} by the {optim.lr_rule} rule"
    epochs = plan.total_steps / plan.steps_per_epoch
    return [
        f"recipe      {name}: {registry.summary(name)}",
        f"batch       global {optim.global_batch} = micro {optim.micro_batch} x {world_size} "
        f"rank{'s' * (world_size > 1)} x accumulation {plan.accumulation}",
        f"length      {plan.total_steps:,} steps = {epochs:,.2f} epochs of {plan.steps_per_epoch:,} steps"
        + (f", stopping after step {plan.last_step:,}" if plan.last_step < plan.total_steps else ""),
        f"rate        peak {optim.peak_lr:.4g} ({rule}), warm-up {plan.warmup_steps:,.0f} steps, "
        f"cosine to {optim.min_lr:g}, weight decay {optim.weight_decay:g}",
        f"precision   {recipe.precision}, ZeRO stage {recipe.zero.stage}, seed {run.seed}",
        *([f"compile     {compiled}"] if compiled else []),
        f"data        {train.folder}: {len(train):,} samples in {len(train.paths):,} shards, {train.fingerprint[:12]}",
        f"k-NN        {val.folder}: {len(val):,} samples" if val else "k-NN        not measured: no data.val",
        *batch_norm_lines(recipe, world_size),
        *([f"teacher     {recipe.teacher}, weights {teacher[:12]}"] if teacher else []),
        *([f"init        {init}"] if init else []),
        *(f"departure   {line}" for line in departures(name, recipe)),
    ]


def require_labels(dataset: Dataset, setting: str) -> None:
    """ValueError with both numbers where samples have no label: there is no k-NN and no probe without."""
    unlabelled = int((dataset.label < 0).sum())
    if unlabelled:
        raise ValueError(
            f"{setting}: {unlabelled:,} of {len(dataset):,} samples have no label, and k-NN and probe need one of "
            "every image; choose a labelled set, or train without data.val and without a folder `val` beside data.train"
        )


def check_classes(train: Dataset, val: Dataset | None) -> None:
    """ValueError where samples have no label, or naming the first class that the two sets number differently.

    Accuracies would mean nothing.
    """
    if val is None:
        return
    require_labels(train, f"data.train={train.folder}")
    require_labels(val, f"data.val={val.folder}")
    if val.classes == train.classes or not (has_names(train) and has_names(val)):
        return
    pairs = zip_longest(train.classes, val.classes, fillvalue="nothing")
    number, (ours, theirs) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
    raise ValueError(
        f"data.val={val.folder}: class {number} is {theirs}, in data.train={train.folder} it is {ours} "
        f"({len(val.classes)} and {len(train.classes)} classes); convert both from the same class "
        "folders; an empty folder keeps the number of a class without images"
    )


def has_names(dataset: Dataset) -> bool:
    """Whether classes are called anything but their own numbers (shards of others, lists)."""
    return dataset.classes != tuple(map(str, range(len(dataset.classes))))


def batch_norm_lines(recipe: Recipe, world_size: int) -> list[str]:
    """How many images batch norm and InfoNCE see at once; results are equal only while that number is kept."""
    settings, micro = recipe.objective, recipe.optim.micro_batch
    if not isinstance(settings, Lut):
        return []
    seen, meant = micro * world_size, settings.norm_batch
    labels = ["batch norm  over"] * settings.has_batch_norm + ["InfoNCE     among"] * (settings.bc_loss == "infonce")
    warning = f": WARNING, the recipe means {meant:,}; features will differ" if seen != meant else ""
    return [f"{label} micro {micro} x ranks {world_size} = {seen:,} images{warning}" for label in labels]


def other_images_at_once(manifest: dict, recipe: Recipe, world_size: int) -> list[str]:
    """A warning where batch norm or InfoNCE will see another number of images than before the resume."""
    settings = recipe.objective
    if not isinstance(settings, Lut) or not (settings.has_batch_norm or settings.bc_loss == "infonce"):
        return []
    micro_was, was = int(manifest["recipe"]["optim.micro_batch"]), manifest["world_size"]
    micro = recipe.optim.micro_batch
    if micro_was * was == micro * world_size:
        return []
    keep = micro_was * was / world_size
    return [
        f"WARNING     batch norm or InfoNCE saw {micro_was * was} images at once (micro {micro_was} x ranks {was}), "
        f"now {micro * world_size} (micro {micro} x ranks {world_size}): other losses than without the resume"
        + (f"; optim.micro_batch={keep:.0f} would keep them" if keep.is_integer() else "")
    ]


def departures(name: str, recipe: Recipe) -> list[str]:
    """What differs from the paper: the recipe's own remarks, and every field changed on the command line."""
    changed = difference(registry.load(name), recipe)
    overrides = [
        f"{path}={show(new)} (recipe: {show(old)})" for path, (old, new) in changed.items() if not is_harmless(path)
    ]
    return [*recipe.departures, *overrides]


def end_lines(folder: Path, checkpoint_folder: Path, memory: int) -> list[str]:
    """Where the results of a finished run are, and the bytes of memory that it took at most on rank 0."""
    newest = complete_checkpoints(checkpoint_folder)[0]
    return [
        f"memory      {memory / 2**30:.2f} GiB at most on rank 0",
        f"done        {folder}: metrics.jsonl, {newest.relative_to(folder)}",
        f'features    timm.create_model("local-dir:{newest / "encoder"}", pretrained=True)',
    ]
