"""The benchmark of the convolution and the norm, whole, on the CPU: peers get what they want, wrong is not timed."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from torch import Tensor

import kda_cuda
from bench.python import bench_surround, providers


def fla_conv(x: Tensor, weight: Tensor, activation: str, cu_seqlens: Tensor | None) -> tuple[Tensor, None]:
    assert activation == "silu" and x.dim() == 3 and weight.shape == (x.shape[2], 4)
    return kda_cuda.short_conv(x, weight, cu_seqlens=cu_seqlens)


def causal_conv1d_fn(x: Tensor, weight: Tensor, activation: str, seq_idx: Tensor | None) -> Tensor:
    """Stands in for the package's function: channels second, int32 indices of documents."""
    assert activation == "silu" and x.shape[1] == weight.shape[0]
    cu_seqlens = None
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32 and seq_idx.shape == (1, x.shape[2])
        cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.long), seq_idx[0].bincount().cumsum(0)))
    return kda_cuda.short_conv(x.transpose(1, 2), weight, cu_seqlens=cu_seqlens)[0].transpose(1, 2)


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, bias: None, activation: str, eps: float) -> Tensor:
    return kda_cuda.gated_rmsnorm(x, gate, weight, eps, activation=activation)


@pytest.fixture
def stand_ins(monkeypatch):
    modules = {
        "fla": types.ModuleType("fla"),
        "fla.modules": types.ModuleType("fla.modules"),
        "fla.modules.convolution": types.SimpleNamespace(causal_conv1d=fla_conv),
        "fla.modules.fused_norm_gate": types.SimpleNamespace(rms_norm_gated=rms_norm_gated),
        "causal_conv1d": types.SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("KDA_CUDA_STRICT", "1")  # which main sets: restored afterwards
    monkeypatch.setattr(providers, "version", lambda distribution: "1.0")


def run(tmp_path, *more: str) -> dict:
    out = tmp_path / "results" / "run.json"
    bench_surround.main(["--device", "cpu", "--rounds", "2", "--out", str(out), *more])
    return json.loads(out.read_text())


@pytest.mark.parametrize(("op", "shapes"), [("short_conv", ["21x8", "21x8x3"]), ("gated_rmsnorm", ["5x2x16"])])
def test_a_whole_run(op, shapes, tmp_path, capsys, stand_ins):
    result = run(tmp_path, "--ops", op, "--shapes", *shapes)
    peers = {"short_conv": {"fla", "causal_conv1d"}, "gated_rmsnorm": {"fla"}}[op]
    assert set(result["peers"]) == {f"{peer} ({op})" for peer in peers}
    assert all("1.0" in said for said in result["peers"].values())
    assert [row["shape"] for row in result["rows"]] == shapes
    for row in result["rows"]:
        elements = 1
        for n in row["shape"].split("x")[: 2 if op == "short_conv" else 3]:
            elements *= int(n)
        streams = (2, 3) if op == "short_conv" else (3, 5)
        assert list(row["bytes"].values()) == [2 * elements * n for n in streams]
        assert set(row["providers"]) == {"kda_cuda", "copy"} | peers
        for name, said in row["providers"].items():
            assert name == "copy" or 0 < max(said["errors"].values()) < 5e-3
            for what in ("forward", "backward"):
                assert all(said[what][column]["median"] > 0 for column in ("gpu_us", "eager_us", "host_us"))
                assert said[what]["of_copy"] >= 0
    assert capsys.readouterr().out.count(" of copy") == 2 * len(shapes) * (2 + len(peers))


def test_a_wrong_or_missing_peer_is_named(tmp_path, capsys, monkeypatch, stand_ins):
    def wrong(*arguments, **more):
        y, state = fla_conv(*arguments, **more)
        return 1.05 * y, state

    monkeypatch.setattr(sys.modules["fla.modules.convolution"], "causal_conv1d", wrong)
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    result = run(tmp_path, "--ops", "short_conv", "--shapes", "9x8", "--what", "forward")
    assert result["peers"]["causal_conv1d (short_conv)"].startswith("missing: ModuleNotFoundError")
    said = result["rows"][0]["providers"]
    assert said["fla"]["failed"].startswith("wrong, not timed: {'o': 0.05") and "forward" not in said["fla"]
    assert "fla wrong, not timed" in capsys.readouterr().out


def test_our_own_fault_ends_the_run_in_an_error(tmp_path, monkeypatch, stand_ins):
    op = bench_surround.OPS["gated_rmsnorm"]
    doubled = bench_surround.Op(**{**vars(op), "ours": lambda a: lambda: 2 * op.ours(a)()})
    monkeypatch.setitem(bench_surround.OPS, "gated_rmsnorm", doubled)
    with pytest.raises(SystemExit, match=r"^2 of 2 rows failed, the first: kda_cuda is wrong in gated_rmsnorm, 3x1x8"):
        run(tmp_path, "--ops", "gated_rmsnorm", "--shapes", "3x1x8", "4x1x8")


def test_a_failing_provider(tmp_path, monkeypatch, stand_ins):
    def broken(*arguments, **more):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(sys.modules["fla.modules.fused_norm_gate"], "rms_norm_gated", broken)
    result = run(tmp_path, "--ops", "gated_rmsnorm", "--shapes", "3x1x8", "--what", "backward")
    assert result["rows"][0]["providers"]["fla"] == {"failed": "RuntimeError: no kernel image"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, and it is about what is said without one")
def test_without_a_gpu():
    with pytest.raises(SystemExit, match=r"^this benchmark needs a CUDA device$"):
        bench_surround.main([])
