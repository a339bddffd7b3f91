"""What a checked call leaves behind, so that the next one like it checks nothing again but contents.

The checks of a call depend on its *signature*: dtypes, devices, shapes and strides of tensors, which of them require a
gradient, all other values, what torch is asked for around it (gradients, inference mode, autocast, emulation), and the
environment variable KDA_CUDA_CHECK.
Where a call has passed them, its :class:`Recipe` says where each argument of the op comes from: from an argument of the
function, from a constant, or it is made anew. A recipe holds no tensor.

Signatures are taken by ``_C`` (csrc/python/signature.h). Without it, and for calls whose checks depend on more, every
call is checked: under torch.compile, torch.func and forward-mode derivatives, and with subclasses of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import variants
from .checks import Checker, check_contents
from .schemas import picker

try:
    from ._C import signature, use_tensors
except ImportError:  # a reference-only install, or one for another Python
    signature = None
if signature and not use_tensors(Tensor, torch.nn.Parameter, torch.dtype):
    signature = None

MOST = 1024  # recipes of one function: some 2 MB
AUTOCAST_DEVICES = ("cpu", "cuda")


def context() -> tuple | None:
    """What the checks depend on beside the arguments; None: on more than can be said. Gradients first."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return None
    asked = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), variants.emulating())
    if not torch._C._is_any_autocast_enabled():
        return asked
    on = (device if torch.is_autocast_enabled(device) else None for device in AUTOCAST_DEVICES)
    return (*asked, *(torch.get_autocast_dtype(device) if device else None for device in on))


def signed(args: tuple, kwargs: dict) -> tuple[bytes, tuple] | None:
    """The signature of a call, and its values: arguments, and what is in tuples and lists among them."""
    around = context() if signature else None
    return None if around is None else signature(args, kwargs, around)


class Unrepeatable(Exception):
    """An argument of the op is neither given nor made in a way that is known."""


class Recipe(NamedTuple):
    """How a call with a known signature becomes arguments of its op."""

    kind: type[tuple]  # the NamedTuple of the op's arguments
    op: Callable
    pick: Callable[[tuple], tuple]  # the arguments, from values, constants and makers' tensors in this order
    constants: tuple
    makers: tuple[Callable[[tuple], Tensor], ...]
    looks: tuple[tuple[Callable, Callable[[tuple], tuple]], ...]  # a check of contents, and its arguments
    checker: Checker
    returned: Callable[[Any, Any], Any]

    def run(self, values: tuple) -> Any:
        kind, op, pick, constants, makers, looks, checker, returned = self
        there = values + constants
        if makers:
            there += tuple([make(values) for make in makers])
        for check, of in looks:
            check(checker, *of(there))
        arguments = tuple.__new__(kind, pick(there))
        return returned(arguments, op(*arguments))


class Writer:
    """Finds where the arguments of a call's op come from."""

    def __init__(self, values: tuple, checker: Checker):
        self._values, self._made = values, checker.made
        inputs = [(i, x) for i, x in enumerate(values) if isinstance(x, Tensor)]
        self._at = {id(x): ("value", i) for i, x in reversed(inputs)}  # of one that is given twice, the first
        self.constants: list[object] = []
        self.makers: list[Callable[[tuple], Tensor]] = []

    def sources(self, arguments: tuple) -> list[tuple[str, int]]:
        return [self._source(x) for x in arguments]

    def picker(self, sources: list[tuple[str, int]]) -> Callable[[tuple], tuple]:
        """Once all are known: the tuple of them, from values, constants and makers' tensors."""
        begin = {"value": 0, "constant": len(self._values), "made": len(self._values) + len(self.constants)}
        return picker(begin[kind] + i for kind, i in sources)

    def _source(self, x: object) -> tuple[str, int]:
        if not isinstance(x, Tensor):
            self.constants.append(x)
            return "constant", len(self.constants) - 1
        if id(x) not in self._at:
            self.makers.append(self._maker(x))
            self._at[id(x)] = "made", len(self.makers) - 1
        return self._at[id(x)]

    def _maker(self, x: Tensor) -> Callable[[tuple], Tensor]:
        for made, make, owner in self._made:
            if made is x:
                kind, i = self._at.get(id(owner), ("made", 0))
                if kind != "value":
                    raise Unrepeatable
                return lambda values: make(values[i])
        same = [i for i, y in enumerate(self._values) if isinstance(y, Tensor) and is_reshaped(x, y)]
        if len(same) != 1:
            raise Unrepeatable
        i, shape = same[0], x.shape
        return lambda values: values[i].view(shape)


def is_reshaped(x: Tensor, y: Tensor) -> bool:
    """Whether ``x`` is the memory of ``y`` in another shape."""
    if x.dtype != y.dtype or x.numel() != y.numel() or not (x.is_contiguous() and y.is_contiguous()):
        return False
    return x.data_ptr() == y.data_ptr() != 0


class Recipes:
    """Those of one function, by signature. None: calls of this signature are always checked."""

    def __init__(self):
        self._known: dict[bytes, Recipe | None] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def get(self, key: bytes) -> Recipe | None:
        return self._known.get(key)

    def forget(self) -> None:
        self._known.clear()

    def keep(self, key: bytes, recipe: Recipe | None) -> None:
        if len(self._known) >= MOST:
            self.forget()
        self._known[key] = recipe


def recipe_of(checker: Checker | None, op: Callable, arguments: tuple, values: tuple, returned) -> Recipe | None:
    """None where the next call of the same signature must be checked as this one was."""
    if checker is None or checker.depends_on_more:
        return None
    writer = Writer(values, checker)
    try:
        picked = writer.sources(arguments)
        looks = [(check, writer.sources(given)) for x, check, given in checker.looks if check_contents(x)]
    except Unrepeatable:
        return None
    return Recipe(
        kind=type(arguments),
        op=op,
        pick=writer.picker(picked),
        constants=tuple(writer.constants),
        makers=tuple(writer.makers),
        looks=tuple((check, writer.picker(given)) for check, given in looks),
        checker=Checker(checker.op),
        returned=returned,
    )
