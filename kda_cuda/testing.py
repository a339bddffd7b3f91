"""Runs the compiled kernels on the CPU, for tests: every kernel's own source, emulated thread by thread.

The library that does so is built by ``make test`` into ``build/emulator`` and is never part of the wheel.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from . import library, native, variants

_NAME = "libkda_cuda_emulated.so"
_ARCHS = {"80": (163, 0), "86": (99, 0), "90": (227, 1)}  # KB of shared memory per block, wgmma


def emulator_path() -> Path:
    """Where the emulated library is: KDA_CUDA_EMULATE_LIB, or ``build/emulator`` of the checkout."""
    given = os.environ.get("KDA_CUDA_EMULATE_LIB")
    return Path(given) if given else Path(__file__).parent.parent / "build" / "emulator" / _NAME


@functools.cache
def load_emulator() -> ctypes.CDLL:
    """Defines ``torch.ops.kda_cuda_emulated``. FileNotFoundError if the library was not built."""
    path = emulator_path()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: build it with `make emulator`, or set KDA_CUDA_EMULATE_LIB")
    library.define_namespace(library.NAMESPACE_EMULATED, None)
    torch.ops.load_library(str(path))
    variants.find_kernels(library.NAMESPACE_EMULATED)
    handle = ctypes.CDLL(str(path))
    native.register(library.NAMESPACE_EMULATED, handle)
    handle.kda_emulator_configure.argtypes = [ctypes.c_uint64, *[ctypes.c_int] * 4]
    return handle


@contextlib.contextmanager
def emulated(seed: int = 0, threads: int = 2, arch: str = "90", multiprocessors: int = 1) -> Iterator[None]:
    """Inside, the public functions serve CPU tensors with the emulated kernels, and raise where there is none.

    In this thread: another one asks for itself. How the emulator runs is set for all of them.

    Args:
        seed: 0 runs the threads of a block in order; any other number is a random schedule of its own.
        threads: OS threads that share the blocks of a grid.
        arch: which device to be: "80" (A100), "86" (99 KB of shared memory), "90" (Hopper: wgmma, and kernels of one
            op that are launched early run beside each other).
        multiprocessors: of that device; how work is divided depends on them.
    """
    handle = load_emulator()
    handle.kda_emulator_configure(seed, threads, *_ARCHS[arch], multiprocessors)
    take_record()
    before = variants.set_emulating(True)
    try:
        yield
    finally:
        variants.set_emulating(before)


def take_record() -> list[str]:
    """The kernels that ran since the last call, in order."""
    buffer = ctypes.create_string_buffer(1 << 20)
    load_emulator().kda_emulator_take_record(buffer, len(buffer))
    return buffer.value.decode().split()


if variants.emulating():  # KDA_CUDA_EMULATE=1
    load_emulator()
