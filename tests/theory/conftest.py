"""The scripts of ``experiments/theory`` import each other by their bare names; so do these tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "theory"))
