"""Case files: what the C++ sanitizer executables read, since a ThreadSanitizer library cannot be loaded into Python.

    python -m python_tests.support.case_files DIRECTORY [case ...]

One file per case, ``<name>.case``: the inputs under the names of the ops' schemas, the float64 truth rounded to fp32,
and the error budget. Little-endian, no padding:

    file    "KDACASE1"                          8 bytes
            uint32 entries
    entry   uint32 length, then the name        UTF-8, no terminator
            uint32 dtype                        as csrc/kda/dtype.h: 0 fp32, 1 fp16, 2 bf16; 3 float64, 4 int32, 5 int64
            uint32 rank
            int64  size of each dimension       row-major, contiguous
            uint64 bytes, then the data

Entries: ``q k v g beta do`` always, ``A_log dt_bias initial_state dfinal_state cu_seqlens`` where the case has them.
Scalars have rank 0: float64 ``scale``, ``lower_bound`` (absent: the unbounded gate), int64 ``use_qk_l2norm use_gate
use_beta_sigmoid allow_neg_eigval state_v_first chunk_size``. ``truth.NAME`` for NAME in o, final_state, h and the
gradients dq dk dv dg dbeta dA_log ddt_bias dinitial_state, each shaped like its argument and absent with it;
``budget.NAME`` is float64 [2]: the relative RMS error that is allowed, and the worst row (|row error| over the RMS norm
of the truth's rows). The cases are those of cases.py and bwd_cases.py.

Where K = V, the arguments of one decode_layer of three rows in the case's dtype, the second without a slot:
``layer.NAME`` for NAME in q k v g beta output_gate conv_state q_conv_weight k_conv_weight v_conv_weight norm_weight
state A_log dt_bias slot_of, and ``truth.layer_NAME budget.layer_NAME`` for NAME in o state conv_state: of every slot.
"""

from __future__ import annotations

import dataclasses
import struct
import sys
from pathlib import Path

import torch
from torch import Tensor

from . import accuracy, decode_layer_calls, oracle
from .bwd_cases import GRID, PEERS
from .cases import CASES, Case

MAGIC = b"KDACASE1"
ALL = CASES | GRID | PEERS
DTYPES = {
    torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3, torch.int32: 4, torch.int64: 5,
}  # fmt: skip


def entries(case: Case) -> dict[str, Tensor]:
    x = case.inputs()
    found: dict[str, Tensor] = {}
    for field in dataclasses.fields(x):
        value = getattr(x, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value
        elif isinstance(value, float):
            found[field.name] = torch.tensor(value, dtype=torch.float64)
        elif value is not None:
            found[field.name] = torch.tensor(int(value), dtype=torch.int64)
    rounded = accuracy.low_precision_reference(x)
    for name, truth in oracle.named(*oracle.gradients(x.double())).items():
        limits = accuracy.budget(case, name, rounded[name], truth)
        found[f"truth.{name}"] = truth.float()
        found[f"budget.{name}"] = torch.tensor([limits.rms, limits.worst_row], dtype=torch.float64)
    return found | (layer_entries(case) if case.key_dim == case.value_dim else {})


def layer_entries(case: Case) -> dict[str, Tensor]:
    slots = [2, -1, 0]
    x = decode_layer_calls.arguments("cpu", case.dtype, dim=case.key_dim, heads=case.heads, batch=3)
    in_row_order = x | {name: x[name][[2, 1, 0]] for name in ("conv_state", "state")}
    o, *after = decode_layer_calls.truth(in_row_order)
    o[1] = 0
    expected = {"o": o}
    for name, states in zip(("conv_state", "state"), after, strict=True):
        expected[name] = x[name].double()
        expected[name][[2, 0]] = states[[0, 2]]
    weights = dict(zip(("q_conv_weight", "k_conv_weight", "v_conv_weight"), x.pop("conv_weights"), strict=True))
    x |= weights | {"slot_of": torch.tensor(slots, dtype=torch.int32)}
    found = {f"layer.{name}": value for name, value in x.items() if value is not None}
    cap = accuracy.CAP[case.dtype]
    for name, value in expected.items():
        found[f"truth.layer_{name}"] = value.float()
        found[f"budget.layer_{name}"] = torch.tensor([cap, accuracy.ROW_FACTOR * cap], dtype=torch.float64)
    return found


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<I", len(tensors)))
        for name, x in tensors.items():
            encoded, data = name.encode(), x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            file.write(struct.pack("<I", len(encoded)) + encoded)
            file.write(struct.pack(f"<II{x.dim()}q", DTYPES[x.dtype], x.dim(), *x.shape))
            file.write(struct.pack("<Q", len(data)) + data)


def read(path: Path) -> dict[str, Tensor]:
    content = memoryview(path.read_bytes())
    if content[:8] != MAGIC:
        raise ValueError(f"{path} begins with {bytes(content[:8])!r}, expected {MAGIC!r}")
    at = 8

    def take(layout: str) -> tuple:
        nonlocal at
        values = struct.unpack_from("<" + layout, content, at)
        at += struct.calcsize("<" + layout)
        return values

    dtypes = {code: dtype for dtype, code in DTYPES.items()}
    tensors = {}
    for _ in range(*take("I")):
        (length,) = take("I")
        name = take(f"{length}s")[0].decode()
        code, rank = take("II")
        shape = take(f"{rank}q")
        (size,) = take("Q")
        data = torch.frombuffer(bytearray(take(f"{size}s")[0]), dtype=torch.uint8) if size else torch.empty(0)
        tensors[name] = data.view(dtypes[code]).reshape(shape) if size else torch.empty(shape, dtype=dtypes[code])
    return tensors


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or ALL:
        write(directory / f"{name}.case", entries(ALL[name]))


if __name__ == "__main__":
    main()
