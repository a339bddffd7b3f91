"""Builds the package: CMake + Ninja compile `_ops.so` (kernels, torch's stable ABI) and `_C` (build information).

Environment: KDA_CUDA_BUILD = auto | require | off, KDA_CUDA_ARCHS = auto | all | such as "80;90a", CUDA_HOME.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "kda_cuda" / "__init__.py").read_text())[1]
ALL_ARCHS = "80;90a;100;120"  # 80 serves 86 and 89, 100 serves 103
DEFAULT_ARCHS, OLDEST_ARCH = "80;90a", 80


def say(text: str) -> None:
    print(f"kda_cuda build: {text}", file=sys.stderr, flush=True)


def package_dir(name: str) -> Path | None:
    """A package's folder, also from within pip's isolated build, which hides the environment it installs into."""
    spec = importlib.util.find_spec(name)
    if spec and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    installed = Path(sysconfig.get_path("platlib")) / name
    return installed if installed.is_dir() else None


class Cuda:
    """The CUDA compiler and what belongs to it, wherever it comes from."""

    def __init__(self, home: Path, source: str):
        self.home, self.source = home, source
        self.nvcc = home / "bin" / "nvcc"
        self.include = home / "include"
        libraries = [home / d / "libcudart_static.a" for d in ("lib64", "lib", "targets/x86_64-linux/lib")]
        self.cudart = next((x for x in libraries if x.exists()), None)

    def problem(self) -> str | None:
        if not self.nvcc.exists():
            return f"no {self.nvcc}"
        if not (self.include / "cuda_runtime.h").exists():
            return f"no {self.include}/cuda_runtime.h"
        return None if self.cudart else f"no libcudart_static.a in {self.home}"

    def version(self) -> str:
        text = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        return re.search(r"release ([\d.]+)", text)[1]


def nvcc_home(nvcc: str) -> Path:
    """The toolkit behind an nvcc, which may be a wrapper script: nvcc itself says where it lives."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.M)
    return Path(found[1]).resolve() if found else Path(nvcc).resolve().parent.parent


def find_cuda() -> Cuda | None:
    """CUDA_HOME, then PATH, then the PyPI packages; says what was found and why not."""
    candidates = []
    if os.environ.get("CUDA_HOME"):
        candidates.append(Cuda(Path(os.environ["CUDA_HOME"]), "CUDA_HOME"))
    if nvcc := shutil.which("nvcc"):
        candidates.append(Cuda(nvcc_home(nvcc), "nvcc on PATH"))
    if (wheels := package_dir("nvidia")) and (wheels / "cu13").is_dir():
        candidates.append(Cuda(wheels / "cu13", "PyPI packages"))
    for cuda in candidates:
        problem = cuda.problem()
        say(f"{cuda.source}: {problem or f'CUDA {cuda.version()} in {cuda.home}'}")
        if not problem:
            return cuda
    say("no CUDA compiler: set CUDA_HOME, or install the PyPI packages that docs/install.md names")
    return None


def architectures(asked: str | None = None) -> str:
    """Compute capabilities to compile for, separated by semicolons: what KDA_CUDA_ARCHS asks for by default."""
    asked = os.environ.get("KDA_CUDA_ARCHS", "auto") if asked is None else asked
    if asked == "all":
        return ALL_ARCHS
    if asked == "auto":
        return ";".join(present_architectures()) or DEFAULT_ARCHS
    archs = list(dict.fromkeys(re.split(r"[;, ]+", asked.strip(";, "))))
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < OLDEST_ARCH:
            raise SystemExit(
                f"KDA_CUDA_ARCHS is {asked!r}, expected auto, all, or compute capabilities of {OLDEST_ARCH} or later "
                'such as "80;90a"'
            )
    return ";".join(archs)


