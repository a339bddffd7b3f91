"""Named cases: one for each thing that can go wrong, usable for every operation, on every device.

``CASES["tail_chunk"].inputs("cpu")`` gives the same numbers on every machine and in every dtype (rounded to it). All
are small enough for the emulator. Gate regimes ``fast`` and ``long`` are those of the benchmarks.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call under the names that the raw ops give them, and upstream gradients."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, HV, V]
    g: Tensor  # [B, T, HV, K]
    beta: Tensor  # [B, T, HV]
    A_log: Tensor | None  # [HV]
    dt_bias: Tensor | None  # [HV, K]
    initial_state: Tensor | None  # [N, HV, K, V] or [N, HV, V, K]
    cu_seqlens: Tensor | None
    scale: float
    use_qk_l2norm: bool
    use_gate: bool
    use_beta_sigmoid: bool
    allow_neg_eigval: bool
    lower_bound: float | None
    state_v_first: bool
    chunk_size: int
    do: Tensor  # like o
    dfinal_state: Tensor | None  # like the final state

    def replace(self, **changes) -> Inputs:
        return dataclasses.replace(self, **changes)

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: x for f in dataclasses.fields(self) if isinstance(x := getattr(self, f.name), Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        return self.replace(**{name: change(x) for name, x in self.tensors().items()})

    def to(self, where: str | torch.dtype) -> Inputs:
        """On another device, or with every floating tensor in another dtype."""
        cast = isinstance(where, torch.dtype)
        return self.map(lambda x: x if cast and not x.is_floating_point() else x.to(where))

    def double(self) -> Inputs:
        return self.to(torch.float64)

    def differentiable(self) -> dict[str, Tensor]:
        names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def common(self) -> tuple:
        """The arguments that all raw ops share, in their order."""
        names = [f.name for f in dataclasses.fields(self)]
        return tuple(getattr(self, name) for name in names[: names.index("chunk_size")])

    def fwd_args(self, output_chunk_states: bool = False) -> tuple:
        """Arguments of ``chunk_fwd`` and ``chunk``."""
        return (*self.common(), True, self.chunk_size, output_chunk_states)

    def bwd_args(self) -> tuple:
        return (self.do, self.dfinal_state, *self.common(), self.chunk_size)

    def public(self) -> dict:
        """Arguments of ``kda_cuda.chunk_kda``."""
        names = ("q", "k", "v", "g", "beta", "scale", "initial_state", "cu_seqlens", "lower_bound", "state_v_first",
                 "A_log", "dt_bias", "chunk_size", "allow_neg_eigval")  # fmt: skip
        return {
            **{name: getattr(self, name) for name in names},
            "use_qk_l2norm_in_kernel": self.use_qk_l2norm,
            "use_gate_in_kernel": self.use_gate,
            "use_beta_sigmoid_in_kernel": self.use_beta_sigmoid,
            "output_final_state": True,
        }

    def sequence_bounds(self) -> list[int]:
        return [0, self.q.shape[1]] if self.cu_seqlens is None else self.cu_seqlens.tolist()


def longer(x: Inputs, tail: int) -> Inputs:
    """``x`` with ``tail`` more tokens, which no sequence of its cu_seqlens has: NaN."""
    streams = {name: getattr(x, name) for name in ("q", "k", "v", "g", "beta", "do")}
    nan = {name: y.new_full((y.shape[0], tail, *y.shape[2:]), math.nan) for name, y in streams.items()}
    return x.replace(**{name: torch.cat([y, nan[name]], 1) for name, y in streams.items()})


class Draw:
    """Random numbers that are the same for every device and dtype."""

    def __init__(self, name: str):
        self._generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self._generator, dtype=torch.float64)

    def uniform(self, *size: int) -> Tensor:
        return torch.rand(*size, generator=self._generator, dtype=torch.float64)


# ---- gates: (draw, B, T, HV, K) -> g, A_log, dt_bias, lower_bound; the last three None where g is the log-decay ------


def gate_mild(d: Draw, *size: int):
    return -0.2 * d.uniform(*size), None, None, None


def gate_fast(d: Draw, *size: int):
    """Bounded at -5; mean log-decay -3.2 a token, no channel remembers for 16 tokens."""
    *_, heads, key_dim = size
    return d.normal(*size), d.uniform(heads), d.uniform(heads, key_dim), -5.0


def gate_long(d: Draw, *size: int):
    """Softplus at the released model's initialisation; two channels in three are slower than -0.152 a token."""
    *_, heads, key_dim = size
    dt = torch.exp(d.uniform(heads, key_dim) * (math.log(1e-1) - math.log(1e-3)) + math.log(1e-3))
    return 0.1 * d.normal(*size), (1 + 15 * d.uniform(heads)).log(), dt + torch.log(-torch.expm1(-dt)), None


