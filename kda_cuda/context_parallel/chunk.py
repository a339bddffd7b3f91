r"""``chunk_kda`` over several ranks: each computes its own tokens, and one all-gather a direction brings the states.

A rank computes its first sequence, if that began elsewhere, from a zero state and beside it from the identity, as K
more columns of V. With S_in, the state that arrives, and M, the transition that the identity becomes,

    S_out = M S_in + S_local        o = o_local + o_identity S_in
    dS_in = M^T dS_out + dS_local   dS_local = o_identity^T do

So the pass over the tokens and the exchange do not wait for other ranks' passes. The backward needs no pass for
dS_local, because the forward leaves o_identity to it. Every rank then folds what it needs of the chain, in the order of
tokens and in float64: results are equal from run to run, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import calls, library, variants
from ..checks import Checker
from ..reference.chunk_bwd import GRADIENTS, mask_of
from ..reference.gates import compute_dtype
from ..schemas import Chunk, ChunkBwd, Inputs
from .exchange import Exchange, agree, run_alone, run_together
from .routes import Part, Route

__all__ = ["Rank", "chunk_call", "run_local"]

Op = Callable[..., tuple[Tensor, ...]]


# ---- the two directions, each as what a rank computes, sends, and makes of what all have sent ------------------------


def forward(x: Chunk, route: Route, op: Op, keeps: bool) -> Exchange:
    """Returns o, the final states and, if ``keeps``, what the backward needs beside the inputs.

    That is the initial states, key first; M of each part's first sequence, if that is resumed; and o_identity of these
    sequences, one after another, ``[tokens, HV, K]``.

    Sends ``[parts, HV, K, V + K]``: S_local and M of each part's last sequence; zero where nobody needs them.
    """
    heads, key_dim, value_dim = x.v.shape[2], x.k.shape[3], x.v.shape[3]
    resumed, continued = route.resumed(), route.continued()
    states, initial, v = _initial_states(x, resumed), x.initial_state, x.v
    if x.initial_state is not None or resumed:
        initial = states
    if resumed:
        identity = states.new_zeros(len(states), heads, key_dim, key_dim)
        for part in resumed:
            identity[part.first] = torch.eye(key_dim, dtype=states.dtype, device=states.device)
        initial, v = torch.cat((states, identity), -1), F.pad(x.v, (0, key_dim))
    wants_final = x.output_final_state or bool(continued)
    o, final, _ = op(*x._replace(v=v, initial_state=initial, state_v_first=False, output_final_state=wants_final))
    summaries = states.new_zeros(len(route.parts), heads, key_dim, value_dim + key_dim)
    transitions = states.new_zeros(len(route.parts), heads, key_dim, key_dim)
    for i, part in enumerate(route.parts):
        if part.after:
            summaries[i, ..., : final.shape[-1]] = final[part.last]
        if part.before and wants_final:
            transitions[i] = final[part.first, ..., value_dim:]
    everywhere = yield summaries
    through = o.new_zeros(0, heads, key_dim)
    if resumed:
        if keeps:
            through = torch.cat([o[0, begin:end, :, value_dim:] for begin, end in map(route.first_tokens, resumed)])
        o, final = _resume(o, final if wants_final else None, states, everywhere, route)
    final = _in_layout(final, x.state_v_first) if x.output_final_state else None
    return (o, final, states, transitions, through) if keeps else (o, final)


def _initial_states(x: Chunk, resumed: list[Part]) -> Tensor:
    """``[N, HV, K, V]``: zero for sequences that began elsewhere."""
    sequences, (heads, value_dim), key_dim = x.cu_seqlens.shape[0] - 1, x.v.shape[2:], x.k.shape[3]
    if x.initial_state is None:
        return x.v.new_zeros(sequences, heads, key_dim, value_dim, dtype=compute_dtype(x.v.dtype))
    states = _in_layout(x.initial_state, x.state_v_first)
    if resumed:
        states = states.clone()
    for part in resumed:
        states[part.first] = 0
    return states


def _resume(
    o: Tensor, final: Tensor | None, states: Tensor, everywhere: Tensor, route: Route
) -> tuple[Tensor, Tensor | None]:
    """Adds to o and the final states, with K columns more, what comes of the states that arrive. Sets these too."""
    value_dim = states.shape[-1]
    own = o[..., :value_dim].contiguous()
    for part in route.resumed():
        states[part.first] = state_before(everywhere, part, value_dim)
        begin, end = route.first_tokens(part)
        _add_product(own[0, begin:end], o[0, begin:end, :, value_dim:], states[part.first])
        if final is not None:
            local, transition = final[part.first].double().split((value_dim, states.shape[-2]), -1)
            final[part.first, ..., :value_dim] = torch.baddbmm(local, transition, states[part.first].double())
    return own, None if final is None else final[..., :value_dim]


def _add_product(o: Tensor, through: Tensor, state: Tensor) -> None:
    """``o += through state`` for ``[tokens, HV, V]``, ``[tokens, HV, K]`` and a state ``[HV, K, V]``.

    bf16 has operands of the tensor cores, as in the kernels. All else is exact, whatever is set for fp32 products.
    """
    o, through = o.transpose(0, 1), through.transpose(0, 1)
    if o.dtype == torch.bfloat16 and o.is_cuda:
        o.baddbmm_(through, state.to(o.dtype))
        return
    for own, left, right in zip(o, through, state.double(), strict=True):  # one head at a time: float64 is large
        own.copy_(torch.addmm(own.double(), left.double(), right))


def backward(x: ChunkBwd, route: Route, op: Op, transitions: Tensor, through: Tensor) -> Exchange:
    """Returns the gradients of ``GRADIENTS``. ``x`` has initial and final states key first.

    ``transitions``, ``through``: as :func:`forward` returns them.

    Sends ``[parts, HV, K, V + K]``: dS_local and M of each part's first sequence; zero where nobody needs them.
    """
    heads, key_dim, value_dim = x.v.shape[2], x.k.shape[3], x.v.shape[3]
    dtype, sequences = compute_dtype(x.v.dtype), x.cu_seqlens.shape[0] - 1
    summaries = x.v.new_zeros(len(route.parts), heads, key_dim, value_dim + key_dim, dtype=dtype)
    rest = through
    for i, part in enumerate(route.parts):
        if not part.before:
            continue
        begin, end = route.first_tokens(part)
        local = _summed_product(rest[: end - begin], x.do[0, begin:end], dtype)
        rest = rest[end - begin :]
        if x.dfinal_state is not None:
            of_final = x.dfinal_state[part.first].double()
            local = torch.baddbmm(local.double(), transitions[i].double().transpose(-1, -2), of_final).to(dtype)
        summaries[i, ..., :value_dim] = local
        if part.first == part.last:
            summaries[i, ..., value_dim:] = transitions[i]
    everywhere = yield summaries
    dfinal = x.dfinal_state
    if continued := route.continued():
        shape = (sequences, heads, key_dim, value_dim)
        dfinal = x.v.new_zeros(shape, dtype=dtype) if dfinal is None else dfinal.to(dtype, copy=True)
        for part in continued:
            dfinal[part.last] += gradient_after(everywhere, part, value_dim)
    gradients = list(op(*x._replace(dfinal_state=dfinal)))
    if gradients[-1].numel():
        for part in route.resumed():
            gradients[-1][part.first] = 0  # this state was not used
    return tuple(gradients)


def _summed_product(through: Tensor, do: Tensor, dtype: torch.dtype) -> Tensor:
    """through^T do, summed over tokens: ``[HV, K, V]`` of ``[tokens, HV, K]`` and ``[tokens, HV, V]``.

    With operands as in :func:`_add_product`, and the sum in ``dtype``.
    """
    left, right = through.permute(1, 2, 0), do.transpose(0, 1)
    if do.dtype == torch.bfloat16 and do.is_cuda:
        return torch.bmm(left, right, out_dtype=dtype)
    return torch.stack([a.double() @ b.double() for a, b in zip(left, right, strict=True)]).to(dtype)


def state_before(everywhere: Tensor, part: Part, value_dim: int) -> Tensor:
    """S <- M S + S_local over the slots before ``part`` that have its first sequence: the state ``[HV, K, V]``."""
    begin = part.slot - part.before
    state = everywhere[begin, ..., :value_dim].double()
    for slot in range(begin + 1, part.slot):
        own = everywhere[slot].double()
        state = torch.baddbmm(own[..., :value_dim], own[..., value_dim:], state)
    return state.to(everywhere.dtype)


def gradient_after(everywhere: Tensor, part: Part, value_dim: int) -> Tensor:
    """dS <- M^T dS + dS_local from the last slot of a sequence down: the gradient of the state after ``part``."""
    end = part.slot + part.after
    gradient = everywhere[end, ..., :value_dim].double()
    for slot in range(end - 1, part.slot, -1):
        own = everywhere[slot].double()
        gradient = torch.baddbmm(own[..., :value_dim], own[..., value_dim:].transpose(-1, -2), gradient)
    return gradient.to(everywhere.dtype)


def _in_layout(states: Tensor, v_first: bool) -> Tensor:
    """Key-first states in the layout of the caller, or the other way round."""
    return states.transpose(-1, -2).contiguous() if v_first else states.contiguous()


# ---- autograd, and who takes part -----------------------------------------------------------------------------------


class Meeting(NamedTuple):
    """The ranks that this process computes: its own one of a group, or all of a simulation."""

    routes: tuple[Route, ...]
    group: Any  # None: a simulation

    def run(self, steps: Sequence[Exchange]) -> list[Any]:
        if self.group is None:
            return run_together(steps, self.routes[0])
        return [run_alone(steps[0], self.routes[0], self.group)]


class _ContextParallelChunk(torch.autograd.Function):
    """``chunk`` with autograd; takes and returns what the ranks of a meeting have, one after another."""

    @staticmethod
    def forward(ctx, meeting: Meeting, namespace: str, *flat):
        ranks = _by_rank(flat, meeting)
        with _exact(ranks[0].q):
            results = _forwards(meeting, namespace, ranks, keeps=True)
        ctx.meeting, ctx.namespace = meeting, namespace
        saved = [t for x, (_, _, *kept) in zip(ranks, results, strict=True) for t in (*_saved(x), *kept)]
        ctx.save_for_backward(*saved)
        ctx.options = [x._replace(**dict.fromkeys((*GRADIENTS, "cu_seqlens"))) for x in ranks]
        ctx.needed = [
            [getattr(needs, name) for name in GRADIENTS] for needs in _by_rank(ctx.needs_input_grad[2:], meeting)
        ]
        ctx.set_materialize_grads(False)
        return tuple(t for o, final, *_ in results for t in (o, final))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        meeting, count = ctx.meeting, len(GRADIENTS) + 3
        saved, steps = ctx.saved_tensors, []
        op = library.backward_op(ctx.namespace, "chunk_bwd", saved[2], saved[1].shape[3])
        with _exact(saved[0]):
            for rank, route in enumerate(meeting.routes):
                *tensors, cu_seqlens, states, transitions, through = saved[count * rank : count * (rank + 1)]
                arguments = dict(zip(GRADIENTS, (*tensors, states), strict=True)) | {"cu_seqlens": cu_seqlens}
                x = _backward_arguments(ctx.options[rank], arguments, *gradients[2 * rank : 2 * rank + 2])
                x = x._replace(wanted=mask_of(ctx.needed[rank]))
                steps.append(backward(x, route, op, transitions, through))
            found = [dict(zip(GRADIENTS, results, strict=True)) for results in meeting.run(steps)]
        flat = []
        for own, needed, options in zip(found, ctx.needed, ctx.options, strict=True):
            wanted = dict(zip(GRADIENTS, needed, strict=True))
            if wanted["initial_state"]:
                own["initial_state"] = _in_layout(own["initial_state"], options.state_v_first)
            flat += [own[name] if wanted.get(name) else None for name in Chunk._fields]
        return None, None, *flat


def _by_rank(flat: Sequence, meeting: Meeting) -> list[Chunk]:
    size = len(Chunk._fields)
    return [Chunk(*flat[size * i : size * (i + 1)]) for i in range(len(meeting.routes))]


def _forwards(meeting: Meeting, namespace: str, ranks: list[Chunk], *, keeps: bool) -> list[tuple]:
    op = variants.op_in(namespace, "chunk_fwd")
    return meeting.run([forward(x, route, op, keeps) for x, route in zip(ranks, meeting.routes, strict=True)])


def _saved(x: Chunk) -> tuple:
    """All of ``GRADIENTS`` but the initial state, which the forward returns as it was used."""
    return (*(getattr(x, name) for name in GRADIENTS[:-1]), x.cu_seqlens)


def _backward_arguments(options: Chunk, arguments: dict, do: Tensor | None, dfinal: Tensor | None) -> ChunkBwd:
    """Of this rank, with the states key first."""
    v = arguments["v"]
    shared = {name: getattr(options, name) for name in Chunk._fields if name in ChunkBwd._fields}
    do = v.new_zeros(v.shape) if do is None else do
    dfinal = None if dfinal is None else _in_layout(dfinal, options.state_v_first)
    return ChunkBwd(**(shared | arguments | {"do": do, "dfinal_state": dfinal, "state_v_first": False}))


def _exact(x: Tensor) -> contextlib.AbstractContextManager:
    """No autocast: the products here are of states."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


