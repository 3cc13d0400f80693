"""Prints the requirements of the named extras of pyproject.toml, one a line: `python tools/extras.py test lint`."""

import re
import sys
from pathlib import Path


def extras(names: list[str]) -> list[str]:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()  # tomllib needs Python 3.11
    section = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    requirements = dict(re.findall(r"^(\w+) = \[(.*)\]$", section, re.MULTILINE))
    return sorted({requirement.strip(' "') for name in names for requirement in requirements[name].split(",")})


if __name__ == "__main__":
    print("\n".join(extras(sys.argv[1:])))