def gate_violent(d: Draw, *size: int):
    """From no decay at all to e^-30000, token by token."""
    return -torch.exp(4 * d.normal(*size)), None, None, None


def gate_steep(d: Draw, *size: int):
    """Channels that are forgotten at once beside channels that remember everything."""
    return torch.where(d.uniform(*size) < 0.1, -1e4, -1e-3 * d.uniform(*size)), None, None, None


def gate_all_steep(d: Draw, *size: int):
    return torch.full(size, -1e4, dtype=torch.float64), None, None, None


def gate_zero(d: Draw, *size: int):
    return torch.zeros(size, dtype=torch.float64), None, None, None


def gate_negative_zero(d: Draw, *size: int):
    return -torch.zeros(size, dtype=torch.float64), None, None, None


def gate_nearly_none(d: Draw, *size: int):
    """So little decay that exp(g) rounds to 1 or to its neighbour."""
    return -1e-4 * torch.ones(size, dtype=torch.float64), None, None, None


def gate_bounded_plain(d: Draw, *size: int):
    """Bounded, with neither A_log nor dt_bias."""
    return 2 * d.normal(*size), None, None, -1.5


def gate_at_the_bound(d: Draw, *size: int):
    """Every channel loses e^5 a token: over a chunk of 64 e^320, which no single anchor holds."""
    return torch.full(size, -5.0, dtype=torch.float64), None, None, None


def gate_one_slow(d: Draw, *size: int):
    """The first channel remembers everything, beside channels that lose e^5 a token."""
    return torch.cat([-1e-3 * d.uniform(*size[:-1], 1), torch.full((*size[:-1], size[-1] - 1), -5.0)], -1), *[None] * 3


def gate_heavy_tailed(d: Draw, *size: int):
    """As violent, from e^0 to e^-30000, by a softplus: A_log has a gradient, a sum over tokens of every size."""
    *_, heads, key_dim = size
    decay = torch.exp(4 * d.normal(*size)).clamp(1e-4, 3e4)
    return decay + torch.log(-torch.expm1(-decay)), 0.1 * d.uniform(heads), 0.1 * d.uniform(heads, key_dim), None


GATES = {name.removeprefix("gate_"): function for name, function in list(globals().items()) if name.startswith("gate_")}

# ---- keys: (draw, B, T, H, K) -> k -----------------------------------------------------------------------------------


def keys_normal(d: Draw, *size: int):
    return d.normal(*size)


def keys_collinear(d: Draw, *size: int):
    """All but equal: powers of A_kk explode, its inverse does not."""
    return d.normal(size[0], 1, *size[2:]) + 1e-3 * d.normal(*size)


