"""Prints what a pyproject.toml asks for: `requirements.py pyproject.toml EXTRA...`."""

import sys
import tomllib
from pathlib import Path


def main(path: str, *extras: str) -> None:
    project = tomllib.loads(Path(path).read_text())["project"]
    for line in project["dependencies"]:
        print(line)
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            print(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
