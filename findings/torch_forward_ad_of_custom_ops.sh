#!/usr/bin/env bash
# torch 2.13.0 (CPU). A custom op with a backward by register_autograd has the derivative zero in forward mode, silently.
#
# register_autograd gives an op a reverse-mode formula and no forward-mode formula. A torch.autograd.Function without
# a jvp raises NotImplementedError in forward mode. The op raises it only if its input also requires a gradient.
# Otherwise torch.func.jvp and torch.func.jacfwd return zeros and a dual tensor loses its tangent. Nothing is printed.
#
# Output seen on 2026-11-29:
#   jvp      tensor([0., 0.])
#   jacfwd   tensor([[0., 0.], [0., 0.]])
#   dual     None
#   reverse  tensor([ 3., 12.])
#   dual of a leaf that requires a gradient: NotImplementedError
#   Function NotImplementedError
. "$(dirname "$0")/common.bash"
install torch==2.13.0 numpy==2.4.6

output=$(python - <<'PY'
import torch
from torch.autograd import forward_ad


@torch.library.custom_op("finding::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


def remember(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def backward(ctx, grad):
    return 3 * ctx.saved_tensors[0] ** 2 * grad


cube.register_autograd(backward, setup_context=remember)


class Cube(torch.autograd.Function):
    forward = staticmethod(lambda x: x**3)
    setup_context = staticmethod(remember)
    backward = staticmethod(backward)


def outcome(function):
    try:
        return function()
    except NotImplementedError:
        return "NotImplementedError"


def dual(x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(cube(forward_ad.make_dual(x, torch.ones(2)))).tangent


x, ones = torch.tensor([1.0, 2.0]), torch.ones(2)
print("jvp     ", torch.func.jvp(cube, (x,), (ones,))[1])
print("jacfwd  ", str(torch.func.jacfwd(cube)(x)).replace("\n       ", ""))
print("dual    ", dual(x))
leaf = x.clone().requires_grad_()
print("reverse ", torch.autograd.grad(cube(leaf).sum(), leaf)[0])
print("dual of a leaf that requires a gradient:", outcome(lambda: dual(leaf)))
print("Function", outcome(lambda: torch.func.jvp(Cube.apply, (x,), (ones,))))
PY
)
echo "$output"
expect "$output" '^jvp +tensor\(\[0\., 0\.\]\)$'
expect "$output" '^jacfwd +tensor\(\[\[0\., 0\.\], \[0\., 0\.\]\]\)$'
expect "$output" '^dual +None$'
expect "$output" '^reverse +tensor\(\[ 3\., 12\.\]\)$'
expect "$output" '^dual of a leaf .*: NotImplementedError$'
expect "$output" '^Function NotImplementedError$'
