"""Ops that do nothing, with the schemas of kda_cuda's and through the same stable ABI: what any such op costs the host.

Their source is written from the schemas and compiled with the compiler of the machine, for CPU and CUDA tensors. An
empty op returns its first argument in the place of every result, so it allocates nothing.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

NAMESPACE = "kda_cuda_empty"
TYPES = {  # of a schema -> of the stable ABI
    "Tensor": "Tensor",
    "Optional[Tensor]": "std::optional<Tensor>",
    "float": "double",
    "Optional[float]": "std::optional<double>",
    "bool": "bool",
    "int": "int64_t",
    "Optional[int]": "std::optional<int64_t>",
}
HEAD = """#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <optional>
#include <tuple>
using torch::stable::Tensor;
"""


def source(schemas: dict[str, str]) -> str:
    functions, registered = [], []
    for name, schema in schemas.items():
        parsed = torch._C.parse_schema(f"{NAMESPACE}::{name}{schema}")
        first, *others = (
            "torch::headeronly::ScalarType" if "ScalarType" in str(a.real_type) else TYPES[str(a.type)]
            for a in parsed.arguments
        )
        results = len(parsed.returns)
        kind = "void" if not results else "Tensor" if results == 1 else f"std::tuple<{', '.join(['Tensor'] * results)}>"
        value = ("", "x", f"{{{', '.join('x' * results)}}}")[min(results, 2)]
        functions.append(f"static {kind} {name}({', '.join([f'{first} x', *others])}) {{ return {value}; }}")
        registered.append(f'  m.impl("{name}", TORCH_BOX(&{name}));')
    blocks = (
        "\n".join([f"STABLE_TORCH_LIBRARY_IMPL({NAMESPACE}, {key}, m) {{", *registered, "}"]) for key in ("CPU", "CUDA")
    )
    return "\n".join([HEAD, *functions, *blocks, ""])


def build(text: str, folder: Path) -> Path:
    """The library of a source, compiled where its text was never seen before."""
    torch_dir = Path(torch.__file__).parent
    name = hashlib.sha256((text + torch.__version__).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    path, written = folder / f"{name}.so", folder / f"{name}.{os.getpid()}.so"
    if not path.exists():
        (folder / f"{name}.cpp").write_text(text)
        command = [
            os.environ.get("CXX", "c++"),
            "-std=c++17",
            "-O2",
            "-fPIC",
            "-shared",
            "-w",
            f"-I{torch_dir}/include",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            folder / f"{name}.cpp",
            "-o",
            written,
            f"-L{torch_dir}/lib",
            "-Wl,--no-as-needed",
            "-ltorch_cpu",
            "-ltorch",
        ]
        subprocess.run([str(part) for part in command], check=True)
        written.replace(path)
    return path


@functools.cache
def load(folder: Path, *ops: str) -> Callable[[str], Callable]:
    """Compiles and loads the empty ops of these names; what is returned gives one by its name."""
    from kda_cuda.library import SCHEMAS

    schemas = {name: SCHEMAS[name] for name in ops}
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in schemas.items():
        library.define(name + schema)
    torch.ops.load_library(str(build(source(schemas), folder)))

    def op(name: str) -> Callable:
        assert library is not None  # it defines the ops for as long as it lives
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return op
