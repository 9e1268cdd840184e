"""How good are the features of a checkpoint? k-NN and a fast linear probe: `python tools/evaluate.py CHECKPOINT...`"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# Started as a script, tools/ is first on the path; the repository's root belongs there, installed or not.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine import shell

EXAMPLE = """example:
  python tools/evaluate.py runs/b/checkpoints/step_00500000 --data data/imagenet --json scores.json"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition(":")[0], epilog=EXAMPLE, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="folders RUN/checkpoints/step_*, or RUN"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with shards in train/ and val/")
    parser.add_argument("--json", type=Path, help="write the scores there as well")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    return shell.run(lambda: evaluate(args.checkpoints, args.data, args.json), debug=args.debug)


def evaluate(checkpoints: list[Path], data: Path, out: Path | None) -> int:
    """Print, and perhaps write, the scores of every checkpoint; of a run, of its newest one.

    What can be known to be wrong is found before anything is computed.
    """
    from rich.console import Console
    from rich.text import Text

    from engine.evaluation.scores import score_checkpoint
    from engine.weights.export import find_checkpoint

    found = [find_checkpoint(path) for path in checkpoints]
    require_labels(data)
    if out:
        require_file_place(out)
    console, scores = Console(highlight=False, markup=False, soft_wrap=True), {}
    for checkpoint in found:
        with console.status(Text(f"features of {checkpoint}")):
            scores[str(checkpoint)] = score = score_checkpoint(checkpoint, data)
        console.print(f"{checkpoint}  k-NN {score['knn']:.2f} %  fast probe {score['probe']:.2f} %")
    if out:
        out.write_text(json.dumps(scores, indent=1) + "\n")
    return 0


def require_labels(data: Path) -> None:
    """ValueError where samples of `data`/train or `data`/val have no class."""
    from shards.dataset import open_dataset

    for part in ("train", "val"):
        dataset = open_dataset(data / part)
        unlabelled = int((dataset.label < 0).sum())
        if unlabelled:
            raise ValueError(
                f"--data={data}: data has no labels: {unlabelled:,} of {len(dataset):,} samples in {part}/ have no "
                "class, and both scores need one of every image; convert from class folders (tools/make_shards.py)"
            )


def require_file_place(out: Path) -> None:
    """Make the folder of `out`; ValueError where `out` itself is one."""
    if out.is_dir():
        raise ValueError(f"--json={out}: is a folder; name a file in it")
    out.parent.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    sys.exit(main())
