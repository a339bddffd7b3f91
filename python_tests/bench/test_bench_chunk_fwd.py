"""The side-by-side benchmark: every peer is called as its interface wants, and one that cannot do a row is named."""

from __future__ import annotations

import argparse
import json
import sys
import types

import pytest
import torch
from torch.nn import functional as F

import kda_cuda
from bench.python import bench_chunk_fwd, harness, peers, providers, shapes, truth
from bench.python.shapes import Shape
from python_tests.support.devices import Device

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


def cula(q, k, v, g, beta, safe_gate, lower_bound, cu_seqlens, **rest):
    """Stands in for cuLA: bounded gates, beta after the sigmoid, int32 boundaries."""
    assert safe_gate is True and -5 <= lower_bound < 0 and "use_beta_sigmoid_in_kernel" not in rest
    assert beta.min() > 0 and beta.max() < 1 and (cu_seqlens is None or cu_seqlens.dtype == torch.int32)
    return kda_cuda.chunk_kda(q, k, v, g, beta, lower_bound=lower_bound, cu_seqlens=cu_seqlens, **rest)


def flashinfer(q, k, v, g, beta, beta_is_logit, **rest):
    assert beta_is_logit is True and "use_beta_sigmoid_in_kernel" not in rest
    return kda_cuda.chunk_kda(q, k, v, g, beta, use_beta_sigmoid_in_kernel=True, **rest)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    ops = types.SimpleNamespace(kimi_delta_attention=cudnn)
    modules = {"flash_kda": types.SimpleNamespace(fwd=flash_kda), "cudnn": types.ModuleType("cudnn")}
    modules |= {"cudnn.linear_attention": types.ModuleType("linear_attention"), "cudnn.linear_attention.ops": ops}
    modules |= {"cula": types.ModuleType("cula"), "flashinfer": types.ModuleType("flashinfer")}
    modules["cula.kda"] = types.SimpleNamespace(chunk_kda=cula, kda_prefill_hopper=cula)
    modules["flashinfer.kda"] = types.SimpleNamespace(recurrent_kda=flashinfer)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "fla", None)  # not installed, wherever this runs
    monkeypatch.setenv("KDA_CUDA_STRICT", "1")  # which main sets: restored afterwards


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("regime", shapes.REGIMES)
def test_peers_compute_what_we_compute(shape, regime):
    loaded, said = providers.load_peers(list(providers.PEERS))
    assert set(loaded) == {"flash_kda", "cudnn", "cula", "flashinfer"}
    assert said["fla"].startswith("missing: ModuleNotFoundError")
    arguments = shapes.inputs(shape, regime, "cpu", torch.bfloat16)
    reference = bench_chunk_fwd.truth(arguments, [0, 1])["o"]
    for name, bind in (loaded | {"kda_cuda": providers.ours}).items():
        if name not in ("kda_cuda", "cudnn") and regime == "long":
            with pytest.raises(harness.Unsupported, match="bounded gates only"):
                bind(arguments)
            continue
        error = truth.relative_error(bind(arguments)(), reference)
        assert error < bench_chunk_fwd.LARGEST_ERROR, name


def bench(regime, named):
    args = argparse.Namespace(device=Device("cpu"), rounds=1, bandwidth=1e12, head_dim=128)
    return bench_chunk_fwd.bench(SHAPES[0], regime, named, args)


def broken(a):
    raise RuntimeError("no kernel image")


def test_a_row_names_what_a_peer_cannot_do():
    def wrong(a):
        return lambda: F.silu(a["v"])

    loaded, _ = providers.load_peers(["flash_kda"])
    said = bench("long", {"kda_cuda": providers.ours, **loaded, "cudnn": wrong, "fla": broken})["providers"]
    assert said["kda_cuda"]["forward"]["gpu_us"]["median"] > 0 and said["kda_cuda"]["errors"]["o"] < 1e-2
    assert said["flash_kda"] == {"unsupported": "bounded gates only"}
    assert said["cudnn"]["failed"].startswith("wrong, not timed: {'o'") and "forward" not in said["cudnn"]
    assert said["fla"] == {"failed": "RuntimeError: no kernel image"}


def test_of_our_own_fault_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(harness, "timed", lambda *a: pytest.fail("timed"))
    with pytest.raises(harness.OurFault, match="kda_cuda is wrong in T70_H2_N1, fast, nothing is timed"):
        bench("fast", {"kda_cuda": lambda a: lambda: a["v"]})
    with pytest.raises(harness.OurFault, match="kda_cuda failed in T70_H2_N1, fast: RuntimeError: no kernel image"):
        bench("fast", {"kda_cuda": broken})


@pytest.mark.parametrize("shape", (*SHAPES, Shape(70, 6, (35, 35))), ids=str)
def test_attention_is_held_to_itself(shape):
    a = shapes.inputs(shape, "fast", "cpu", torch.bfloat16)
    if len(set(shape.lengths)) > 1:
        with pytest.raises(harness.Unsupported, match="sequences of different length"):
            providers.SDPA(a)
        return
    o, own = providers.SDPA(a)(), providers.attention_inputs(a)
    assert o.shape == a["v"].shape and own["q"].shape == (len(shape.lengths), shape.heads, shape.lengths[0], 128)
    assert providers.SDPA.errors(own, None, {"o": o})["o"] < 1e-2
    assert providers.SDPA.errors(own, None, {"o": o.roll(1, 1)})["o"] > 0.1
    first = F.scaled_dot_product_attention(*(a[x][0, : shape.lengths[0], 0].float() for x in "qkv"), is_causal=True)
    assert truth.relative_error(o[0, : shape.lengths[0], 0], first) < 1e-2


def test_no_row_is_begun_after_the_budget(tmp_path, capsys):
    out = tmp_path / "results" / "run.json"
    given = ["--device", "cpu", "--rounds", "1", "--no-peers", "--only", "T20_H1_N1", "--head-dim", "16"]
    bench_chunk_fwd.main([*given, "--budget", "0", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["left_out"] for row in rows] == ["the budget of 0 s was spent"] * 2
    assert "row 2 of 2: T20_H1_N1 long" in capsys.readouterr().out


def test_compilation_covers_every_autotuning_key():
    keys = {(s.heads, len(s.lengths) > 1, r) for s, r in peers.tuning_keys(shapes.ALL)}
    assert keys == {(s.heads, len(s.lengths) > 1, r) for s in shapes.ALL for r in shapes.REGIMES}
    assert len(peers.tuning_keys(shapes.ALL)) == len(keys)
