"""The side-by-side benchmark: every peer is called as its interface wants, and one that cannot do a row is named."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch.nn import functional as F

import kda_cuda
from bench.python import bench_chunk_fwd, peers, shapes
from bench.python.shapes import Shape

SHAPES = (Shape(70, 2, (70,)), Shape(70, 2, (33, 37)))


def flash_kda(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, final_state=None, cu_seqlens=None):
    """Stands in for FlashKDA: refuses what its checks refuse, and computes with the reference."""
    sequences = 1 if cu_seqlens is None else len(cu_seqlens) - 1
    assert all(x.is_contiguous() and x.dtype == torch.bfloat16 for x in (q, k, v, g, beta, out))
    assert dt_bias.shape == q.shape[2:] and dt_bias.dtype == A_log.dtype == torch.float32
    assert final_state.shape == (sequences, q.shape[2], 128, 128) and final_state.dtype == torch.float32
    assert cu_seqlens is None or cu_seqlens.dtype == torch.int64
    fused = dict.fromkeys(("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel"), True)
    gate = {"A_log": A_log, "dt_bias": dt_bias.flatten(), "lower_bound": lower_bound}
    out.copy_(kda_cuda.chunk_kda(q, k, v, g, beta, scale=scale, cu_seqlens=cu_seqlens, **gate, **fused)[0])


def cudnn(q, k, v, g, beta, cu_seqlens, safe_gate=False, gate_lower_bound=None, a_log=None, dt_bias=None, **flags):
    """Stands in for cudnn-frontend: packed tokens, int32 boundaries always, g in log space unless safe_gate."""
    assert q.dim() == g.dim() == 3 and beta.dim() == 2 and cu_seqlens.dtype == torch.int32
    assert flags == dict.fromkeys(("use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "output_final_state"), True)
    if safe_gate:
        g = gate_lower_bound * torch.sigmoid(a_log.exp()[:, None] * (g.float() + dt_bias))
    assert g.dtype == torch.float32
    fused = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    packed = (x[None] for x in (q, k, v, g, beta))
    return kda_cuda.chunk_kda(*packed, cu_seqlens=cu_seqlens, **fused)[0][0], None


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    ops = types.SimpleNamespace(kimi_delta_attention=cudnn)
    modules = {"flash_kda": types.SimpleNamespace(fwd=flash_kda), "cudnn": types.ModuleType("cudnn")}
    modules |= {"cudnn.linear_attention": types.ModuleType("linear_attention"), "cudnn.linear_attention.ops": ops}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "fla", None)  # not installed, wherever this runs


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("regime", shapes.REGIMES)
def test_peers_compute_what_we_compute(shape, regime):
    loaded, said = peers.load_peers(list(peers.PEERS))
    assert set(loaded) == {"flash_kda", "cudnn"} and said["fla"].startswith("missing: ModuleNotFoundError")
    arguments = shapes.inputs(shape, regime, "cpu", torch.bfloat16)
    reference = bench_chunk_fwd.truth(arguments)
    for name, bind in (loaded | {"kda_cuda": bench_chunk_fwd.ours}).items():
        if name == "flash_kda" and regime == "long":
            assert peers.PEERS[name].unsupported(arguments) == "bounded gates only"
            continue
        assert name == "kda_cuda" or peers.PEERS[name].unsupported(arguments) is None
        error = bench_chunk_fwd.relative_error(bind(arguments)(), reference)
        assert error < bench_chunk_fwd.LARGEST_ERROR, name


@pytest.fixture
def untimed(monkeypatch):
    monkeypatch.setattr(bench_chunk_fwd, "microseconds", lambda calls: 2.0)
    monkeypatch.setattr(bench_chunk_fwd, "graph_microseconds", lambda calls: 1.0)
    here = shapes.inputs
    monkeypatch.setattr(bench_chunk_fwd, "inputs", lambda s, r, device, *a, **k: here(s, r, "cpu", *a, **k))


def test_a_row_names_what_a_peer_cannot_do(untimed):
    def wrong(a):
        return lambda: F.silu(a["v"])

    def broken(a):
        raise RuntimeError("no kernel image")

    providers = {"kda_cuda": bench_chunk_fwd.ours, "flash_kda": broken, "cudnn": wrong, "fla": broken}
    row = bench_chunk_fwd.bench(SHAPES[0], "long", providers, bandwidth=1e12)
    assert row["kda_cuda_us"] == 2.0 and row["kda_cuda_gpu_us"] == 1.0 and row["kda_cuda_error"] < 1e-2
    assert row["flash_kda_unsupported"] == "bounded gates only"
    assert row["cudnn_failed"] == "wrong output, not timed" and "cudnn_us" not in row
    assert row["fla_failed"] == "RuntimeError: no kernel image"


def test_our_own_failure_ends_the_benchmark(untimed):
    with pytest.raises(SystemExit, match="wrong output"):
        bench_chunk_fwd.bench(SHAPES[0], "fast", {"kda_cuda": lambda a: lambda: a["v"]}, bandwidth=1e12)


def test_compilation_covers_every_autotuning_key():
    keys = {(s.heads, len(s.lengths) > 1, r) for s, r in peers.tuning_keys(shapes.ALL)}
    assert keys == {(s.heads, len(s.lengths) > 1, r) for s in shapes.ALL for r in shapes.REGIMES}
    assert len(peers.tuning_keys(shapes.ALL)) == len(keys)
