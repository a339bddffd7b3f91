"""The public functions. Signatures and semantics are those of flash-linear-attention, so that models need no change."""

from __future__ import annotations

import torch
from torch import Tensor

from . import calls, decoding
from .checks import FLOAT_DTYPES, Checker, check_gate_parameters
from .context_parallel.chunk import chunk_call as chunk_call_on_ranks
from .context_parallel.context import route_of, sequences_of_context
from .schemas import Gate

__all__ = ["chunk_kda", "fused_recurrent_kda", "kda_gate"]


@calls.public
def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: object | None = None,
    **kwargs,
):
    r"""Kimi Delta Attention over whole sequences, in chunks, with gradients.

    For each head, with a state :math:`S \in R^{K \times V}` (Kimi Linear report, arXiv 2510.26692, section 3):

    .. math:: S_t = (I - \beta_t k_t k_t^T) Diag(e^{g_t}) S_{t-1} + \beta_t k_t v_t^T, \quad o_t = scale \, S_t^T q_t

    Args:
        q, k: ``[B, T, H, K]``, K <= 256; fp32, fp16 or bf16 (float64 on the CPU).
        v: ``[B, T, HV, V]``, HV a multiple of H; dtype of q.
        g: ``[B, T, HV, K]``, log-decay <= 0, or its pre-activation with ``use_gate_in_kernel``; dtype of q or fp32.
        beta: ``[B, T, HV]``, write strength, or its logit with ``use_beta_sigmoid_in_kernel``; dtype of q or fp32.
        scale: factor of the output; default ``K ** -0.5``.
        initial_state: fp32 ``[N, HV, K, V]`` (``[N, HV, V, K]`` with ``state_v_first``); N is B, or the sequences of
            ``cu_seqlens``. Default: zero.
        output_final_state: return the state after the last token; for an empty sequence the initial state.
        use_qk_l2norm_in_kernel: ``x * rsqrt(sum x^2 + 1e-6)`` on q and k.
        use_gate_in_kernel: ``g = -exp(A_log) softplus(g + dt_bias)``, or with ``lower_bound``
            ``g = lower_bound sigmoid(exp(A_log) (g + dt_bias))``.
        use_beta_sigmoid_in_kernel: ``beta = sigmoid(beta)``; ``allow_neg_eigval`` doubles it.
        safe_gate: accepted, changes nothing: every gate is safe here.
        lower_bound: negative; selects the bounded gate.
        disable_recompute: accepted, changes nothing: only inputs are kept for the backward.
        return_intermediate_states: also return ``h``, the state before every chunk, ``[B, ceil(T / chunk_size), HV, K,
            V]`` in the dtype of k (``[1, chunks of all sequences, ...]`` with cu_seqlens). Only in inference mode.
        cu_seqlens: ``[N + 1]`` int32 or int64: B = 1 and sequence n is tokens ``cu_seqlens[n]`` to ``cu_seqlens[n+1]``.
            Tokens after the last sequence are padding: whatever they hold, their outputs and gradients are zero.
        cu_seqlens_cpu: the same on the CPU; its contents are then checked without a synchronisation.
        cp_context: of :func:`kda_cuda.parallel.build_cp_context`, or of flash-linear-attention's: the tokens are this
            rank's of sequences that lie on several ranks, B = 1. The context has the sequences, so cu_seqlens is None
            or the context's. States are those of the local sequences: the initial state of one that began on an
            earlier rank is not used, the final state of one that goes on is that after the local tokens. Every rank of
            the group calls, and differentiates, in the same order. Gradients of ``A_log`` and ``dt_bias`` are this
            rank's share: they add up over the ranks.
        **kwargs: ``A_log`` fp32 ``[HV]`` and ``dt_bias`` fp32 ``[HV * K]`` of the gate; ``chunk_size`` 64 or 32;
            ``use_graph`` and ``max_num_seqs`` are accepted; ``transpose_state_layout`` is the deprecated name of
            ``state_v_first``; ``deterministic="batch_invariant"``: the bits that the forward gives a sequence do not
            depend on what it is batched with, and no sequence is split into segments that run at once (from run to
            run they are always the same).

    Returns:
        ``(o, final_state)``, or ``(o, final_state, h)``: o ``[B, T, HV, V]`` in the dtype of v, final_state fp32 or
        None.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. Nothing has run then.
        NotImplementedError: a derivative by forward mode or by torch.func is asked for; there is that by
            torch.autograd, the first one.

    Example:
        >>> import torch, kda_cuda
        >>> q, k, v = (torch.randn(1, 100, 2, 64, requires_grad=True) for _ in range(3))
        >>> g, beta = -torch.rand(1, 100, 2, 64), torch.rand(1, 100, 2)
        >>> o, state = kda_cuda.chunk_kda(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, output_final_state=True)
        >>> o.sum().backward()
        >>> o.shape, state.shape
        (torch.Size([1, 100, 2, 64]), torch.Size([1, 2, 64, 64]))
    """
    c = Checker("chunk_kda")
    calls.take_kwargs(c, kwargs, calls.CHUNK_KWARGS)
    state_v_first = calls.state_layout(c, state_v_first, kwargs)
    transforms = calls.Transforms(
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval
    )
    if cp_context is not None:
        route = route_of(c, cp_context)
        cu_seqlens, cu_seqlens_cpu = sequences_of_context(c, cp_context, cu_seqlens)
    x = calls.common_arguments(
        c, q, k, v, g, beta, kwargs.get("A_log"), kwargs.get("dt_bias"), scale, transforms, lower_bound, state_v_first,
        cu_seqlens, cu_seqlens_cpu, initial_state, output_final_state=output_final_state, safe_gate=safe_gate,
        disable_recompute=disable_recompute, return_intermediate_states=return_intermediate_states,
    )  # fmt: skip
    chunk_size = kwargs.get("chunk_size", 64)
    c.choice("chunk_size", chunk_size, calls.CHUNK_SIZES)
    invariant = calls.batch_invariant(c, kwargs.get("deterministic", True))
    options = {"chunk_size": chunk_size, "batch_invariant": invariant}
    if cp_context is not None:
        if return_intermediate_states:
            raise c.value_error("return_intermediate_states is True with a cp_context, expected False")
        return chunk_call_on_ranks(c, x, route, cp_context.group, initial_state, output_final_state, **options)
    if return_intermediate_states:
        if not calls.in_inference_mode():
            raise c.value_error("return_intermediate_states is True outside of torch.inference_mode(), expected inside")
        rows = calls.chunk_state_rows(c, cu_seqlens, cu_seqlens_cpu, chunk_size)
        options |= {"keep_states": True, "state_rows": rows}
    return calls.chunk_call(c, x, initial_state, output_final_state, **options)


