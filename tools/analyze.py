"""Look at what a model learned: `python tools/analyze.py reconstructions CHECKPOINT --data DIR --out FILE.png`."""

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
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=EXAMPLE, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("analysis", choices=["reconstructions"], help="what to look at")
    parser.add_argument("checkpoint", type=Path, help="a folder RUN/checkpoints/step_*")
    parser.add_argument("--data", type=Path, required=True, help="folder of shards to take images from")
    parser.add_argument("--out", type=Path, default=Path("reconstructions.png"), help="picture to write (PNG)")
    parser.add_argument("--images", type=int, default=12, help="number of images (default: 12)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of expected errors too")
    args = parser.parse_args()
    return shell.run(lambda: draw_reconstructions(args.checkpoint, args.data, args.images, args.out), debug=args.debug)


def draw_reconstructions(checkpoint: Path, data: Path, num_images: int, out: Path) -> int:
    """Write a picture of `num_images` columns, one validation image each."""
    import torch
    from PIL import Image

    from engine.analyses.reconstructions import reconstructions
    from engine.evaluation.features import spread
    from engine.export import read_objective
    from shards.dataset import open_dataset
    from shards.draws import mask_noise
    from shards.loader import EvaluationLoader

    objective, recipe = read_objective(checkpoint)
    dataset = open_dataset(data)
    ids = spread(len(dataset), num_images)
    (batch,) = EvaluationLoader(dataset, ids, data=recipe.data, batch=len(ids), device=torch.device("cpu"))
    noise = torch.from_numpy(mask_noise(recipe.run.seed, 0, ids, recipe.num_patches))
    mean, std = torch.tensor(recipe.data.mean), torch.tensor(recipe.data.std)
    rows = [framed(images) for images in reconstructions(objective, batch.views[0], noise, mean, std)]
    pixels = (torch.cat(rows, dim=1) * 255).round().byte()  # [3, H, W]
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    zoom = max(1, 96 // recipe.data.image_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(out)
    print(f"{out}: rows are the image, what the encoder sees, and its reconstruction")
    return 0


def framed(images):
    """Images [B, 3, S, S] side by side with a white margin: [3, S + 2, B (S + 2)]."""
    import torch.nn.functional as F

    return F.pad(images, (1, 1, 1, 1), value=1.0).permute(1, 2, 0, 3).flatten(2)


if __name__ == "__main__":
    sys.exit(main())
