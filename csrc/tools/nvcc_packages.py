"""Prints the PyPI packages that bring nvcc, as pyproject.toml's extra `nvcc` lists them."""

import re
from pathlib import Path

text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
print(*re.findall(r'"([^"]+)"', re.search(r"^nvcc = \[(.*?)\]", text, re.M | re.S)[1]))
