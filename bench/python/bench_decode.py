"""Decoding, side by side with its peers: outputs and states are verified before anything is timed.

python -m bench.python.bench_decode [--out FILE] [--heads H ...] [--batches B ...] [--tokens T ...]
                                    [--states fp32|bf16 ...] [--regimes fast|long ...] [--context N] [--head-dim N]
                                    [--peers [NAME ...] | --no-peers] [--rounds N] [--budget SECONDS]
                                    [--device cuda|emulator|cpu]

Every provider gets the same inputs and updates the state of every sequence in place. States and inputs rotate through
more memory than the L2 holds. sdpa reads a cache of --context keys and values a sequence in place of a state.
bench/python/harness.py says what the columns of a row mean. bench/cpp/bench_decode.cpp has the kernel alone over more
shapes.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from itertools import product

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

import kda_cuda

from . import harness
from .harness import Call, Provider, Unsupported, as_provider, failure, judged, too_large
from .providers import CULA, FLA, FLASHINFER, Peer, load_peers
from .shapes import REGIMES
from .truth import errors, in_fp32

DIM = 128
BATCHES, HEADS, TOKENS = (1, 8, 32, 128, 512), (8, 32, 64), (1, 4, 8)
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LARGEST_ERROR = 2e-2  # relative, of bf16 results
CACHE_BYTES = 64 << 30  # of keys and values, all sets together


def inputs(
    batch: int,
    heads: int,
    tokens: int,
    state_dtype: torch.dtype,
    seed: int,
    device: str = "cuda",
    regime: str = "long",
    dim: int = DIM,
) -> dict:
    make = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=make, device=device)

    streams = {name: normal(batch, tokens, heads, dim).bfloat16() for name in ("q", "k", "v", "g")}
    return streams | {
        "beta": normal(batch, tokens, heads).bfloat16(),
        "A_log": (1 + 15 * torch.rand(heads, generator=make, device=device)).log(),
        "dt_bias": normal(heads * dim) - 4,
        "lower_bound": -5.0 if regime == "fast" else None,
        "initial_state": normal(batch, heads, dim, dim).to(state_dtype),
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "state_v_first": True,
    }


def own_names(a: dict) -> dict:
    return {name: x for name, x in a.items() if name != "initial_state"} | {"state": a["initial_state"]}


def ours(a: dict) -> Call:
    given = own_names(a)
    return lambda: kda_cuda.decode(**given)


def reference(a: dict) -> Call:
    """The op of the reference, on the arguments that the public function hands on."""
    arguments = kda_cuda.decode.bind(**own_names(a)).arguments

    def call() -> torch.Tensor:
        torch.ops.kda_cuda_reference.decode(*arguments)
        return arguments.out

    return call


def truth(a: dict) -> dict[str, torch.Tensor]:
    """The fp32 reference on the same device, from a copy of the state."""
    wide = in_fp32(a) | {"initial_state": a["initial_state"].clone()}
    return {"o": reference(wide)(), "state": wide["initial_state"]}


# ---- peers -----------------------------------------------------------------------------------------------------------


def load_fla() -> Callable[[dict], Call]:
    """fla's kernel as a serving engine calls it, states in place: its public function would return fp32 copies."""
    from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd

    return lambda a: lambda: fused_recurrent_kda_fwd(**a, inplace_final_state=True)[0]


def load_flashinfer() -> Callable[[dict], Call]:
    from flashinfer.kda import recurrent_kda

    def bind(a: dict) -> Call:
        if a["initial_state"].dtype != torch.bfloat16:
            raise Unsupported("bf16 states only")
        if a["q"].shape[1] > 1:
            raise Unsupported("a draft writes a state for every token there")
        given = {name: x for name, x in a.items() if name not in ("use_beta_sigmoid_in_kernel", "state_v_first")}
        return lambda: recurrent_kda(**given, beta_is_logit=True)[0]

    return bind


def load_cula() -> Callable[[dict], Call]:
    from cula.kda import kda_decode

    def bind(a: dict) -> Call:
        if a["initial_state"].dtype != torch.float32 or a["q"].shape[1] > 1 or a["lower_bound"] is not None:
            raise Unsupported("single tokens on fp32 states with unbounded gates only")
        batch, _, heads, dim = a["q"].shape
        slots = torch.arange(batch, device=a["q"].device, dtype=torch.int32)
        state = {"initial_state_source": a["initial_state"], "initial_state_indices": slots}
        gate = {"A_log": a["A_log"], "dt_bias": a["dt_bias"].view(heads, dim), "a": a["g"], "b": a["beta"]}
        return lambda: kda_decode(q=a["q"], k=a["k"], v=a["v"], **gate, **state, use_qk_l2norm_in_kernel=True)

    return bind


