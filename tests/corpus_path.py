"""Puts the root of the repository on the path, for a script in tests/ that is run from anywhere: import it first."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
