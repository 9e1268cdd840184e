"""Look at what a model sees and learns, as a picture: views and masks, reconstructions, morph maps."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Started as a script, tools/ is first on the path; the repository's root belongs there, installed or not.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine import shell

EXAMPLE = """example:
  python tools/analyze.py reconstructions runs/demo/mae/checkpoints/step_00001400 --data runs/demo/shards/val"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("analysis", choices=list(ANALYSES), help="what to look at")
    parser.add_argument("checkpoint", type=Path, help="a folder RUN/checkpoints/step_*, or RUN")
    parser.add_argument("--data", type=Path, required=True, help="folder of shards to take images from")
    parser.add_argument("--out", type=Path, help="picture to write (default: ANALYSIS.png)")
    parser.add_argument("--images", type=int, default=12, help="number of images (default: 12)")
    parser.add_argument("--teacher", metavar="PLACE", help="DTM's teacher, where it is not where it was")
    parser.add_argument("--download", action="store_true", help="allow a teacher to be fetched from timm's hub")
    parser.add_argument("--debug", action="store_true", help="show the traceback of expected errors too")
    args = parser.parse_args()
    return shell.run(lambda: draw(args), debug=args.debug)


def draw(args: argparse.Namespace) -> int:
    """Write the picture of one analysis and say how to read it."""
    from engine.analyses.pictures import write_rows
    from engine.weights.export import find_checkpoint, read_manifest, read_objective
    from shards.dataset import open_dataset

    analysis, num_images, out = args.analysis, args.images, args.out or Path(f"{args.analysis}.png")
    if num_images < 1:
        raise ValueError(f"--images={num_images}: at least 1 image is needed")
    checkpoint = find_checkpoint(args.checkpoint)
    require_fitting(analysis, checkpoint, read_manifest(checkpoint)[1])
    dataset = open_dataset(args.data)
    objective, recipe = read_objective(checkpoint, args.teacher, args.download)
    rows, explanation = ANALYSES[analysis](objective, recipe, dataset, min(num_images, len(dataset)))
    write_rows(out, rows)
    print(f"{out}: rows are {explanation}")
    return 0


def draw_views(objective, recipe, dataset, num_images: int):
    """What training sees: each view of the first images of the first epoch, with its mask."""
    import torch

    from engine.analyses.pictures import hide, to_pixels
    from engine.masks import disjoint_masks
    from shards.reading.loader import TrainLoader

    with TrainLoader(
        dataset, view=objective.view, data=recipe.data, seed=recipe.run.seed, global_batch=num_images,
        micro_batch=num_images, rank=0, world_size=1, masks=objective.masks, device=torch.device("cpu"), total_steps=1,
    ) as loader:  # fmt: skip
        batch = loader.next_batch()
        if batch.mask.shape[1]:
            masks = [batch.mask.clone()]
        else:
            noise = batch.noise[:, : recipe.num_patches]  # with target masking, the teacher's follows
            masks = [mask.mask for mask in disjoint_masks(noise, recipe.objective.mask_ratio)]
        mean, std = moments(recipe)
        rows = []
        for view, mask in zip(batch.views, masks, strict=False):
            pixels = to_pixels(view, mean, std)
            rows += [pixels, hide(pixels, mask, recipe.model.patch_size)]
    return rows, "each view of the image, and what the mask leaves of it"


def draw_reconstructions(objective, recipe, dataset, num_images: int):
    """MAE's and LUT's reconstruction of masked patches."""
    import torch

    from engine.analyses.reconstructions import reconstructions
    from shards.draws.augmentations import mask_noise

    images, ids = evaluation_images(recipe, dataset, num_images)
    noise = torch.from_numpy(mask_noise(recipe.run.seed, 0, ids, recipe.num_patches))
    rows = list(reconstructions(objective, images, noise, *moments(recipe)))
    return rows, "the image, what the encoder sees, and its reconstruction"


def draw_morphs(objective, recipe, dataset, num_images: int):
    """DTM's groups of the teacher's tokens, from many groups to few."""
    import torch

    from engine.analyses.morphs import morph_map
    from engine.analyses.pictures import to_pixels
    from engine.objectives.comparison import Draw

    images, _ = evaluation_images(recipe, dataset, num_images)
    pixels, patches = to_pixels(images, *moments(recipe)), recipe.num_patches
    settings = [(patches // 4, 1), (patches // 2, 2), (3 * patches // 4, 7)]
    targets, places = objective.teacher(images), torch.arange(len(images))
    groups = [objective.group(targets, Draw(m, k), places, step=0, schedule=0) for m, k in settings]
    maps = [morph_map(group, pixels, recipe.model.patch_size) for group in groups]
    names = ", ".join(f"{m} in {k}" for m, k in settings)
    return [pixels, *maps], f"the image, and its patches in the colours of their groups (removed in steps: {names})"


ANALYSES = {"views": draw_views, "reconstructions": draw_reconstructions, "morphs": draw_morphs}
FITTING = {
    "Mae": ("views", "reconstructions"),
    "Lut": ("views", "reconstructions"),
    "Dtm": ("views", "morphs"),
    "MaeDtm": ("views", "morphs"),
}


def require_fitting(analysis: str, checkpoint: Path, recipe) -> None:
    """ValueError where the method of a checkpoint has nothing of what an analysis shows."""
    method = type(recipe.objective).__name__
    if analysis not in FITTING[method]:
        fitting = " and ".join(FITTING[method])
        raise ValueError(f"{analysis}: {checkpoint} was trained by {method.upper()}; {fitting} fit it")


def evaluation_images(recipe, dataset, num_images: int):
    """Images [B, 3, S, S], spread over the data set, as evaluation sees them, and their ids."""
    import torch

    from engine.evaluation.features import spread
    from shards.reading.loader import EvaluationLoader

    ids = spread(len(dataset), num_images)
    with EvaluationLoader(dataset, ids, data=recipe.data, batch=len(ids), device=torch.device("cpu")) as loader:
        return loader.next_batch().views[0].clone(), ids


def moments(recipe):
    import torch

    return torch.tensor(recipe.data.mean), torch.tensor(recipe.data.std)


if __name__ == "__main__":
    sys.exit(main())
