"""Take a released checkpoint (MAE, LUT, DTM, BEiT v2) in: a folder that every command here takes as a checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Started as a script, tools/ is first on the path; the repository's root belongs there, installed or not.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine import shell

EXAMPLE = """examples:
  python tools/import_weights.py mae_pretrain_vit_base.pth weights/mae_b --recipe vit_b_mae
  python tools/import_weights.py beitv2_base.pth weights/beit --recipe vit_b_dtm model.rel_pos_bias=false

then: python tools/evaluate.py weights/mae_b --data DIR
      deepspeed engine/train.py --recipe vit_b_dtm teacher=weights/mae_b
      deepspeed engine/train.py --recipe vit_b_lut init=weights/mae_b"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", metavar="FILE", help="the checkpoint: .pth, .pt, .bin or .safetensors")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder to make")
    parser.add_argument("--recipe", required=True, metavar="NAME", help="recipe of the checkpoint's method and size")
    parser.add_argument("--debug", action="store_true", help="show the traceback of expected errors too")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="changes to the recipe")
    args = parser.parse_intermixed_args()
    return shell.run(lambda: import_file(args), debug=args.debug)


def import_file(args: argparse.Namespace) -> int:
    """Import, and say what came from where."""
    from rich.console import Console

    from engine.evaluation.scores import alone
    from recipes import registry
    from recipes.overrides import apply_overrides

    recipe = apply_overrides(registry.load(args.recipe), args.overrides)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with console.status("reading and checking"):
        from engine.weights.importing import import_weights

        done = import_weights(args.file, args.folder, args.recipe, recipe, alone())
    console.print(f"from        {done.source.origin}")
    console.print(f"taken       {done.placement}")
    console.print(f"written     {args.folder}: {'the whole objective' if done.whole else 'the encoder'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