def keys_repeated(d: Draw, *size: int):
    """Exactly equal, in runs of five."""
    return d.normal(*size)[:, torch.arange(size[1]) // 5 * 5]


def keys_zero_rows(d: Draw, *size: int):
    """Every third key is zero."""
    return d.normal(*size) * (torch.arange(size[1]) % 3 != 0).reshape(-1, 1, 1)


def keys_negative_zero(d: Draw, *size: int):
    return torch.where(d.uniform(*size) < 0.3, -0.0, d.normal(*size))


KEYS = {name.removeprefix("keys_"): function for name, function in list(globals().items()) if name.startswith("keys_")}


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int
    batch: int = 1
    heads: int = 2
    value_heads: int | None = None  # default: heads
    key_dim: int = 64
    value_dim: int = 64
    dtype: torch.dtype = torch.float32
    gate: str = "mild"
    keys: str = "normal"
    beta: float | None = None  # all equal; None: uniform, or a normal logit with beta_sigmoid
    beta_sigmoid: bool = False
    neg_eigval: bool = False
    l2norm: bool = True
    lengths: tuple[int, ...] | None = None
    index_dtype: torch.dtype = torch.int32
    initial_state: bool = False
    state_v_first: bool = False
    scale: float | None = None
    chunk_size: int = 64
    wide_gate: bool = False  # g and beta fp32 beside a narrower q
    layout: str = "contiguous"  # or packed, expanded, transposed
    do: str = "dense"  # or rows, one, transposed
    dfinal_state: bool = True  # whether the loss depends on the final state
    forward_allowance: float = 1.0  # factors on the caps of accuracy.py (docs/mathematics.md, section 6)
    gradient_allowance: float = 1.0

    def __str__(self) -> str:
        return self.name

    def inputs(self, device: str = "cpu", dtype: torch.dtype | None = None) -> Inputs:
        dtype = dtype or self.dtype
        d = Draw(self.name)
        b, t, h, hv = self.batch, self.tokens, self.heads, self.value_heads or self.heads
        kd, vd = self.key_dim, self.value_dim
        if self.layout == "expanded":
            b = 1
        q, k, v = d.normal(b, t, h, kd), KEYS[self.keys](d, b, t, h, kd), d.normal(b, t, hv, vd)
        if not self.l2norm:
            q, k = q / math.sqrt(kd), k / k.norm(dim=-1, keepdim=True)
        g, A_log, dt_bias, lower_bound = GATES[self.gate](d, b, t, hv, kd)
        beta = self._beta(d, b, t, hv)
        sequences = self.batch if self.lengths is None else len(self.lengths)
        state = (sequences, hv, vd, kd) if self.state_v_first else (sequences, hv, kd, vd)
        initial_state, do, dfinal_state = d.normal(*state), d.normal(self.batch, t, hv, vd), d.normal(*state)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        gate_dtype = wide if self.wide_gate else dtype
        # the same streams at every strength of rounding: a float64 run sees what a bf16 kernel sees
        q, k, v, do = (x.to(dtype) for x in (q, k, v, do))
        g, beta = g.to(gate_dtype), beta.to(gate_dtype)
        A_log, dt_bias = (None if x is None else x.to(wide) for x in (A_log, dt_bias))
        cu_seqlens = None
        if self.lengths is not None:
            cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).to(self.index_dtype)
        # on their device before they are laid out: a copy to another device would be dense
        q, k, v, g, beta, do = (x.to(device) for x in (q, k, v, g, beta, do))
        q, k, v, g, beta = LAYOUTS[self.layout](self, q, k, v, g, beta)
        do, dfinal_state = DO_LAYOUTS[self.do](do), dfinal_state.to(wide) if self.dfinal_state else None
        inputs = Inputs(
            q, k, v, g, beta, A_log, dt_bias, initial_state.to(wide) if self.initial_state else None, cu_seqlens,
            self.scale or kd**-0.5, self.l2norm, A_log is not None or lower_bound is not None, self.beta_sigmoid,
            self.neg_eigval, lower_bound, self.state_v_first, self.chunk_size, do, dfinal_state,
        )  # fmt: skip
        return inputs.to(device)

    def _beta(self, d: Draw, *size: int) -> Tensor:
        if self.beta is not None:
            return torch.full(size, self.beta, dtype=torch.float64)
        return d.normal(*size) if self.beta_sigmoid else d.uniform(*size)


# ---- layouts: views that hold the same numbers -----------------------------------------------------------------------


def layout_contiguous(case: Case, *streams: Tensor) -> tuple[Tensor, ...]:
    return streams


def layout_packed(case: Case, q, k, v, g, beta) -> tuple[Tensor, ...]:
    """Rows of one projection: q | k | v side by side; g and beta in rows longer than they are."""
    packed = torch.cat([x.flatten(2) for x in (q, k, v)], -1)
    parts = packed.split([x.shape[2] * x.shape[3] for x in (q, k, v)], -1)
    q, k, v = (part.unflatten(-1, x.shape[2:]) for part, x in zip(parts, (q, k, v), strict=True))
    g = torch.cat([g, torch.full_like(g[..., :3], math.nan)], -1)[..., :-3]
    beta = torch.cat([beta, torch.full_like(beta, math.nan)], -1)[..., : beta.shape[-1]]
    return q, k, v, g, beta


def layout_expanded(case: Case, *streams: Tensor) -> tuple[Tensor, ...]:
    """One batch row seen several times, with stride zero."""
    return tuple(x.expand(case.batch, *x.shape[1:]) for x in streams)


def layout_transposed(case: Case, *streams: Tensor) -> tuple[Tensor, ...]:
    """Heads before tokens in memory, and channels not innermost."""
    q, k, v, g, beta = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in streams)
    return q, k.transpose(-1, -2).contiguous().transpose(-1, -2), v, g, beta


LAYOUTS = {
    name.removeprefix("layout_"): function for name, function in list(globals().items()) if name.startswith("layout_")
}

# How autograd may hand over do: `rows` is what a projection of a mean leaves, `one` what o.sum() leaves.
DO_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda do: do,
    "rows": lambda do: do[:1, :1, :1].expand_as(do),
    "one": lambda do: do[:1, :1, :1, :1].expand_as(do),
    "transposed": lambda do: do.transpose(1, 3).contiguous().transpose(1, 3),
}

