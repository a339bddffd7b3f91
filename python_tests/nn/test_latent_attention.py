"""One query of each head over latents, in products: the softmax in float64 says what is right."""

from __future__ import annotations

import pytest
import torch

from kda_cuda.nn import latent_attention
from kda_cuda.nn.latent_attention import attend_to_latents

WIDTH, RANK, SCALE = 24, 16, 0.3
SHAPES = {
    "one key": (2, 3, 1),
    "few keys": (3, 4, 300),
    "pieces": (2, 4, 2 * latent_attention.PIECE_KEYS),
    "pieces and a rest": (2, 3, 5 * latent_attention.PIECE_KEYS + 77),
    "longer pieces": (1, 2, 40_001),
    "many sequences": (latent_attention.FEW_SEQUENCES, 2, 700),
}


def inputs(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, latents in a buffer with more room, and a mask that shows every row something."""
    batch, heads, keys = SHAPES[name]
    make = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, WIDTH, generator=make)
    latents = torch.randn(batch, keys + 9, WIDTH, generator=make)[:, :keys]
    mask = torch.rand(batch, keys, generator=make) < 0.7
    mask[:, 0] = True
    return q, latents, mask


def expected(q: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    q, latents = q.double(), latents.double()
    scores = SCALE * q @ latents.transpose(1, 2)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    return torch.softmax(scores, -1) @ latents[..., :RANK]


def product(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """torch.bmm with sums in another dtype, which only CUDA has."""
    return a.to(out_dtype) @ b.to(out_dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_products(name, masked):
    q, latents, mask = inputs(name)
    mask = mask if masked else None
    o = latent_attention._in_products(q, latents, RANK, SCALE, None, mask, product)
    torch.testing.assert_close(o.double(), expected(q, latents, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beyond", [1, 63])
@pytest.mark.parametrize("name", SHAPES)
def test_products_of_some_keys(name, beyond):
    """What lies behind those that are seen changes nothing."""
    q, latents, _ = inputs(name)
    seen = latents.shape[1]
    padded = torch.nn.functional.pad(latents, (0, 0, 0, beyond), value=1e4)
    o = latent_attention._in_products(q, padded, RANK, SCALE, seen, None, product)
    torch.testing.assert_close(o.double(), expected(q, latents, None), rtol=1e-4, atol=1e-5)


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_every_dtype(name, dtype, masked, device):
    q, latents, mask = (x.to(device) for x in inputs(name))
    q, latents, mask = q.to(dtype), latents.to(dtype), mask if masked else None
    seen = latents.shape[1] - latents.shape[1] // 3
    o = attend_to_latents(q, latents, RANK, SCALE, seen, mask)
    truth = expected(q, latents[:, :seen], None if mask is None else mask[:, :seen])
    assert o.dtype == dtype and o.shape == truth.shape
    limit = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert (o - truth).norm() <= limit * truth.norm()


@pytest.mark.devices("cpu", "cuda")
def test_gradients(device):
    """Where they are asked for, the products give way to an op that has them."""
    q, latents, _ = (x.to(device) for x in inputs("few keys"))
    q, latents = q.bfloat16().requires_grad_(), latents.bfloat16().requires_grad_()
    found = torch.autograd.grad(attend_to_latents(q, latents, RANK, SCALE).sum(), (q, latents))
    truth = torch.autograd.grad(expected(q, latents, None).sum(), (q, latents))
    for x, y in zip(found, truth, strict=True):
        assert (x - y).norm() <= 2e-2 * y.norm()
