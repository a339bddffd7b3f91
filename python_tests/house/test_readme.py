"""What the documents say is true: examples run, numbers are those that were measured, names exist."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kda_cuda
from bench.python import accuracy_table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MODULES = [m.name for m in pkgutil.walk_packages(kda_cuda.__path__, "kda_cuda.") if "._" not in m.name]


def readme_examples() -> list[str]:
    """The Python blocks of the README."""
    return [piece.split("```")[0] for piece in README.split("```python\n")[1:]]


@pytest.mark.parametrize("number", range(len(readme_examples())))
def test_readme_example_runs(number):
    exec(compile(readme_examples()[number], f"README example {number}", "exec"), {"__name__": "readme"})


def test_readme_has_its_examples():
    op, serving, drafts, layer, decoding, kimi_linear = readme_examples()
    assert ".backward()" in op and len(op.splitlines()) <= 20
    assert "checkpoint_slots" in serving and "kda_cuda.commit(" in drafts
    assert "KimiDeltaAttention" in layer and "generate(" in decoding
    assert "from_pretrained(" in kimi_linear


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples_run(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


@pytest.mark.parametrize("function", [name for name in kda_cuda.__all__ if name not in ("__version__", "build_info")])
def test_public_functions_have_examples(function):
    """Run here: doctest.testmod does not look behind a decorator of another module."""
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(getattr(kda_cuda, function), function, module=False, globs={}):
        runner.run(example)
    assert runner.tries > 0 and runner.failures == 0


def test_readme_says_what_the_demo_measured():
    """Its numbers are those of bench/results/demo.json, and that run met its targets."""
    result = json.loads((ROOT / "bench/results/demo.json").read_text())
    cost = result["forgetful"] / result["bits_per_byte"] - 1
    assert result["bits_per_byte"] <= 0.60 * result["order0"] and cost >= 0.05
    for number in (result["bits_per_byte"], result["order0"], result["forgetful"]):
        assert f"{number:.3f}" in README
    assert f"{cost:+.1%}" in README and f"{result['difference']:.1e}" in README
    for row in result["cache_bytes"].values():
        assert " | ".join(f"{count:,}" for count in row.values()) in README


def test_readme_has_the_measured_accuracy():
    """The table is what `python -m bench.python.accuracy_table --markdown` prints."""
    rows = json.loads((ROOT / "bench/results/accuracy_reference.json").read_text())["rows"]
    assert accuracy_table.markdown(rows) in README


def test_make_targets_that_documents_name_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for document in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)", (ROOT / document).read_text(), re.M))
        assert {a or b for a, b in named} <= targets, document


def test_readme_names_the_packages_that_bring_nvcc():
    """Those of the extra ``nvcc``, as the Makefile installs them."""
    printed = subprocess.check_output([sys.executable, ROOT / "csrc/tools/nvcc_packages.py"], text=True)
    assert f"pip install {printed.strip()}`" in README


def test_readme_names_every_variable():
    """What the environment can say, at build time and at run time."""
    sources = [ROOT / "setup.py", *(ROOT / "kda_cuda").rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"environ[^\n]*?\"(KDA_CUDA_\w+)\"", path.read_text())}
    told = set(re.findall(r"KDA_CUDA_[A-Z]+", README))
    assert read - {"KDA_CUDA_EMULATE_LIB"} == told


def test_changelog_begins_with_this_version():
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == kda_cuda.__version__
