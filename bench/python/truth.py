"""What a training step must give: o and every gradient, from the recurrence in float64 and from the fp32 reference.

Arguments are those of ``chunk_kda``, as bench/python/shapes.py draws them, without states. The recurrence goes token by
token and is for short sequences; the reference serves every length and is itself held to the recurrence.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from python_tests.support import oracle
from python_tests.support.cases import Inputs

LEAVES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias")
STREAMS = LEAVES[:5]


def leaves_of(arguments: dict, wanted: tuple[str, ...] = LEAVES) -> dict[str, Tensor]:
    """The tensors that get gradients, as leaves of their own, in the memory of the arguments."""
    given = {name: arguments[name].detach() for name in wanted if arguments.get(name) is not None}
    return {name: x.requires_grad_() for name, x in given.items()}


def step(forward: Callable[[], Tensor], leaves: dict[str, Tensor], do: Tensor, keep: bool = False) -> dict[str, Tensor]:
    """o and the gradients of ``sum(o do)`` by name."""
    o = forward()
    gradients = torch.autograd.grad(o, list(leaves.values()), do, retain_graph=keep)
    return {"o": o.detach()} | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def reference_call(arguments: dict) -> Callable[[], Tensor]:
    """The reference on the device and in the dtype of the arguments, whatever kernels there are."""
    given = dict.fromkeys(LEAVES) | {name: arguments.get(name) for name in LEAVES}
    if given["dt_bias"] is not None:
        given["dt_bias"] = given["dt_bias"].view(arguments["g"].shape[2:])

    def call() -> Tensor:
        return torch.ops.kda_cuda_reference.chunk(
            **given,
            initial_state=None,
            cu_seqlens=arguments["cu_seqlens"],
            scale=arguments["q"].shape[-1] ** -0.5,
            use_qk_l2norm=arguments.get("use_qk_l2norm_in_kernel", False),
            use_gate=arguments.get("use_gate_in_kernel", False),
            use_beta_sigmoid=arguments.get("use_beta_sigmoid_in_kernel", False),
            allow_neg_eigval=False,
            lower_bound=arguments.get("lower_bound"),
            state_v_first=False,
            output_final_state=False,
            chunk_size=64,
            output_chunk_states=False,
        )[0]

    return call


def in_fp32(arguments: dict) -> dict:
    return arguments | {name: x.float() for name, x in leaves_of(arguments).items()}


def reference(arguments: dict, do: Tensor) -> dict[str, Tensor]:
    """o and gradients from the fp32 reference."""
    wide = in_fp32(arguments)
    leaves = leaves_of(wide)
    return step(reference_call(wide | leaves), leaves, do.float())


def recurrence(arguments: dict, do: Tensor) -> dict[str, Tensor]:
    """Autograd through the recurrence in float64."""
    q, v, cu_seqlens = (arguments[name] for name in ("q", "v", "cu_seqlens"))
    sequences = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    x = Inputs(
        **dict.fromkeys(LEAVES) | {name: y.detach() for name, y in leaves_of(arguments).items()},
        initial_state=None,
        cu_seqlens=cu_seqlens,
        scale=q.shape[-1] ** -0.5,
        use_qk_l2norm=arguments.get("use_qk_l2norm_in_kernel", False),
        use_gate=arguments.get("use_gate_in_kernel", False),
        use_beta_sigmoid=arguments.get("use_beta_sigmoid_in_kernel", False),
        allow_neg_eigval=False,
        lower_bound=arguments.get("lower_bound"),
        state_v_first=False,
        chunk_size=64,
        do=do,
        dfinal_state=v.new_zeros(sequences, v.shape[2], q.shape[3], v.shape[3]),
    )
    truth, gradients = oracle.gradients(x.double())
    return {"o": truth.o} | {f"d{name}": y for name, y in gradients.items()}


def only_heads(tensors: dict, heads: list[int], of: int) -> dict:
    """Arguments or results of some heads of so many; what is not a tensor with heads stays."""

    def pick(name: str, x: object) -> object:
        if not isinstance(x, Tensor) or name == "cu_seqlens":
            return x
        if name.endswith(("A_log", "dt_bias")):
            return x.view(of, -1)[heads].flatten()
        return x[:, :, heads]

    return tensors if len(heads) == of else {name: pick(name, x) for name, x in tensors.items()}


def relative_error(x: Tensor, truth: Tensor) -> float:
    """Relative RMS; infinite if any value is not finite."""
    difference = (x.double() - truth.double().view_as(x)).norm() / truth.double().norm()
    return difference.item() if difference.isfinite() else float("inf")


def errors(results: dict[str, Tensor], truths: dict[str, Tensor]) -> dict[str, float | None]:
    """Three digits of each; None, which JSON has, if any value is not finite."""
    found = {name: relative_error(x, truths[name]) for name, x in results.items()}
    return {name: float(f"{error:.2e}") if math.isfinite(error) else None for name, error in found.items()}


def nonfinite_share(results: dict[str, Tensor]) -> float:
    """The largest share of values that are not finite, over the results."""
    return round(max((~x.isfinite()).double().mean().item() for x in results.values()), 4)
