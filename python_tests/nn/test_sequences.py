"""Rows of different lengths, packed documents and empty inputs: each sequence is what it is alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from kda_cuda import layers, short_conv
from kda_cuda.model import HybridLM
from kda_cuda.nn import modules

from .test_layers import HIDDEN, LAYERS, kda_layer, mla_layer
from .test_model import CONFIG, prompt

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def model() -> HybridLM:
    torch.manual_seed(0)
    return HybridLM(CONFIG)


# ---- no tokens -------------------------------------------------------------------------------------------------------


@LAYERS
@pytest.mark.parametrize("shape", [(2, 0, HIDDEN), (0, 3, HIDDEN), (0, 1, HIDDEN), (0, 0, HIDDEN)], ids=str)
@pytest.mark.parametrize("cached", [False, True])
def test_no_tokens(make, shape, cached):
    layer, x = make(), torch.randn(shape, requires_grad=True)
    cache = layer.new_cache(shape[0]) if cached else None
    y = layer(x, cache)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.devices("emulator", "cuda")
@pytest.mark.parametrize("shape", [(2, 0, HIDDEN), (0, 3, HIDDEN), (0, 1, HIDDEN)], ids=str)
@torch.no_grad()
def test_no_tokens_on_the_kernels(shape, device):
    layer = kda_layer().to(device)
    cache, x = layer.new_cache(shape[0]), torch.zeros(shape, device=device)
    before = cache.state.clone()
    assert layer(x).shape == layer(x, cache).shape == shape and torch.equal(cache.state, before)


@LAYERS
@torch.no_grad()
def test_no_tokens_leave_the_cache_as_it_is(make):
    layer, x = make(), torch.randn(2, 6, HIDDEN)
    cache = layer.new_cache(2)
    pieces = [layer(part, cache) for part in (x[:, :0], x[:, :4], x[:, :0], x[:, 4:5], x[:, :0], x[:, 5:])]
    torch.testing.assert_close(torch.cat(pieces, 1), layer(x), **CLOSE)


def test_no_tokens_in_the_model(model):
    tokens, cache = prompt(2, 5), model.new_cache(2)
    assert model(tokens[:, :0]).shape == (2, 0, 50) and model(tokens[:, :0], cache).shape == (2, 0, 50)
    assert model(tokens[:0]).shape == (0, 5, 50) and model.generate(tokens[:0], 3).shape == (0, 8)
    packed = model(tokens[:1, :0], cu_seqlens=torch.tensor([0, 0]))
    assert packed.shape == model(tokens[:, :0], position_ids=tokens[:, :0])[:1].shape == (1, 0, 50)
    assert torch.equal(model.generate(tokens, 0), tokens)


def test_no_tokens_in_the_convolution():
    conv, x = layers.ShortConvolution(3), torch.randn(2, 0, 3)
    assert conv(x).shape == conv(x, torch.zeros(2, 3, 3)).shape == (2, 0, 3)


# ---- padding ---------------------------------------------------------------------------------------------------------


def mask_of(counts: list[int], tokens: int, side: str) -> torch.Tensor:
    """bool ``[rows, tokens]``: so many tokens in each row, on one side or anywhere."""
    place = torch.arange(tokens).expand(len(counts), tokens)
    if side == "anywhere":
        place = torch.rand(place.shape, generator=torch.Generator().manual_seed(tokens)).argsort(1)
    mask = place < torch.tensor(counts)[:, None]
    return mask.flip(1) if side == "left" else mask


SIDES = pytest.mark.parametrize("side", ["left", "right", "anywhere"])
COUNTS = [70, 3, 0, 66, 1]


def padded(rows: list[torch.Tensor], mask: torch.Tensor, fill: float = float("nan")) -> torch.Tensor:
    x = torch.full((*mask.shape, *rows[0].shape[1:]), fill, dtype=rows[0].dtype)
    x[mask] = torch.cat(rows)
    return x


@SIDES
@LAYERS
def test_padded_rows_are_what_they_are_alone(make, side):
    """Outputs and gradients; NaN in the padding reaches nothing."""
    layer, rows = make(), [torch.randn(n, HIDDEN, requires_grad=True) for n in COUNTS]
    leaves = [*rows, *layer.parameters()]
    alone = [layer(row[None])[0] for row in rows]
    weights = torch.randn(sum(COUNTS), HIDDEN)
    expected = torch.autograd.grad((torch.cat(alone) * weights).sum(), leaves)
    mask = mask_of(COUNTS, 72, side)
    x = padded([row.detach() for row in rows], mask)
    x = x.index_put((mask,), torch.cat(rows))
    y = layer(x, attention_mask=mask.long())
    torch.testing.assert_close(y[mask], torch.cat(alone), **CLOSE)
    assert not y[~mask].any()
    got = torch.autograd.grad((y[mask] * weights).sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


PIECES = [[40, 3, 0], [1, 1, 1], [1, 0, 1], [0, 1, 0], [3, 0, 5], [2, 4, 1], [1, 1, 1]]  # tokens of each row


def check_pieces(layer, side: str, device: str = "cpu") -> None:
    """Prompts, steps and drafts of different lengths on one cache."""
    totals = [sum(counts) for counts in zip(*PIECES, strict=True)]
    rows = [torch.randn(n, HIDDEN) for n in totals]
    cache, outputs, begins = layer.new_cache(3), [[], [], []], [0, 0, 0]
    for counts in PIECES:
        mask = mask_of(counts, max(counts) + (max(counts) > 1), side)
        part = padded([row[b : b + n] for row, b, n in zip(rows, begins, counts, strict=True)], mask)
        y = layer(part.to(device), cache, attention_mask=None if bool(mask.all()) else mask.to(device)).cpu()
        assert not y[~mask].any()
        for b in range(3):
            outputs[b].append(y[b, mask[b]])
            begins[b] += counts[b]
    assert cache.row_lengths().tolist() == totals
    for row, pieces in zip(rows, outputs, strict=True):
        alone = layer(row[None].to(device))[0].cpu()
        torch.testing.assert_close(torch.cat(pieces), alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@SIDES
@LAYERS
def test_padded_pieces_continue_each_row(make, side, grad):
    with torch.set_grad_enabled(grad):
        check_pieces(make(), side)


@pytest.mark.devices("emulator", "cuda")
@torch.no_grad()
def test_padded_pieces_on_the_kernels(device):
    """Rows without a token are null slots of the fused step."""
    _, kernels = device.run(lambda: check_pieces(kda_layer().to(device), "left", device))
    assert "decode_layer" in kernels


@LAYERS
@torch.no_grad()
def test_a_masked_step_leaves_the_cache_of_the_row(make):
    layer, x = make(), torch.randn(2, 6, HIDDEN)
    cache = layer.new_cache(2)
    layer(x, cache)
    before = cache.clone()
    layer(torch.full((2, 1, HIDDEN), float("nan")), cache, attention_mask=torch.tensor([[0], [0]]))
    assert torch.equal(cache.row_lengths(), before.row_lengths()) and cache.nbytes() == before.nbytes()
    more = torch.randn(2, 2, HIDDEN)
    torch.testing.assert_close(layer(more, cache), layer(more, before), **CLOSE)


@torch.no_grad()
def test_the_mask_of_transformers_begins_with_the_past(model):
    """Left padded prompts, then steps with a mask of all columns so far."""
    tokens, mask = prompt(3, 24), mask_of([20, 3, 7], 20, "left").long()
    full = torch.cat((mask, torch.ones(3, 4, dtype=torch.long)), 1)
    cache = model.new_cache(3)
    steps = [model(tokens[:, :20], cache, attention_mask=full[:, :20])]
    steps += [model(tokens[:, t : t + 1], cache, attention_mask=full[:, : t + 1]) for t in range(20, 24)]
    logits = torch.cat(steps, 1)
    torch.testing.assert_close(logits, model(tokens, attention_mask=full), rtol=1e-4, atol=1e-4)
    for b in range(3):
        alone = model(tokens[b : b + 1, full[b].bool()])[0]
        torch.testing.assert_close(logits[b, full[b].bool()], alone, rtol=1e-4, atol=1e-4)


def test_a_mask_without_padding_costs_nothing(model, monkeypatch):
    tokens, cache, seen = prompt(2, 9), model.new_cache(2), []
    model(tokens, cache, attention_mask=torch.ones(2, 9, dtype=torch.long))
    assert [layer.lengths for layer in cache.layers] == [None] * 8
    forward = HybridLM.forward
    monkeypatch.setattr(HybridLM, "forward", lambda *a, **options: seen.append(options) or forward(*a, **options))
    model.generate(tokens, 2, attention_mask=torch.ones(2, 9, dtype=torch.bool))
    assert seen == [{"last_only": True}] * 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_different_lengths_generate_what_they_do_alone(model, side):
    rows = [prompt(1, 20)[0, -n:] for n in (20, 3, 9)]
    mask = mask_of([20, 3, 9], 21, side)
    tokens = padded(rows, mask, 0)
    out = model.generate(tokens, 6, attention_mask=mask)
    assert torch.equal(out[:, :21], tokens)
    for row, generated in zip(rows, out[:, 21:], strict=True):
        assert torch.equal(generated, model.generate(row[None], 6)[0, len(row) :])


def test_loss_of_padded_rows(model):
    """Each parameter's gradient is that of the rows alone; any number may stand for padding."""
    rows = [prompt(1, n)[0] for n in (9, 4, 6)]
    mask = mask_of([9, 4, 6], 10, "left")
    tokens = padded(rows, mask, -100)

    def gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(logits.logsumexp(-1).square().sum(), list(model.parameters())))

    expected = gradients(torch.cat([model(row[None])[0] for row in rows]))
    torch.testing.assert_close(gradients(model(tokens, attention_mask=mask)[mask]), expected, rtol=1e-3, atol=1e-3)


