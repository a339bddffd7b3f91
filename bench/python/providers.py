"""Who computes KDA besides this package, and how each is called; what one cannot do is said rather than skipped.

A provider is a function ``bind(arguments of chunk_kda) -> call() -> o``, or a `harness.Provider`. What ``bind`` does is
not timed. ``PEERS`` are those of the forward, ``BACKWARD_PEERS`` those of training by the form that they differentiate.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.nn import functional as F

import kda_cuda

from .harness import Provider, Unsupported
from .truth import errors, reference_call, step

Call = Callable[[], Tensor]
ATTENTION_HEADS = 4  # on which attention is verified


def ours(a: dict) -> Call:
    return lambda: kda_cuda.chunk_kda(**a)[0]


def reference(a: dict) -> Call:
    return reference_call(a)


# ---- attention, which a user would pick instead ----------------------------------------------------------------------


def attention_inputs(a: dict) -> dict:
    """q, k and v as attention takes them: [sequences, heads, tokens, dim], views of KDA's."""
    sequences = 1
    if a["cu_seqlens"] is not None:
        lengths = a["cu_seqlens"].diff()
        if not (lengths == lengths[0]).all():
            raise Unsupported("sequences of different length need padding")
        sequences = len(lengths)
    return {name: a[name].unflatten(1, (sequences, -1))[0].transpose(1, 2) for name in ("q", "k", "v")}


def attention(a: dict) -> Call:
    """Causal, over as many tokens and heads: another function of q, k and v, with no gate and no beta."""

    def call() -> Tensor:
        o = F.scaled_dot_product_attention(a["q"], a["k"], a["v"], is_causal=True)
        return o.transpose(1, 2).flatten(0, 1)[None]

    return call


def attention_errors(a: dict, do: Tensor | None, results: dict[str, Tensor]) -> dict[str, float | None]:
    """Against attention in fp32, on the first heads."""
    wide = {name: x[:, :ATTENTION_HEADS].detach().float() for name, x in a.items()}
    if do is None:
        truths, some = {"o": attention(wide)()}, {"o": results["o"][:, :, :ATTENTION_HEADS]}
    else:
        leaves = {name: x.requires_grad_() for name, x in wide.items()}
        truths = step(attention(leaves), leaves, do[:, :, :ATTENTION_HEADS].float())
        some = {name: x[:, :ATTENTION_HEADS] for name, x in results.items()}
        some["o"] = results["o"][:, :, :ATTENTION_HEADS]
    return errors(some, truths)


SDPA = Provider(attention, attention_inputs, ("q", "k", "v"), attention_errors, same_bytes=False)

# ---- peers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """`load()` imports it and gives `bind(arguments of chunk_kda) -> call() -> o`; what `bind` does is not timed."""

    distributions: tuple[str, ...]  # names of the package that has it, any of them
    load: Callable[[], Callable[[dict], Call]]
    bounded_gates_only: bool = False

    def loaded(self) -> Callable[[dict], Call]:
        bind = self.load()
        return self.within_bounds(bind) if self.bounded_gates_only else bind

    def within_bounds(self, bind: Callable[[dict], Call]) -> Callable[[dict], Call]:
        def bind_if_bounded(a: dict) -> Call:
            if a["lower_bound"] is None:
                raise Unsupported("bounded gates only")
            return bind(a)

        return bind_if_bounded

    def version(self) -> str:
        for name in self.distributions:
            try:
                return f"{name} {version(name)}"
            except PackageNotFoundError:
                continue
        return "built from source"


def tune_shortly() -> None:
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    def short_bench(kernel_call, quantiles):
        return do_bench(kernel_call, warmup=5, rep=20, quantiles=quantiles)

    Autotuner.do_bench = staticmethod(short_bench)


def load_fla() -> Callable[[dict], Call]:
    """fla's own Triton kernels. Its autotuner is given 20 ms per configuration instead of 100."""
    os.environ["FLA_FLASH_KDA"] = "0"  # else it hands bounded gates on to FlashKDA, where that is installed
    from fla.ops.kda import chunk_kda

    tune_shortly()
    return lambda a: lambda: chunk_kda(**a, safe_gate=a["lower_bound"] is not None)[0]


def load_flash_kda() -> Callable[[dict], Call]:
    import flash_kda

    def bind(a: dict) -> Call:
        q, heads, dim = a["q"], a["q"].shape[2], a["q"].shape[3]
        sequences = 1 if a["cu_seqlens"] is None else a["cu_seqlens"].shape[0] - 1
        dt_bias = a["dt_bias"].view(heads, dim)

        def call() -> Tensor:
            out = torch.empty_like(a["v"])
            state = torch.empty(sequences, heads, dim, dim, dtype=torch.float32, device=q.device)
            flash_kda.fwd(
                q,
                a["k"],
                a["v"],
                a["g"],
                a["beta"],
                dim**-0.5,
                out,
                a["A_log"],
                dt_bias,
                a["lower_bound"],
                final_state=state,
                cu_seqlens=a["cu_seqlens"],
            )
            return out

        return call

    return bind


