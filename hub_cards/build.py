"""`noiseopt hub` in a checkout that is not installed: `python hub_cards/build.py [ACTION ...]`, by default `build`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from noiseopt.cli import main

if __name__ == "__main__":
    main(["hub", *(sys.argv[1:] or ["build"])])
