"""fla's functions on this package: through its registry in a process of its own, and what the registry is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kda_cuda import variants
from kda_cuda.integrations import fla as door
from kda_cuda.integrations import patched

from .peers import ROOT, run_with

needs_kernels = pytest.mark.skipif(
    "chunk_bwd" not in variants.kernels("kda_cuda"), reason="reference-only install: no kernel could serve a GPU"
)


@pytest.fixture(scope="module", params=["fla-0.6.0", pytest.param("fla-0.5.2", marks=pytest.mark.slow)])
def seen(request) -> dict:
    return run_with((request.param, "triton"), "fla_program")


def test_registration(seen):
    assert seen["served"] == ["chunk_kda", "fused_recurrent_kda", "fused_kda_gate"]
    for name in ("softplus", "bounded"):
        assert seen[f"{name} error"] < 1e-4 and seen[f"{name} same"]
    assert seen["recurrent error"] < 1e-4 and seen["gate error"] == 0
    assert seen["counted"] == {"chunk_kda": 2, "fused_recurrent_kda_fwd": 1, "fused_kda_gate": 1}
    assert any("chunk_fwd" in k for k in seen["training kernels"])
    assert any("chunk_bwd" in k for k in seen["training kernels"])
    assert len(seen["decoding kernels"]) == 1 and "decode" in seen["decoding kernels"][0]
    assert len(seen["gate kernels"]) == 1 and "kda_gate_fwd" in seen["gate kernels"][0]
    assert seen["too wide"] == "ValueError: kda_cuda::chunk_kda: q has K=512, expected 1 <= K <= 256"
    assert seen["unknown"].startswith("TypeError: kda_cuda::chunk_kda: got unexpected keyword arguments")
    assert seen["on again"] == "none"
    if not torch.cuda.is_available():  # fla's own path has no CPU
        for when in ("before", "switched off", "after"):
            assert "active drivers" in seen[when]


def test_transformers_beside_fla(seen):
    """An installed fla takes over transformers' layer on the CPU; either registration leaves it working."""
    assert seen["transformers by fla"] == seen["transformers by transformers"] == "none"
    if not torch.cuda.is_available():
        assert "active drivers" in seen["transformers alone"]


def test_patched_layer(seen):
    """Every form of fla's layer, its cache, packed rows and padding."""
    errors = {name: x for name, x in seen.items() if name.startswith("layer ") and isinstance(x, float)}
    assert len(errors) >= 4 and max(errors.values()) < 1e-4, errors
    for name in ("pieces", "packed", "padded", "padded pieces"):
        assert seen[name] < 1e-4, name
    for op in ("chunk_fwd", "chunk_bwd"):
        assert any(op in k for k in seen["layer kernels"])
    assert all(any(op in k for k in seen["step kernels"]) for op in ("chunk_fwd", "decode"))
    assert seen["names"] == seen["undone"] == [""]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("lengths", [[5, 0, 1, 3, 9], [0, 0]], ids=str)
def test_last_inputs_of_packed_rows(begun, lengths):
    """Those of each sequence alone, whatever its neighbours hold; also where no sequence has a token."""
    bounds, taps = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32), 4
    x, state = torch.randn(sum(lengths), 3), torch.randn(len(lengths), 3, taps) if begun else None
    x[:5] = torch.nan
    alone = [
        patched._last_inputs(part[None], None if state is None else state[i : i + 1], taps)
        for i, part in enumerate(x.split(lengths))
    ]
    found = patched._last_of_each(x, state, taps, bounds)
    # No tolerance: the same numbers are copied, and the NaNs put in above are numbers of the first sequence.
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=0, equal_nan=True)


def streams(key_dim: int = 128, dtype: torch.dtype = torch.bfloat16, **options) -> dict:
    shapes = [(1, 64, 2, key_dim)] * 4 + [(1, 64, 2)]
    tensors = (torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes)
    return dict(zip(("q", "k", "v", "g", "beta"), tensors, strict=True)) | options


