"""Our mathematics against the released programs' numbers: one test for each file in the folder that GOLDEN_DIR names.

What a file holds, golden_files.py reads; how it is checked is in the modules that golden_families.py lists.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_families import check, golden_paths
from golden_files import GOLDEN, Golden


@pytest.mark.parametrize("path", golden_paths(GOLDEN), ids=lambda path: path.name)
def test_numbers_are_the_released_ones(path: Path) -> None:
    check(Golden(path))
