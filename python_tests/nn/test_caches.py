"""Caches: gradients through them, modes of autograd, and what can be done with their rows."""

from __future__ import annotations

import base64
import copy
import io
import pickle
import zlib

import pytest
import torch

from kda_cuda.layers import KDACache, MLACache
from kda_cuda.model import HybridCache, HybridLM

from .test_layers import HIDDEN, LAYERS, kda_layer, mla_layer
from .test_model import CONFIG, prompt

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TIED = {"rtol": 1e-4, "atol": 1e-4}  # of logits


@pytest.fixture(scope="module")
def model() -> HybridLM:
    torch.manual_seed(0)
    return HybridLM(CONFIG).requires_grad_(False)


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(y: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(0.5, 1, y.numel(), device=y.device).view_as(y)
    return list(torch.autograd.grad((y * weights).sum(), leaves, retain_graph=True, allow_unused=True))


def in_pieces(layer, x: torch.Tensor, parts: list[int], cache=None) -> torch.Tensor:
    cache = layer.new_cache(len(x)) if cache is None else cache
    return torch.cat([layer(part, cache) for part in x.split(parts, dim=1)], 1)


@LAYERS
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("parts", [[8, 1, 3], [1] * 12], ids=str)
def test_gradients_through_pieces_are_those_of_one_pass(make, parts, batch):
    layer, x = make(), torch.randn(batch, 12, HIDDEN, requires_grad=True)
    leaves = [x, *layer.parameters()]
    expected = gradients(layer(x), leaves)
    torch.testing.assert_close(gradients(in_pieces(layer, x, parts), leaves), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_through_a_cache_of_the_model(batch):
    model, tokens = HybridLM(CONFIG), prompt(batch, 12)
    leaves = list(model.parameters())
    expected = gradients(model(tokens), leaves)
    pieces = in_pieces(model, tokens, [8, 1, 3])
    torch.testing.assert_close(gradients(pieces, leaves), expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert not in_pieces(model, tokens, [8, 4]).requires_grad


@pytest.mark.parametrize(
    ("make", "trained"),
    [(kda_layer, ""), (kda_layer, "q_proj"), (mla_layer, ""), (mla_layer, "q_proj"), (mla_layer, "kv_b_proj")],
    ids=["kda", "kda-queries", "mla", "mla-queries", "mla-expansion"],
)
@pytest.mark.parametrize("crop", [False, True], ids=["", "cropped"])
def test_steps_without_gradients_leave_what_autograd_kept(make, trained, crop, device):
    """Also where only some weights are trained, so that the cache itself needs no gradient."""
    layer, x = make().to(device), torch.randn(1, 9, HIDDEN, device=device)
    for name, p in layer.named_parameters():
        p.requires_grad_(trained in name)
    leaves = [p for p in layer.parameters() if p.requires_grad]
    expected, cache = gradients(layer(x[:, :7]), leaves), layer.new_cache(1)
    y = in_pieces(layer, x[:, :7], [5, 2], cache)
    states = [t for t in vars(cache).values() if isinstance(t, torch.Tensor) and t.requires_grad]
    losses = [t.square() for t in states]
    of_losses = [gradients(loss, states) for loss in losses]
    with torch.no_grad():
        if crop:
            cache.crop(0)
        layer(x[:, 7:8], cache), layer(x[:, 8:], cache)
    torch.testing.assert_close(gradients(y, leaves), expected, rtol=1e-3, atol=1e-4)
    assert len(states) >= (trained == "")
    for loss, truth in zip(losses, of_losses, strict=True):  # a user may have kept the states too
        assert all(d is None or torch.equal(d, t) for d, t in zip(gradients(loss, states), truth, strict=True))


@LAYERS
@torch.no_grad()
def test_compiled_pieces_continue(make):
    """One graph a call, cache and all."""
    layer, x = make(), torch.randn(2, 9, HIDDEN)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    cache = layer.new_cache(2)
    pieces = torch.cat([compiled(part, cache) for part in x.split([8, 1], dim=1)], 1)
    torch.testing.assert_close(pieces, layer(x), **CLOSE)


def test_detach_stops_gradients():
    layer, x = mla_layer(), torch.randn(1, 4, HIDDEN, requires_grad=True)
    cache = layer.new_cache(1)
    layer(x[:, :2], cache)
    cache.detach()
    layer(x[:, 2:], cache).sum().backward()
    assert not x.grad[:, :2].any() and x.grad[:, 2:].any()


MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
ORDERS = [("inference", "no_grad"), ("no_grad", "inference"), ("inference", "grad"), ("inference", "no_grad", "grad")]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@LAYERS
def test_a_cache_goes_from_mode_to_mode(make, order, device):
    layer, x = make().to(device), torch.randn(1, 5 + 2 * len(order), HIDDEN, device=device)
    with torch.no_grad():
        expected = layer(x)
    with MODES[order[0]]():
        cache = layer.new_cache(1)
        pieces = [layer(x[:, :5], cache)]
    for i, mode in enumerate(order):
        with MODES[mode]():
            pieces += [layer(x[:, t : t + 1], cache) for t in (5 + 2 * i, 6 + 2 * i)]
    if order[-1] == "grad":
        pieces[-1].sum().backward()
        assert layer.q_proj.weight.grad.any()
    torch.testing.assert_close(torch.cat([p.detach().clone() for p in pieces], 1), expected, **CLOSE)


def test_operations_take_a_cache_out_of_inference_mode(model):
    tokens = prompt(2, 9)
    with torch.inference_mode():
        cache = model.new_cache(2)
        model(tokens[:, :5], cache)
        cache.checkpoint()
        model(tokens[:, 5:], cache)
    for changed in (cache.select([1, 0]), cache.repeat(1), copy.deepcopy(cache), copy.copy(cache)):
        with torch.no_grad():
            changed.crop(5)
            changed.reset_rows([0])
            model(tokens[:, :1], changed)


# ---- rows ------------------------------------------------------------------------------------------------------------


def after(model: HybridLM, tokens: torch.Tensor) -> HybridCache:
    cache = model.new_cache(len(tokens))
    with torch.no_grad():
        in_pieces(model, tokens, [max(1, tokens.shape[1] - 1), 1][: tokens.shape[1]], cache)
    return cache


def continued(model: HybridLM, tokens: torch.Tensor, cache: HybridCache) -> torch.Tensor:
    with torch.no_grad():
        return in_pieces(model, tokens, [1, 3, 1], cache)


@pytest.mark.parametrize("rows", [[1, 0, 2], [2, 2], torch.tensor([0]), []], ids=str)
def test_selected_rows_continue(model, rows):
    tokens, more = prompt(3, 20), prompt(3, 25)[:, 20:]
    cache = after(model, tokens)
    chosen = cache.select(rows)
    y = continued(model, more[rows], chosen)
    torch.testing.assert_close(y, continued(model, more, cache)[rows], **TIED)  # which shares nothing with it
    assert chosen.batch_size == len(rows)


def test_repeated_rows_continue(model):
    cache, more = after(model, prompt(2, 20)), prompt(2, 25)[:, 20:]
    repeated = cache.repeat(2)
    y = continued(model, more.repeat_interleave(2, 0), repeated)
    torch.testing.assert_close(y, continued(model, more, cache).repeat_interleave(2, 0), **TIED)


def test_concatenated_rows_of_different_lengths_continue(model):
    prompts, more = (prompt(1, 20), prompt(2, 3), prompt(1, 7)[:, 1:]), prompt(4, 25)[:, 20:]
    caches = [after(model, tokens) for tokens in prompts]
    caches[0].checkpoint()
    joined = HybridCache.concatenate(caches)
    assert joined.row_lengths().tolist() == [20, 3, 3, 6]
    assert joined.nbytes() == sum(after(model, tokens).nbytes() for tokens in prompts)
    y, begin = continued(model, more, joined), 0
    for cache in caches:
        rows = slice(begin, begin + cache.batch_size)
        torch.testing.assert_close(y[rows], continued(model, more[rows], cache), **TIED)
        begin = rows.stop
    alone = joined.select([0, 3]).select([1])
    assert [layer.lengths for layer in alone.layers] == [None] * 8  # equal again: no masks any more


def test_reset_rows_begin_anew(model):
    tokens, more = prompt(3, 20), prompt(3, 25)[:, 20:]
    cache = after(model, tokens)
    for layer in cache.layers:  # what a row that went wrong leaves behind
        for x in (layer.buffer,) if isinstance(layer, MLACache) else (layer.conv, layer.state):
            x[1] = float("nan")
    cache.reset_rows([1])
    assert cache.row_lengths().tolist() == [20, 0, 20]
    y = continued(model, more, cache)
    torch.testing.assert_close(y[1:2], continued(model, more[1:2], model.new_cache(1)), **TIED)
    torch.testing.assert_close(y[::2], continued(model, more[::2], after(model, tokens[::2])), **TIED)


# ---- crop ------------------------------------------------------------------------------------------------------------


def test_crop_returns_to_a_checkpoint_exactly(model):
    tokens, more = prompt(2, 20), prompt(2, 25)[:, 20:]
    cache, sizes = after(model, tokens), []
    cache.checkpoint()
    expected = continued(model, more, cache.clone())
    sizes.append(cache.nbytes())
    for _ in range(2):
        continued(model, prompt(2, 5), cache)
        cache.crop(20)
        sizes.append(cache.nbytes())
    assert torch.equal(continued(model, more, cache), expected) and len(set(sizes)) == 1
    cache.drop_checkpoints()
    assert cache.nbytes() == after(model, prompt(2, 25)).nbytes()


def test_crop_of_rows_of_different_lengths(model):
    tokens, more = prompt(2, 12), prompt(2, 25)[:, 20:]
    cache = HybridCache.concatenate([after(model, tokens[:1, :10]), after(model, tokens[1:, :3])])
    cache.checkpoint()
    with torch.no_grad():
        model(torch.stack((tokens[0, 10:], tokens[1, 3:5])), cache)
        cache.checkpoint()  # 12 and 5 tokens
        model(more, cache)
    cache.crop(12)  # the second row, of 10, stays
    assert cache.row_lengths().tolist() == [12, 10]
    both = torch.cat((tokens[1:, :5], more[1:]), 1)
    expected = [continued(model, more[:1], after(model, tokens[:1])), continued(model, more[1:], after(model, both))]
    torch.testing.assert_close(continued(model, more, cache.clone()), torch.cat(expected), **TIED)


def test_crop_where_it_cannot_be_changes_nothing(model):
    cache = after(model, prompt(2, 20))
    cache.checkpoint()
    continued(model, prompt(2, 5), cache)
    expected = continued(model, prompt(2, 5), cache.clone())
    message = (
        "kda_cuda::crop: length is 22 and row 0 of a KDACache has no checkpoint there, expected one of [0, 20, 25] "
        "(KDACache.checkpoint)"
    )
    with pytest.raises(ValueError) as error:
        cache.crop(22)
    assert str(error.value) == message and cache.row_lengths().tolist() == [25, 25]
    cache.layers[2].drop_checkpoints()  # of one layer alone: the layers before it stay as they are
    with pytest.raises(ValueError, match=r"length is 20 and row 0 .* expected one of \[0, 25\]"):
        cache.crop(20)
    assert torch.equal(continued(model, prompt(2, 5), cache), expected)


def test_crop_to_nothing_and_to_everything(model):
    cache, more = after(model, prompt(2, 20)), prompt(2, 25)[:, 20:]
    expected = continued(model, more, cache.clone())
    cache.crop(20)
    assert torch.equal(continued(model, more, cache), expected)
    cache.crop(0)
    assert torch.equal(continued(model, more, cache), continued(model, more, model.new_cache(2)))


@pytest.mark.devices("emulator", "cuda")
@torch.no_grad()
def test_copies_share_nothing_with_steps_in_place(device):
    """The fused step writes into the states of its cache."""
    layer, x = kda_layer().to(device), torch.randn(2, 3, HIDDEN, device=device)
    cache = layer.new_cache(2)
    layer(x[:, :2], cache)
    cache.checkpoint()
    copies = [cache.select([0, 1]), copy.copy(cache), cache.to(device), copy.deepcopy(cache)]
    state, conv = cache.state.clone(), cache.conv.clone()
    _, kernels = device.run(lambda: layer(x[:, 2:], cache))
    assert kernels == ["decode_layer"] and not torch.equal(cache.state, state)
    cache.crop(2)
    for same in (cache, *copies):
        assert torch.equal(same.state, state) and torch.equal(same.conv, conv)


def test_reset_states_count_from_nothing(model):
    cache = after(model, prompt(2, 20))
    cache.checkpoint()
    cache.reset_states()
    assert cache.row_lengths().tolist() == [0, 0]
    continued(model, prompt(2, 5), cache)
    with pytest.raises(ValueError, match=r"expected one of \[0, 5\]"):
        cache.crop(3)


@torch.no_grad()
def test_latents_can_be_cropped_anywhere():
    layer, x = mla_layer(), torch.randn(2, 12, HIDDEN)
    cache = layer.new_cache(2)
    layer(torch.cat((x[:, :6], torch.randn(2, 9, HIDDEN)), 1), cache)
    cache.crop(6)
    assert cache.nbytes() == 2 * layer.cache_bytes(6, torch.float32)
    torch.testing.assert_close(in_pieces(layer, x[:, 6:], [1, 5], cache), layer(x)[:, 6:], **CLOSE)


# ---- devices and files -----------------------------------------------------------------------------------------------


def test_a_cache_moves_to_a_device(model):
    cache, more = after(model, prompt(2, 20)), prompt(2, 25)[:, 20:]
    cache.reset_rows([1])
    cache.checkpoint()
    away, twin = cache.to("meta"), cache.to("cpu")
    tensors = [t for layer in away.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    assert len(tensors) >= 14 and {t.device.type for t in tensors} == {"meta"}
    y = continued(model, more, twin)
    assert torch.equal(y, continued(model, more, cache))


def test_a_cache_is_saved_and_loaded(model):
    cache, more = after(model, prompt(2, 20)), prompt(2, 25)[:, 20:]
    cache.checkpoint()
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded.layers[3].buffer.shape[1] == 20 < cache.layers[3].buffer.shape[1]  # without the room to grow
    twins = [loaded, pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)]
    expected = continued(model, more, cache)
    assert all(torch.equal(continued(model, more, twin), expected) for twin in twins)
    assert loaded.row_lengths().tolist() == [25, 25]


OLD = (  # a HybridCache with a KDACache and an MLACache, pickled before they counted their rows' tokens
    "eNrVlMuO0zAUhnNrO22ZmWp2sIFl2FTQG+0K5qIRkhkuwyabUZSL22TwxLXjVCpSpbBAZZB3mB0LEBtegR2PwpZHACHB6UXQIuYBxsmx45P/OMefj5Jb"
    "bz9a2rzJrWeh5wZZ6NXPaIiJktX7Y5/H4b4XRFi9UTdfqImSReKNMU/VibLl9p+IpVNuoIPdNb0trYAmIyWvCMqDqO5mIiYg3HE59rOYhK7ASUq5O2pA"
    "iC03F7IUBm+Alay5hHqh2+f0zPXHAqeg2ruua1puvK6Qn+8Ov984/fT4aj03jr6Z0E+YZjs12M6QU0EDStwRJBbThOkgcDbhDYmFINjFSRh7CTNeORVw"
    "ivEQu2n8HKfMnDDLdgrgTCPKBSsgwzFhFieCFZHlzHgRmgxYCVlZBt+0ndJMvEiZacF8C5VDSFw8XTgrTHe2QNNrdZq99u1Ou9tt9TpssW4wzJiJyg8F"
    "s57AaidM+59W9+plbbXld6G7BzdYDvYe7AvYVzBtV71UxwppSEcmMqcKlWHUp+pcVoEJwYEAJHAM1Uc8xByHB3EgZkd2rATEyUIqPIFVtG1HO/u/LjXq"
    "5p1mu3FrDbV+EeqlFlDrK5iXKG1gOb+EWnk8j64toWV+VJIbRw/+rf+in/X7mC9g7pUue+m2eq1Gt7vG07yI51ILPM2/dTsv2fzD5x+rJQqliWozotMV"
    "ovCvwclARAoZmY9Tv/4bLD9gvA=="
)


def test_caches_pickled_by_older_versions_load():
    data = zlib.decompress(base64.b64decode(OLD))
    cache = pickle.loads(data)
    kda, mla = cache.layers
    assert isinstance(kda, KDACache) and isinstance(mla, MLACache)
    assert torch.equal(kda.conv, torch.arange(9.0).view(1, 3, 3)) and kda.state.tolist() == [[[[1.0]]]]
    assert mla.length == 2 and mla.lengths is None and kda.nbytes() == 40 and mla.nbytes() == 8
    assert mla.append(torch.ones(1, 2, 1)).flatten().tolist() == [2, 3, 1, 1]
    assert cache.select([0, 0]).batch_size == 2
    with pytest.raises(ValueError, match="layers have seen different numbers of tokens, expected the same"):
        cache.crop(0)


ERRORS = [
    (lambda c: c.select([2]), ValueError, "select: rows has 2, expected 0 <= row < 2"),
    (lambda c: c.select([0.5]), TypeError, "select: rows has dtype float32, expected int64 or int32"),
    (lambda c: c.select([[0]]), ValueError, "select: rows has shape [1, 1], expected 1 dimensions [rows]"),
    (lambda c: c.reset_rows([-1]), ValueError, "reset_rows: rows has -1, expected 0 <= row < 2"),
    (lambda c: c.repeat(0), ValueError, "repeat: times is 0, expected >= 1"),
    (lambda c: c.crop(5), ValueError, "crop: length is 5, expected 0 <= length <= 4, the tokens of the longest row"),
    (lambda c: c.crop(-1), ValueError, "crop: length is -1, expected 0 <= length <= 4, the tokens of the longest row"),
    (lambda c: c.crop(1.0), TypeError, "crop: length is 1.0 (float), expected an int"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[m[:40] for *_, m in ERRORS])
def test_errors(model, call, error, message):
    with pytest.raises(error) as raised:
        call(after(model, prompt(2, 4)))
    assert str(raised.value) == f"kda_cuda::{message}"


def test_rows_must_be_those_of_the_cache(model):
    with pytest.raises(ValueError) as error:
        model(prompt(3, 4), model.new_cache(2))
    assert str(error.value) == "kda_cuda::HybridLM: tokens has shape [3, 4], expected batch=2, the rows of the cache"
    layer, x = mla_layer(), torch.zeros(3, 1, HIDDEN)
    with pytest.raises(
        ValueError, match=r"NoPEMultiLatentAttention: x has shape \[3, 1, 48\], expected batch=2, the rows"
    ):
        layer(x, layer.new_cache(2))


def test_caches_of_different_kinds_are_not_concatenated(model):
    kda, mla = HybridCache(model.new_cache(1).layers[2:3]), HybridCache(model.new_cache(1).layers[3:4])
    with pytest.raises(
        ValueError, match=r"concatenate: caches are .'KDACache', 'MLACache'., expected at least one, all"
    ):
        HybridCache.concatenate([kda, mla])
