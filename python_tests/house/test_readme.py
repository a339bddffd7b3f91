"""What the documents say is true: examples run, numbers are those that were measured, names exist."""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import kda_cuda
from bench.python import accuracy_table
from kda_cuda.model import HybridConfig, HybridLM

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": (ROOT / "README.md").read_text()}
PAGES |= {f"docs/{path.name}": path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
RUN_ELSEWHERE = {"docs/mathematics.md": "test_documents.py", "docs/integrations.md": "python_tests/integrations"}
README = PAGES["README.md"]
MODULES = [m.name for m in pkgutil.walk_packages(kda_cuda.__path__, "kda_cuda.") if "._" not in m.name]


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and text of the code blocks of a page."""
    return re.findall(r"^```([\w{}-]+)\n(.*?)^```", text, re.M | re.S)


EXAMPLES = [
    pytest.param(page, code, id=f"{page}-{number}")
    for page, text in PAGES.items()
    for number, (language, code) in enumerate(blocks(text))
    if language == "python" and page not in RUN_ELSEWHERE
]


@pytest.fixture
def around(request, tmp_path):
    """What a page says before its examples: they run in this."""
    if request.node.callspec.params["page"] == "docs/kernels.md" and request.config.getoption("--no-emulator"):
        pytest.skip("--no-emulator")
    if request.node.callspec.params["page"] != "docs/parallel.md":
        yield {}
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
    g, beta = -q.abs(), q[..., 0].sigmoid()
    group, cu_seqlens = dist.group.WORLD, torch.tensor([0, 70, 100])
    model = HybridLM(HybridConfig(vocab_size=50, hidden_size=32, num_layers=4))
    tokens = torch.randint(50, (1, 100))
    yield {name: value for name, value in locals().items() if name not in ("request", "tmp_path")}
    dist.destroy_process_group()


@pytest.mark.parametrize(("page", "code"), EXAMPLES)
def test_example_runs(page, code, around):
    exec(compile(code, f"an example of {page}", "exec"), {"__name__": "example", **around})


def test_pages_have_their_examples():
    found = {page: "".join(p.values[1] for p in EXAMPLES if p.values[0] == page) for page in PAGES}
    assert ".backward()" in found["README.md"] and "KimiDeltaAttention" in found["README.md"]
    for word in ("checkpoint_slots", "kda_cuda.commit(", "decode_layer(", "workspace_size("):
        assert word in found["docs/serving.md"]
    assert "generate(" in found["docs/models.md"] and "from_pretrained(" in found["docs/models.md"]
    assert "build_cp_context(" in found["docs/parallel.md"] and "emulated(" in found["docs/kernels.md"]
    assert set(RUN_ELSEWHERE) <= set(PAGES)


def test_other_blocks_are_of_known_languages():
    """Those of C++ and CMake run in test_cpp_package.py; Sphinx, which builds the site, reads those in braces."""
    known = {"python", "sh", "{toctree}", "{eval-rst}"}
    others = {(page, language) for page, text in PAGES.items() for language, _ in blocks(text)}
    unknown = {pair for pair in others if pair[1] not in known}
    assert unknown == {("docs/kernels.md", "cpp"), ("docs/install.md", "cmake")}
    for text in PAGES.values():
        assert len(blocks(text)) == len(re.findall(r"^```$", text, re.M))


def test_programs_that_pages_start_exist():
    shell = [code for text in PAGES.values() for language, code in blocks(text) if language == "sh"]
    lines = "".join(shell).splitlines()
    assert len(lines) > 3
    for line in lines:
        module = re.search(r" -m ([\w.]+)", line)
        assert re.match(r"(make|pip install|python|torchrun|cmake) ", line), line
        assert not module or importlib.util.find_spec(module[1]), line


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


def test_what_the_demo_measured_is_told():
    """Numbers of the demo are those of bench/results/demo.json, and that run met its targets."""
    page = PAGES["docs/models.md"]
    result = json.loads((ROOT / "bench/results/demo.json").read_text())
    cost = result["forgetful"] / result["bits_per_byte"] - 1
    assert result["bits_per_byte"] <= 0.60 * result["order0"] and cost >= 0.05
    for number in (result["bits_per_byte"], result["order0"], result["forgetful"]):
        assert f"{number:.3f}" in page
    assert f"{cost:+.1%}" in page and f"{result['difference']:.1e}" in page
    for row in result["cache_bytes"].values():
        assert " | ".join(f"{count:,}" for count in row.values()) in page


def test_the_measured_accuracy_is_told():
    """The table is what `python -m bench.python.accuracy_table --markdown` prints."""
    rows = json.loads((ROOT / "bench/results/accuracy_reference.json").read_text())["rows"]
    assert accuracy_table.markdown(rows) in PAGES["docs/numerics.md"]


def test_figures_of_the_readme_were_measured():
    results = ROOT / "bench/results"
    rows = json.loads((results / "chunk_bwd_h200.json").read_text())["rows"]
    steps = [
        row["providers"]
        for row in rows
        if (row["form"], row["shape"], row["gradients"]) == ("fused", "T8192_H16_N1", "all")
    ]
    (ours, _), fla = (
        sorted(f"{step[name]['step']['gpu_us']['median'] / 1e3:.2f}" for step in steps) for name in ("kda_cuda", "fla")
    )
    assert f"takes {ours} ms for 8192 tokens and 16 heads" in README and f"takes {' to '.join(fla)} ms in" in README
    result = json.loads((results / "decode_fla_h100.json").read_text())
    labels = {"batch": 32, "heads": 32, "tokens": 1, "state": "fp32"}
    (row,) = (row for row in result["rows"] if labels.items() <= row.items())
    ours, fla = (row["providers"][name]["decode"]["gpu_us"]["median"] for name in ("kda_cuda", "fla"))
    copy = row["bytes"]["decode"] / (1e6 * result["copy_bandwidth_tb_s"])
    assert f"32 heads takes {ours:.0f} µs on one H100, and {fla:.0f} µs in flash" in README
    assert f"Copying as many bytes takes {copy:.0f} µs." in README


def test_what_two_gpus_bring_is_told():
    rows = json.loads((ROOT / "bench/results/several_gpus_h200x2.json").read_text())["rows"]
    of = {(row["tokens"], row["heads"], row["regime"]): row["kda_cuda"]["step"] for row in rows}
    share = {key: f"{step['us'] / step['one_gpu_us']:.2f}" for key, step in of.items()}
    page = PAGES["docs/parallel.md"]
    assert f"take {share[262144, 32, 'long']} to {share[262144, 32, 'fast']} of the time of one" in page
    assert f"{share[32768, 8, 'long']} to {share[32768, 8, 'fast']} times that time" in page


def test_make_targets_that_documents_name_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for document in ("CONTRIBUTING.md", *PAGES):
        named = set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)", (ROOT / document).read_text(), re.M))
        assert {a or b for a, b in named} <= targets, document


def test_the_packages_that_bring_nvcc_are_named():
    """Those of the extra ``nvcc``, as the Makefile installs them."""
    printed = subprocess.check_output([sys.executable, ROOT / "csrc/tools/nvcc_packages.py"], text=True)
    assert f"pip install {printed.strip()}`" in PAGES["docs/install.md"]


def test_every_variable_is_named():
    """What the environment can say, at build time and at run time."""
    sources = [ROOT / "setup.py", *(ROOT / "kda_cuda").rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"environ[^\n]*?\"(KDA_CUDA_\w+)\"", path.read_text())}
    told = set(re.findall(r"KDA_CUDA_[A-Z]+", PAGES["docs/install.md"]))
    assert read - {"KDA_CUDA_EMULATE_LIB"} == told


def test_changelog_begins_with_this_version():
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == kda_cuda.__version__
