"""Writes what follows from the worker's registry of models, or checks that it is up to date.

`python -m shoal.worker.generate` writes docs/models.md; `--check` writes nothing, prints what would
change and then exits with 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from shoal.api.generate import settle
from shoal.worker.model.table import models_page

MODELS_PATH = Path("docs/models.md")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shoal.worker.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a change")
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the repository's root")
    parsed = parser.parse_args(arguments)
    return settle(parsed.root, {MODELS_PATH: models_page()}, check=parsed.check)


if __name__ == "__main__":
    sys.exit(main())
