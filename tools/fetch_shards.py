"""Fetch shards from a URL into the local cache, as `data.train=URL` would before the first step.

For machines that train without a network, and for several nodes: run it once on each, then start the training.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Started as a script, tools/ is first on the path; the repository's root belongs there, installed or not.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine import shell

EXAMPLE = """example:
  python tools/fetch_shards.py https://example.org/imagenet/train
  srun --ntasks-per-node=1 python tools/fetch_shards.py s3://bucket/imagenet/train --cache /local/shards"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=EXAMPLE, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("url", help="folder of shards that tools/make_shards.py made: http, https, s3, ... (fsspec)")
    parser.add_argument("--cache", default="", metavar="DIR", help="as data.cache; default: ~/.cache/maskwright/shards")
    parser.add_argument("--tries", type=int, default=5, metavar="N", help="times that a file is asked for (default: 5)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args()
    return shell.run(lambda: fetch(args.url, args.cache, args.tries), debug=args.debug)


def fetch(url: str, cache: str, tries: int) -> int:
    """Fetch, and print the folder, which `data.train=` takes too."""
    from shards import remote

    if not remote.is_url(url):
        raise ValueError(f"URL={url}: is no URL; a folder is used where it is, by data.train={url}")
    if tries < 1:
        raise ValueError(f"--tries={tries}: at least 1 is needed")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    print(remote.fetch(url, remote.cache_folder(cache), setting="URL", tries=tries, say=say))
    return 0


if __name__ == "__main__":
    sys.exit(main())
