"""What a layer keeps of the past, and what can be done with the rows of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..checks import Checker, check_contents

__all__ = ["KDACache", "MLACache", "concatenate"]

LEAST_GROWTH = 64  # latents that a buffer grows by, at least


def _own(x: Tensor) -> Tensor:
    """``x``, or a copy of it that may be written and differentiated in the present mode of autograd.

    A copy is needed of a tensor of inference mode outside of it, and of a result of autograd while gradients are off.
    """
    if not torch.compiler.is_compiling() and x.is_inference() and not torch.is_inference_mode_enabled():
        return x.clone()
    return x.detach().clone() if x.requires_grad and not torch.is_grad_enabled() else x


class RowCache:
    """What the caches of both kinds of layer share: rows, one a sequence, and how many tokens each has seen.

    ``length`` is the number of tokens of every row while ``lengths`` is None. Otherwise rows differ: ``lengths``
    ``[batch]`` has the number of each, and ``length`` is an upper bound of them that the host knows.
    """

    length: int = 0
    lengths: Tensor | None = None

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces every tensor that has a row a sequence."""
        raise NotImplementedError

    def tensors(self) -> tuple[Tensor, ...]:
        """Those tensors, without checkpoints. What is there now; the next step may put others in their place."""
        raise NotImplementedError

    def set_tensors(self, tensors: tuple[Tensor, ...]) -> None:
        """Puts these in the place of :meth:`tensors`."""
        raise NotImplementedError

    def own(self) -> None:
        """Makes the tensors fit to be written in the present mode of autograd."""
        self.set_tensors(tuple(_own(x) for x in self.tensors()))

    def keep_in(self, tensors: tuple[Tensor, ...]) -> None:
        """Moves what the cache holds back into earlier :meth:`tensors`, where a step has not written them in place."""
        for to, x in zip(tensors, self.tensors(), strict=True):
            if to is not x:
                to.copy_(x)
        self.set_tensors(tensors)

    def _rows(self) -> Tensor:
        """One of the tensors."""
        return self.tensors()[-1]

    @property
    def batch_size(self) -> int:
        return self._rows().shape[0]

    def row_lengths(self) -> Tensor:
        """int64 ``[batch]``: the tokens of each row."""
        if self.lengths is not None:
            return self.lengths
        return torch.full((self.batch_size,), self.length, dtype=torch.int64, device=self._rows().device)

    def advance(self, tokens: int, counts: Tensor | None = None) -> None:
        """Counts tokens that the tensors have taken in: ``tokens`` in each row, or ``counts`` ``[batch]`` of them."""
        if counts is not None:
            self.lengths = self.row_lengths() + counts
        elif self.lengths is not None:
            self.lengths = self.lengths + tokens
        self.length += tokens

    def _set_lengths(self, lengths: Tensor) -> None:
        """Reads the lengths on the host, so that equal ones cost nothing from here on."""
        known = lengths.tolist()
        self.length, equal = max(known, default=0), len(set(known)) <= 1
        self.lengths = None if equal else lengths

    def _copy(self):
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def select(self, rows: Tensor | Sequence[int]):
        """A new cache of these rows, in this order; a row may be taken more than once. Nothing is shared.

        Beam search reorders with it, sampling n continuations repeats with it, and finished rows are left out with it.
        """
        rows = _row_indices("select", rows, self)
        lengths, twin = self.row_lengths(), self._copy()
        twin._map(lambda x: x.index_select(0, rows))
        if self.lengths is not None:
            twin._set_lengths(lengths.index_select(0, rows))
        return twin

    def repeat(self, times: int):
        """A new cache with every row ``times`` times: rows 0, 0, 1, 1 for two."""
        c = Checker("repeat")
        c.integer("times", times)
        if times < 1:
            raise c.value_error(f"times is {times}, expected >= 1")
        return self.select(torch.arange(self.batch_size, device=self._rows().device).repeat_interleave(times))

    def clone(self):
        """A new cache with the same rows that shares no memory with this one."""
        return self.repeat(1)

    def __copy__(self):
        return self.clone()

    def to(self, device: torch.device | str):
        """A new cache on ``device``."""
        twin = self._copy()
        twin._map(lambda x: x.to(device, copy=True))
        twin.lengths = None if self.lengths is None else self.lengths.to(device)
        return twin

    def detach(self) -> None:
        """Stops gradients here: later pieces do not reach the earlier ones (truncated backpropagation)."""
        self._map(lambda x: x.detach().clone())

    def reset_rows(self, rows: Tensor | Sequence[int]) -> None:
        """These rows start new sequences; the others stay as they are."""
        rows = _row_indices("reset_rows", rows, self)
        lengths = self.row_lengths().index_fill(0, rows, 0)
        self._map(lambda x: x.index_fill(0, rows, 0))
        self._set_lengths(lengths)