PEERS = {
    "fla": Peer(FLA, load_fla),
    "cula": Peer(CULA, load_cula),
    "flashinfer": Peer(FLASHINFER, load_flashinfer),
}


def sdpa(context: int, sets: int) -> Provider:
    """Attention of the new tokens to a cache, whose last tokens they are. Such a cache is what a state replaces."""

    def caches(a: dict) -> dict:
        batch, _, heads, dim = a["q"].shape
        if (need := 4 * batch * heads * context * dim * sets) > CACHE_BYTES:
            raise Unsupported(f"{sets} caches of {context} tokens take {need >> 30} GiB")
        make = torch.Generator(a["q"].device).manual_seed(0)
        size, like = (batch, heads, context, dim), {"dtype": a["q"].dtype, "device": a["q"].device}
        k, v = (torch.randn(size, generator=make, **like) for _ in range(2))
        return {"q": a["q"].transpose(1, 2), "k": k, "v": v}

    def bind(a: dict) -> Call:
        tokens = a["q"].shape[2]
        mask = causal_lower_right(tokens, context) if tokens > 1 else None
        return lambda: F.scaled_dot_product_attention(a["q"], a["k"], a["v"], attn_mask=mask).transpose(1, 2)

    def found(a: dict, do: None, results: dict) -> dict[str, float | None]:
        """Against fp32, on the first sequence."""
        return errors({"o": results["o"][:1]}, {"o": bind({name: x[:1].float() for name, x in a.items()})()})

    return Provider(bind, caches, errors=found, same_bytes=False)


# ---- rows ------------------------------------------------------------------------------------------------------------


def prepared(name: str, bind: Callable, sets: list[dict], where: str, device: str) -> tuple[harness.Calls | None, dict]:
    """A provider's calls, and what is said of it. Its own states: none sees what another one left."""
    provider = as_provider(bind)
    own = [provider.prepare(a | {"initial_state": a["initial_state"].clone()}) for a in sets]
    calls = [provider.bind(a) for a in own]
    results = {"o": calls[0]()}
    if provider.errors:
        found = provider.errors(own[0], None, results)
    else:
        found = errors(results | {"state": own[0]["initial_state"]}, truth(sets[0]))
    said = judged(name, found, too_large(found, {}, LARGEST_ERROR), where)
    if "failed" in said:
        return None, said
    said["peak_mib"] = harness.peak_mib(calls[0], device)
    return harness.Calls(provider, calls), said


@torch.inference_mode()
def bench(batch: int, heads: int, tokens: int, state: str, regime: str, peers: dict, args: argparse.Namespace) -> dict:
    dtype, dim = STATE_DTYPES[state], args.head_dim
    need = batch * heads * (2 * dim * dim * dtype.itemsize + tokens * (5 * dim + 1) * 2)
    count = harness.set_count(need, args.device, most=64)
    sets = [inputs(batch, heads, tokens, dtype, seed, args.device, regime, dim) for seed in range(count)]
    others = peers | ({"sdpa": sdpa(args.context, count)} if "sdpa" in args.peers else {})
    where = f"batch {batch}, {heads} heads, {tokens} tokens, {state}, {regime}"
    calls, said = {}, {}
    for name, bind in harness.with_ours(ours, reference, others, args.device).items():
        try:
            calls[name], said[name] = prepared(name, bind, sets, where, args.device)
        except Exception as e:  # a peer that cannot run a shape is a result
            said[name] = failure(name, where, e)
    harness.measure({name: x for name, x in calls.items() if x}, said, {"decode": need}, args)
    return {"bytes": {"decode": need}, "providers": said}


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser, (*PEERS, "sdpa"), rounds=15)
    for name, default in {"batches": BATCHES, "heads": HEADS, "tokens": TOKENS}.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=default)
    parser.add_argument("--states", nargs="+", choices=STATE_DTYPES, default=list(STATE_DTYPES))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--context", type=int, default=8192, help="tokens in the cache of sdpa")
    parser.add_argument("--head-dim", type=int, default=DIM)
    args = parser.parse_args(given)
    peers, said = load_peers(args.peers, PEERS)
    facts = {"dtype": "bfloat16", "head_dim": args.head_dim, "context": args.context}
    result = harness.begin(args, "decode", said, **facts)
    work = []
    for state, regime, heads, tokens, batch in product(
        args.states, args.regimes, args.heads, args.tokens, args.batches
    ):
        labels = {"batch": batch, "heads": heads, "tokens": tokens, "state": state, "regime": regime}
        work.append((labels, functools.partial(bench, **labels, peers=peers, args=args)))
    harness.run(args, result, work)


if __name__ == "__main__":
    main()