# ---- packed documents ------------------------------------------------------------------------------------------------

BOUNDS = [0, 1, 71, 71, 73, 76, 78, 81]


def packed_documents(x: torch.Tensor) -> list[torch.Tensor]:
    return [x[:, begin:end] for begin, end in itertools.pairwise(BOUNDS) if begin < end]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@LAYERS
def test_packed_documents_are_what_they_are_alone(make, dtype, device):
    layer, x = make().to(device), torch.randn(1, BOUNDS[-1], HIDDEN, device=device, requires_grad=True)
    leaves, weights = [x, *layer.parameters()], torch.randn(1, BOUNDS[-1], HIDDEN, device=device)
    alone = torch.cat([layer(document) for document in packed_documents(x)], 1)
    y = layer(x, cu_seqlens=torch.tensor(BOUNDS, dtype=dtype, device=device))
    torch.testing.assert_close(y, alone, rtol=1e-3, atol=1e-4)
    expected = torch.autograd.grad((alone * weights).sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad((y * weights).sum(), leaves), expected, rtol=1e-3, atol=1e-3)
    assert (y - layer(x)).abs().max() > 1e-2  # documents that see each other are something else


@LAYERS
def test_tokens_after_the_last_document_are_padding(make, device):
    """Outputs of zero, no gradients, and NaN there reaches nothing."""
    layer, documents = make().to(device), torch.randn(1, BOUNDS[-1], HIDDEN, device=device)
    x = torch.nn.functional.pad(documents, (0, 0, 0, 20), value=float("nan")).requires_grad_()
    bounds, weights = torch.tensor(BOUNDS, device=device), torch.randn(1, BOUNDS[-1] + 20, HIDDEN, device=device)
    y = layer(x, cu_seqlens=bounds)
    wanted = layer(documents.requires_grad_(), cu_seqlens=bounds)
    torch.testing.assert_close(y[:, : BOUNDS[-1]], wanted, **CLOSE)
    assert not y[:, BOUNDS[-1] :].any()
    parameters = list(layer.parameters())
    dx, *got = torch.autograd.grad((y * weights).sum(), [x, *parameters])
    expected = torch.autograd.grad((wanted * weights[:, : BOUNDS[-1]]).sum(), [documents, *parameters])
    torch.testing.assert_close((dx[:, : BOUNDS[-1]], *got), expected, rtol=1e-4, atol=1e-5)
    assert not dx[:, BOUNDS[-1] :].any()


