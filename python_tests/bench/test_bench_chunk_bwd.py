"""The backward's benchmark, whole, on the CPU: peers are called as they want, and what is wrong is never timed."""

from __future__ import annotations

import argparse
import json
import sys
import types

import pytest
import torch

import kda_cuda
from bench.python import accuracy_peers, bench_chunk_bwd, harness, peers, providers, shapes, timing, truth
from bench.python.shapes import Shape
from python_tests.support.devices import Device

ONE, PACKED = Shape(70, 2, (70,)), Shape(70, 2, (35, 35))
FUSED_FLAGS = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel")


def fla(q, k, v, g, beta, safe_gate, lower_bound=None, **rest):
    """Stands in for fla's function: the bounded kernel is asked for exactly if there is a bound."""
    if "A_log" not in rest:  # the core
        assert safe_gate == bool((g >= -5).all()) and set(rest) == {"cu_seqlens"}
        return kda_cuda.chunk_kda(q, k, v, g, beta, **rest)
    assert safe_gate == (lower_bound is not None)
    assert all(rest[name] is True for name in FUSED_FLAGS) and rest["output_final_state"] is False
    assert rest["dt_bias"].dim() == 1 and all(x.requires_grad for x in (q, k, v, g, beta, rest["A_log"]))
    return kda_cuda.chunk_kda(q, k, v, g, beta, lower_bound=lower_bound, **rest)


def dplr(q, k, v, a, b, gk, cu_seqlens, lower_bound):
    """Stands in for fla's function: S = Diag(e^gk) S + b (a^T S) + k v^T, token by token."""
    assert lower_bound == (-5.0 if (gk >= -5).all() else None)
    q, k, v, a, b, gk = (x.float()[0] for x in (q, k, v, a, b, gk))
    starts, outputs = [0] if cu_seqlens is None else cu_seqlens.tolist(), []
    state = zero = q.new_zeros(q.shape[1], 128, 128)
    for t in range(len(q)):
        state = zero if t in starts else state
        read = torch.einsum("hk,hkv->hv", a[t], state)
        state = gk[t].exp()[..., None] * state + b[t][..., None] * read[:, None] + k[t][..., None] * v[t][:, None]
        outputs.append(torch.einsum("hk,hkv->hv", q[t] * 128**-0.5, state))
    return torch.stack(outputs)[None].bfloat16(), None


