#!/usr/bin/env bash
# torch 2.13.0 (CPU). The host time of an operator with register_autograd and setup_context grows with the square of
# the number of its arguments.
#
# Before torch calls setup_context it fills in defaults: for each argument it asks the schema twice for the list of all
# arguments, and each time that list is converted from C++ to Python anew. With 32 arguments this takes the host longer
# than a small kernel runs, also where no argument has a default. The same forward and backward in a
# torch.autograd.Function around an operator without autograd cost a few microseconds more than with 4 arguments.
# So operators with many arguments, as attention has them, do better with such a function in eager mode.
#
# Output seen on 2026-11-30 (microseconds a call, on one machine):
#   2.13.0+cpu
#   register_autograd       4 arguments       24
#   autograd.Function       4 arguments       27
#   register_autograd      16 arguments      101
#   autograd.Function      16 arguments       36
#   register_autograd      32 arguments      345
#   autograd.Function      32 arguments       45
#   still so
# and from 2.14.1+cu130, run once by hand: 20, 26; 92, 35; 475, 39.
. "$(dirname "$0")/common.bash"
install torch==2.13.0 numpy==2.4.6

cat > "$here/cost.py" <<'PY'
import time

import torch

torch.set_num_threads(1)


def build(count):
    """The operator with register_autograd, and a Function around one without."""
    names = [f"a{i}" for i in range(count - 1)]
    schema = "(Tensor x" + "".join(f", float {name}" for name in names) + ") -> Tensor"
    lib = torch.library.Library(f"cost{count}", "DEF")
    for name in ("registered", "raw"):
        lib.define(name + schema)
        lib.impl(name, lambda x, *_: x.clone(), "CPU")
    torch.library.register_autograd(
        f"cost{count}::registered",
        lambda ctx, dy: (dy,) + (None,) * (count - 1),
        setup_context=lambda ctx, inputs, output: None,
        lib=lib,
    )
    raw = getattr(torch.ops, f"cost{count}").raw.default

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return raw(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, dy):
            return (dy,) + (None,) * (count - 1)

    return getattr(torch.ops, f"cost{count}").registered.default, Function.apply, lib


def microseconds(function, count):
    args = (torch.ones(4, requires_grad=True), *(1.0 for _ in range(count - 1)))
    rounds = []
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(50):
            function(*args)
        rounds.append((time.perf_counter() - begin) / 50e-6)
    return min(rounds)


print(torch.__version__)
keep, times = [], {}
for count in (4, 16, 32):
    registered, function, lib = build(count)
    keep.append(lib)
    times["register_autograd", count] = microseconds(registered, count)
    times["autograd.Function", count] = microseconds(function, count)
for (way, count), us in times.items():
    print(f"{way:18} {count:6} arguments {us:8.0f}")
grows = {way: times[way, 32] - times[way, 4] for way, _ in times}
assert grows["register_autograd"] > 8 * grows["autograd.Function"], grows
assert times["register_autograd", 32] - times["register_autograd", 16] > 2 * (
    times["register_autograd", 16] - times["register_autograd", 4]
), times
print("still so")
PY

output=$(python "$here/cost.py")
echo "$output"
expect "$output" "still so"