class KDACache(RowCache):
    """What a KDA layer keeps of the past: the same number of bytes after any number of tokens.

    A state cannot be taken back. :meth:`checkpoint` keeps a copy of it, and :meth:`crop` returns to such a copy.
    """

    _kept: tuple[KDACache, ...] = ()  # the checkpoints

    def __init__(self, conv: Tensor, state: Tensor):
        self.conv = conv  # [batch, 3 projections' channels, taps - 1]: the last inputs of the convolutions of q | k | v
        self.state = state  # [batch, heads, value_dim, key_dim], fp32

    def __repr__(self) -> str:
        return f"KDACache(conv={list(self.conv.shape)}, state={list(self.state.shape)}, length={self.length})"

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.conv, self.state = change(self.conv), change(self.state)
        kept = tuple(c._copy() for c in self._kept)
        for c in kept:
            lengths = c.row_lengths()
            c._map(change)
            c.lengths = change(lengths)
        self._kept = kept

    def tensors(self) -> tuple[Tensor, ...]:
        return self.conv, self.state

    def set_tensors(self, tensors: tuple[Tensor, ...]) -> None:
        self.conv, self.state = tensors

    def reset_state(self) -> None:
        """Forgets everything but the last inputs of the convolutions."""
        self.state = torch.zeros_like(self.state)
        self.length, self.lengths, self._kept = 0, None, ()

    def checkpoint(self) -> None:
        """Keeps a copy of what the cache holds now, for :meth:`crop`. It takes as many bytes again."""
        kept = self._copy()
        kept._kept = ()
        self._kept = (*self._kept, kept.clone())

    def drop_checkpoints(self) -> None:
        self._kept = ()

    def crop(self, length: int) -> None:
        """Returns every row that is longer to its first ``length`` tokens: exactly, or with an error.

        Raises:
            ValueError: a row has no checkpoint after that many tokens. Nothing has changed then.
        """
        sources = self.crop_sources(length)
        if sources is None:
            return
        versions = (self, *self._kept)
        conv, state = torch.zeros_like(self.conv), torch.zeros_like(self.state)
        for i, version in enumerate(versions):
            at = (sources == i).view(-1, 1, 1)
            conv = torch.where(at, version.conv, conv)
            state = torch.where(at.unsqueeze(-1), version.state, state)
        lengths = self.row_lengths().clamp(max=length)
        self.conv, self.state = conv, state
        self._kept = tuple(c for c in self._kept if bool((c.row_lengths() <= lengths).all()))
        self._set_lengths(lengths)

    def crop_sources(self, length: int) -> Tensor | None:
        """The version that each row takes: 0 is this cache, i the i-th checkpoint, -1 an empty one. None: no change."""
        c = check_crop(self, length)
        target = self.row_lengths().clamp(max=length)
        source = torch.where(target == 0, -1, -2)
        for i, version in reversed(list(enumerate((self, *self._kept)))):
            source = torch.where((version.row_lengths() == target) & (target > 0), i, source)
        if bool((source == -2).any()):
            row = int((source == -2).nonzero()[0])
            raise c.value_error(
                f"length is {length} and row {row} of a KDACache has no checkpoint there, expected one of "
                f"{sorted({0} | {int(v.row_lengths()[row]) for v in (self, *self._kept)})} (KDACache.checkpoint)"
            )
        return None if not len(source) or bool((target == self.row_lengths()).all()) else source

    def nbytes(self) -> int:
        """Checkpoints included."""
        return self.conv.nbytes + self.state.nbytes + sum(c.nbytes() for c in self._kept)