def cudnn(q, k, v, g, beta, cu_seqlens):
    """Stands in for cudnn-frontend's op: packed tokens, int32 boundaries always, nothing fused, gate and beta fp32."""
    assert q.dim() == k.dim() == v.dim() == g.dim() == 3 and beta.dim() == 2
    assert cu_seqlens.dtype == torch.int32 and g.dtype == beta.dtype == torch.float32
    torch.testing.assert_close(q.float().norm(dim=-1), torch.ones(q.shape[:2]), rtol=0.01, atol=0)
    o, _ = kda_cuda.chunk_kda(*(x[None] for x in (q, k, v, g, beta)), cu_seqlens=cu_seqlens)
    return o[0], None


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    autotuner = types.SimpleNamespace(Autotuner=type("Autotuner", (), {}))
    modules = {
        "fla": types.ModuleType("fla"),
        "fla.ops": types.ModuleType("fla.ops"),
        "fla.ops.kda": types.SimpleNamespace(chunk_kda=fla),
        "fla.ops.generalized_delta_rule": types.ModuleType("generalized_delta_rule"),
        "fla.ops.generalized_delta_rule.dplr": types.SimpleNamespace(chunk_dplr_delta_rule=dplr),
        "cula": None,
        "triton": types.ModuleType("triton"),
        "triton.runtime": types.ModuleType("triton.runtime"),
        "triton.runtime.autotuner": autotuner,
        "triton.testing": types.SimpleNamespace(do_bench=None),
        "cudnn": types.ModuleType("cudnn"),
        "cudnn.linear_attention": types.ModuleType("linear_attention"),
        "cudnn.linear_attention.ops": types.SimpleNamespace(kimi_delta_attention=cudnn),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("KDA_CUDA_STRICT", "1")  # which main sets: restored afterwards
    monkeypatch.setenv("FLA_FLASH_KDA", "1")


PROVIDERS = {"fused": {"fla", "sdpa"}, "core": {"cudnn"}, "general": {"fla", "fla_dplr"}}
MEASURED = {"fused": {"forward", "backward", "step"}, "core": {"core"}, "general": {"forward", "step"}}


def test_a_whole_run(tmp_path, capsys):
    out = tmp_path / "results" / "run.json"
    given = ["--device", "cpu", "--rounds", "2", "--out", str(out), "--regimes", "long"]
    bench_chunk_bwd.main([*given, "--shapes", str(ONE), str(PACKED)])
    result = json.loads(out.read_text())
    assert {"gpu", "driver", "torch", "cuda", "commit", "date", "copy_bandwidth_tb_s"} <= set(result)
    assert [(r["form"], r["shape"]) for r in result["rows"]] == [
        (form, str(shape)) for form in ("core", "general", "fused") for shape in (ONE, PACKED)
    ]
    for row in result["rows"]:
        what = MEASURED[row["form"]]
        assert set(row["providers"]) == {"kda_cuda"} | PROVIDERS[row["form"]] and set(row["bytes"]) == what
        for name, said in row["providers"].items():
            gradients = {"o", "dq", "dk", "dv"} | ({"dg", "dbeta"} if name != "sdpa" else set())
            fused = row["form"] == "fused" and name != "sdpa"
            assert set(said["errors"]) == gradients | ({"dA_log", "ddt_bias"} if fused else set())
            assert 0 < max(said["errors"].values()) < (2e-2 if name == "fla_dplr" else 8e-3)
            for x in what:
                assert all(said[x][column]["median"] > 0 for column in ("gpu_us", "eager_us", "host_us"))
                assert ("of_copy" in said[x]) == (name not in ("sdpa", "fla_dplr"))
    printed = capsys.readouterr().out
    assert printed.count(" x)") == 3 * 2 * (1 + 2 * 2 + 3 * 2), "three ratios for every measurement of a peer"


def scaled(factor: float):
    """A provider whose gradient of q is off by a factor."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return factor * dx

    def bind(a):
        return lambda: kda_cuda.chunk_kda(**a | {"q": Scale.apply(a["q"])})[0]

    return bind


def broken(a):
    raise RuntimeError("no kernel image")


def args_of(gradients="all"):
    return argparse.Namespace(device=Device("cpu"), rounds=1, gradients=gradients, bandwidth=1e12, head_dim=128)


def row(named, what=("step",), form="fused", gradients="all"):
    return bench_chunk_bwd.bench(form, list(what), ONE, "fast", named, args_of(gradients))


def test_a_wrong_or_broken_peer_is_named_and_not_timed():
    result = row({"kda_cuda": providers.ours, "fla": scaled(1.05), "cudnn": broken})
    fla_said, cudnn_said = (result["providers"][name] for name in ("fla", "cudnn"))
    assert fla_said["failed"].startswith("wrong, not timed: {'dq': 0.05") and "step" not in fla_said
    assert cudnn_said == {"failed": "RuntimeError: no kernel image"}
    lines = harness.table_lines(result, "a row")
    assert len(lines) == 1 and "fla wrong, not timed" in lines[0] and "no kernel image" in lines[0]


def test_a_peer_that_fails_while_it_is_timed_is_named(monkeypatch):
    def capture(calls, device, real=timing.graph_of):
        if any("fla" in repr(call) for call in calls):
            raise RuntimeError("operation not permitted when stream is capturing")
        return real(calls, device)

    class Call:
        def __init__(self, a):
            self.run = providers.ours(a)

        def __call__(self):
            return self.run()

        def __repr__(self):
            return "fla"

    monkeypatch.setattr(timing, "graph_of", capture)
    result = row({"kda_cuda": providers.ours, "fla": Call}, ["forward"])
    assert "stream is capturing" in result["providers"]["fla"]["forward"]["failed"]
    assert "gpu_us" in result["providers"]["kda_cuda"]["forward"]


@pytest.mark.parametrize("provider", [scaled(0.96), broken, lambda a: lambda: 1.1 * kda_cuda.chunk_kda(**a)[0]])
def test_of_a_row_with_our_own_fault_nothing_is_timed(provider, monkeypatch):
    monkeypatch.setattr(timing, "elapsed_us", lambda *a: pytest.fail("timed"))
    with pytest.raises(harness.OurFault, match=r"kda_cuda (is wrong|failed) in fused, T70_H2_N1, fast"):
        row({"kda_cuda": provider})


def test_a_run_with_our_own_fault_goes_on_and_fails_in_the_end(tmp_path, monkeypatch, capsys):
    def ours(a):
        return broken(a) if a["cu_seqlens"] is not None else providers.ours(a)

    monkeypatch.setattr(bench_chunk_bwd, "ours", ours)
    monkeypatch.setattr(bench_chunk_bwd, "SMALL", bench_chunk_bwd.SMALL[:1])
    given = ["--device", "cpu", "--rounds", "1", "--regimes", "fast", "--what", "core", "--no-peers"]
    with pytest.raises(SystemExit, match="1 of 2 rows failed, the first: kda_cuda failed in core, T70_H2_N2, fast"):
        bench_chunk_bwd.main([*given, "--out", str(tmp_path / "run.json"), "--shapes", str(PACKED), str(ONE)])
    failed, good = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert "no kernel image" in failed["failed"] and "core" in good["providers"]["kda_cuda"]
    assert "FAILED   kda_cuda failed" in capsys.readouterr().out


def test_small_shapes_are_held_to_the_recurrence(monkeypatch):
    bench_chunk_bwd.verify_small("fused", "fast", providers.ours, args_of())
    with pytest.raises(harness.OurFault, match="kda_cuda is wrong in core, T130_H2_N2, long"):
        bench_chunk_bwd.verify_small("core", "long", scaled(1.05), args_of())
    real = truth.reference
    monkeypatch.setattr(bench_chunk_bwd, "reference", lambda a, do: real(a, 1.001 * do.float()))
    with pytest.raises(harness.OurFault, match="the reference is wrong"):
        bench_chunk_bwd.verify_small("core", "long", providers.ours, args_of())


def test_what_is_not_finite_is_wrong():
    x = torch.ones(4)
    assert truth.relative_error(x, x) == 0
    assert truth.relative_error(torch.tensor([1, 1, 1, float("nan")]), x) == float("inf")
    assert truth.errors({"o": 2 * x, "dq": x / 0}, {"o": x, "dq": x}) == {"o": 1.0, "dq": None}
    assert truth.nonfinite_share({"o": x, "dq": torch.tensor([1, float("nan"), float("inf"), 0])}) == 0.5
    assert harness.too_large({"o": 0.5, "dq": None, "dk": 0.5, "dv": 2.0}, {"o": 0.1}, 1.0) == {
        "o": 0.5, "dq": None, "dv": 2.0,
    }  # fmt: skip


def test_the_core_is_the_fused_call_without_its_fused_parts():
    for regime in shapes.REGIMES:
        a = shapes.inputs(ONE, regime, "cpu", torch.bfloat16) | {"output_final_state": False}
        do = torch.randn(a["v"].shape)
        fused, core = truth.reference(a, do), truth.reference(shapes.core_of(a), do)
        assert truth.relative_error(core["o"], fused["o"]) < 5e-3  # q and k are rounded again
        assert truth.relative_error(core["dv"], fused["dv"]) < 5e-3


def test_bytes_are_each_once():
    (a,), do = shapes.training_inputs("core", ONE, "fast", "cpu", sets=1)
    rows = 70 * 2
    inputs = rows * (3 * 128 * 2 + 128 * 4 + 4)
    assert bench_chunk_bwd.moved_bytes("forward", a, do) == inputs + rows * 256
    assert bench_chunk_bwd.moved_bytes("core", a, do) == 2 * inputs + rows * 256
    assert bench_chunk_bwd.moved_bytes("step", a, do) == 3 * inputs + 2 * rows * 256
    assert bench_chunk_bwd.moved_bytes("backward", a, do, ("v",)) == inputs + 2 * rows * 256


@pytest.mark.parametrize("gradients", ["no_gate", "v"])
def test_only_the_gradients_asked_for(gradients):
    result = row({"kda_cuda": providers.ours, "fla": without_v}, gradients=gradients)
    expected = {"o"} | {f"d{name}" for name in bench_chunk_bwd.GRADIENTS[gradients]}
    assert set(result["providers"]["kda_cuda"]["errors"]) == expected
    assert "wrong, not timed: {'dv': 1.0" in result["providers"]["fla"]["failed"]


def without_v(a):
    """A provider that gives no gradient of v, and refuses leaves that were not asked for."""
    assert not a["g"].requires_grad and not a["A_log"].requires_grad
    return lambda: kda_cuda.chunk_kda(**a | {"v": a["v"].detach()})[0] + 0 * a["v"]


def test_long_sequences_are_verified_on_some_heads(monkeypatch):
    assert shapes.sampled_heads(8192, 64) == list(range(64))
    assert shapes.sampled_heads(1 << 18, 32) == [0, 10, 20, 31]
    assert shapes.sampled_heads(1 << 20, 32) == shapes.sampled_heads(1 << 22, 8) == [0]
    monkeypatch.setattr(shapes, "VERIFIED", 70)

    def only_first_head(factor):
        def bind(a):
            scale = torch.tensor([1.0, factor]).reshape(2, 1)
            return lambda: (kda_cuda.chunk_kda(**a)[0] * scale).bfloat16()

        return bind

    assert "failed" not in row({"kda_cuda": only_first_head(3.0)})["providers"]["kda_cuda"]
    monkeypatch.setattr(bench_chunk_bwd, "sampled_heads", lambda *shape: [1])
    errors = row({"kda_cuda": providers.ours})["providers"]["kda_cuda"]["errors"]
    assert 0 < max(errors.values()) < 5e-3 and "ddt_bias" in errors
    with pytest.raises(harness.OurFault, match="is wrong"):
        row({"kda_cuda": only_first_head(3.0)})


def test_choices():
    args = bench_chunk_bwd.arguments(["--quick", "--what", "core", "step", "--regimes", "fast"])
    assert args.rounds == 5 and [(form, str(shape)) for form, _, shape, _ in bench_chunk_bwd.work(args)] == [
        ("core", "T2048_H16_N1"), ("core", "T8192_H16_N1"), ("fused", "T8192_H16_N1"),
    ]  # fmt: skip
    everything = bench_chunk_bwd.work(bench_chunk_bwd.arguments([]))
    assert len(everything) == 2 * (len(shapes.FUSED) + len(shapes.CORE) + len(shapes.GENERAL)) == 26
    for bad in (["--what", "sideways"], ["--shapes", "T100_H2_N3"], ["--peers", "flash_kda"]):
        with pytest.raises(SystemExit):
            bench_chunk_bwd.arguments(bad)


def test_names_of_shapes():
    assert shapes.named("T8192_H64_N6").lengths == shapes.RAGGED and shapes.named("T12_H3_N4").lengths == (3,) * 4
    with pytest.raises(ValueError, match="'T12_H3_N5', expected such as"):
        shapes.named("T12_H3_N5")


def test_processes_share_the_configurations_of_a_key():
    launched = []
    for share in range(3):
        launch = peers.launch_share(share, 3)
        times = [launch(lambda i=i: launched.append(i), (0.5, 0.2)) for i in range(8)]
        assert min(range(8), key=times.__getitem__) == share and len(times[0]) == 2
    assert sorted(launched) == list(range(8))
    tasks = peers.compile_tasks(shapes.FUSED, workers=14)
    assert len(tasks) == 12 and {(*task[:2],) for task in tasks} == set(peers.tuning_keys(shapes.FUSED))
    assert len(peers.compile_tasks(shapes.ALL, workers=4)) == len(peers.tuning_keys(shapes.ALL))


def test_spread_is_the_middle_half():
    assert timing.summary([1.0, 2.0, 3.0, 4.0, 100.0]) == {"median": 3.0, "spread": pytest.approx(16.833, abs=0.001)}
    assert timing.summary([2.0]) == {"median": 2.0, "spread": 0.0}


def test_accuracy_beside_peers(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLA_CACHE_RESULTS", "1")
    out = tmp_path / "accuracy.json"
    accuracy_peers.main(["--device", "cpu", "--tokens", "70", "--heads", "1", "--out", str(out)])
    result = json.loads(out.read_text())
    rows = {(row["regime"], row["form"], row["provider"]): row for row in result["rows"]}
    assert len(rows) == 16 and {key[0] for key in rows} == set(accuracy_peers.REGIMES)
    for (_, form, provider), row in rows.items():
        assert row["repeats_bitwise"] and row["nonfinite_share"] == 0
        assert all(error < 1e-2 for error in row["errors"].values())
        assert ("dA_log" in row["errors"]) == (form == "fused")
        assert ("over_best" in row) == (provider == "kda_cuda")
    fast = rows["fast", "fused", "kda_cuda"]["over_best"]
    assert fast["dA_log"] == 1.0, "the stand-in for fla is our reference, and no other peer has dA_log"
    assert fast["dg"] > 100, "the best peer's dg is that of the core, in fp32"
    assert "dg " in capsys.readouterr().out


def test_regimes_of_gates_are_what_they_are_called():
    decays = {}
    for regime in accuracy_peers.REGIMES:
        a, _ = accuracy_peers.inputs(regime, 50, 16, "cpu")
        decays[regime] = -shapes.core_of(a)["g"]
    assert decays["fast"].mean() > 2.5 and decays["fast"].max() <= 5
    assert 0.02 < decays["long"].median() < 0.3
    assert decays["heavy"].median() < 2 and decays["heavy"].quantile(0.995) > 200
    assert decays["collinear"].max() < 1e-2
    k = a["k"].float()
    assert torch.nn.functional.cosine_similarity(k[:, :1], k, dim=-1).min() > 0.999
    assert a["beta"].sigmoid().min() > 0.9


def test_what_is_said_of_a_peer_that_fails_or_gives_no_numbers():
    def infinite(a):
        return lambda: kda_cuda.chunk_kda(**a | {"v": a["v"] / 0})[0]

    named = {"fused": {"kda_cuda": providers.ours, "fla": broken}, "core": {"cudnn": infinite}}
    fused, failed, core = accuracy_peers.rows_of("long", named, 20, 1, "cpu")
    assert fused["over_best"] == {} and failed["failed"] == "RuntimeError: no kernel image"
    assert core["errors"]["o"] is None and core["nonfinite_share"] == 1
    assert accuracy_peers.table_line(failed).endswith("no kernel image")
    assert "o -" in accuracy_peers.table_line(core) and "100% not finite" in accuracy_peers.table_line(core)
    with pytest.raises(harness.OurFault, match="kda_cuda failed in fused, long"):
        accuracy_peers.rows_of("long", {"fused": {"kda_cuda": broken}, "core": {}}, 20, 1, "cpu")
