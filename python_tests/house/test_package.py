"""The package as it is built, installed and imported: linkage, missing parts, the search for a compiler, the wheel."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import kda_cuda
from kda_cuda.build_info import ops_library

ROOT = Path(__file__).parents[2]
needs_ops = pytest.mark.skipif(ops_library() is None, reason="reference-only install: there is no _ops.so")


def load_setup():
    """setup.py as a module: it builds only where it is the program."""
    spec = importlib.util.spec_from_file_location("kda_cuda_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- linkage ---------------------------------------------------------------------------------------------------------


def imported_symbols(library: Path) -> set[str]:
    """What a library takes from others, weak symbols left out: those may stay unresolved."""
    lines = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1] for line in lines if re.match(r"\s+U ", line)}


def foreign(symbols: set[str]) -> set[str]:
    """Those that come neither from a versioned system library nor from torch's C shim."""
    return {s for s in symbols if "@" not in s and not re.match(r"(aoti_torch|torch)_[a-z0-9_]+$", s)}


@needs_ops
def test_ops_use_torch_through_its_c_shim_and_no_python():
    symbols = imported_symbols(ops_library())
    assert not {s for s in symbols if s.lstrip("_").startswith("Py")}
    assert foreign(symbols) == set()
    assert "aoti_torch_library_init_impl" in symbols


def test_other_symbols_would_be_noticed():
    symbols = imported_symbols(Path(torch.__file__).parent / "lib" / "libtorch_python.so")
    assert any(s.startswith("Py") for s in foreign(symbols)) and any(s.startswith("_ZN2at") for s in foreign(symbols))


@needs_ops
def test_ops_link_cuda_statically():
    dynamic = subprocess.run(["readelf", "-d", ops_library()], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"Shared library: \[([^\].]+)", dynamic))
    assert {"libtorch", "libtorch_cpu"} <= needed
    assert needed <= {"libtorch", "libtorch_cpu", "libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64"}


@needs_ops
def test_build_info():
    info = kda_cuda.build_info()
    assert info["c_extension"] and info["ops"] == str(ops_library())
    assert info["version"] == kda_cuda.__version__ and info["torch_target"] == "2.10"
    kernels = {(row["kernel"].split("<")[0], row["arch"]) for row in info["kernels"]}
    assert {arch for _, arch in kernels} == set(info["architectures"])
    assert {"kda_gate_fwd_kernel", "kda_gate_bwd_kernel"} <= {name for name, _ in kernels}
    for row in info["kernels"]:
        assert 0 < row["registers"] <= 255 and {"spill_store_bytes", "static_shared_bytes"} <= set(row)


# ---- parts that are missing ------------------------------------------------------------------------------------------


@pytest.fixture
def copy_of_package(tmp_path) -> Path:
    """The package without ``_C``, the compiled ops linked into it."""
    package = tmp_path / "kda_cuda"
    shutil.copytree(ROOT / "kda_cuda", package, ignore=shutil.ignore_patterns("*.so", "_reference_only.txt", "__pyc*"))
    if ops_library():
        (package / "_ops.so").symlink_to(ops_library())
    return package


USE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f)]  # it finds missing parts in the checkout
import json, torch, kda_cuda
from kda_cuda import variants
x = torch.randn(1, 70, 2, 16)
o = kda_cuda.chunk_kda(x, x, x, -x.abs(), x[..., 0], use_qk_l2norm_in_kernel=True)[0]
print(json.dumps({"where": kda_cuda.__file__, "info": kda_cuda.build_info(), "sum": o.sum().item(),
                  "kernels": sorted(variants.kernels("kda_cuda"))}))
