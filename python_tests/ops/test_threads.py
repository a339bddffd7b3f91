"""Calls in one thread beside others in another: nothing that one thread asks for decides what another gets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import kda_cuda
from kda_cuda import DraftRecords, testing, variants

from ..decode_layer.test_decode_layer import arguments as layer_arguments
from .test_ops import ALL_TRANSFORMS, HV, B, K, V, gate, streams

ROUNDS = 12
Arguments = dict[str, object]


def pool_of(device) -> Tensor:
    return torch.zeros(B + 1, HV, K, V, device=device)


def public_calls(device) -> dict[str, Arguments]:
    """The arguments of every public function; those named like pools are written."""
    few, many = streams(device, tokens=3), streams(device)
    options = gate(device) | ALL_TRANSFORMS
    slots = torch.tensor([2, 0], device=device)
    drafts = DraftRecords(*(torch.rand_like(x) for x in DraftRecords.empty(few["k"], few["v"])))
    return {
        "chunk_kda": many | options | {"output_final_state": True},
        "fused_recurrent_kda": few | options | {"output_final_state": True},
        "kda_gate": {"g": many["g"], **gate(device)},
        "prefill": many | options | {"state_pool": pool_of(device), "slot_of": slots},
        "decode": few | options | {"state": pool_of(device), "slot_of": slots},
        "commit": {
            "records": drafts, "num_accepted_tokens": torch.tensor([1, 3], device=device),
            "state": pool_of(device) + 1, "slot_of": slots,
        },
        "decode_layer": layer_arguments(device),
        "short_conv": {"x": many["beta"], "weight": torch.ones(HV, 4, device=device), "output_final_state": True},
        "gated_rmsnorm": {"x": many["q"], "gate": many["k"], "weight": torch.ones(K, device=device)},
    }  # fmt: skip


WRITTEN = ("state_pool", "state", "conv_state")


def results(function: str, arguments: Arguments) -> list[Tensor]:
    """What the function returns and what it leaves in copies of the pools."""
    pools = {name: arguments[name].clone() for name in WRITTEN if name in arguments}
    returned = getattr(kda_cuda, function)(**{**arguments, **pools})
    returned = returned if isinstance(returned, tuple) else (returned,)
    return [x.clone() for x in (*returned, *pools.values()) if x is not None]


def in_thread(call: Callable[[], object], emulating: bool = False) -> object:
    """What ``call`` gives in a thread of its own."""

    def inside() -> object:
        assert not variants.emulating()
        variants.set_emulating(emulating)
        return call()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(inside).result()


def test_explain_beside_every_call(device):
    """Every call gets the bits that it gets alone, and what is only explained is not run."""
    calls = public_calls(device)
    expected = {function: results(function, arguments) for function, arguments in calls.items()}
    pools = [(name, pool) for name, arguments in calls.items() for pool in WRITTEN if pool in arguments]
    before = [calls[name][pool].clone() for name, pool in pools]
    done, explained = threading.Event(), []

    def explain() -> None:
        while not done.is_set():
            for function, arguments in calls.items():
                explained.append(kda_cuda.explain(op=function, **arguments).forward.kernel == device.runs_kernels)

    def run() -> None:
        try:
            for _ in range(ROUNDS):
                for function, arguments in calls.items():
                    alone = zip(results(function, arguments), expected[function], strict=True)
                    assert all(torch.equal(a, b) for a, b in alone), function
        finally:
            done.set()

    with ThreadPoolExecutor(1) as other:
        beside = other.submit(in_thread, explain, device.name == "emulator")
        run()
        beside.result()
    assert len(explained) >= len(calls) and all(explained)
    for (name, pool), as_it_was in zip(pools, before, strict=True):
        assert torch.equal(calls[name][pool], as_it_was), (name, pool)


def test_every_public_function_is_called_here():
    functions = {name for name in kda_cuda.__all__ if hasattr(getattr(kda_cuda, name), "bind")}
    assert functions == set(public_calls("cpu"))


def test_bind_runs_nothing(device):
    calls = public_calls(device)
    bound, kernels = device.run(lambda: {name: getattr(kda_cuda, name).bind(**a) for name, a in calls.items()})
    assert kernels == []
    assert [bound[name].op for name in ("chunk_kda", "fused_recurrent_kda", "kda_gate", "commit")] == [
        "chunk_fwd", "decode", "kda_gate_fwd", "decode_commit",
    ]  # fmt: skip
    assert not calls["decode"]["state"].any() and not calls["prefill"]["state_pool"].any()


# ---- emulation -------------------------------------------------------------------------------------------------------


@pytest.mark.devices("emulator")
def test_emulation_is_of_one_thread(device):
    x = streams()
    assert kda_cuda.explain(**x).forward.namespace == "kda_cuda_emulated"
    told, kernels = device.run(lambda: in_thread(lambda: (kda_cuda.explain(**x), kda_cuda.chunk_kda(**x)))[0])
    assert told.forward.namespace == "kda_cuda" and kernels == []
    assert variants.emulating()


@pytest.mark.devices("emulator")
def test_a_backward_in_another_thread_is_emulated(device):
    """It belongs to its forward, wherever it runs."""
    g = streams()["g"].requires_grad_()
    y = kda_cuda.kda_gate(g, lower_bound=-5.0)
    _, kernels = device.run(lambda: in_thread(lambda: y.sum().backward()))
    assert "kda_gate_bwd" in kernels and g.grad.abs().sum() > 0


@pytest.mark.devices("emulator")
def test_a_compiled_function_follows_its_thread(device):
    """A graph is not used where another implementation is asked for."""
    x = streams(tokens=5)
    torch.compiler.reset()
    compiled = torch.compile(kda_cuda.chunk_kda, fullgraph=True, backend="eager")
    kernels = []
    for emulating in (True, False, True):
        variants.set_emulating(emulating)
        kernels.append(bool(device.run(lambda: compiled(**x))[1]))
    kernels.append(bool(device.run(lambda: in_thread(lambda: compiled(**x)))[1]))
    assert kernels == [True, False, True, False]


def test_every_thread_is_emulated_where_the_process_is(run_python):
    code = """
import threading
from kda_cuda import variants
seen = [variants.emulating()]
thread = threading.Thread(target=lambda: seen.append(variants.emulating()))
thread.start(), thread.join()
print(seen)
"""
    assert run_python(code, KDA_CUDA_EMULATE="1") == "[True, True]"
    assert run_python(code, KDA_CUDA_EMULATE="0") == "[False, False]"


@pytest.fixture
def run_python() -> Callable[..., str]:
    import os
    import subprocess
    import sys

    def run(code: str, **environment: str) -> str:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              env=os.environ | environment, check=True)  # fmt: skip
        return done.stdout.strip()

    return run


def test_the_emulator_is_there():
    assert testing.emulator_path().exists()
