"""The layer of Kimi Delta Attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import decoding_layer
from ..checks import Checker
from ..context_parallel.streams import exchange_conv_tails
from ..ops import chunk_kda, fused_recurrent_kda
from .cache import KDACache, check_rows
from .layouts import Layout, PaddedRows, layout_of
from .modules import GatedRMSNorm, KeepsFp32, ShortConvolution, convolve, device_and_dtype, fit_on_load, is_plain
from .projections import linears

__all__ = ["KimiDeltaAttention"]

GATE_PARAMETERS = ("A_log", "dt_bias")
NEVER = -1e4  # the logit of a write or of a decay that does not happen: exactly 0 in every dtype


class KimiDeltaAttention(KeepsFp32, nn.Module):
    """Kimi Delta Attention over ``[batch, tokens, hidden_size]``, in parallel or a few tokens on top of a cache.

    Projections, a causal convolution with SiLU on each of q, k and v, the gate
    ``-exp(A_log) softplus(f_b(f_a x) + dt_bias)``, ``beta = sigmoid(b x)``, l2-normalised q and k, the delta rule, and
    ``o_proj(RMSNorm(o) sigmoid(g_b(g_a x)))``. Source: Kimi Linear report, section 4.

    Args:
        hidden_size: width of the input and of the output.
        num_heads, head_dim: of q and k, and of v too unless the next two say otherwise.
        conv_size: taps of the short convolutions.
        norm_eps: of the output norm.
        num_v_heads: heads of v, of the gates and of the state: a multiple of ``num_heads``, which is the default.
        expand_v: a value head is ``expand_v * head_dim`` wide, a whole number.
        lower_bound: None, or a negative number: the gate is then ``lower_bound sigmoid(exp(A_log)(... + dt_bias))``.
        full_rank_gate: the gate comes from one ``f_proj`` instead of ``f_b_proj`` after ``f_a_proj``.
        full_rank_output_gate: the output gate comes from one ``g_proj`` instead of ``g_b_proj`` after ``g_a_proj``.
        allow_neg_eigval: beta is ``2 sigmoid(b x)``.
        conv_bias: whether the convolutions have a bias.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> from kda_cuda.layers import KimiDeltaAttention
        >>> layer = KimiDeltaAttention(hidden_size=64, num_heads=2, head_dim=32)
        >>> layer(torch.randn(1, 10, 64)).shape
        torch.Size([1, 10, 64])
    """

    FP32 = GATE_PARAMETERS  # they scale every decay of a whole context

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        conv_size: int = 4,
        norm_eps: float = 1e-5,
        *,
        num_v_heads: int | None = None,
        expand_v: float = 1,
        lower_bound: float | None = None,
        full_rank_gate: bool = False,
        full_rank_output_gate: bool = False,
        allow_neg_eigval: bool = False,
        conv_bias: bool = False,
    ):
        super().__init__()
        self.num_heads, self.head_dim, self.conv_size = num_heads, head_dim, conv_size
        self.num_v_heads = num_heads if num_v_heads is None else num_v_heads
        self.v_head_dim = round(head_dim * Checker("KimiDeltaAttention").number("expand_v", expand_v))
        self.lower_bound, self.allow_neg_eigval = lower_bound, allow_neg_eigval
        self.options = {  # what a layer with other heads has in common with this one
            "expand_v": expand_v,
            "lower_bound": lower_bound,
            "full_rank_gate": full_rank_gate,
            "full_rank_output_gate": full_rank_output_gate,
            "allow_neg_eigval": allow_neg_eigval,
            "conv_bias": conv_bias,
        }
        self._check_options()
        self.key_width, self.value_width = num_heads * head_dim, self.num_v_heads * self.v_head_dim
        gate_width = self.num_v_heads * head_dim
        for name, width in (("q", self.key_width), ("k", self.key_width), ("v", self.value_width)):
            self.add_module(f"{name}_proj", nn.Linear(hidden_size, width, bias=False))
            self.add_module(f"{name}_conv1d", ShortConvolution(width, conv_size, conv_bias))
        self._add_gate("f", hidden_size, gate_width, full_rank_gate)
        self.b_proj = nn.Linear(hidden_size, self.num_v_heads, bias=False)
        self._add_gate("g", hidden_size, self.value_width, full_rank_output_gate)
        self.A_log = nn.Parameter(torch.empty(self.num_v_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(gate_width, dtype=torch.float32))
        self.o_norm = GatedRMSNorm(self.v_head_dim, norm_eps)
        self.o_proj = nn.Linear(self.value_width, hidden_size, bias=False)
        self.reset_gate_parameters()

    def _check_options(self) -> None:
        c, expand_v = Checker("KimiDeltaAttention"), self.options["expand_v"]
        for name in ("full_rank_gate", "full_rank_output_gate", "allow_neg_eigval", "conv_bias"):
            c.boolean(name, self.options[name])
        if self.num_v_heads < 1 or self.num_v_heads % self.num_heads:
            raise c.value_error(
                f"num_v_heads is {self.num_v_heads}, expected a multiple of the {self.num_heads} heads of q and k"
            )
        if self.v_head_dim < 1 or not math.isclose(self.v_head_dim, self.head_dim * expand_v):
            raise c.value_error(
                f"expand_v is {expand_v}, expected a whole number > 0 for head_dim={self.head_dim} times it"
            )
        if self.lower_bound is not None and not -math.inf < c.number("lower_bound", self.lower_bound) < 0:
            raise c.value_error(f"lower_bound is {self.lower_bound}, expected a finite negative number")

    def _add_gate(self, name: str, hidden_size: int, width: int, full_rank: bool) -> None:
        if full_rank:
            self.add_module(f"{name}_proj", nn.Linear(hidden_size, width, bias=False))
        else:
            self.add_module(f"{name}_a_proj", nn.Linear(hidden_size, self.v_head_dim, bias=False))
            self.add_module(f"{name}_b_proj", nn.Linear(self.v_head_dim, width, bias=False))

    @torch.no_grad()
    def reset_gate_parameters(self) -> None:
        """Amplitudes A uniform in [1, 16]; time steps softplus(dt_bias) log-uniform in [1e-3, 1e-1]."""
        self.A_log.uniform_(1, 16).log_()
        dt = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        dt.add_(torch.log(-torch.expm1(-dt)))

    def reset_parameters(self) -> None:
        """Sets the parameters that belong to the layer itself; its modules have a ``reset_parameters`` of their own."""
        self.reset_gate_parameters()

    @property
    def _is_fsdp_managed_module(self) -> bool:
        """FSDP2 sets this when it has taken parameters of the layer into a group."""
        return vars(self).get("_managed", False)

    @_is_fsdp_managed_module.setter
    def _is_fsdp_managed_module(self, managed: bool) -> None:
        """Refuses a group of two dtypes, which FSDP2 would refuse in the first forward, without a way out."""
        first, vars(self)["_managed"] = not self._is_fsdp_managed_module, managed
        if first and hasattr(self.A_log, "device_mesh"):
            grouped = [m for m in self.children() if not any(c.__name__ == "FSDPModule" for c in type(m).__mro__)]
            trained = [p for p in (self.A_log, *(p for m in grouped for p in m.parameters())) if p.requires_grad]
            dtypes = {str(p.dtype).removeprefix("torch.") for p in trained}
            if len(dtypes) > 1:
                raise Checker("fully_shard").value_error(
                    f"the parameters of a KimiDeltaAttention have dtypes {sorted(dtypes)}, expected one: "
                    "kda_cuda.parallel.shard(model, ...) shards such a model, with A_log and dt_bias apart"
                )

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """A_log may be ``[1, 1, heads, 1]``, as released checkpoints have it, and dt_bias ``[heads, head_dim]``."""
        fit_on_load(state_dict, prefix, self, "A_log")
        fit_on_load(state_dict, prefix, self, "dt_bias", (self.num_v_heads, self.head_dim))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def new_cache(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> KDACache:
        """For ``batch_size`` sequences that have not begun. Default: device and dtype of the layer's weights."""
        like = device_and_dtype(self, leave_out=GATE_PARAMETERS)
        device, dtype = like[0] if device is None else device, like[1] if dtype is None else dtype
        state = (batch_size, self.num_v_heads, self.v_head_dim, self.head_dim)
        return KDACache(
            torch.zeros(batch_size, sum(self._stream_widths()), self.conv_size - 1, device=device, dtype=dtype),
            torch.zeros(state, device=device, dtype=torch.promote_types(dtype, torch.float32)),
        )

    def cache_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Of one sequence; ``tokens`` does not matter."""
        state = torch.promote_types(dtype, torch.float32)
        inputs = sum(self._stream_widths()) * (self.conv_size - 1)
        return inputs * dtype.itemsize + self.value_width * self.head_dim * state.itemsize

    def _stream_widths(self) -> tuple[int, int, int]:
        """Channels of q, k and v."""
        return self.key_width, self.key_width, self.value_width

    def forward(
        self,
        x: Tensor,
        cache: KDACache | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        layout: Layout | None = None,
        cp_context: object | None = None,
    ) -> Tensor:
        """``[batch, tokens, hidden_size]`` for such an ``x``.

        Args:
            cache: it is read, and brought forward past the tokens of x; without it x starts the sequences.
            attention_mask: bool or integer ``[batch, tokens]``, nonzero for tokens: the others, anywhere in a row, are
                padding. They change nothing and get zeros. With a cache, columns of past tokens may come first.
            cu_seqlens: int32 or int64 ``[documents + 1]``: x is one row, and document n its tokens ``cu_seqlens[n]`` to
                ``cu_seqlens[n + 1]``. No document sees another. Tokens after the last one are padding, as above. Not
                with a cache.
            layout: what the two before and the one below say, prepared for several layers; x is then in its order.
            cp_context: as in :func:`kda_cuda.chunk_kda`: x is ``[1, tokens of this rank, hidden_size]``. The layers of
                all ranks have equal weights; gradients of weights are this rank's share. Not with the others.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        op = "KimiDeltaAttention"
        check_rows(Checker(op), x, cache)
        if layout is None:
            own = layout_of(op, x, cache is not None, attention_mask, cu_seqlens, cp_context)
            return own.leave(self._forward(own.enter(x), cache, own))
        return self._forward(x, cache, layout)

    def _forward(self, x: Tensor, cache: KDACache | None, layout: Layout) -> Tensor:
        counts = layout.counts
        *inputs, gate, output_gate, beta = linears(
            x, self.q_proj, self.k_proj, self.v_proj, self._first("f"), self._first("g"), self.b_proj
        )
        gate = self._second("f", gate).unflatten(-1, (-1, self.head_dim))
        output_gate = self._second("g", output_gate).unflatten(-1, (-1, self.v_head_dim))
        single_step = cache is not None and x.shape[1] == 1
        if cache is not None:
            cache.own()
        if single_step and self._can_fuse(gate):
            return self.o_proj(self._fused_step(inputs, gate, beta, output_gate, cache, counts).flatten(-2))
        q, k, v = self._convolved(inputs, cache, layout)
        if cache is not None and isinstance(layout, PaddedRows):  # padding leaves the state as it is
            padding = layout.padding(x.shape[1]).unsqueeze(-1)
            gate, beta = gate.masked_fill(padding.unsqueeze(-1), NEVER), beta.masked_fill(padding, NEVER)
        o, state = self._recurrence(
            fused_recurrent_kda if single_step else chunk_kda, q, k, v, gate, beta,
            initial_state=None if cache is None else cache.state,
            output_final_state=cache is not None,
            cu_seqlens=layout.cu_seqlens,
            **({} if layout.cp_context is None else {"cp_context": layout.cp_context}),
        )  # fmt: skip
        if cache is not None:
            cache.state = state
            cache.advance(x.shape[1], counts)
        return self.o_proj(self.o_norm(o, output_gate).flatten(-2))

    def _recurrence(
        self, op: Callable, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor, **more: object
    ) -> tuple[Tensor, Tensor | None]:
        """The output and the last state of ``op``; layers that are compared with KDA change what it is given.

        ``more`` has arguments of ``op``, and may replace those that the layer gives.
        """
        own = {
            "A_log": self.A_log,
            "dt_bias": self.dt_bias,
            "use_qk_l2norm_in_kernel": True,
            "use_gate_in_kernel": True,
            "use_beta_sigmoid_in_kernel": True,
            "allow_neg_eigval": self.allow_neg_eigval,
            "lower_bound": self.lower_bound,
            "state_v_first": True,
        }
        return op(q, k, v, gate, beta, **own | more)

    def _first(self, name: str) -> nn.Module:
        """What computes a gate's pre-activation ``[batch, tokens, heads * dim]``, or the first of two that do."""
        whole = self._modules.get(f"{name}_proj")
        return self._modules[f"{name}_a_proj"] if whole is None else whole

    def _second(self, name: str, y: Tensor) -> Tensor:
        second = self._modules.get(f"{name}_b_proj")
        return y if second is None else second(y)

    def _convolved(self, inputs: list[Tensor], cache: KDACache | None, layout: Layout) -> list[Tensor]:
        """q, k, v ``[batch, tokens, heads, dim]``; the cache then holds the last inputs."""
        past = None if cache is None else cache.conv
        if layout.cp_context is not None:
            tails = exchange_conv_tails(torch.cat(inputs, dim=-1), layout.cp_context, self.conv_size)
            past = layout.pasts(tails.transpose(1, 2))
        streams = self._convolve(inputs, past, layout.cu_seqlens)
        if cache is not None:
            new = torch.cat(inputs, dim=-1).transpose(1, 2)
            seen = torch.cat((cache.conv, new.to(cache.conv.dtype)), dim=2)
            cache.conv = _last_inputs(seen, self.conv_size - 1, layout.counts)
        dims = (self.head_dim, self.head_dim, self.v_head_dim)
        return [y.unflatten(-1, (-1, dim)) for y, dim in zip(streams, dims, strict=True)]

    def _convolve(self, inputs: list[Tensor], past: Tensor | None, cu_seqlens: Tensor | None) -> Sequence[Tensor]:
        """The streams of q, k and v, convolved in one call if the modules are plain and alike.

        ``inputs`` ``[batch, tokens, channels]`` of each, ``past`` ``[sequences, channels of all, taps - 1]``.
        """
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        plain = all(is_plain(conv, ShortConvolution, may_have_bias=True) for conv in convolutions)
        if plain and len({conv.bias is None for conv in convolutions}) == 1:
            biases = [conv.bias for conv in convolutions if conv.bias is not None]
            weight = torch.cat([conv.weight for conv in convolutions])
            return convolve(inputs, weight, torch.cat(biases) if biases else None, past, cu_seqlens)
        pasts = [None] * 3 if past is None else past.split(self._stream_widths(), dim=1)
        bounds = () if cu_seqlens is None else (cu_seqlens,)
        streams = zip(convolutions, inputs, pasts, strict=True)
        return [conv(y, before, *bounds) for conv, y, before in streams]

    def _can_fuse(self, gate: Tensor) -> bool:
        """Whether one kernel may stand for convolutions, recurrence and norm: none of them is wrapped or replaced."""
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        return (
            (self.num_v_heads, self.v_head_dim) == (self.num_heads, self.head_dim)
            and decoding_layer.serves(gate, self.head_dim, self.conv_size)
            and all(is_plain(conv, ShortConvolution) for conv in convolutions)
            and is_plain(self.o_norm, GatedRMSNorm)
        )

    def _fused_step(
        self,
        inputs: list[Tensor],
        gate: Tensor,
        beta: Tensor,
        output_gate: Tensor,
        cache: KDACache,
        counts: Tensor | None,
    ) -> Tensor:
        """Everything between the projections in one launch; the cache is updated in place."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in inputs)
        rows = None
        if counts is not None:  # rows without a token have a null slot
            rows = torch.where(counts > 0, torch.arange(len(counts), device=counts.device), -1)
        y = decoding_layer.decode_layer(
            q, k, v, gate, beta, output_gate,
            conv_state=cache.conv,
            conv_weights=(self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight),
            norm_weight=self.o_norm.weight,
            state=cache.state,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            allow_neg_eigval=self.allow_neg_eigval,
            lower_bound=self.lower_bound,
            slot_of=rows,
            norm_eps=self.o_norm.eps,
        )  # fmt: skip
        cache.advance(1, counts)
        return y


def _last_inputs(seen: Tensor, taps: int, counts: Tensor | None) -> Tensor:
    """The last ``taps`` of ``[batch, channels, taps + tokens]``, counted from the last token of each row."""
    if counts is None:
        return seen[:, :, seen.shape[2] - taps :].contiguous()
    places = counts[:, None, None] + torch.arange(taps, device=counts.device)
    return torch.take_along_dim(seen, places, dim=2)
