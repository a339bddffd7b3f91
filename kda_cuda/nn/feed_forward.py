"""What follows attention in a block: SwiGLU, or a mixture of such experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import Checker
from .modules import KeepsFp32
from .projections import linears

__all__ = ["MixtureOfExperts", "Router", "SwiGLU"]

ALIGNED = 16  # bytes: torch's grouped product takes rows that begin at multiples of this


class SwiGLU(nn.Module):
    """``down_proj(SiLU(gate_proj(x)) up_proj(x))`` over ``[..., hidden_size]``, without biases."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linears(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class Router(KeepsFp32, nn.Module):
    """Which experts a token goes to, and with what weights. Computed in fp32, whatever the dtype of the weight.

    Scores are ``sigmoid(weight x)``. The correction bias is added to choose experts, and only for that: it keeps their
    load even and gets no gradient. With groups, the experts of the ``topk_group`` best groups alone may be chosen;
    a group counts as much as its two best experts together.

    Args:
        hidden_size: width of the input.
        num_experts: how many there are, ``num_groups`` groups of equal size.
        top_k: how many a token goes to.
        renormalize: whether the weights of a token are divided by their sum.
        scaling: a factor of all weights.
        num_groups, topk_group: of the experts, and how many of them a token may use.
    """

    FP32 = ("e_score_correction_bias",)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        renormalize: bool = True,
        scaling: float = 1.0,
        num_groups: int = 1,
        topk_group: int = 1,
    ):
        super().__init__()
        c = Checker("Router")
        if num_groups < 1 or num_experts < 1 or num_experts % num_groups:
            raise c.value_error(f"num_groups is {num_groups}, expected a divisor of the {num_experts} experts")
        if not 1 <= topk_group <= num_groups:
            raise c.value_error(f"topk_group is {topk_group}, expected 1 <= topk_group <= {num_groups}, the groups")
        if not 1 <= top_k <= topk_group * (num_experts // num_groups):
            raise c.value_error(
                f"top_k is {top_k}, expected 1 <= top_k <= {topk_group * (num_experts // num_groups)}, the experts of "
                f"topk_group={topk_group} groups"
            )
        self.num_experts, self.top_k, self.num_groups, self.topk_group = num_experts, top_k, num_groups, topk_group
        self.renormalize, self.scaling = renormalize, scaling
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("e_score_correction_bias", torch.empty(num_experts, dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(std=self.weight.shape[1] ** -0.5)
        self.e_score_correction_bias.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For x ``[tokens, hidden]``: experts, int64, and their weights, fp32 or wider, both ``[tokens, top_k]``."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(F.linear(x.to(wide), self.weight.to(wide)))
        with torch.no_grad():
            experts = self._choose(scores + self.e_score_correction_bias)
        weights = scores.gather(1, experts)
        if self.renormalize:
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
        return experts, weights * self.scaling

    def _choose(self, scores: Tensor) -> Tensor:
        if self.num_groups > 1:
            grouped = scores.unflatten(1, (self.num_groups, -1))
            worth = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(2)
            usable = torch.zeros_like(worth, dtype=torch.bool)
            usable.scatter_(1, worth.topk(self.topk_group, dim=1).indices, True)
            scores = grouped.masked_fill(~usable.unsqueeze(2), float("-inf")).flatten(1)
        return scores.topk(self.top_k, dim=1).indices


class Experts(nn.Module):
    """The weights of all routed experts, each a SwiGLU, stacked.

    ``gate_up_proj`` ``[experts, 2 * intermediate, hidden]`` has the rows of the gate and then those of up;
    ``down_proj`` is ``[experts, hidden, intermediate]``.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for weight in (self.gate_up_proj, self.down_proj):
            weight.normal_(std=weight.shape[2] ** -0.5)

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """``[tokens, hidden]``: for each token of x the sum of its experts' outputs, by their weights.

        A token of top_k experts has as many rows, sorted by expert. No sum depends on the order of threads.
        """
        tokens, top_k = experts.shape
        by_expert, order = experts.flatten().sort(stable=True)
        every = torch.arange(len(self.down_proj), device=x.device)
        ends = torch.searchsorted(by_expert, every, right=True, out_int32=True)  # bincount would wait for a GPU
        rows = x.unsqueeze(1).expand(-1, top_k, -1).flatten(0, 1).index_select(0, order)
        gate, up = grouped_product(rows, self.gate_up_proj, ends).chunk(2, dim=1)
        rows = grouped_product(F.silu(gate) * up, self.down_proj, ends)
        outputs = rows.index_select(0, order.argsort()).unflatten(0, (tokens, top_k))
        return (outputs * weights.unsqueeze(2)).sum(1).to(x.dtype)


def grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """``[rows, out]``: rows ``ends[i - 1]`` to ``ends[i]`` of x ``[rows, in]`` times ``weights[i].T``.

    One product of torch where it takes dtype and sizes. Otherwise a product a group: its bounds are then read on the
    host.

    Args:
        x: ``[rows, in]``.
        weights: ``[groups, out, in]``.
        ends: int32 ``[groups]``, on the device of x; the last one is the number of rows.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    weights = weights.to(x.dtype)
    if len(x) and _is_served(x, weights):
        return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
    bounds = [0, *ends.tolist()]
    parts = [F.linear(x[bounds[i] : end], weights[i]) for i, end in enumerate(bounds[1:]) if end > bounds[i]]
    return torch.cat(parts) if parts else x @ weights[0].T


def _is_served(x: Tensor, weights: Tensor) -> bool:
    dtypes = (torch.bfloat16,) if x.device.type == "cuda" else (torch.bfloat16, torch.float32)
    widths = (weights.shape[1] * x.itemsize, weights.shape[2] * x.itemsize)
    return hasattr(F, "grouped_mm") and x.dtype in dtypes and not any(width % ALIGNED for width in widths)


class MixtureOfExperts(nn.Module):
    """SwiGLU experts, of which each token goes to a few, and shared experts, to which all tokens go.

    Args:
        hidden_size: width of the input and of the output.
        intermediate_size: of one expert.
        num_experts: of which a :class:`Router` chooses.
        top_k: how many it chooses for a token.
        num_shared_experts: they are one SwiGLU of as many times ``intermediate_size``; 0: none.
        **routing: ``renormalize``, ``scaling``, ``num_groups`` and ``topk_group`` of the :class:`Router`.

    Example:
        >>> import torch
        >>> from kda_cuda.layers import MixtureOfExperts
        >>> moe = MixtureOfExperts(64, 32, num_experts=8, top_k=2, num_shared_experts=1)
        >>> moe(torch.randn(1, 10, 64)).shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        num_shared_experts: int = 0,
        **routing,
    ):
        super().__init__()
        self.gate = Router(hidden_size, num_experts, top_k, **routing)
        self.experts = Experts(num_experts, hidden_size, intermediate_size)
        shared = SwiGLU(hidden_size, intermediate_size * num_shared_experts) if num_shared_experts else None
        self.shared_experts = shared

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size]`` for such an x."""
        rows = x.flatten(0, -2)
        y = self.experts(rows, *self.gate(rows)).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)
