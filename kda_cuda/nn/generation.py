"""How a language model continues a prompt: prefill in pieces, then a token at a time, drawn by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..checks import Checker
from .decode_graph import DecodeGraph
from .hybrid_cache import HybridCache
from .layouts import layout_of

__all__ = ["Generation", "next_token"]


class Generation:
    """The part of a language model that generates. It needs ``self(tokens, cache, ...)`` and ``self.new_cache``."""

    def prefill(
        self,
        tokens: Tensor,
        cache: HybridCache,
        attention_mask: Tensor | None = None,
        piece: int | None = None,
    ) -> Tensor:
        """Reads a prompt into the cache; returns the logits ``[batch, vocab_size]`` after the last token of each row.

        Args:
            tokens: ``[batch, tokens]``, at least one column.
            cache: of ``new_cache``; the tokens continue it.
            attention_mask: as in ``forward``.
            piece: so many columns at a time. The result is that of one pass, up to rounding, and what the layers need
                beside the cache does not grow with the prompt. Default: all columns at once.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        c = Checker("prefill")
        c.tensor("tokens", tokens)
        c.rank("tokens", tokens, "batch, tokens")
        if not tokens.shape[1]:
            raise c.value_error(f"tokens has shape {list(tokens.shape)}, expected at least one token")
        if piece is None:
            piece = tokens.shape[1]
        c.integer("piece", piece)
        if piece < 1:
            raise c.value_error(f"piece is {piece}, expected >= 1")
        if piece >= tokens.shape[1]:
            options = {} if attention_mask is None else {"attention_mask": attention_mask}
            return self(tokens, cache, last_only=True, **options)
        return self._prefill_in_pieces(tokens, cache, attention_mask, piece)

    def _prefill_in_pieces(self, tokens: Tensor, cache: HybridCache, mask: Tensor | None, piece: int) -> Tensor:
        """A row whose last token lies in an earlier piece keeps the logits of that piece."""
        if mask is None:
            for part in tokens.split(piece, dim=1):
                logits = self(part, cache, last_only=True)
            return logits
        mask = mask[:, mask.shape[1] - tokens.shape[1] :]
        logits = None
        for part, part_mask in zip(tokens.split(piece, dim=1), mask.split(piece, dim=1), strict=True):
            new = self(part, cache, attention_mask=part_mask, last_only=True)
            logits = new if logits is None else torch.where(part_mask.any(1, keepdim=True), new, logits)
        return logits

    def generate(self, tokens: Tensor, max_new_tokens: int, **sampling) -> Tensor:
        """``tokens`` ``[batch, prompt]`` followed by ``max_new_tokens`` more; arguments as in :meth:`stream`.

        With ``stop_tokens`` there are fewer if every row has met one of them.
        """
        return torch.cat((tokens, *self.stream(tokens, max_new_tokens, **sampling)), dim=1)

    def stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        attention_mask: Tensor | None = None,
        piece: int | None = None,
        stop_tokens: Sequence[int] = (),
        cuda_graph: bool = False,
    ) -> Iterator[Tensor]:
        """Yields the next tokens ``[batch, 1]`` one by one: the prompt in parallel, then one step a token.

        Args:
            tokens: the prompt ``[batch, prompt]``, at least one token.
            max_new_tokens: how many to add.
            temperature: 0 takes the most likely token; otherwise draws from ``softmax(logits / temperature)``.
            top_k: draw only from this many most likely tokens.
            top_p: draw only from the most likely tokens that together have this probability, in (0, 1].
            seed: of the draws; the same seed gives the same tokens.
            attention_mask: as in ``forward``: prompts of different length, padded on the left or on the right.
            piece: columns of the prompt that are read at a time, as in :meth:`prefill`.
            stop_tokens: a row that has got one of them repeats it, and the stream ends when every row has. Every step
                then waits for the device.
            cuda_graph: whether single steps are replayed from a CUDA graph (:class:`DecodeGraph`), which makes small
                batches several times faster. Modules that wait for the device cannot be captured. On the CPU the steps
                are the same, without a graph.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(f"generate: tokens has shape {list(tokens.shape)}, expected [batch, prompt], prompt >= 1")
        if temperature < 0:
            raise ValueError(f"generate: temperature is {temperature}, expected >= 0")
        if top_k is not None and top_k < 1:
            raise ValueError(f"generate: top_k is {top_k}, expected >= 1")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"generate: top_p is {top_p}, expected 0 < top_p <= 1")
        if piece is not None and piece < 1:
            raise ValueError(f"generate: piece is {piece}, expected >= 1")
        layout_of("generate", tokens, False, attention_mask)  # for its checks
        generator = torch.Generator(tokens.device).manual_seed(seed)
        return self._steps(
            tokens, max_new_tokens, attention_mask, piece, stop_tokens, cuda_graph, temperature, top_k, top_p, generator
        )

    @torch.no_grad()
    def _steps(
        self, tokens: Tensor, count: int, mask: Tensor | None, piece, stop_tokens, cuda_graph: bool, *sampling
    ) -> Iterator[Tensor]:
        cache = self.new_cache(len(tokens), tokens.device)
        if isinstance(mask, Tensor) and bool(mask.all()):  # one look, which may spare masks in every step
            mask = None
        stops = torch.tensor(list(stop_tokens), dtype=tokens.dtype, device=tokens.device)
        finished = None
        step = DecodeGraph(self, cache) if cuda_graph else self._eager_step(cache)
        for i in range(count):
            logits = step(tokens) if i else self.prefill(tokens, cache, mask, piece)
            following = next_token(logits.float(), *sampling)
            if finished is not None:
                following = torch.where(finished, tokens[:, -1:], following)
            tokens = following
            yield tokens
            if len(stops):
                finished = torch.isin(tokens, stops)
                if bool(finished.all()):
                    return

    def _eager_step(self, cache: HybridCache) -> Callable[[Tensor], Tensor]:
        return lambda tokens: self(tokens, cache, last_only=True)


def next_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """int64 ``[batch, 1]``, drawn from logits ``[batch, vocab_size]``; arguments as in :meth:`Generation.stream`."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probabilities = torch.softmax(logits / temperature, -1)
    if top_p is not None:
        values, order = probabilities.sort(dim=-1, descending=True)
        beyond = values.cumsum(-1) - values >= top_p
        probabilities = torch.zeros_like(values).scatter(-1, order, values.masked_fill(beyond, 0))
    return torch.multinomial(probabilities, 1, generator=generator)
