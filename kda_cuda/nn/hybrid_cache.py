"""The cache of a model: one of each layer, and the operations on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import Checker
from .cache import KDACache, MLACache, check_crop, concatenate

__all__ = ["HybridCache"]


class HybridCache:
    """What the model keeps of the past: per KDA layer a constant number of bytes, per MLA layer a latent a token."""

    def __init__(self, layers: list[KDACache | MLACache]):
        self.layers = layers

    @classmethod
    def concatenate(cls, caches: Sequence[HybridCache]) -> HybridCache:
        """A new cache with the rows of all of them."""
        return cls([concatenate(layers) for layers in zip(*(cache.layers for cache in caches), strict=True)])

    @property
    def batch_size(self) -> int:
        return self.layers[0].batch_size

    def row_lengths(self) -> Tensor:
        """int64 ``[batch]``: the tokens of each row."""
        return self.layers[0].row_lengths()

    def select(self, rows: Tensor | Sequence[int]) -> HybridCache:
        """A new cache of these rows, in this order; a row may be taken more than once."""
        return HybridCache([layer.select(rows) for layer in self.layers])

    def repeat(self, times: int) -> HybridCache:
        """A new cache with every row ``times`` times: rows 0, 0, 1, 1 for two."""
        return HybridCache([layer.repeat(times) for layer in self.layers])

    def clone(self) -> HybridCache:
        """A new cache with the same rows that shares no memory with this one."""
        return self.repeat(1)

    def __copy__(self) -> HybridCache:
        return self.clone()

    def to(self, device: torch.device | str) -> HybridCache:
        """A new cache on ``device``."""
        return HybridCache([layer.to(device) for layer in self.layers])

    def detach(self) -> None:
        """Stops gradients here: later pieces do not reach the earlier ones (truncated backpropagation)."""
        for layer in self.layers:
            layer.detach()

    def reset_rows(self, rows: Tensor | Sequence[int]) -> None:
        """These rows start new sequences; the others stay as they are."""
        for layer in self.layers:
            layer.reset_rows(rows)

    def reset_states(self) -> None:
        """Forgets the KDA states and the MLA latents; the convolutions keep their last inputs."""
        for layer in self.layers:
            layer.reset_state()

    def checkpoint(self) -> None:
        """Keeps a copy of the KDA states, so that :meth:`crop` can return to this length."""
        for layer in self.layers:
            if isinstance(layer, KDACache):
                layer.checkpoint()

    def drop_checkpoints(self) -> None:
        for layer in self.layers:
            if isinstance(layer, KDACache):
                layer.drop_checkpoints()

    def crop(self, length: int) -> None:
        """Returns every row that is longer to its first ``length`` tokens: exactly, or with an error.

        Raises:
            ValueError: a KDA layer has no checkpoint after that many tokens. Nothing has changed then.
        """
        first, *others = (layer.row_lengths() for layer in self.layers)
        if any(not torch.equal(first, other) for other in others):
            raise Checker("crop").value_error("the layers have seen different numbers of tokens, expected the same")
        for layer in self.layers:  # every refusal before the first change
            layer.crop_sources(length) if isinstance(layer, KDACache) else check_crop(layer, length)
        for layer in self.layers:
            layer.crop(length)

    def nbytes(self) -> int:
        return sum(layer.nbytes() for layer in self.layers)


torch.serialization.add_safe_globals([HybridCache, (HybridCache, "kda_cuda.model.HybridCache")])