@calls.public
def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
):
    """Kimi Delta Attention for decoding: a few tokens on top of a state.

    The same mathematics, arguments and results as :func:`chunk_kda` (report, section 3). Without gradients inputs of up
    to 16 tokens a sequence run the recurrence itself, as :func:`decode` does; others, and every call with gradients,
    take the chunkwise path.

    Args:
        **kwargs: ``ssm_state_indices`` ``[N]`` or ``[N, columns]``: ``initial_state`` is then a pool of states, fp32,
            bf16 or fp16, and these are the slots of the sequences (negative: null slot). ``num_accepted_tokens``
            ``[N]``: start from that column of them. ``inplace_final_state``: the final states go where the initial
            ones came from, with ``[N, columns]`` the state after token t to column t, and ``initial_state`` is
            returned. ``out``: where o goes. See :func:`decode` for their semantics; with gradients each of them raises.
            ``transpose_state_layout`` is the deprecated name of ``state_v_first``.

    Example:
        >>> import torch, kda_cuda
        >>> q, k, v = (torch.randn(4, 1, 2, 64) for _ in range(3))
        >>> g, beta, state = -torch.rand(4, 1, 2, 64), torch.rand(4, 1, 2), torch.zeros(4, 2, 64, 64)
        >>> o, state = kda_cuda.fused_recurrent_kda(
        ...     q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
        >>> o.shape
        torch.Size([4, 1, 2, 64])
    """
    c = Checker("fused_recurrent_kda")
    calls.take_kwargs(c, kwargs, calls.RECURRENT_KWARGS)
    state_v_first = calls.state_layout(c, state_v_first, kwargs)
    transforms = calls.Transforms(
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval
    )
    in_pool = decoding.takes_pool(c, kwargs)
    x = calls.common_arguments(
        c, q, k, v, g, beta, A_log, dt_bias, scale, transforms, lower_bound, state_v_first, cu_seqlens,
        initial_state=None if in_pool else initial_state, output_final_state=output_final_state,
    )  # fmt: skip
    if in_pool:
        return decoding.in_pool_call(c, x, initial_state, output_final_state, kwargs)
    return decoding.recurrent_call(c, x, initial_state, output_final_state)


@calls.public
def kda_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    head_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
):
    """The gate of KDA by itself, with gradients: what vLLM and fla call ``fused_kda_gate``.

    ``-exp(A_log) softplus(g + dt_bias)``, or with ``lower_bound`` ``lower_bound sigmoid(exp(A_log) (g + dt_bias))``
    (Kimi Linear report, section 3; the bounded form is Kimi K3's).

    Args:
        g: ``[..., HV, K]``, or ``[..., HV * K]`` with ``head_dim`` K; any layout; fp32, fp16, bf16 (float64 on CPU).
        A_log: fp32, HV elements; may be None with a lower_bound (amplitude 1).
        dt_bias: fp32, HV * K elements, or None.
        lower_bound: negative; selects the bounded form.
        head_dim: K, where g has its heads flattened.
        dtype: of the result (float64 on CPU).

    Returns:
        The log-decay ``[..., HV, K]``.

    Raises:
        ValueError, TypeError: an argument does not fit.
        NotImplementedError: a derivative by forward mode or by torch.func is asked for.

    Example:
        >>> import torch, kda_cuda
        >>> kda_cuda.kda_gate(torch.zeros(3, 2, 4), A_log=torch.zeros(2))[0, 0, 0]
        tensor(-0.6931)
    """
    c = Checker("kda_gate")
    c.tensor("g", g)
    dtypes = FLOAT_DTYPES[:3] if g.device.type == "cuda" else FLOAT_DTYPES
    c.dtype("g", g, dtypes)
    if head_dim is not None:
        c.integer("head_dim", head_dim)
        if g.dim() < 1 or head_dim < 1 or g.shape[-1] % head_dim:
            raise c.value_error(f"g has shape {list(g.shape)}, expected [..., HV*K] with K=head_dim={head_dim}")
        g = g.unflatten(-1, (g.shape[-1] // head_dim, head_dim))
    if g.dim() < 2:
        raise c.value_error(f"g has shape {list(g.shape)}, expected [..., HV, K], or [..., HV*K] with head_dim=K")
    A_log, dt_bias, lower_bound = check_gate_parameters(c, g, *g.shape[-2:], A_log, dt_bias, lower_bound)
    c.choice("dtype", dtype, dtypes)
    arguments = Gate(g=g, A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound, dtype=dtype)
    op = "kda_gate" if calls.needs_grad(c, g, A_log, dt_bias) else "kda_gate_fwd"
    return calls.Call(op, arguments, g, calls.as_it_is, c)
