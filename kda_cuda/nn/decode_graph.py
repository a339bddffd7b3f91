"""Single steps of a language model as a CUDA graph: the host launches one thing a token instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import Checker, check_contents
from .cache import MLACache
from .hybrid_cache import HybridCache

__all__ = ["DecodeGraph"]

# Latents that a graph reads beyond those that are there: at most so many, or an eighth of them. A multiple of ALIGNED.
LEAST_ROOM = 256


class DecodeGraph:
    """``model(token, cache, last_only=True)`` without gradients, replayed from a CUDA graph.

    A call takes one token of each row, ``[batch, 1]``, brings the cache forward and returns the logits
    ``[batch, vocab_size]`` in memory of its own. A graph has fixed sizes, so it reads latents of MLA layers up to a
    bound and masks what is not there yet. At the bound a call runs eagerly, and the next one captures a graph with more
    room. So does a call after the cache was changed by others: cropped, reset, or fed with a prompt.

    Only models on CUDA devices whose steps do not wait for the device can be captured. Elsewhere, and with
    ``KDA_CUDA_CHECK=1``, which reads contents on the host, every call runs eagerly.

    Args:
        model: such as :class:`kda_cuda.model.HybridLM`.
        cache: of ``model.new_cache``, after its prompt.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch, kda_cuda.model
        >>> model = kda_cuda.model.HybridLM(kda_cuda.model.HybridConfig(num_layers=2))
        >>> cache = model.new_cache(1)
        >>> logits = model.prefill(torch.tensor([[72, 101, 108]]), cache)
        >>> step = kda_cuda.model.DecodeGraph(model, cache)
        >>> for _ in range(4):
        ...     logits = step(logits.argmax(-1, keepdim=True))
        >>> cache.row_lengths()
        tensor([7])
    """

    def __init__(self, model: Callable[..., Tensor], cache: HybridCache):
        c = Checker("DecodeGraph")
        if not isinstance(cache, HybridCache):
            raise c.type_error(f"cache is a {type(cache).__name__}, expected a HybridCache")
        self.model, self.cache = model, cache
        self.device = cache.row_lengths().device
        with torch.inference_mode(False):
            self._tokens = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=self.device)
            self._lengths = torch.zeros(cache.batch_size, dtype=torch.int64, device=self.device)
        self._bound = 0  # so many latents the graph reads
        self._left: list = []  # the cache as this object left it
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        self._check(tokens)
        if not self._is_as_left() or self.cache.layers[0].length >= self._bound:
            self._begin()
        self._tokens.copy_(tokens)
        if self.device.type != "cuda" or check_contents(tokens):
            logits = self._step()
        elif self._logits is None:  # eagerly, so that whatever is set up once is set up before the capture
            self._logits = logits = self._step()
        else:
            if self._graph is None:
                self._capture()
            self._graph.replay()
            logits = self._logits.clone()
        self._advance()
        return logits

    def _check(self, tokens: Tensor) -> None:
        c = Checker("DecodeGraph")
        c.tensor("tokens", tokens)
        if tokens.shape != self._tokens.shape:
            raise c.value_error(f"tokens has shape {list(tokens.shape)}, expected {list(self._tokens.shape)}")
        if self.cache.batch_size != len(self._tokens):
            raise c.value_error(f"cache has {self.cache.batch_size} rows now, expected {len(self._tokens)} as before")

    def _is_as_left(self) -> bool:
        """Nothing was put in another's place, and no token came in."""
        now = self._now()
        return len(now) == len(self._left) and all(map(_is_same, now, self._left))

    def _now(self) -> list:
        return [x for layer in self.cache.layers for x in (layer.length, layer.lengths, *layer.tensors())]

    def _begin(self) -> None:
        """Room for more tokens, and the lengths as they are now."""
        layers, length = self.cache.layers, self.cache.layers[0].length
        self._bound = bound_after(length)
        for layer in layers:
            layer.own()
            if isinstance(layer, MLACache):
                layer.reserve(self._bound)
        self._lengths.copy_(layers[0].row_lengths())
        self._logits = self._graph = None

    def _step(self) -> Tensor:
        """One step on the cache, whose host side is then as before."""
        layers = self.cache.layers
        before = [(layer.length, layer.lengths) for layer in layers]
        held = [layer.tensors() for layer in layers]
        try:
            for layer in layers:
                layer.length, layer.lengths = self._bound - 1, self._lengths if isinstance(layer, MLACache) else None
            logits = self.model(self._tokens, self.cache, last_only=True)
            for layer, tensors in zip(layers, held, strict=True):
                layer.keep_in(tensors)
            self._lengths.add_(1)
            return logits
        finally:
            for layer, tensors, (length, lengths) in zip(layers, held, before, strict=True):
                layer.set_tensors(tensors)
                layer.length, layer.lengths = length, lengths

    def _capture(self) -> None:
        graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[self.device.index or 0]
        random = generator.clone_state()
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph):
                self._logits = self._step()
        except RuntimeError as e:
            generator.graphsafe_set_state(random)  # torch leaves it as if the capture were still going on
            if "captur" not in str(e):  # an error of the model itself
                raise
            message = f"model has a step that cannot be captured, expected one that does not wait for the device: {e}"
            raise Checker("DecodeGraph").value_error(message) from e
        self._graph = graph

    def _advance(self) -> None:
        lengths = None if self.cache.layers[0].lengths is None else self._lengths.clone()
        for layer in self.cache.layers:
            layer.length, layer.lengths = layer.length + 1, lengths
        self._left = self._now()


def _is_same(a: Tensor | int | None, b: Tensor | int | None) -> bool:
    return a == b if isinstance(a, int) and isinstance(b, int) else a is b


def bound_after(length: int) -> int:
    """How many latents a graph that begins after ``length`` of them reads."""
    step = max(LEAST_ROOM, 1 << max(0, length.bit_length() - 4))
    return (length // step + 1) * step
