"""What the public functions share: how they are checked and run, and the arguments that they have in common.

A public function is written as its checks: it returns a :class:`Call`, and runs nothing. :func:`public` makes of it the
function that users see, which runs the call; the checks alone stay reachable as ``function.bind``. A call with the
signature of an earlier one is not checked again: :mod:`kda_cuda.recipes`.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import library, variants
from .checks import (
    Checker,
    check_cu_seqlens,
    check_gate_parameters,
    check_initial_state,
    check_qkvgb,
    cu_seqlens_list,
    rows_contiguous,
)
from .recipes import Recipe, Recipes, recipe_of, signed
from .schemas import NAMESPACE_REFERENCE, Chunk, Inputs, raw_op

CHUNK_KWARGS = ("A_log", "dt_bias", "chunk_size", "transpose_state_layout", "use_graph", "max_num_seqs",
                "deterministic")  # fmt: skip
RECURRENT_KWARGS = (
    "inplace_final_state", "num_accepted_tokens", "out", "ssm_state_indices", "transpose_state_layout",
)  # fmt: skip
CHUNK_SIZES = (32, 64)
DETERMINISTIC = (True, "batch_invariant")
P = ParamSpec("P")
_CASTABLE = (torch.float32, torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """A checked call of a public function."""

    op: str  # with autograd where an input requires a gradient
    arguments: tuple  # of the op, by name
    owner: Tensor  # whose device and dtype decide who serves the op
    returned: Callable[[Any, Any], Any]  # from the op's arguments and results to the function's; refers to no tensor
    checker: Checker | None = None  # knows what a repetition must check; None: everything
    runner: Callable[[str, str], Callable] = library.runner  # from namespace and op to what runs it


def public(bind: Callable[P, Call]) -> Callable[P, Any]:
    """The function that checks its arguments by ``bind`` and runs the call that this returns."""
    recipes = Recipes()

    @functools.wraps(bind)
    def function(*args, **kwargs):
        if torch.compiler.is_compiling() or not (known := signed(args, kwargs)):
            return run(bind(*args, **kwargs))
        key, values = known
        recipe = recipes.get(key)
        if recipe:
            return recipe.run(values)
        call = bind(*args, **kwargs)
        results = run(call)
        if key not in recipes:
            recipes.keep(key, recipe_for(call, values))
        return results

    function.bind, function.recipes = bind, recipes
    return function


def recipe_for(call: Call, values: tuple) -> Recipe | None:
    """How the next call is run that has the signature of this one; None: like this one."""
    namespace, _ = variants.choose(raw_op(call.op), call.owner)
    if namespace == NAMESPACE_REFERENCE or call.runner is not library.runner:
        return None  # says each time why no kernel runs; exchanges with other ranks
    return recipe_of(call.checker, library.runner(namespace, call.op), call.arguments, values, call.returned)


def run(call: Call) -> Any:
    """Runs the op in the namespace that serves it."""
    raw, x = raw_op(call.op), call.owner
    namespace, reason = variants.choose(raw, x)
    if namespace == NAMESPACE_REFERENCE and x.device.type == "cuda":
        variants.warn_no_kernel(raw, reason)
    return call.returned(call.arguments, call.runner(namespace, call.op)(*call.arguments))


def as_it_is(_: Any, results: Any) -> Any:
    return results


def out(arguments: Any, _: Any) -> Any:
    """Of an op that writes into an argument of this name."""
    return arguments.out


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
    c.depends_on_more = True  # on who has been warned
    if not torch.compiler.is_compiling():
        warnings.warn("transpose_state_layout is deprecated: use state_v_first", DeprecationWarning, stacklevel=4)
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


class Transforms(NamedTuple):
    """What the ops do to their inputs, as the public functions name it."""

    use_qk_l2norm_in_kernel: bool
    use_gate_in_kernel: bool
    use_beta_sigmoid_in_kernel: bool
    allow_neg_eigval: bool


def common_arguments(
    c: Checker, q, k, v, g, beta, A_log, dt_bias, scale, transforms: Transforms, lower_bound, state_v_first, cu_seqlens,
    cu_seqlens_cpu=None, initial_state=None, **booleans,
) -> Inputs:  # fmt: skip
    """All checks that the functions on sequences share; returns the arguments that their ops share.

    ``booleans``: other arguments, which must be bools. ``initial_state`` is checked, and not returned."""
    q, k, v, g, beta = under_autocast(q, k, v, g, beta)
    check_qkvgb(c, q, k, v, g, beta)
    key_dim, value_heads = q.shape[3], v.shape[2]
    for name, flag in zip(transforms._fields, transforms, strict=True):
        c.boolean(name, flag)
    c.boolean("state_v_first", state_v_first)
    for name, flag in booleans.items():
        c.boolean(name, flag)
    if transforms.allow_neg_eigval and not transforms.use_beta_sigmoid_in_kernel:
        raise c.value_error("allow_neg_eigval is True and use_beta_sigmoid_in_kernel is False, expected both True")
    if transforms.use_gate_in_kernel:
        A_log, dt_bias, lower_bound = check_gate_parameters(c, g, value_heads, key_dim, A_log, dt_bias, lower_bound)
    else:
        A_log = dt_bias = lower_bound = None
    if cu_seqlens is not None:
        check_cu_seqlens(c, q, cu_seqlens, cu_seqlens_cpu)
        cu_seqlens = cu_seqlens.contiguous()
    elif cu_seqlens_cpu is not None:
        raise c.value_error("cu_seqlens is None and cu_seqlens_cpu is not, expected both or cu_seqlens alone")
    if initial_state is not None:
        check_initial_state(c, initial_state, q, v, cu_seqlens, state_v_first)
    return Inputs(
        q=rows_contiguous(q),
        k=rows_contiguous(k),
        v=rows_contiguous(v),
        g=rows_contiguous(g),
        beta=beta,
        A_log=A_log,
        dt_bias=dt_bias,
        cu_seqlens=cu_seqlens,
        scale=key_dim**-0.5 if scale is None else c.number("scale", scale),
        use_qk_l2norm=transforms.use_qk_l2norm_in_kernel,
        use_gate=transforms.use_gate_in_kernel,
        use_beta_sigmoid=transforms.use_beta_sigmoid_in_kernel,
        allow_neg_eigval=transforms.allow_neg_eigval,
        lower_bound=lower_bound,
        state_v_first=state_v_first,
    )


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
    c.depends_on_more = True  # on contents
    if cu_seqlens_cpu is None and cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        raise c.value_error("cu_seqlens_cpu is None during graph capture, expected it with return_intermediate_states")
    bounds = cu_seqlens_list(cu_seqlens if cu_seqlens_cpu is None else cu_seqlens_cpu)
    return sum((end - begin + chunk - 1) // chunk for begin, end in itertools.pairwise(bounds))


def chunk_call(
    c: Checker, x: Inputs, initial_state: Tensor | None, output_final_state: bool, *, chunk_size: int = 64,
    keep_states: bool = False, state_rows: int | None = None, batch_invariant: bool = False,
) -> Call:  # fmt: skip
    """Returns o and final_state (None where not asked for), and the chunk states where they are kept."""
    arguments = Chunk(
        **x._asdict(),
        initial_state=initial_state,
        output_final_state=output_final_state,
        chunk_size=chunk_size,
        output_chunk_states=keep_states,
        chunk_state_rows=state_rows,
        batch_invariant=batch_invariant,
    )

    def returned(_: Chunk, results: tuple[Tensor, Tensor, Tensor]) -> tuple:
        o, final_state, h = results
        final_state = final_state if output_final_state else None
        return (o, final_state, h) if keep_states else (o, final_state)

    return Call("chunk" if needs_grad(c, *arguments) else "chunk_fwd", arguments, x.q, returned, c)
