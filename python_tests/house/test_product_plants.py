"""Bugs are planted where the code is what it was; the product has no trace of them. sanitize.py looks for them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture(scope="module")
def product_plants():
    spec = importlib.util.spec_from_file_location("product_plants", CSRC / "tests" / "product_plants.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclass looks its class up
    spec.loader.exec_module(module)
    return module


def test_every_plant_is_a_choice_in_a_copy(product_plants):
    copies = product_plants.copies(CSRC)
    names = {plant.name for plant in product_plants.PLANTS}
    assert len(names) == len(product_plants.PLANTS) > 10
    chosen = [name for text in copies.values() for name in re.findall(r"planted == tests::Plant::(\w+)", text)]
    assert sorted(chosen) == sorted(names)
    assert copies.keys() == {"planted.h", *(plant.header for plant in product_plants.PLANTS)}
    for path in (CSRC / "kda").rglob("*.h"):
        assert "planted" not in path.read_text(), path


@pytest.mark.parametrize("change, times", [(lambda line: "", 0), (lambda line: f"{line}\n{line}", 2)])
def test_a_line_that_moved_is_refused(product_plants, tmp_path, change, times):
    plant = product_plants.PLANTS[0]
    shutil.copytree(CSRC / "kda", tmp_path / "kda")
    header = tmp_path / plant.header
    header.write_text(header.read_text().replace(plant.line, change(plant.line)))
    with pytest.raises(SystemExit, match=f"{plant.name}: {plant.header} has this {times} times, expected once: "):
        product_plants.copies(tmp_path)