def verdict(name: str, **arguments) -> tuple[bool, str | None]:
    return door.verify(name, (), arguments)


@needs_kernels
def test_what_a_gpu_serves_is_accepted():
    with FakeTensorMode():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert verdict("chunk_kda", **streams(dtype=dtype, use_graph=True, max_num_seqs=4)) == (True, None)
        assert verdict("fused_recurrent_kda_fwd", **streams(inplace_final_state=False)) == (True, None)
        assert door.verify("fused_kda_gate", (torch.empty(1, 9, 2, 8, device="cuda"), None), {"lower_bound": -5.0})[0]


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("chunk_kda", {"key_dim": 512}, "K=512"),
        ("chunk_kda", {"dtype": torch.float64}, "float64"),
        ("chunk_kda", {"no_such_option": 1}, "no_such_option"),
        ("chunk_kda", {"cp_context": object()}, "cp_context"),
        ("chunk_kda", {"use_gate_in_kernel": True}, "A_log is None"),
        ("fused_recurrent_kda_fwd", {}, "inplace_final_state"),
        ("fused_recurrent_kda_fwd", {"inplace_final_state": False, "ssm_state_indices": 1}, "ssm_state_indices"),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else None,
)
def test_what_a_gpu_does_not_serve_is_declined(name, arguments, reason):
    with FakeTensorMode():
        accepted, said = verdict(name, **streams(**arguments))
    assert not accepted and reason in said
    assert door.report()["declined"][f"{name}: {said}"] >= 1


def test_no_kernel_is_a_reason(monkeypatch):
    monkeypatch.setitem(variants._kernels, "kda_cuda", frozenset({"chunk_fwd"}))
    with FakeTensorMode():
        arguments = streams()
        assert verdict("chunk_kda", **arguments) == (True, None)
        arguments["q"].requires_grad_()
        accepted, said = verdict("chunk_kda", **arguments)
    assert not accepted and "chunk_bwd: its backward kernel is not compiled in" in said


def test_a_verdict_serves_no_other_call():
    """The implementation takes over what its verifier has checked only for the very same arguments."""
    x = {name: torch.rand(1, 3, 1, 4) for name in ("q", "k", "v")} | {"g": -torch.rand(1, 3, 1, 4)}
    x["beta"] = torch.rand(1, 3, 1)
    first = door.run("chunk_kda", (), x)[0]
    door._checked.call = ("chunk_kda", (), x, door.BINDS["chunk_kda"](**x | {"v": x["v"] * 2}))
    other = dict(x, v=x["v"] * 3)
    torch.testing.assert_close(door.run("chunk_kda", (), other)[0], first * 3)
    door._checked.call = ("chunk_kda", (), x, door.BINDS["chunk_kda"](**x | {"v": x["v"] * 2}))
    torch.testing.assert_close(door.run("chunk_kda", (), x)[0], first * 2)


def test_the_switch_without_fla():
    """The environment's switch registers when kda_cuda is imported: an error where there is no fla."""
    code = "import sys; sys.modules['fla'] = None; import kda_cuda"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "KDA_CUDA_FLA": "1"},
        capture_output=True,
        text=True,
    )
    assert "ImportError: kda_cuda.integrations.fla: " in done.stderr and "expected fla-core 0.5 or 0.6" in done.stderr


def test_a_program_is_started_registered(monkeypatch, tmp_path):
    program, events = tmp_path / "train.py", []
    program.write_text(
        "import sys, json; open(sys.argv[1], 'w').write(json.dumps([__name__, sys.argv[1:], sys.path[0]]))"
    )
    monkeypatch.setattr(door, "register", lambda: events.append("registered"))
    monkeypatch.setattr(sys, "argv", ["fla", str(program), str(tmp_path / "seen"), "--lr", "1"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    door.main()
    assert events == ["registered"]
    assert json.loads((tmp_path / "seen").read_text()) == [
        "__main__",
        [str(tmp_path / "seen"), "--lr", "1"],
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["fla"])
    with pytest.raises(SystemExit, match="usage"):
        door.main()