def test_loss_of_documents_before_padding(model):
    """Any number may stand for padding."""
    tokens = prompt(1, BOUNDS[-1])
    padded_tokens = torch.nn.functional.pad(tokens, (0, 9), value=-100)
    bounds, parameters = torch.tensor(BOUNDS), list(model.parameters())
    expected = torch.autograd.grad(model(tokens, cu_seqlens=bounds).logsumexp(-1).square().sum(), parameters)
    logits = model(padded_tokens, cu_seqlens=bounds)[:, : BOUNDS[-1]]
    got = torch.autograd.grad(logits.logsumexp(-1).square().sum(), parameters)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_loss_of_packed_documents(model):
    """Boundaries, and positions that restart at them: in one row, and in two."""
    tokens = prompt(1, BOUNDS[-1])
    positions = torch.cat([torch.arange(document.shape[1]) for document in packed_documents(tokens)])[None]
    parameters = list(model.parameters())

    def gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        loss = torch.nn.functional.cross_entropy(logits[0], tokens[0].roll(-1), reduction="sum")
        return [loss, *torch.autograd.grad(loss, parameters)]

    alone = torch.cat([model(document) for document in packed_documents(tokens)], 1)
    expected = gradients(alone)
    for packed in (model(tokens, cu_seqlens=torch.tensor(BOUNDS)), model(tokens, position_ids=positions.int())):
        torch.testing.assert_close(gradients(packed), expected, rtol=1e-3, atol=1e-3)
    two_rows = model(tokens[:, :78].view(2, 39), position_ids=positions[:, :78].view(2, 39))
    other = torch.tensor([0, 1, 39, 71, 73, 76, 78])
    torch.testing.assert_close(two_rows.view(1, 78, -1), model(tokens[:, :78], cu_seqlens=other), **CLOSE)


