"""What serving engines ask of a KDA layer, as calls of this package: tensors of an engine in, checked calls out.

Each function returns the checked call, or the reason why the engine's own path must serve it. Nothing has run then.
All states are ``[slots, HV, V, K]``, as vLLM and SGLang keep them; q, k and g have passed nothing but the convolution.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from .. import calls
from ..decoding import DraftRecords, commit, decode
from ..decoding_layer import decode_layer
from ..prefilling import CHECKPOINT_TOKENS, prefill
from .serving import attempt

__all__ = [
    "ACTIVATED",
    "Checkpoints",
    "Ledger",
    "Streams",
    "copy_call",
    "decode_call",
    "layer_call",
    "prefill_call",
    "raw_gates",
    "run",
    "verify_call",
]

POOLED = {"use_qk_l2norm_in_kernel": True, "state_v_first": True}
ACTIVATED = {"use_gate_in_kernel": False, "use_beta_sigmoid_in_kernel": False}  # g is log-decay, beta is in [0, 1]


def raw_gates(A_log: Tensor, dt_bias: Tensor | None, lower_bound: float | None) -> dict:
    """The options of gates that are computed here. ``A_log``: HV numbers in any shape; ``dt_bias``: HV * K."""
    return {
        "A_log": A_log.detach().reshape(-1),
        "dt_bias": None if dt_bias is None else dt_bias.detach().reshape(-1),
        "lower_bound": lower_bound,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
    }


class Streams(NamedTuple):
    """Tokens of one step: ``[1, T, heads, dim]``, beta ``[1, T, HV]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor

    def rows(self, length: int) -> Streams:
        """Sequences of ``length`` tokens as rows of a batch: ``[T / length, length, ...]``."""
        return Streams(*(x[0].unflatten(0, (-1, length)) for x in self))


class Checkpoints(NamedTuple):
    """Of every sequence at most one state on the way."""

    chunk_of: Tensor  # int [N]; c: the state after c times 64 tokens; below 1: none
    slots: Tensor  # int [N], where it goes
    chunks: int  # none is larger
    pool: Tensor | None = None  # None: the pool of states

    def table(self) -> Tensor:
        """``checkpoint_slots`` of :func:`prefill`: int ``[N, chunks]``, -1 where no state is kept."""
        columns = torch.arange(1, self.chunks + 1, device=self.slots.device)
        wanted = self.chunk_of[:, None] == columns
        return torch.where(wanted, self.slots[:, None], -1)


def prefill_call(
    x: Streams,
    pool: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    *,
    has_initial_state: Tensor | None = None,
    checkpoints: Checkpoints | None = None,
    zero_is_null: bool,
    gates: dict,
) -> calls.Call | str:
    """Packed prompts, in place in ``pool``. The call returns o ``[1, T, HV, V]``."""
    kept = {}
    if checkpoints is not None and checkpoints.chunks:
        kept = {"checkpoint_slots": checkpoints.table(), "checkpoint_pool": checkpoints.pool}
    return attempt(
        prefill.bind,
        x,
        {
            "state_pool": pool,
            "slot_of": slots,
            "has_initial_state": has_initial_state,
            "cu_seqlens": cu_seqlens,
            "checkpoint_interval": CHECKPOINT_TOKENS,
            "zero_is_null": zero_is_null,
            **kept,
            **POOLED,
            **gates,
        },
    )


def decode_call(
    x: Streams, pool: Tensor, slots: Tensor, *, out: Tensor | None = None, zero_is_null: bool, gates: dict, scale=None
) -> calls.Call | str:
    """One token of each sequence, in place in ``pool``. The call returns o ``[T, 1, HV, V]``: ``out`` if given."""
    options = {"slot_of": slots, "out": out, "scale": scale, "zero_is_null": zero_is_null, **POOLED, **gates}
    return attempt(decode.bind, (*x.rows(1), pool), options)


def verify_call(
    x: Streams,
    pool: Tensor,
    slots: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    accepted: Tensor | None = None,
    states: Tensor | None = None,
    state_slots: Tensor | None = None,
    parents: Tensor | None = None,
    out: Tensor | None = None,
    zero_is_null: bool,
    gates: dict,
) -> calls.Call | str:
    """Drafts: the state after every token is kept, so that any number of them can be accepted.

    In place (vLLM): ``slots`` ``[N, columns]`` take the states, and a sequence starts from column ``accepted - 1``.
    Aside (SGLang): ``states`` ``[rows, HV, V, K]`` take them at ``state_slots`` ``[N, tokens]``, and ``pool`` stays.
    ``parents`` ``[N, tokens]`` makes trees of the drafts.
    """
    return attempt(
        decode.bind,
        (*x, pool),
        {
            "slot_of": slots,
            "cu_seqlens": cu_seqlens,
            "num_accepted_tokens": accepted,
            "new_state": states,
            "new_slot_of": state_slots,
            "state_per_token": True,
            "parent_token": parents,
            "out": out,
            "zero_is_null": zero_is_null,
            **POOLED,
            **gates,
        },
    )


def layer_call(
    streams: tuple[Tensor, ...], pool: Tensor, slots: Tensor, *, gates: dict, zero_is_null: bool, **layer: object
) -> calls.Call | str:
    """One token of each sequence through convolutions, recurrence and gated norm: :func:`decode_layer`.

    ``streams``: q, k, v, g ``[T, 1, H, D]`` before their convolutions, beta ``[T, 1, H]``, output gate.
    """
    if not (gates["use_gate_in_kernel"] and gates["use_beta_sigmoid_in_kernel"]):
        return "kda_cuda::decode_layer: the gates are activated before it, expected their pre-activations"
    options = {name: gates[name] for name in ("A_log", "dt_bias", "lower_bound")}
    return attempt(
        decode_layer.bind, streams, {"state": pool, "slot_of": slots, "zero_is_null": zero_is_null, **options, **layer}
    )


def copy_call(x: Streams, pool: Tensor, slots: Tensor, states: Tensor) -> calls.Call | str:
    """Copies slot ``slots[n]`` of ``pool`` to ``states[n]``, unless it is null: a commit of no token."""
    sequences = slots.shape[0]
    like = (y[:, :1].expand(sequences, -1, -1, -1) for y in (x.k, x.v))
    none = torch.zeros_like(slots)
    options = {"slot_of": slots, "new_state": states, "state_v_first": True}
    return attempt(commit.bind, (DraftRecords.empty(*like), none, pool), options)


@torch.no_grad()
def run(call: calls.Call) -> Tensor:
    return calls.run(call)


class Ledger:
    """Counts what a door served and what it left to the engine; says each reason once, in the log of ``name``."""

    def __init__(self, name: str):
        self.served: Counter[str] = Counter()
        self.declined: Counter[str] = Counter()
        self._log = logging.getLogger(name)

    def decline(self, what: str, reason: str) -> None:
        entry = f"{what}: {reason}"
        if not self.declined[entry]:
            self._log.warning("left to the engine: %s", entry)
        self.declined[entry] += 1

    def report(self) -> dict[str, dict[str, int]]:
        return {"served": dict(self.served), "declined": dict(self.declined)}