_MODEL = {"beta_sigmoid": True}  # what layers ask for, with a gate that has parameters
_BF16, _FP16 = torch.bfloat16, torch.float16
_ALL = (
    # lengths
    Case("one_token", 1, initial_state=True),
    Case("two_tokens", 2, batch=3, initial_state=True, dtype=_BF16),
    Case("short_of_a_chunk", 63, dtype=_FP16),
    Case("one_chunk", 64, dtype=_BF16),
    Case("tail_of_one", 65, batch=2, dtype=_BF16),
    Case("tail_chunk", 150, initial_state=True, dtype=_BF16),
    Case("chunk_32", 70, chunk_size=32, initial_state=True, dtype=_FP16),
    Case("many_chunks", 400, heads=1, key_dim=32, value_dim=32, initial_state=True),
    # gates
    Case("fast", 130, gate="fast", key_dim=128, value_dim=128, dtype=_BF16, **_MODEL),
    Case("long_memory", 192, gate="long", key_dim=128, value_dim=128, initial_state=True, dtype=_BF16, **_MODEL),
    Case("violent", 150, gate="violent", dtype=_FP16),
    Case("steep", 150, gate="steep", initial_state=True, dtype=_BF16),
    Case("all_steep", 70, gate="all_steep", initial_state=True),
    Case("zero_gate", 100, gate="zero", initial_state=True, dtype=_BF16),
    Case("nearly_no_decay", 256, gate="nearly_none", heads=1, initial_state=True),
    Case("bounded_plain", 80, gate="bounded_plain", dtype=_FP16),
    Case("negative_eigenvalues", 150, gate="long", neg_eigval=True, initial_state=True, **_MODEL),
    # keys and write strengths
    Case("collinear", 130, gate="zero", keys="collinear", beta=1.0, forward_allowance=5, gradient_allowance=10),
    Case("collinear_bf16", 130, gate="mild", keys="collinear", beta=1.0, dtype=_BF16, forward_allowance=5,
         gradient_allowance=10),
    Case("reflections", 130, gate="zero", keys="collinear", beta=12.0, beta_sigmoid=True, neg_eigval=True,
         forward_allowance=20, gradient_allowance=50),
    Case("repeated_keys", 100, gate="zero", keys="repeated", beta=1.0, forward_allowance=5, gradient_allowance=10),
    Case("zero_rows", 70, keys="zero_rows", initial_state=True, dtype=_BF16),
    Case("negative_zero", 70, gate="negative_zero", keys="negative_zero"),
    Case("beta_zero", 70, beta=0.0, initial_state=True, dtype=_BF16),
    # dimensions
    Case("gva", 100, heads=2, value_heads=6, gate="long", initial_state=True, dtype=_BF16, **_MODEL),
    Case("dim_60", 100, key_dim=60, value_dim=60, initial_state=True, dtype=_BF16),
    Case("dim_100", 100, key_dim=100, value_dim=100, heads=1, value_heads=2),
    Case("dim_256", 100, key_dim=256, value_dim=256, heads=1, dtype=_BF16),
    Case("dim_3", 70, key_dim=3, value_dim=5, gate="fast", initial_state=True, **_MODEL),
    Case("wide_values", 70, value_dim=200, heads=1, dtype=_FP16),
    # sequences and states
    Case("varlen", 300, lengths=(0, 70, 0, 1, 64, 128, 37, 0), gate="long", initial_state=True, dtype=_BF16, **_MODEL),
    Case("varlen_v_first", 130, lengths=(3, 127), index_dtype=torch.int64, heads=1, value_heads=2, state_v_first=True,
         initial_state=True, chunk_size=32),
    Case("varlen_ones", 9, lengths=(1,) * 9, dtype=_BF16),
    Case("v_first", 90, key_dim=48, value_dim=36, state_v_first=True, initial_state=True, dtype=_FP16),
    # how the inputs come
    Case("no_l2norm", 100, l2norm=False, scale=1.7, initial_state=True),
    Case("fp32_gate", 100, gate="violent", wide_gate=True, dtype=_BF16),
    Case("packed", 100, batch=2, layout="packed", key_dim=60, gate="fast", dtype=_BF16, **_MODEL),
    Case("expanded", 70, batch=3, layout="expanded", initial_state=True),
    Case("transposed", 70, batch=2, layout="transposed", gate="long", dtype=_BF16, **_MODEL),
)  # fmt: skip
CASES = {case.name: case for case in _ALL}