class Rank(NamedTuple):
    """Runs a call on one rank of a group, or of a simulation: the ``runner`` of its :class:`kda_cuda.calls.Call`."""

    route: Route
    group: Any

    def __call__(self, namespace: str, op: str) -> Callable:
        if not self.route.exchanges:
            return library.runner(namespace, op)
        if self.group is None:
            raise Checker("chunk_kda").value_error(
                "cp_context is one of local_cp_contexts, expected the calls of all ranks in kda_cuda.parallel.run_local"
            )
        return functools.partial(_outside_of_graphs(), self, namespace, op)

    def run(self, namespace: str, op: str, *arguments: Any) -> tuple:
        x = Chunk(*arguments)
        _agree_on_call(self.group, x, op)
        ((o, final),) = _run(Meeting((self.route,), self.group), namespace, op, [x])
        return o, final, None


@functools.cache
def _outside_of_graphs() -> Callable:
    """torch.compile leaves exchanges out of its graphs. What asks for that is slow to import."""
    return torch.compiler.disable(Rank.run)


def _run(meeting: Meeting, namespace: str, op: str, ranks: list[Chunk]) -> list[tuple[Tensor, Tensor | None]]:
    if op != "chunk":
        with torch.no_grad(), _exact(ranks[0].q):
            return _forwards(meeting, namespace, ranks, keeps=False)
    flat = _ContextParallelChunk.apply(meeting, namespace, *(a for x in ranks for a in x))
    return list(zip(flat[::2], flat[1::2], strict=True))