def load_cudnn() -> Callable[[dict], Call]:
    """Its Hopper kernel takes bounded gates as they are; others as g in log space, which a caller computes first."""
    from cudnn.linear_attention.ops import kimi_delta_attention

    def bind(a: dict) -> Call:
        tokens, heads, dim = a["q"].shape[1:]
        q, k, v, g, beta = (a[name][0] for name in ("q", "k", "v", "g", "beta"))
        one = torch.tensor([0, tokens], device=q.device)
        cu_seqlens = (one if a["cu_seqlens"] is None else a["cu_seqlens"]).int()
        dt_bias = a["dt_bias"].view(heads, dim)
        fused = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "output_final_state": True}

        def bounded() -> Tensor:
            gate = {"safe_gate": True, "gate_lower_bound": a["lower_bound"], "a_log": a["A_log"], "dt_bias": dt_bias}
            return kimi_delta_attention(q, k, v, g, beta, cu_seqlens, **gate, **fused)[0][None]

        def softplus() -> Tensor:
            log_decay = -a["A_log"].exp()[:, None] * torch.nn.functional.softplus(g.float() + dt_bias)
            return kimi_delta_attention(q, k, v, log_decay, beta, cu_seqlens, **fused)[0][None]

        return softplus if a["lower_bound"] is None else bounded

    return bind


def load_cudnn_core() -> Callable[[dict], Call]:
    """Its Hopper backward takes the core alone: log-decay and beta in fp32, normalised q and k, the default scale.

    It knows packed tokens only; the views that drop the batch are made in the call, so that their gradients cost views.
    """
    from cudnn.linear_attention.ops import kimi_delta_attention

    def bind(a: dict) -> Call:
        tokens, cu_seqlens = a["q"].shape[1], a["cu_seqlens"]
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, tokens], device=a["q"].device)
        cu_seqlens = cu_seqlens.int()

        def call() -> Tensor:
            streams = (a[name].squeeze(0) for name in ("q", "k", "v", "g", "beta"))
            return kimi_delta_attention(*streams, cu_seqlens)[0].unsqueeze(0)

        return call

    return bind


def load_fla_core() -> Callable[[dict], Call]:
    """fla's KDA, the core alone: log-decay and beta given."""
    from fla.ops.kda import chunk_kda

    tune_shortly()
    return lambda a: lambda: chunk_kda(**a, safe_gate=at_least_minus_5(a["g"]))[0]


def at_least_minus_5(g: Tensor) -> bool:
    return bool((g.detach() >= -5).all())


def dplr_inputs(a: dict) -> dict:
    """KDA as general DPLR: S = Diag(e^g) S + b (a^T S) + k v^T, with a = e^g k, b = -beta k and v = beta v."""
    beta = a["beta"][..., None]
    moved = {"a": a["g"].exp() * a["k"], "b": -beta * a["k"], "v": beta * a["v"]}
    narrow = {name: x.to(a["v"].dtype) for name, x in moved.items()}
    return {"q": a["q"], "k": a["k"], "gk": a["g"], "cu_seqlens": a["cu_seqlens"]} | narrow


def load_fla_dplr() -> Provider:
    """fla's kernels for a general diagonal-plus-low-rank transition; its bound allows it larger chunks."""
    from fla.ops.generalized_delta_rule.dplr import chunk_dplr_delta_rule

    tune_shortly()

    def bind(a: dict) -> Call:
        bound = -5.0 if at_least_minus_5(a["gk"]) else None
        return lambda: chunk_dplr_delta_rule(**a, lower_bound=bound)[0]

    return Provider(bind, dplr_inputs, ("q", "k", "v", "a", "b", "gk"), same_bytes=False)


def load_cula() -> Callable[[dict], Call]:
    """cuLA takes beta after the sigmoid and int32 boundaries; on Hopper a kernel of its own, forward alone."""
    from cula.kda import chunk_kda, kda_prefill_hopper

    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9

    def bind(a: dict) -> Call:
        function = chunk_kda if not hopper or a["q"].requires_grad else kda_prefill_hopper
        given = {name: x for name, x in a.items() if name not in ("beta", "use_beta_sigmoid_in_kernel")}
        if a["cu_seqlens"] is not None:
            given["cu_seqlens"] = a["cu_seqlens"].int()
        return lambda: function(**given, beta=a["beta"].sigmoid(), safe_gate=True)[0]

    return bind


def load_flashinfer() -> Callable[[dict], Call]:
    """FlashInfer has states with V first, and kernels for Blackwell alone."""
    from flashinfer.kda import recurrent_kda

    def bind(a: dict) -> Call:
        given = {name: x for name, x in a.items() if name != "use_beta_sigmoid_in_kernel"}
        return lambda: recurrent_kda(**given, beta_is_logit=True)[0]

    return bind


FLA = ("flash-linear-attention", "fla-core")
CUDNN, CULA, FLASHINFER = ("nvidia-cudnn-frontend",), ("cula", "cuda-linear-attention"), ("flashinfer-python",)
PEERS = {
    "fla": Peer(FLA, load_fla),
    "flash_kda": Peer(("flash_kda", "tokenspeed-flashkda"), load_flash_kda, bounded_gates_only=True),
    "cudnn": Peer(CUDNN, load_cudnn),
    "cula": Peer(CULA, load_cula, bounded_gates_only=True),
    "flashinfer": Peer(FLASHINFER, load_flashinfer, bounded_gates_only=True),
}
BACKWARD_PEERS = {
    "fused": {name: PEERS[name] for name in ("fla", "cula")},
    "core": {"cudnn": Peer(CUDNN, load_cudnn_core)},
    "general": {"fla": Peer(FLA, load_fla_core), "fla_dplr": Peer(FLA, load_fla_dplr)},
}


def load_peers(names: list[str], peers: dict[str, Peer] = PEERS) -> tuple[dict[str, Callable], dict[str, str]]:
    """Those of ``peers`` that can be imported, and for every name its version or why it is missing."""
    loaded, said = {}, {}
    for name in names:
        if name not in peers:
            continue
        try:
            loaded[name] = peers[name].loaded()
            said[name] = peers[name].version()
        except Exception as e:  # an import of a GPU library fails in many ways
            said[name] = f"missing: {type(e).__name__}: {str(e)[:160]}"
    return loaded, said
