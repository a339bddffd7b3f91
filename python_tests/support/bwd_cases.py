"""Cases of the chunkwise backward: named after a regime and a number of tokens, each such pair once.

Everything else is spread over them so that every two properties of a call meet in some case: ``PROPERTIES`` says which
properties, ``VALUES`` what each must be, and a test counts the pairs. All are small enough for the emulator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .cases import Case

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
REGIMES = {
    "fast": {"gate": "fast", "beta_sigmoid": True},
    "long": {"gate": "long", "beta_sigmoid": True},
    "violent": {"gate": "violent"},
    "steep": {"gate": "steep"},
    "zero": {"gate": "zero"},
    "collinear": {"gate": "zero", "keys": "collinear", "beta": 1.0, "forward_allowance": 5, "gradient_allowance": 10},
}
PACKED = {1: (0, 1, 0), 17: (4, 0, 13), 64: (0, 27, 37), 65: (64, 0, 1), 200: (70, 0, 130)}  # lengths of sequences

# regime, T, heads and sequences, states, V-first states, dtype, K, V, layout of inputs and of do, chunk_size
# states: i, an initial one; f, a gradient of the final one
_GRID = (
    ("fast", 1, "", "f", True, _FP16, 200, 72, "packed", "one", 32),
    ("fast", 17, "gva packed", "i", False, _FP16, 200, 40, "contiguous", "rows", 32),
    ("fast", 64, "gva", "if", False, _BF16, 64, 40, "transposed", "transposed", 32),
    ("fast", 65, "gva", "", True, _FP32, 60, 72, "contiguous", "dense", 64),
    ("fast", 200, "gva", "if", True, _FP32, 128, 64, "transposed", "one", 32),
    ("long", 1, "packed", "i", True, _FP16, 128, 40, "contiguous", "dense", 32),
    ("long", 17, "", "", True, _BF16, 64, 72, "packed", "rows", 32),
    ("long", 64, "gva packed", "if", True, _BF16, 256, 64, "contiguous", "one", 32),
    ("long", 65, "", "if", True, _BF16, 200, 64, "transposed", "dense", 64),
    ("long", 200, "gva", "f", False, _FP32, 256, 72, "transposed", "transposed", 64),
    ("violent", 1, "gva", "", True, _FP16, 256, 40, "packed", "rows", 32),
    ("violent", 17, "packed", "if", True, _FP32, 60, 64, "contiguous", "one", 32),
    ("violent", 64, "gva", "i", True, _FP16, 100, 64, "transposed", "rows", 64),
    ("violent", 65, "packed", "", False, _BF16, 100, 72, "packed", "transposed", 64),
    ("violent", 200, "packed", "f", True, _FP32, 64, 40, "transposed", "dense", 32),
    ("steep", 1, "gva packed", "f", False, _FP32, 100, 64, "transposed", "one", 32),
    ("steep", 17, "", "if", True, _FP16, 256, 40, "contiguous", "one", 64),
    ("steep", 64, "gva packed", "f", False, _FP32, 60, 64, "packed", "rows", 64),
    ("steep", 65, "gva", "i", True, _BF16, 256, 72, "packed", "dense", 32),
    ("steep", 200, "gva packed", "", False, _FP16, 60, 40, "packed", "transposed", 32),
    ("zero", 1, "gva", "i", False, _BF16, 60, 40, "transposed", "transposed", 64),
    ("zero", 17, "gva packed", "f", False, _BF16, 100, 40, "contiguous", "dense", 64),
    ("zero", 64, "packed", "", False, _FP32, 200, 64, "packed", "one", 64),
    ("zero", 65, "gva", "i", True, _FP16, 64, 72, "packed", "one", 64),
    ("zero", 200, "gva packed", "if", False, _BF16, 100, 64, "transposed", "rows", 32),
    ("collinear", 1, "gva", "if", True, _BF16, 64, 64, "contiguous", "one", 32),
    ("collinear", 17, "packed", "", True, _BF16, 128, 64, "transposed", "transposed", 64),
    ("collinear", 64, "", "if", False, _FP16, 128, 72, "packed", "dense", 64),
    ("collinear", 65, "", "f", True, _FP32, 128, 40, "contiguous", "rows", 32),
    ("collinear", 200, "packed", "i", False, _FP32, 200, 64, "contiguous", "transposed", 64),
)


def _case(regime, tokens, how, states, v_first, dtype, key_dim, value_dim, layout, do, chunk_size) -> Case:
    heads = 2 if tokens <= 65 and key_dim <= 128 else 1
    return Case(
        f"{regime}_{tokens}", tokens, heads=heads, value_heads=heads * (2 if "gva" in how else 1), key_dim=key_dim,
        value_dim=value_dim, dtype=dtype, lengths=PACKED[tokens] if "packed" in how else None,
        initial_state="i" in states, dfinal_state="f" in states, state_v_first=v_first, chunk_size=chunk_size,
        layout=layout, do=do, **REGIMES[regime],
    )  # fmt: skip


GRID = {case.name: case for case in (_case(*row) for row in _GRID)}


def regime_of(case: Case) -> str:
    return case.keys if case.keys in REGIMES else case.gate


def key_tile(case: Case) -> int:
    return next(tile for tile in (64, 128, 256) if case.key_dim <= tile)


PROPERTIES: dict[str, Callable[[Case], object]] = {
    "regime": regime_of,
    "tokens": lambda c: c.tokens,
    "grouped heads": lambda c: c.value_heads > c.heads,
    "packed": lambda c: c.lengths is not None,
    "states": lambda c: (c.initial_state, c.dfinal_state),
    "V first": lambda c: c.state_v_first,
    "dtype": lambda c: c.dtype,
    "K tile": key_tile,
    "K fills its tile": lambda c: c.key_dim == key_tile(c),
    "V modulo 64": lambda c: c.value_dim % 64,
    "layout": lambda c: c.layout,
    "do": lambda c: c.do,
    "chunk_size": lambda c: c.chunk_size,
}
_NO_OR_YES = (False, True)
VALUES: dict[str, tuple] = {
    "regime": tuple(REGIMES),
    "tokens": (1, 17, 64, 65, 200),
    "grouped heads": _NO_OR_YES,
    "packed": _NO_OR_YES,
    "states": tuple((initial, final) for initial in _NO_OR_YES for final in _NO_OR_YES),
    "V first": _NO_OR_YES,
    "dtype": (_BF16, _FP16, _FP32),
    "K tile": (64, 128, 256),
    "K fills its tile": _NO_OR_YES,
    "V modulo 64": (0, 8, 40),
    "layout": ("contiguous", "packed", "transposed"),
    "do": ("dense", "rows", "one", "transposed"),
    "chunk_size": (32, 64),
}

# ---- what peers got wrong: of every one, per sequence and worst token ------------------------------------------------

_PEERS = (
    Case("anchor_at_-5", 130, gate="at_the_bound", initial_state=True, dtype=_BF16),
    Case("anchor_at_-5_fp16", 64, gate="at_the_bound", heads=1, dtype=_FP16),
    Case("anchor_at_-5_fp32", 130, gate="at_the_bound", heads=1, key_dim=100, initial_state=True),
    Case("partial_last_chunks", 183, gate="long", beta_sigmoid=True, lengths=(70, 0, 65, 11, 37), heads=1,
         value_heads=2, initial_state=True, dtype=_BF16),
    Case("partial_last_chunks_fp32", 183, gate="zero", lengths=(70, 0, 65, 11, 37), heads=1, initial_state=True),
    Case("collinear_keys", 130, heads=1, value_heads=2, initial_state=True, dtype=_BF16,
         **{**REGIMES["collinear"], "gate": "mild"}),
    Case("collinear_keys_fp32", 130, heads=1, initial_state=True, **REGIMES["collinear"]),
    Case("repeated_keys_fp16", 70, heads=1, dtype=_FP16, **{**REGIMES["collinear"], "keys": "repeated"}),
    Case("heavy_tails", 130, gate="heavy_tailed", beta_sigmoid=True, initial_state=True, dtype=_BF16),
    Case("heavy_tails_fp32", 130, gate="heavy_tailed", beta_sigmoid=True, heads=1, value_heads=3, initial_state=True),
    Case("one_slow_channel", 130, gate="one_slow", initial_state=True, dtype=_BF16),
    Case("one_slow_channel_fp32", 200, gate="one_slow", heads=1, initial_state=True),
)  # fmt: skip
PEERS = {case.name: case for case in _PEERS}