_agreed: weakref.WeakKeyDictionary[Any, set[tuple]] = weakref.WeakKeyDictionary()  # group -> what its ranks agree on


def _agree_on_call(group: Any, x: Chunk, op: str) -> None:
    """Compares the sizes of a call on all ranks of a group, the first time that it has such a call."""
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
    sizes = {
        "HV of v": x.v.shape[2],
        "K of q": x.k.shape[3],
        "V of v": x.v.shape[3],
        "dtype of q (0 float32, 1 float16, 2 bfloat16, 3 float64)": dtypes.index(x.q.dtype),
        "whether a gradient is needed": int(op == "chunk"),
    }
    known = _agreed.setdefault(group, set())
    if tuple(sizes.values()) in known:
        return
    c = Checker("chunk_kda")
    if x.q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise c.value_error("cp_context meets these sizes first during graph capture, expected a call like it before")
    agree(c, group, x.q.device, sizes)
    known.add(tuple(sizes.values()))


# ---- what the public functions call ----------------------------------------------------------------------------------


def chunk_call(
    c: Checker, x: Inputs, route: Route, group: Any, initial_state: Tensor | None, output_final_state: bool, **options
) -> calls.Call:
    """The call of ``chunk_kda`` on one rank."""
    tokens = x.q.shape[1]
    if tokens != route.bounds[-1]:
        raise c.value_error(
            f"q has T={tokens} tokens, expected the T={route.bounds[-1]} that cp_context gives this rank"
        )
    call = calls.chunk_call(c, x, initial_state, output_final_state, **options)
    return call._replace(runner=Rank(route, group), checker=None)