class MLACache(RowCache):
    """The latents of the past tokens, in a buffer that doubles when it is full: appending stays O(1) a token.

    While gradients are enabled, appending copies instead: autograd may have kept the latents so far. A buffer with
    room to grow was therefore never seen by autograd.
    """

    def __init__(self, batch_size: int, width: int, device: torch.device, dtype: torch.dtype):
        self.buffer = torch.zeros(batch_size, 16, width, device=device, dtype=dtype)
        self.length = 0

    def __getstate__(self) -> dict:
        """Without the room to grow."""
        return vars(self) | {"buffer": self.buffer[:, : self.length].clone()}

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.buffer = change(self.buffer[:, : self.length])

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.buffer,)

    def set_tensors(self, tensors: tuple[Tensor, ...]) -> None:
        (self.buffer,) = tensors

    def reserve(self, tokens: int) -> None:
        """Makes room for so many tokens in all, the present ones included."""
        self.buffer = self._with_room(tokens)

    def append(self, latents: Tensor, counts: Tensor | None = None, multiple: int = 1) -> Tensor:
        """Adds ``[batch, tokens, width]`` and returns all latents so far, ``[batch, length, width]``.

        ``counts`` ``[batch]``: only the first so many of each row are tokens. Rows then differ in length, and what the
        result has after the tokens of a row is finite and means nothing. ``multiple``: likewise the result is extended
        to a multiple of so many latents; only while gradients are disabled.
        """
        begin, end = self.length, self.length + latents.shape[1]
        extent = -(-end // multiple) * multiple
        new = latents.to(self.buffer.dtype)
        if counts is not None or self.lengths is not None:
            place = self.row_lengths()[:, None] + torch.arange(end - begin, device=new.device)
            self.buffer = self._with_room(extent).scatter_(1, place.unsqueeze(-1).expand_as(new), new)
        else:
            self.buffer = self._with_room(extent)
            self.buffer[:, begin:end] = new
        self.advance(end - begin, counts)
        return self.buffer[:, :extent].to(latents.dtype)

    def _with_room(self, end: int) -> Tensor:
        """A buffer that may be written up to ``end``. While gradients are enabled it is new, without further room.

        Otherwise it grows by an eighth: twice as much may be more memory than there is for a long context.
        """
        held, grads = self.buffer[:, : self.length], torch.is_grad_enabled()
        if not grads and end <= self.buffer.shape[1]:
            return _own(self.buffer)
        size = self.buffer.shape[1]
        room = (end if grads else max(end, size + max(LEAST_GROWTH, size // 8))) - self.length
        return torch.cat((_own(held), held.new_zeros(len(held), room, held.shape[2])), dim=1)

    def reset_state(self) -> None:
        self.crop(0)

    def crop(self, length: int) -> None:
        """Returns every row that is longer to its first ``length`` tokens."""
        check_crop(self, length)
        self.buffer = self.buffer[:, :length]
        if self.lengths is None:
            self.length = length
        else:
            lengths = self.lengths.clamp(max=length)
            beyond = torch.arange(self.buffer.shape[1], device=lengths.device) >= lengths[:, None]
            self.buffer = self.buffer.masked_fill(beyond.unsqueeze(-1), 0)
            self._set_lengths(lengths)

    def nbytes(self) -> int:
        """Of the latents held, not of the buffer's room to grow."""
        tokens = self.length * len(self.buffer) if self.lengths is None else int(self.lengths.sum())
        return tokens * self.buffer.shape[2] * self.buffer.element_size()


def concatenate(caches: Sequence[KDACache | MLACache]) -> KDACache | MLACache:
    """A new cache with the rows of all of them. Checkpoints are left behind: they belong to the cache they are of."""
    caches = list(caches)
    c = Checker("concatenate")
    kinds = {type(cache).__name__ for cache in caches}
    if len(kinds) != 1:
        raise c.value_error(f"caches are {sorted(kinds)}, expected at least one, all of the same kind")
    joined = caches[0]._copy()
    if isinstance(joined, KDACache):
        joined.conv, joined.state = (torch.cat([getattr(x, name) for x in caches]) for name in ("conv", "state"))
        joined._kept = ()
    else:
        held = [x.buffer[:, : x.length] for x in caches]
        extent = max(x.length for x in caches)
        joined.buffer = torch.cat([torch.nn.functional.pad(x, (0, 0, 0, extent - x.shape[1])) for x in held])
    joined._set_lengths(torch.cat([x.row_lengths() for x in caches]))
    return joined


def _row_indices(op: str, rows: Tensor | Sequence[int], cache: RowCache) -> Tensor:
    c = Checker(op)
    rows = torch.as_tensor(rows, device=cache._rows().device)
    if not rows.numel():
        rows = rows.long()
    c.rank("rows", rows, "rows")
    c.dtype("rows", rows, (torch.int64, torch.int32))
    inside = (rows >= 0) & (rows < cache.batch_size)
    if check_contents(rows) and not bool(inside.all()):
        raise c.value_error(f"rows has {int(rows[~inside][0])}, expected 0 <= row < {cache.batch_size}")
    return rows


def check_rows(c: Checker, x: Tensor, cache: RowCache | None) -> None:
    """That ``x`` is ``[batch, tokens, hidden]`` with a row for each of the cache's."""
    c.tensor("x", x)
    c.rank("x", x, "batch, tokens, hidden")
    if cache is not None and x.shape[0] != cache._rows().shape[0]:
        raise c.value_error(f"x has shape {list(x.shape)}, expected batch={cache.batch_size}, the rows of the cache")


def check_crop(cache: RowCache, length: int) -> Checker:
    c = Checker("crop")
    c.integer("length", length)
    longest = cache.length if cache.lengths is None else int(cache.lengths.max())
    if not 0 <= length <= longest:
        raise c.value_error(f"length is {length}, expected 0 <= length <= {longest}, the tokens of the longest row")
    return c


# A saved cache is read back with ``torch.load(..., weights_only=True)``; the other names are those of older versions.
torch.serialization.add_safe_globals(
    [KDACache, MLACache, (KDACache, "kda_cuda.layers.KDACache"), (MLACache, "kda_cuda.layers.MLACache")]
)