"""


def run_python(code: str, package: Path, **environment: str) -> tuple[dict, str]:
    """What the code prints as JSON, and its standard error, with ``package`` the one that is found."""
    environment = {**os.environ, "PYTHONPATH": str(package.parent), "KDA_CUDA_EMULATE": "0", **environment}
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env=environment,
        cwd=package.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["where"] == str(package / "__init__.py")
    return result, done.stderr


@needs_ops
def test_ops_load_without_the_c_extension(copy_of_package):
    result, errors = run_python(USE, copy_of_package)
    assert result["info"]["ops"] and not result["info"]["c_extension"]
    assert "_C" in result["info"]["c_extension_error"]
    assert {"chunk_fwd", "kda_gate_fwd", "kda_gate_bwd"} <= set(result["kernels"])
    assert "kda_cuda" not in errors


@needs_ops
def test_ops_load_beside_a_c_extension_of_another_python(copy_of_package):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (copy_of_package / f"_C{suffix}").write_bytes(b"not for this Python")
    result, errors = run_python(USE, copy_of_package)
    assert not result["info"]["c_extension"] and result["info"]["c_extension_error"] and result["kernels"]
    assert "kda_cuda" not in errors


def test_a_reference_only_package_works_and_says_so_once(copy_of_package):
    (copy_of_package / "_ops.so").unlink(missing_ok=True)
    (copy_of_package / "_reference_only.txt").write_text("built without CUDA kernels (no nvcc was found): slow\n")
    result, errors = run_python(USE + "from kda_cuda import layers\n", copy_of_package)
    assert errors.count("kda_cuda: built without CUDA kernels (no nvcc was found)") == 1
    assert result["info"]["ops"] is None and result["kernels"] == [] and result["sum"]
    _, errors = run_python(USE, copy_of_package, KDA_CUDA_QUIET="1")
    assert "built without" not in errors


# ---- setup.py --------------------------------------------------------------------------------------------------------


def toolkit(home: Path, release: str, leave_out: str = "") -> Path:
    """A CUDA toolkit as far as setup.py looks."""
    files = {"include/cuda_runtime.h": "", "lib64/libcudart_static.a": ""}
    files["bin/nvcc"] = f'#!/bin/sh\necho "#\\$ TOP={home}" >&2\necho "Cuda compilation tools, release {release}, V1"\n'
    for name, text in files.items():
        if name != leave_out:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_text(text)
            (home / name).chmod(0o755)
    return home


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a toolkit in CUDA_HOME, a wrapper of another one on PATH, and one from PyPI."""
    setup = load_setup()
    toolkit(tmp_path / "home", "13.1")
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec "{toolkit(tmp_path / "on_path", "12.9")}/bin/nvcc" "$@"\n')
    wrapper.chmod(0o755)
    toolkit(tmp_path / "site" / "nvidia" / "cu13", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(setup, "package_dir", lambda name: tmp_path / "site" / name)
    monkeypatch.setattr(setup, "root", tmp_path, raising=False)
    return setup


def test_compiler_of_cuda_home_first_then_path_then_pypi(machine, monkeypatch, capsys):
    found = []
    for take_away in (lambda: None, lambda: monkeypatch.delenv("CUDA_HOME"),
                      lambda: monkeypatch.setenv("PATH", "/usr/bin:/bin"),
                      lambda: monkeypatch.setattr(machine, "package_dir", lambda name: None)):  # fmt: skip
        take_away()
        cuda = machine.find_cuda()
        found.append(cuda and (cuda.source, cuda.home.name, cuda.version()))
    assert found == [
        ("CUDA_HOME", "home", "13.1"), ("nvcc on PATH", "on_path", "12.9"), ("PyPI packages", "cu13", "13.0"), None,
    ]  # fmt: skip
    said = capsys.readouterr().err
    assert f"CUDA_HOME: CUDA 13.1 in {machine.root / 'home'}" in said
    assert "no CUDA compiler: set CUDA_HOME, or install the PyPI packages" in said


@pytest.mark.parametrize("missing", ["bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart_static.a"])
def test_an_incomplete_toolkit_is_refused_with_its_reason(missing, machine, capsys):
    (machine.root / "home" / missing).unlink()
    assert machine.find_cuda().source == "nvcc on PATH"
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("kda_cuda build: CUDA_HOME: no ") and Path(missing).name in said[0]
    assert said[1] == f"kda_cuda build: nvcc on PATH: CUDA 12.9 in {machine.root / 'on_path'}"


def nvidia_smi(folder: Path, *capabilities: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo {x}\n" for x in capabilities))
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("present", "archs"),
    [([], "80;90a"), (["9.0", "9.0"], "90a"), (["8.6", "12.0", "8.0"], "80;86;120"), (["7.5"], "80;90a"),
     (["No devices were found"], "80;90a")],
    ids=str,
)  # fmt: skip
def test_auto_architectures_are_those_of_the_machine(present, archs, machine, monkeypatch, capsys):
    monkeypatch.setenv("KDA_CUDA_ARCHS", "auto")
    nvidia_smi(machine.root / "bin", *present)
    assert machine.architectures() == archs
    assert ("no kernels for GPUs of compute capability [75]" in capsys.readouterr().err) == (present == ["7.5"])


@pytest.mark.parametrize(
    ("asked", "archs"),
    [("all", "80;90a;100;120"), ("90a", "90a"), ("80,90a", "80;90a"), ("80 90a;80;", "80;90a"), ("100f", "100f")],
)
def test_asked_architectures(asked, archs, monkeypatch):
    monkeypatch.setenv("KDA_CUDA_ARCHS", asked)
    setup = load_setup()
    assert setup.architectures() == archs
    monkeypatch.delenv("KDA_CUDA_ARCHS")
    assert setup.architectures(asked) == archs, "as make core asks"


@pytest.mark.parametrize("asked", ["", "hopper", "9.0", "75", "80;sm_90a", "native"])
def test_bad_architectures(asked, monkeypatch):
    monkeypatch.setenv("KDA_CUDA_ARCHS", asked)
    with pytest.raises(SystemExit) as refused:
        load_setup().architectures()
    assert str(refused.value) == (
        f"KDA_CUDA_ARCHS is {asked!r}, expected auto, all, or compute capabilities of 80 or later such as \"80;90a\""
    )  # fmt: skip


def test_without_a_compiler_there_are_no_options_of_kernels(monkeypatch):
    setup = load_setup()
    monkeypatch.setattr(setup, "find_cuda", lambda: None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--print-kernel-options", "all"])
    with pytest.raises(SystemExit, match="no CUDA compiler was found"):
        setup.main()


# ---- the whole build -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of the checkout, with what an earlier build in place left behind."""
    copy = tmp_path_factory.mktemp("checkout") / "kda_cuda"
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", "*.egg-info", "demo_out", "train_out")
    shutil.copytree(ROOT, copy, ignore=left_out)
    (copy / "kda_cuda" / "_ops.so").write_bytes(b"of an earlier build")
    return copy


def build_wheel(sources: Path, out: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", out, sources]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(command, env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True)


def test_wheel_without_kernels(sources, tmp_path):
    done = build_wheel(sources, tmp_path, KDA_CUDA_BUILD="off")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kda_cuda build: REFERENCE ONLY: KDA_CUDA_BUILD=off" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("kda_cuda-*.whl")
    assert re.fullmatch(rf"kda_cuda-{re.escape(kda_cuda.__version__)}-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        for licence in ("LICENSE", "csrc/package/THIRD_PARTY_NOTICES.txt"):
            (name,) = (name for name in archive.namelist() if name.endswith(f".dist-info/licenses/{licence}"))
            assert archive.read(name) == (ROOT / licence).read_bytes()
        archive.extractall(tmp_path / "site")
    own = {str(p.relative_to(ROOT)) for p in (ROOT / "kda_cuda").rglob("*.py")}
    extension = {name for name in names if name.startswith("kda_cuda/_C.")}
    assert len(extension) == 1 and names == own | extension | {"kda_cuda/_reference_only.txt"}
    result, errors = run_python(USE, tmp_path / "site" / "kda_cuda")
    assert errors.count("built without CUDA kernels (KDA_CUDA_BUILD=off)") == 1
    assert result["info"]["c_extension"] and result["info"]["ops"] is None and result["kernels"] == []
    assert result["info"]["version"] == kda_cuda.__version__


def test_source_distribution_is_the_whole_project(sources, tmp_path):
    """Sources, tests, benchmarks and documents, and nothing that an earlier build left."""
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=sources, check=True, capture_output=True)
    (archive,) = tmp_path.glob("kda_cuda-*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    folders = (".ci", "bench", "csrc", "docs", "findings", "python_tests")
    needed = {p.relative_to(ROOT) for f in folders for p in (ROOT / f).rglob("*") if p.is_file() and p.suffix != ".pyc"}
    needed |= {p.relative_to(ROOT) for p in (ROOT / "kda_cuda").rglob("*.py")}
    needed |= {p.relative_to(ROOT) for p in ROOT.glob("*.*") if p.suffix in (".md", ".py", ".toml", ".txt")}
    needed |= {Path(name) for name in ("LICENSE", "Makefile", ".clang-format")}
    assert {str(path) for path in needed} <= packed
    assert not [name for name in packed if name.endswith((".so", ".pyc"))]


@pytest.mark.parametrize(
    ("environment", "message"),
    [({"KDA_CUDA_BUILD": "yes"}, "KDA_CUDA_BUILD is 'yes', expected auto, require or off"),
     ({"KDA_CUDA_BUILD": "off", "KDA_CUDA_ARCHS": "70"}, "KDA_CUDA_ARCHS is '70', expected auto, all, or"),
     ({"KDA_CUDA_BUILD": "require", "PATH": "/usr/bin:/bin", "CUDA_HOME": "/nowhere"},
      "KDA_CUDA_BUILD=require, but no nvcc was found")],
    ids=["mode", "architectures", "require"],
)  # fmt: skip
def test_a_build_that_cannot_be_is_refused(environment, message, sources, tmp_path):
    done = build_wheel(sources, tmp_path, **environment)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))