def test_a_convolution_of_a_user_does_not_cross_boundaries():
    """A convolution with a hook is called by itself, and is told the boundaries."""
    layer, x = kda_layer(), torch.randn(1, 9, HIDDEN)
    layer.q_conv1d.register_forward_hook(lambda module, args, y: 2 * y)
    alone = torch.cat([layer(x[:, :2]), layer(x[:, 2:])], 1)
    torch.testing.assert_close(layer(x, cu_seqlens=torch.tensor([0, 2, 9])), alone, **CLOSE)


@torch.no_grad()
def test_plain_convolutions_are_one_call(monkeypatch):
    """With a hook on one of them, which changes nothing here, each is a call of its own. The outputs are equal."""
    layer, x, widths = kda_layer(), torch.randn(1, 9, HIDDEN), []

    def counted(y: torch.Tensor | list[torch.Tensor], *arguments, **options):
        widths.append(y.shape[-1] if isinstance(y, torch.Tensor) else [each.shape[-1] for each in y])
        return short_conv(y, *arguments, **options)

    def outputs() -> list[torch.Tensor]:
        cache = layer.new_cache(1)
        return [layer(x), layer(x, cu_seqlens=torch.tensor([0, 2, 9])), layer(x[:, :7], cache), layer(x[:, 7:], cache)]

    monkeypatch.setattr(modules, "short_conv", counted)
    together = outputs()
    streams = [layer.key_width, layer.key_width, layer.value_width]
    assert widths == [streams] * 4
    layer.q_conv1d.register_forward_hook(lambda module, args, y: None)
    torch.testing.assert_close(outputs(), together, **CLOSE)
    assert widths[4:] == streams * 4


# ---- errors ----------------------------------------------------------------------------------------------------------

ONES = torch.ones(2, 3, dtype=torch.long)
ERRORS = [
    ({"attention_mask": ONES.float()}, TypeError, "attention_mask has dtype float32, expected bool or int64"),
    ({"attention_mask": ONES[None]}, ValueError, "has shape [1, 2, 3], expected 2 dimensions [batch, tokens]"),
    ({"attention_mask": ONES[:, :2]}, ValueError, "attention_mask has shape [2, 2], expected [batch=2, tokens=3]"),
    ({"attention_mask": torch.ones(2, 4).long()}, ValueError, "has shape [2, 4], expected [batch=2, tokens=3]"),
    ({"attention_mask": [1]}, TypeError, "attention_mask is a list, expected a Tensor"),
    ({"attention_mask": ONES.to("meta")}, ValueError, "attention_mask is on meta, expected cpu"),
    ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "has shape [2, 3"),
    ({"cu_seqlens": torch.tensor([0, 3]), "attention_mask": ONES}, ValueError,
     "attention_mask and cu_seqlens are given, expected one of them"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS, ids=[m for *_, m in ERRORS])
def test_errors(model, arguments, error, message):
    calls = {"KimiDeltaAttention": kda_layer(), "NoPEMultiLatentAttention": mla_layer(), "HybridLM": model}
    for name, call in calls.items():
        with pytest.raises(error) as raised:
            call(ONES if call is model else torch.zeros(2, 3, HIDDEN), **arguments)
        text = str(raised.value)
        assert text.startswith(f"kda_cuda::{name}: ") and message in text


def test_errors_of_the_model(model):
    one, cache = ONES[:1], model.new_cache(1)
    calls = [
        ({"cache": cache, "cu_seqlens": torch.tensor([0, 3])}, "cache and cu_seqlens are given, expected one of them"),
        (
            {"cache": cache, "position_ids": one},
            "position_ids is given with cache, attention_mask, cu_seqlens or cp_context",
        ),
        ({"position_ids": ONES}, "position_ids has shape [2, 3], expected [batch=1, tokens=3]"),
        ({"cache": cache, "attention_mask": ONES}, "attention_mask has shape [2, 3], expected [batch=1, tokens=3]"),
        ({"tokens": one[0]}, "tokens has shape [3], expected 2 dimensions [batch, tokens]"),
        ({"cu_seqlens": torch.tensor([1, 3])}, "cu_seqlens[0] is 1, expected 0"),
    ]
    for arguments, message in calls:
        with pytest.raises(ValueError) as raised:
            model(**{"tokens": one} | arguments)
        assert str(raised.value).startswith(f"kda_cuda::HybridLM: {message}")
    with pytest.raises(
        ValueError, match=r"generate: attention_mask has shape \[2, 3\], expected \[batch=1, tokens=3\]"
    ):
        model.generate(one, 1, attention_mask=ONES)