def run_local(ranks: Sequence[calls.Call]) -> list[Any]:
    """Runs the calls of all ranks in this process, through the code that ranks of a group run: for tests and timing.

    Args:
        ranks: ``chunk_kda.bind(..., cp_context=context)`` for each context of :func:`local_cp_contexts`, in order.

    Returns:
        What :func:`kda_cuda.chunk_kda` returns on each rank. Gradients flow back through all of them together.

    Raises:
        ValueError: these are not the calls of all ranks of one simulation.

    Example:
        >>> import torch
        >>> from kda_cuda import chunk_kda
        >>> from kda_cuda.parallel import local_cp_contexts, run_local
        >>> q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
        >>> g, beta = -torch.rand(1, 100, 2, 16), torch.rand(1, 100, 2)
        >>> contexts = local_cp_contexts(torch.tensor([0, 100]), 3)
        >>> shards = [[context.shard(x) for x in (q, k, v, g, beta)] for context in contexts]
        >>> options = {"use_qk_l2norm_in_kernel": True}
        >>> ranks = [chunk_kda.bind(*x, cp_context=c, **options) for x, c in zip(shards, contexts)]
        >>> o = torch.cat([o for o, _ in run_local(ranks)], 1)
        >>> bool((o - chunk_kda(q, k, v, g, beta, **options)[0]).abs().max() < 1e-4)
        True
    """
    c = Checker("run_local")
    runners = [getattr(call, "runner", None) for call in ranks]
    if not runners or not all(isinstance(runner, Rank) and runner.group is None for runner in runners):
        raise c.value_error(
            "ranks are not calls with a context of local_cp_contexts, expected chunk_kda.bind(...) of it"
        )
    found = [runner.route.rank for runner in runners]
    if found != list(range(runners[0].route.ranks)):
        raise c.value_error(f"ranks are {found}, expected all of {list(range(runners[0].route.ranks))} in order")
    if not runners[0].route.exchanges:
        return [calls.run(call) for call in ranks]
    meeting = Meeting(tuple(runner.route for runner in runners), None)
    namespace, _ = variants.choose("chunk_fwd", ranks[0].owner)
    op = "chunk" if any(call.op == "chunk" for call in ranks) else "chunk_fwd"
    results = _run(meeting, namespace, op, [call.arguments for call in ranks])
    return [call.returned(call.arguments, (*own, None)) for call, own in zip(ranks, results, strict=True)]
