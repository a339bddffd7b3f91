"""Sequences cut into chunks: ``[chunks, heads, C, ...]``, contiguous, so that nothing depends on the inputs' strides.

Chunks are held step by step: the first chunk of every sequence, then the second of every sequence that has one, and so
on. Sequences are held longest first, so that those with a chunk ``j`` are a prefix, and step ``j`` is a slice. Padding
tokens are zero: with ``k = beta = g = 0`` they neither write to the state nor decay it. Tokens after the last sequence
of cu_seqlens are in no chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of one [chunks, heads, C, D] tensor that the CPU works on at a time: some twenty of these stay in its caches.
CPU_PART = 1 << 18


@dataclass(frozen=True)
class Part:
    """Consecutive steps."""

    chunks: slice
    steps: list[slice]  # within the part; those of one step belong to the first sequences


class ChunkLayout:
    def __init__(self, batch: int, tokens: int, chunk: int, cu_seqlens: Tensor | None, device: torch.device):
        self.batch, self.tokens, self.chunk = batch, tokens, chunk
        self.varlen = cu_seqlens is not None
        self.sequences = batch
        self._owned = slice(0, tokens)  # the tokens that sequences have
        if self.varlen:
            self._plan(cu_seqlens.detach().to("cpu", torch.int64), device)
        else:
            self._steps = [slice(j * batch, (j + 1) * batch) for j in range(-(-tokens // chunk))]
            self.chunks = batch * len(self._steps)

    def _plan(self, bounds: Tensor, device: torch.device) -> None:
        lengths = bounds[1:] - bounds[:-1]
        counts = (lengths + self.chunk - 1) // self.chunk
        self.sequences, self.chunks = lengths.numel(), int(counts.sum())
        self._owned = slice(int(bounds[0]), int(bounds[-1]))
        order = torch.argsort(counts, descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(self.sequences)
        active = (counts > torch.arange(int(counts.max()) if self.sequences else 0).unsqueeze(1)).sum(1)
        ends = torch.cumsum(active, 0)
        begins = ends - active
        self._steps = [slice(b, e) for b, e in zip(begins.tolist(), ends.tolist(), strict=True)]

        sequence = torch.repeat_interleave(torch.arange(self.sequences), lengths)
        offset = torch.arange(self._owned.start, self._owned.stop) - bounds[sequence]
        self._chunk_of_token = (begins[offset // self.chunk] + rank[sequence]).to(device)
        self._row_of_token = (offset % self.chunk).to(device)
        owner = torch.repeat_interleave(torch.arange(self.sequences), counts)
        step = torch.arange(self.chunks) - (torch.cumsum(counts, 0) - counts)[owner]
        self._natural_chunks = (begins[step] + rank[owner]).to(device)
        self._order, self._rank = order.to(device), rank.to(device)

    def parts(self, like: Tensor) -> list[Part]:
        """All steps, in parts that the caches hold where ``like [chunks, heads, C, D]`` is on the CPU."""
        limit = CPU_PART // max(1, like[:1].numel()) if like.device.type == "cpu" else self.chunks
        parts: list[Part] = []
        for step in self._steps:
            if parts and step.stop - parts[-1].chunks.start <= limit:
                begin = parts[-1].chunks.start
                steps = [*parts[-1].steps, slice(step.start - begin, step.stop - begin)]
                parts[-1] = Part(slice(begin, step.stop), steps)
            else:
                parts.append(Part(step, [slice(0, step.stop - step.start)]))
        return parts

    def owned(self, x: Tensor) -> Tensor:
        """``[B, T, ...]`` without the tokens that no sequence has: a view."""
        return x[:, self._owned]

    def to_chunks(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``[B, T, H, ...] -> [chunks, H, C, ...]`` in ``dtype``, of owned tokens; never a view of ``x``."""
        heads, *tail = x.shape[2:]
        shape = (self.chunks, heads, self.chunk, *tail)
        if self.varlen:
            out = x.new_zeros(shape, dtype=dtype)
            out[self._chunk_of_token, :, self._row_of_token] = x[0].to(dtype)
            return out
        out = x.new_empty(shape, dtype=dtype)
        full, rest = divmod(self.tokens, self.chunk)
        in_full = self._in_full_chunks(x)
        out.unflatten(0, (len(self._steps), self.batch))[:full].copy_(in_full)
        if rest:
            last = out[self._steps[-1]]
            last[:, :, :rest] = x[:, full * self.chunk :].transpose(1, 2)
            last[:, :, rest:] = 0
        return out

    def to_tokens(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``[chunks, H, C, ...] -> [B, T, H, ...]`` in ``dtype``, contiguous; never a view of ``x``. Zero for tokens
        that no sequence has."""
        heads, _, *tail = x.shape[1:]
        if self.varlen:
            out = x.new_zeros((1, self.tokens, heads, *tail), dtype=dtype)
            self.owned(out)[0] = x[self._chunk_of_token, :, self._row_of_token].to(dtype)
            return out
        out = x.new_empty((self.batch, self.tokens, heads, *tail), dtype=dtype)
        full, rest = divmod(self.tokens, self.chunk)
        self._in_full_chunks(out).copy_(x.unflatten(0, (len(self._steps), self.batch))[:full])
        if rest:
            out[:, full * self.chunk :] = x[self._steps[-1]][:, :, :rest].transpose(1, 2)
        return out

    def without_others(self, x: Tensor) -> Tensor:
        """``[B, T, ...]`` with zeros for tokens that no sequence has."""
        if self._owned == slice(0, self.tokens):
            return x
        out = torch.zeros_like(x)
        self.owned(out).copy_(self.owned(x))
        return out

    def _in_full_chunks(self, x: Tensor) -> Tensor:
        """View of ``[B, T, H, ...]`` without its tail: ``[steps, B, H, C, ...]``."""
        full = self.tokens // self.chunk
        return x[:, : full * self.chunk].unflatten(1, (full, self.chunk)).transpose(0, 1).transpose(2, 3)

    def sorted_states(self, x: Tensor) -> Tensor:
        """A copy of one state per sequence, in the layout's order."""
        return x[self._order] if self.varlen else x.clone(memory_format=torch.contiguous_format)

    def natural_states(self, x: Tensor) -> Tensor:
        """The states in the caller's order."""
        return x[self._rank] if self.varlen else x

    def natural_chunks(self, x: Tensor) -> Tensor:
        """``[chunks, ...] -> [B, chunks of a sequence, ...]``, or ``[1, chunks, ...]`` with cu_seqlens."""
        if self.varlen:
            return x[self._natural_chunks].unsqueeze(0)
        return x.unflatten(0, (len(self._steps), self.batch)).transpose(0, 1)