def present_architectures() -> list[str]:
    """Those of this machine's GPUs, as far as there are kernels for them."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.split()
    present = sorted({int(line.replace(".", "")) for line in lines if re.fullmatch(r"\d+\.\d", line)})
    if too_old := [arch for arch in present if arch < OLDEST_ARCH]:
        say(f"no kernels for GPUs of compute capability {too_old}: they begin at {OLDEST_ARCH}")
    return ["90a" if arch == 90 else str(arch) for arch in present if arch >= OLDEST_ARCH]


def kernel_options(cuda: Cuda, torch: Path, archs: str) -> dict:
    """What csrc/kda/kernels.cmake and csrc/torch/ops.cmake want to know."""
    return {
        "KDA_BUILD_OPS": "ON",
        "KDA_NVCC": cuda.nvcc,
        "KDA_CUDART": cuda.cudart,
        "CUDA_INCLUDE": cuda.include,
        "KDA_ARCHS": archs,
        "TORCH_DIR": torch,
    }


class CMakeBuild(build_ext):
    def run(self) -> None:
        mode = os.environ.get("KDA_CUDA_BUILD", "auto")
        if mode not in ("auto", "require", "off"):
            raise SystemExit(f"KDA_CUDA_BUILD is {mode!r}, expected auto, require or off")
        out = ROOT / "kda_cuda" if self.inplace or self.editable_mode else Path(self.build_lib).resolve() / "kda_cuda"
        out.mkdir(parents=True, exist_ok=True)
        cuda = None if mode == "off" else find_cuda()
        torch = package_dir("torch")
        missing = "KDA_CUDA_BUILD=off" if mode == "off" else "no nvcc was found" if not cuda else None
        if not missing and not torch:
            missing = "torch is not installed"
        if missing and mode == "require":
            raise SystemExit(f"kda_cuda build: KDA_CUDA_BUILD=require, but {missing}")
        note = out / "_reference_only.txt"
        note.unlink(missing_ok=True)
        if missing:
            (out / "_ops.so").unlink(missing_ok=True)
            note.write_text(f"built without CUDA kernels ({missing}): every call runs the PyTorch reference\n")
            say(f"REFERENCE ONLY: {missing}; the package will have no CUDA kernels")
        self.compile(out, cuda if not missing else None, torch)

    def compile(self, out: Path, cuda: Cuda | None, torch: Path | None) -> None:
        archs, pybind11 = architectures(), package_dir("pybind11")
        if not pybind11:
            raise SystemExit("kda_cuda build: --no-build-isolation needs pybind11, cmake and ninja: pip install them")
        info = {"version": VERSION, "python": platform.python_version()}
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "KDA_OUTPUT": out,
            "KDA_BUILD_OPS": "OFF",
            "KDA_BUILD_PYTHON": "ON",
            "KDA_PYTHON": sys.executable,
            "PYTHON_INCLUDE": sysconfig.get_path("include"),
            "PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "PYBIND11_INCLUDE": pybind11 / "include",
        }
        if cuda:
            info.update(cuda=cuda.version(), architectures=archs.split(";"), torch_target="2.10")
            options.update(kernel_options(cuda, torch, archs))
            say(f"architectures {archs}")
        options["KDA_BUILD_INFO"] = json.dumps(info)
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(
            ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())], check=True
        )
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        subprocess.run(["cmake", "--build", build, "--parallel", jobs], check=True)

    def get_outputs(self) -> list[str]:
        return []


class PackagePy(build_py):
    """What a wheel must not carry over from an in-place build."""

    exclude = ("_ops.so", "_reference_only.txt")

    def find_data_files(self, package, src_dir):
        return [f for f in super().find_data_files(package, src_dir) if Path(f).name not in self.exclude]


class AnyPython(bdist_wheel):
    """One wheel for every Python: `_ops.so` needs none, and where `_C` is for another one it is left alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


def main() -> None:
    # For the Makefile and .ci/run, which build with CMake alone.
    if "--print-cuda-include" in sys.argv:
        found = find_cuda()
        print(found.include if found else "")
        sys.exit(0 if found else 1)
    if "--print-kernel-options" in sys.argv:
        cuda = find_cuda()
        if not cuda:
            raise SystemExit("kda_cuda build: no CUDA compiler was found")
        options = kernel_options(cuda, package_dir("torch"), architectures(sys.argv[-1]))
        print(*(f"'-D{k}={v}'" for k, v in options.items()), f"'-DKDA_OUTPUT={ROOT / 'build' / 'other-archs'}'")
        sys.exit(0)
    setup(
        version=VERSION,
        ext_modules=[Extension("kda_cuda._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "build_py": PackagePy, "bdist_wheel": AnyPython},
        distclass=BinaryDistribution,
        setup_requires=[] if package_dir("torch") or os.environ.get("KDA_CUDA_BUILD") == "off" else ["torch>=2.10"],
    )


if __name__ == "__main__":
    main()
