"""What the public functions share between their signatures and the ops: handling of arguments, and the call itself."""

from __future__ import annotations

import itertools
import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import variants
from .checks import (
    Checker,
    check_cu_seqlens,
    check_gate_parameters,
    check_initial_state,
    check_qkvgb,
    cu_seqlens_list,
    rows_contiguous,
)

CHUNK_KWARGS = ("A_log", "dt_bias", "chunk_size", "transpose_state_layout", "use_graph", "max_num_seqs",
                "deterministic")  # fmt: skip
RECURRENT_KWARGS = (
    "inplace_final_state", "num_accepted_tokens", "out", "ssm_state_indices", "transpose_state_layout",
)  # fmt: skip
CHUNK_SIZES = (32, 64)
DETERMINISTIC = (True, "batch_invariant")
_CASTABLE = (torch.float32, torch.float16, torch.bfloat16)


def take_kwargs(c: Checker, kwargs: dict, known: tuple[str, ...]) -> None:
    if not kwargs:
        return
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise c.type_error(f"got unexpected keyword arguments {unknown}, expected some of {sorted(known)}")


def state_layout(c: Checker, state_v_first: bool, kwargs: dict) -> bool:
    c.boolean("state_v_first", state_v_first)
    if "transpose_state_layout" not in kwargs:
        return state_v_first
    if state_v_first:
        raise c.value_error("got both state_v_first and transpose_state_layout, expected only state_v_first")
    old = kwargs["transpose_state_layout"]
    c.boolean("transpose_state_layout", old)
    if not torch.compiler.is_compiling():
        warnings.warn("transpose_state_layout is deprecated: use state_v_first", DeprecationWarning, stacklevel=3)
    return old


def needs_grad(c: Checker, *arguments: object) -> bool:
    """Whether autograd must see the call. Derivatives that the ops do not have are refused: they would be zero."""
    refuse_tangents(c, arguments)
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def refuse_tangents(c: Checker, arguments: tuple) -> None:
    """Forward-mode derivatives, and those of torch.func, pass torch's custom ops unseen."""
    if forward_ad._current_level >= 0:
        for x in arguments:
            if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
                raise c.not_implemented("an argument has a tangent, expected none: there is no forward-mode derivative")
    if torch._C._are_functorch_transforms_active():
        for x in arguments:
            if isinstance(x, Tensor) and is_tracked(x):
                raise c.not_implemented(
                    "an argument is differentiated by torch.func, expected by torch.autograd (grad or backward)"
                )


def is_tracked(x: Tensor) -> bool:
    """Whether a transform of torch.func differentiates by ``x``, at any level."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def contiguous(x: object) -> object:
    """A small tensor without gaps; anything else as it is, for the checks to refuse."""
    return x.contiguous() if isinstance(x, Tensor) else x


def under_autocast(q, k, v, g, beta) -> tuple:
    """q, k and v in the autocast dtype, as torch's own attention does; g and beta stay in it or become fp32."""
    if not isinstance(q, Tensor) or q.is_meta or not torch.is_autocast_enabled(q.device.type):
        return q, k, v, g, beta
    dtype = torch.get_autocast_dtype(q.device.type)

    def cast(x, to):
        return x.to(to) if isinstance(x, Tensor) and x.dtype in _CASTABLE else x

    q, k, v = (cast(x, dtype) for x in (q, k, v))
    g, beta = (x if isinstance(x, Tensor) and x.dtype == dtype else cast(x, torch.float32) for x in (g, beta))
    return q, k, v, g, beta


TRANSFORMS = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval")


