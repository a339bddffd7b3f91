"""Random calls of the backward: shapes, gates, keys, flags, dtypes, and which gradients are asked for.

``random_call`` makes a call out of choices. hypothesis takes them, and takes them back one by one where a call fails;
without hypothesis a seeded generator does, so that the test runs on any machine with a GPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch

from ..support import accuracy, bwd_calls
from ..support.accuracy import GRADIENTS
from ..support.cases import Case

try:
    import hypothesis
    from hypothesis import Phase, strategies
except ModuleNotFoundError:
    hypothesis = None

pytestmark = pytest.mark.usefixtures("poisoned_memory", "chunk_bwd")
LEAST = {"cpu": 200, "emulator": 60, "cuda": 500}  # calls, all different

T = TypeVar("T")
Choose = Callable[[Sequence[T]], T]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GATES = ("mild", "fast", "long", "violent", "steep", "all_steep", "zero", "negative_zero", "nearly_none",
         "bounded_plain", "at_the_bound", "one_slow", "heavy_tailed")  # fmt: skip
YES_OR_NO = (True, False)
MOST_WORK = 320  # tokens times value heads


def random_lengths(choose: Choose, tokens: int) -> tuple[int, ...]:
    """Of up to six sequences, empty ones among them."""
    cuts = sorted(choose(range(tokens + 1)) for _ in range(choose(range(6))))
    return tuple(end - begin for begin, end in zip([0, *cuts], [*cuts, tokens], strict=True))


def random_keys(choose: Choose) -> dict[str, Any]:
    """Keys and write strengths that go together; collinear keys have the allowances of the named cases."""
    keys = choose(("normal", "normal", "collinear", "repeated", "zero_rows", "negative_zero"))
    collinear = keys in ("collinear", "repeated")
    chosen: dict[str, Any] = {"keys": keys, "beta_sigmoid": choose(YES_OR_NO)}
    chosen["neg_eigval"] = chosen["beta_sigmoid"] and choose(YES_OR_NO)
    # Near 2 collinear keys are reflections, which multiply errors: the logit 0 is a write strength of 1.
    chosen["beta"] = 0.0 if collinear and chosen["neg_eigval"] else choose((None, 0.0, 1.0))
    chosen["l2norm"] = keys in ("zero_rows", "negative_zero") or choose(YES_OR_NO)
    return chosen | ({"forward_allowance": 5.0, "gradient_allowance": 10.0} if collinear else {})


def random_call(choose: Choose) -> tuple[Case, tuple[str, ...]]:
    """A case, and the gradients that are asked for."""
    heads, group = choose((1, 2)), choose((1, 2, 3))
    most = MOST_WORK // (heads * group)
    tokens = choose([n for n in (1, 2, 15, 16, 17, 40, 63, 64, 65, 100, 128, 129, 200) if n <= most])
    packed = choose(YES_OR_NO)
    batch = 1 if packed else choose([n for n in (1, 2, 3) if n * tokens <= most])
    options = {
        "tokens": tokens, "batch": batch, "heads": heads, "value_heads": heads * group,
        "key_dim": choose((64, 3, 16, 60, 100, 128, 200)), "value_dim": choose((64, 1, 8, 40, 72)),
        "dtype": choose(DTYPES), "gate": choose(GATES),
        "lengths": random_lengths(choose, tokens) if packed else None,
        "index_dtype": choose((torch.int32, torch.int64)), "initial_state": choose(YES_OR_NO),
        "dfinal_state": choose(YES_OR_NO), "state_v_first": choose(YES_OR_NO), "scale": choose((None, 1.7)),
        "chunk_size": choose((64, 32)), "wide_gate": choose(YES_OR_NO),
        "layout": choose(("contiguous", "packed", "transposed")),
        "do": choose(("dense", "rows", "one", "transposed")), **random_keys(choose),
    }  # fmt: skip
    wanted = GRADIENTS if choose(YES_OR_NO) else tuple(name for name in GRADIENTS if choose(YES_OR_NO))
    return Case(repr(sorted(options.items(), key=str)), **options), wanted or ("dv",)


def check(case: Case, wanted: tuple[str, ...], device) -> None:
    x = case.inputs(device)
    wanted = [name for name in wanted if name[1:] in x.differentiable()] or ["dv"]
    results = bwd_calls.gradients(x, wanted)
    assert list(results) == wanted
    truth, rounded = bwd_calls.expected.__wrapped__(case)
    for name, d in results.items():
        allowed_for(case, name, rounded[name], truth[name]).check(f"{name} of {case}", d, truth[name])


def allowed_for(case: Case, name: str, rounded: torch.Tensor, truth: torch.Tensor) -> accuracy.Budget:
    """The cap, and up to four caps where the roundings alone need them: in few numbers nothing averages out."""
    limit = accuracy.cap(case, case.dtype, gradient=True)
    rms = min(max(limit, 4 * accuracy.rms_of_draws(rounded, truth)), 4 * limit)
    return accuracy.Budget(rms, accuracy.ROW_FACTOR * rms)


def drive(examples: int, body: Callable[[Choose], None]) -> None:
    """Runs ``body`` on that many sources of choices, always the same ones."""
    if hypothesis is None:
        for seed in range(examples):
            body(random.Random(seed).choice)
        return

    @hypothesis.settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @hypothesis.given(strategies.data())
    def run(data) -> None:
        body(lambda options: data.draw(strategies.sampled_from(options)))

    run()


def test_random_calls(device):
    tried: dict[str, Case] = {}

    def body(choose: Choose) -> None:
        case, wanted = random_call(choose)
        tried[case.name] = case
        check(case, wanted, device)

    drive(LEAST[device.name] * 3 // 2, body)  # hypothesis repeats itself at times
    assert len(tried) >= LEAST[device.name]
    assert {case.dtype for case in tried.values()} == set(DTYPES)
    assert len({case.gate for case in tried.values()}) >= 10


def test_a_generator_of_our_own_serves_too(device, monkeypatch):
    """As on a machine without hypothesis. The kernels are those of the backward."""
    monkeypatch.setitem(globals(), "hypothesis", None)
    _, kernels = device.run(lambda: drive(5, lambda choose: check(*random_call(choose), device)))
    bwd_calls.assert_ran(kernels, device)
