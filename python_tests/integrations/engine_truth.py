"""One layer of KDA as serving engines run it, its pools, and the float64 truth of every sequence."""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ..support import oracle

HEADS, DIM, TAPS = 2, 32, 4
WIDTH = HEADS * DIM
STUBS = Path(__file__).parent / "stubs"
# Everything is fp32, beside float64: the bound that an integration has to keep, and outputs and states are of order 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Tokens(NamedTuple):
    """What the projections give for the tokens of a step."""

    mixed: Tensor  # [T, 3 * HEADS * DIM], q|k|v, rows with a gap
    g: Tensor  # [T, HEADS, DIM]
    beta: Tensor  # [T, HEADS]
    output_gate: Tensor  # [T, HEADS, DIM]

    def at(self, which: slice | list[int]) -> Tokens:
        return Tokens(*(x[which] for x in self))

    def qkv(self) -> tuple[Tensor, ...]:
        """q, k, v [T, HEADS, DIM], as if the convolutions had been there."""
        return self.mixed.unflatten(-1, (3, HEADS, DIM)).unbind(1)


def draw_tokens(count: int, device: str = "cpu") -> Tokens:
    mixed = torch.randn(count, 3 * WIDTH + 8, device=device)[:, : 3 * WIDTH]
    g, gate = (torch.randn(count, HEADS, DIM, device=device) for _ in range(2))
    return Tokens(mixed, g, torch.randn(count, HEADS, device=device), gate)


@dataclass
class Layer:
    conv: Tensor  # [3 * HEADS * DIM, TAPS]
    A_log: Tensor  # [HEADS]
    dt_bias: Tensor  # [HEADS * DIM]
    norm: Tensor  # [DIM]
    lower_bound: float | None
    eps: float = 1e-5

    def gates(self) -> dict:
        """As SGLang's kernels take them."""
        return {"A_log": self.A_log.view(1, 1, -1, 1), "dt_bias": self.dt_bias, "lower_bound": self.lower_bound}

    def transformed(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        """What the recurrence sees, float64 ``[1, T, ...]``."""
        q, k, v, g, beta = (x.double()[None] for x in (q, k, v, g, beta))
        x = SimpleNamespace(
            q=q,
            k=k,
            v=v,
            g=g,
            beta=beta,
            A_log=self.A_log.double(),
            dt_bias=self.dt_bias.double(),
            use_gate=True,
            lower_bound=self.lower_bound,
            use_qk_l2norm=True,
            use_beta_sigmoid=True,
            allow_neg_eigval=False,
        )
        return oracle.transformed(x)

    def recurrence(self, qkv: tuple[Tensor, ...], x: Tokens, state: Tensor) -> tuple[Tensor, list[Tensor]]:
        """o ``[T, HEADS, DIM]``, and the states ``[HEADS, V, K]`` after 0, 1, ... tokens."""
        streams = self.transformed(*qkv, x.g, x.beta)
        o, history = [torch.zeros(1, 0, HEADS, DIM, dtype=torch.float64, device=state.device)], [state.double()]
        for out, after in oracle.steps(*streams, history[0].mT[None], DIM**-0.5):
            o.append(out[:, None])
            history.append(after[0].mT)
        return torch.cat(o, dim=1)[0], history

    def truth(self, x: Tokens, state: Tensor, past: Tensor) -> Truth:
        """The whole layer, from a state and the three inputs ``[3 * HEADS * DIM, 3]`` before the first token."""
        inputs = torch.cat((past.double(), x.mixed.double().T), dim=1)
        mixed = F.silu(F.conv1d(inputs[None], self.conv.double()[:, None], groups=len(inputs))[0].T)
        o, history = self.recurrence(mixed.unflatten(-1, (3, HEADS, DIM)).unbind(1), x, state)
        normed = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + self.eps) * self.norm.double()
        return Truth(o, normed * torch.sigmoid(x.output_gate.double()), history, inputs)


class Truth(NamedTuple):
    o: Tensor  # [T, HEADS, DIM]
    normed: Tensor  # likewise, behind the gated norm
    states: list[Tensor]  # after 0, 1, ... tokens
    inputs: Tensor  # [channels, 3 + T]


def draw_layer(lower_bound: float | None, device: str = "cpu") -> Layer:
    shapes = ((3 * WIDTH, TAPS), (HEADS,), (WIDTH,), (DIM,))
    return Layer(*(torch.randn(shape, device=device) / 2 for shape in shapes), lower_bound)


def draw_pool(slots: int, device: str = "cpu") -> Tensor:
    """States ``[slots, HEADS, DIM, DIM]`` with a gap between the slots, none of them zero."""
    return torch.randn(slots, HEADS * DIM * DIM + 64, device=device)[:, :-64].unflatten(-1, (HEADS, DIM, DIM))


def assert_only_written(pool: Tensor, before: Tensor, written: dict[int, Tensor]) -> None:
    """These slots hold these numbers, and all others what they held."""
    for slot, state in written.items():
        torch.testing.assert_close(pool[slot].double(), state, **CLOSE)
    others = [slot for slot in range(len(pool)) if slot not in written]
    assert torch.equal(pool[others], before[others])


def install_stubs(engine: str, folder: Path) -> None:
    """The stub package ``engine`` as source files under ``folder``."""
    for path in sorted(STUBS.glob(f"{engine}.*.py")):
        *packages, name = path.stem.split(".")
        target = folder
        for package in packages:
            target = target / package
            target.mkdir(exist_ok=True)
            (target / "__init__.py").touch()
        shutil.copy(path, target / f"{name}.py")


@pytest.fixture
def stub_engine(tmp_path, monkeypatch):
    """Imports a door beside a stub of its engine. Both are gone when the test ends."""
    before = dict(sys.modules)

    def load(engine: str) -> ModuleType:
        install_stubs(engine, tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv(f"KDA_CUDA_{engine.upper()}", "1")
        for name in [x for x in sys.modules if x == engine or x.startswith(f"{engine}.")]:
            del sys.modules[name]
        sys.modules.pop(f"kda_cuda.integrations.{engine}", None)
        return importlib.import_module(f"kda_cuda.integrations.{engine}")

    finders = list(sys.meta_path)
    yield load
    sys.meta_path[:] = finders
    for name in [x for x in sys.modules if x.partition(".")[0] in ("vllm", "sglang")]:
        del sys.modules[name]
    sys.modules.update({name: x for name, x in before.items() if name.startswith("kda_cuda.integrations.")})