def common_arguments(
    c: Checker, q, k, v, g, beta, A_log, dt_bias, scale, transforms: tuple, lower_bound, state_v_first, cu_seqlens,
    cu_seqlens_cpu=None, initial_state=None, padded: bool = False, **booleans,
) -> tuple:  # fmt: skip
    """All checks that the functions on sequences share; returns the arguments that their ops share.

    ``transforms``: the values of ``TRANSFORMS``. ``booleans``: other arguments, which must be bools. ``padded``: tokens
    may follow the last sequence."""
    q, k, v, g, beta = under_autocast(q, k, v, g, beta)
    check_qkvgb(c, q, k, v, g, beta)
    key_dim, value_heads = q.shape[3], v.shape[2]
    flags = dict(zip(TRANSFORMS, transforms, strict=True))
    for name, flag in (flags | {"state_v_first": state_v_first} | booleans).items():
        c.boolean(name, flag)
    if flags["allow_neg_eigval"] and not flags["use_beta_sigmoid_in_kernel"]:
        raise c.value_error("allow_neg_eigval is True and use_beta_sigmoid_in_kernel is False, expected both True")
    if flags["use_gate_in_kernel"]:
        A_log, dt_bias, lower_bound = check_gate_parameters(c, g, value_heads, key_dim, A_log, dt_bias, lower_bound)
    else:
        A_log = dt_bias = lower_bound = None
    if cu_seqlens is not None:
        check_cu_seqlens(c, q, cu_seqlens, cu_seqlens_cpu, padded)
        cu_seqlens = cu_seqlens.contiguous()
    elif cu_seqlens_cpu is not None:
        raise c.value_error("cu_seqlens is None and cu_seqlens_cpu is not, expected both or cu_seqlens alone")
    if initial_state is not None:
        check_initial_state(c, initial_state, q, v, cu_seqlens, state_v_first)
    scale = key_dim**-0.5 if scale is None else c.number("scale", scale)
    q, k, v, g = (rows_contiguous(x) for x in (q, k, v, g))
    return (q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, scale, *transforms, lower_bound, state_v_first)


def sequences_of(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Of a call with a tensor ``x`` ``[B, T, ...]``."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def state_sizes(k: Tensor, v: Tensor, v_first: bool) -> dict[str, int]:
    """The dimensions of one state by name, for ``k`` ``[B, T, H, K]`` and ``v`` ``[B, T, HV, V]``."""
    matrix = {"V": v.shape[3], "K": k.shape[3]} if v_first else {"K": k.shape[3], "V": v.shape[3]}
    return {"HV": v.shape[2], **matrix}


def batch_invariant(c: Checker, deterministic: bool | str) -> bool:
    """What ``deterministic`` asks for beyond the same bits from run to run, which are always given."""
    c.choice("deterministic", deterministic, DETERMINISTIC)
    return deterministic == "batch_invariant"


def in_inference_mode() -> bool:
    """torch.compile cannot see inference mode; without gradients a compiled graph runs as in it."""
    return not torch.is_grad_enabled() if torch.compiler.is_compiling() else torch.is_inference_mode_enabled()


def chunk_state_rows(c: Checker, cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None, chunk: int) -> int | None:
    """How many chunk states the sequences of cu_seqlens have; None without cu_seqlens, or where the op shall find out.

    A synchronisation where only the device knows, which a graph capture cannot have.
    """
    if cu_seqlens is None or torch.compiler.is_compiling():
        return None
    if cu_seqlens_cpu is None and cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        raise c.value_error("cu_seqlens_cpu is None during graph capture, expected it with return_intermediate_states")
    bounds = cu_seqlens_list(cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu)
    return sum((end - begin + chunk - 1) // chunk for begin, end in itertools.pairwise(bounds))


def run_chunk(
    c: Checker, common: tuple, output_final_state: bool, chunk_size: int = 64, keep_states: bool = False, rows=None,
    batch_invariant: bool = False,
):  # fmt: skip
    """o, final_state (None where not asked for) and the chunk states, with autograd if any input needs a gradient."""
    op = "chunk" if needs_grad(c, *common) else "chunk_fwd"
    arguments = (*common, output_final_state, chunk_size, keep_states, rows, batch_invariant)
    o, final_state, h = variants.run(op, "chunk_fwd", arguments)
    return o, final_state if output_final_state else None, h
