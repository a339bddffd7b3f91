"""What the ends of a number range do to the backward: betas that count as others, large values, and nothing at all."""

from __future__ import annotations

import pytest
import torch

from kda_cuda import reference

from ..support.accuracy import GRADIENTS, measure
from ..support.bwd_calls import NAMESPACES
from ..support.cases import Case, Inputs

pytestmark = [pytest.mark.usefixtures("chunk_bwd"), pytest.mark.devices("emulator", "cuda")]


def inputs(device, dtype: torch.dtype = torch.float16, **changes) -> Inputs:
    case = Case(name="extremes", tokens=130, heads=2, key_dim=64, value_dim=64, dtype=dtype, gate="mild")
    return case.inputs("cpu").replace(**changes).to(str(device))


def run(x: Inputs, device) -> dict[str, torch.Tensor]:
    op = getattr(torch.ops, NAMESPACES[device.name]).chunk_bwd
    return dict(zip(GRADIENTS, op(*x.bwd_args()), strict=True))


def truth_of(x: Inputs) -> dict[str, torch.Tensor]:
    return dict(zip(GRADIENTS, reference.chunk_bwd(*x.to("cpu").double().bwd_args()), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("small", [0.0, 1e-6])
def test_a_few_betas_among_none(dtype, small, device):
    """The states are those of the betas that there are, not of the least that dbeta can be divided by."""
    x = inputs(device, dtype, use_beta_sigmoid=False, allow_neg_eigval=False)
    beta = torch.full_like(x.beta, small)
    beta[:, ::40] = 0.01
    x = x.replace(beta=beta)
    found, truth = run(x, device), truth_of(x)
    for name in ("dq", "dk", "dv", "dg", "dbeta"):
        assert measure(found[name], truth[name]).rms < (2e-3 if dtype == torch.float16 else 1e-2), name


def test_scores_do_not_overflow(device):
    x = inputs(device)
    x = x.replace(do=(600 * x.do / x.do.float().std()).half(), v=(10 * x.v / x.v.float().std()).half())
    found, truth = run(x, device), truth_of(x)
    for name in ("dq", "dk", "dg"):
        assert measure(found[name], truth[name]).rms < 5e-3, name


def test_large_queries_without_norm(device):
    """Rows whose decayed operands fp16 cannot hold take the path by splits, in the forward and in the backward."""
    x = inputs(device, use_qk_l2norm=False)
    k = torch.nn.functional.normalize(x.k.float(), dim=-1).half()
    q = (5000 * torch.nn.functional.normalize(x.q.float(), dim=-1)).half()
    x = x.replace(q=q, k=k, g=torch.full_like(x.g, -0.5))
    o, *_ = getattr(torch.ops, NAMESPACES[device.name]).chunk_fwd(*x.fwd_args())
    assert o.isfinite().all()
    found, truth = run(x, device), truth_of(x)
    for name in ("dk", "dv", "dg", "dbeta"):
        assert measure(found[name], truth[name]).rms < 5e-3, name


def test_nan_of_a_beta_is_not_hidden(device):
    x = inputs(device, torch.float32)
    beta = x.beta.clone()
    beta[0, 70, 0] = float("nan")
    d = run(x.replace(beta=beta), device)
    assert d["dbeta"][0, :, 0].isnan().any() and d["dv"][0, :, 0].isnan().any()
    assert d["dbeta"][0, :, 1].isfinite().all() and d["dv"][0, :, 1].isfinite().all()


def test_gate_parameters_without_a_gate_get_zeros(device, poisoned_memory):
    x = inputs(device, torch.float32, use_gate=False, lower_bound=None)
    heads, key_dim = x.g.shape[2:]
    x = x.replace(A_log=torch.ones(heads), dt_bias=torch.ones(heads, key_dim)).to(str(device))
    d = run(x, device)
    assert not d["dA_log"].any() and not d["ddt_bias"].any()


def test_no_value_heads_are_refused(device):
    x = inputs(device, torch.float32)
    none = {name: getattr(x, name)[:, :, :0] for name in ("v", "g", "beta", "do")}
    with pytest.raises(ValueError, match="v has a number of heads that is no multiple of q's"):
        run(x.replace(**none, A_log=None, dt_bias=None, initial_state=None, dfinal_state=None), device)
