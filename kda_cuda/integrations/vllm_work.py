"""What vLLM's KDA layers and their metadata ask for, in one form: tokens, convolutions, gates, slots, checkpoints."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..prefilling import CHECKPOINT_TOKENS
from . import engine_steps as steps
from .engine_steps import Streams

__all__ = ["WORK", "Step", "Work", "checkpoints_of", "steps_of"]


# ---- what a layer hands over -----------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What a layer hands to its core attention, for all tokens of a step."""

    streams: tuple[Tensor, ...]  # before their convolutions: q|k|v [T, 3 * H * D], or three [T, H * D]
    weights: tuple[Tensor, ...]  # of the convolutions, [channels, taps]
    g: Tensor  # [1, T, H, D]
    beta: Tensor  # [1, T, H]
    out: Tensor  # [1, T, H, D], to be written
    gates: dict  # options of g and beta
    output_gate: Tensor | None = None  # [T, H, D]: the gated norm belongs to the core attention

    def select(self, tokens: slice | Tensor) -> Work:
        """Some of the tokens; their ``out`` only where they stand side by side."""
        if isinstance(tokens, slice):
            own = (tuple(x[tokens] for x in self.streams), self.g[:, tokens], self.beta[:, tokens], self.out[:, tokens])
        else:
            chosen = tuple(x.index_select(0, tokens) for x in self.streams)
            own = (chosen, self.g.index_select(1, tokens), self.beta.index_select(1, tokens), None)
        streams, g, beta, out = own
        return self._replace(streams=streams, g=g, beta=beta, out=out)

    def inputs(self, convolved: tuple[Tensor, ...]) -> Streams:
        sizes = self.g.shape[2:]
        if len(convolved) == 1:
            q, k, v = convolved[0].unflatten(-1, (3, *sizes)).unbind(1)
        else:
            q, k, v = (x.unflatten(-1, sizes) for x in convolved)
        return Streams(q[None], k[None], v[None], self.g, self.beta)


def _kimi(layer: Any, mixed_qkv: Tensor, g1: Tensor, g2: Tensor, beta: Tensor, core_attn_out: Tensor) -> Work:
    gates = steps.raw_gates(layer.A_log, layer.dt_bias, layer.gate_lower_bound)
    return Work((mixed_qkv,), _weights(layer.conv1d), g1, beta, core_attn_out, gates, g2)


def _glm(layer: Any, qkv_proj_states: Tensor, g1: Tensor, beta: Tensor, core_attn_out: Tensor) -> Work:
    gates = steps.raw_gates(layer.A_log, layer.dt_bias, layer.kda_lower_bound)
    weight = torch.cat(_weights(layer.q_conv1d, layer.k_conv1d, layer.v_conv1d))
    return Work((qkv_proj_states,), (weight,), g1, beta, core_attn_out, gates)


def _bailing(layer: Any, q_proj_states, k_proj_states, v_proj_states, g1, beta, core_attn_out) -> Work:
    weights = _weights(layer.q_conv1d, layer.k_conv1d, layer.v_conv1d)
    return Work((q_proj_states, k_proj_states, v_proj_states), weights, g1, beta, core_attn_out, steps.ACTIVATED)


def _weights(*convolutions: Any) -> tuple[Tensor, ...]:
    if any(x.bias is not None for x in convolutions):
        raise ValueError("a convolution has a bias, expected none")
    return tuple(x.weight.detach().flatten(1) for x in convolutions)


WORK = {
    "KimiGatedDeltaNetAttention": _kimi,
    "KimiK3DeltaAttention": _kimi,
    "Glm5NextLinearAttention": _glm,
    "BailingMoeV3KimiDeltaAttention": _bailing,
}


# ---- what the metadata ask for ---------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Sequences that one call serves."""

    kind: str  # prefill, decode, verify
    tokens: slice | Tensor  # theirs, of the step's
    slots: Tensor  # [N]; of verify [N, columns]
    cu_seqlens: Tensor | None = None
    has_initial_state: Tensor | None = None
    accepted: Tensor | None = None  # [N]
    checkpoint: Any = None


def steps_of(m: Any) -> list[Step]:
    """The parts of a batch, of which ``m`` is vLLM's metadata: drafts to verify; prompts, with single tokens among
    them, or single tokens alone."""
    found, others = [], m.num_prefills + m.num_decodes > 0
    everything = slice(0, m.num_actual_tokens)
    if n := m.num_spec_decodes:
        tokens = _tokens(m, "spec", m.num_spec_decode_tokens) if others else everything
        found.append(
            Step(
                "verify",
                tokens,
                m.spec_state_indices_tensor[:n],
                m.spec_query_start_loc[: n + 1],
                accepted=m.num_accepted_tokens[:n],
            )
        )
    if others:
        tokens = _tokens(m, "non_spec", m.num_prefill_tokens + m.num_decode_tokens) if found else everything
        slots = m.non_spec_state_indices_tensor
        if m.num_prefills:
            bounds = m.non_spec_query_start_loc
            found.append(Step("prefill", tokens, slots, bounds, m.has_initial_state, checkpoint=m.checkpoint))
        else:
            found.append(Step("decode", tokens, slots[: _count(tokens)]))
    return found


def _tokens(m: Any, which: str, count: int) -> slice | Tensor:
    start = getattr(m, f"{which}_token_start", None)
    return getattr(m, f"{which}_token_indx") if start is None else slice(start, start + count)


def _count(tokens: slice | Tensor) -> int:
    return tokens.stop - tokens.start if isinstance(tokens, slice) else tokens.numel()


def checkpoints_of(checkpoint: Any, exporter: Any) -> steps.Checkpoints | None:
    """The states on the way that a prefix cache wants. Raises ValueError where a prompt's kernel cannot keep them."""
    if checkpoint is None:
        return None
    if exporter is None or checkpoint.offsets is None:
        raise ValueError("a prefix checkpoint is asked for, expected an exporter and offsets on the host with it")
    if odd := [x for x in checkpoint.offsets if x % CHECKPOINT_TOKENS]:
        raise ValueError(f"a prefix checkpoint is after token {odd[0]}, expected a multiple of {CHECKPOINT_TOKENS}")
    chunk_of = checkpoint.checkpoint_offsets // CHECKPOINT_TOKENS
    return steps.Checkpoints(chunk_of, checkpoint.state_indices, max(checkpoint.offsets) // CHECKPOINT_TOKENS)
