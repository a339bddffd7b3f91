"""Where weights come from and who looks at them: wrapped modules, checkpoints of other shapes, deferred memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from kda_cuda.layers import GatedRMSNorm, KimiDeltaAttention
from kda_cuda.model import HybridConfig, HybridLM

from .test_layers import HEADS, HIDDEN, LAYERS, kda_layer, mla_layer
from .test_model import CONFIG

# ---- modules that are wrapped, replaced or hooked --------------------------------------------------------------------


class Adapted(nn.Module):
    """base(x) + up(down(x)), whose ``weight`` is that of the base."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.weight = base, base.weight
        self.down, self.up = nn.Linear(base.in_features, 3), nn.Linear(3, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class Int8Linear(nn.Module):
    """A quantised projection: its weight has no dtype to compute in."""

    dtype = torch.int8

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.scale = base.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((base.weight.detach() / self.scale).round().to(self.dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


class Float8Linear(Int8Linear):
    dtype = torch.float8_e4m3fn


class Doubled(torch.Tensor):
    """A weight with a product of its own, as quantised tensors have."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        y = super().__torch_function__(function, types, arguments, options or {})
        return 2 * y.as_subclass(torch.Tensor) if function is nn.functional.linear else y


class Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def _with_bias(linear: nn.Linear) -> nn.Linear:
    biased = nn.Linear(linear.in_features, linear.out_features)
    biased.load_state_dict(linear.state_dict(), strict=False)
    return biased


def _called_instead(linear: nn.Linear) -> nn.Linear:
    linear.forward = lambda x: 2 * nn.functional.linear(x, linear.weight)
    return linear


def _hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda module, args, y: 2 * y)
    return linear


def _hooked_before(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return linear


def _subclassed(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Doubled))
    return linear


def _parametrized(linear: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(linear, "weight", Twice())
    return linear


def assert_pieces_equal_one_pass(layer: nn.Module, x: torch.Tensor, parts=(8, 1, 3)) -> None:
    cache = layer.new_cache(len(x))
    pieces = torch.cat([layer(part, cache) for part in x.split(parts, dim=1)], 1)
    torch.testing.assert_close(pieces, layer(x), rtol=1e-4, atol=1e-5)


CHANGES = [Adapted, Int8Linear, _with_bias, _called_instead, _hooked, _hooked_before, _parametrized, _subclassed]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@torch.no_grad()
def test_mla_steps_call_a_changed_projection(change):
    layer = mla_layer()
    before = layer(x := torch.randn(2, 12, HIDDEN))
    layer.kv_b_proj = change(layer.kv_b_proj)
    assert (layer(x) - before).abs().max() > 1e-5
    assert_pieces_equal_one_pass(layer, x)


@torch.no_grad()
def test_mla_steps_call_a_projection_under_hooks_of_all_modules():
    layer = mla_layer()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: 2 * y if module is layer.kv_b_proj else y
    )
    try:
        assert_pieces_equal_one_pass(layer, torch.randn(2, 12, HIDDEN))
    finally:
        handle.remove()


def test_steps_run_the_backward_hooks_of_a_projection():
    layer, seen = mla_layer(), []
    layer.kv_b_proj.register_full_backward_hook(lambda module, inputs, outputs: seen.append(1))
    layer(torch.randn(1, 1, HIDDEN), layer.new_cache(1)).sum().backward()
    assert seen == [1]


@torch.no_grad()
def test_mla_steps_absorb_a_plain_projection(monkeypatch):
    """So that the comparison above cannot pass by never absorbing."""
    layer, x = mla_layer(), torch.randn(1, 3, HIDDEN)
    expected, cache = layer(x), layer.new_cache(1)
    layer(x[:, :2], cache)
    monkeypatch.delattr(type(layer), "_attend")
    torch.testing.assert_close(layer(x[:, 2:], cache), expected[:, 2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["k_conv1d", "o_norm"])
@pytest.mark.parametrize("how", ["hook", "subclass", "parametrized"])
@torch.no_grad()
def test_kda_steps_call_what_is_changed(how, name, device):
    """The fused step has the weights of convolutions and norm, and must not be taken for other modules."""
    layer = kda_layer().to(device).requires_grad_(False)
    module = getattr(layer, name)
    if how == "hook":
        module.register_forward_hook(lambda module, args, y: 2 * y.clamp(min=0))
    elif how == "subclass":
        kind = type(module)
        module.__class__ = type(
            "Doubled", (kind,), {"forward": lambda self, *a: 2 * kind.forward(self, *a).clamp(min=0)}
        )
    else:
        parametrize.register_parametrization(module, "weight", Twice())
    assert_pieces_equal_one_pass(layer, torch.randn(1, 6, HIDDEN, device=device), (3, 1, 1, 1))


@pytest.mark.devices("emulator", "cuda")
@torch.no_grad()
def test_kda_steps_are_fused_while_nothing_is_changed(device):
    layer, x = kda_layer().to(device), torch.randn(1, 1, HIDDEN, device=device)
    _, kernels = device.run(lambda: layer(x, layer.new_cache(1)))
    assert kernels == ["decode_layer"]


@LAYERS
@pytest.mark.parametrize("kind", [Int8Linear, Float8Linear])
@torch.no_grad()
def test_a_quantised_query_projection_has_a_cache(make, kind):
    layer = make()
    layer.q_proj = kind(layer.q_proj)
    assert_pieces_equal_one_pass(layer, torch.randn(2, 12, HIDDEN))
    dtypes = {t.dtype for t in vars(layer.new_cache(2)).values() if isinstance(t, torch.Tensor)}
    assert dtypes == {torch.float32}


@torch.no_grad()
def test_a_latent_norm_without_a_weight():
    layer = mla_layer()
    layer.kv_a_layernorm = nn.RMSNorm(24, elementwise_affine=False)
    assert_pieces_equal_one_pass(layer, torch.randn(2, 12, HIDDEN))


def test_a_quantised_head_has_cache_sizes():
    model = HybridLM(CONFIG)
    plain = [f(100) for f in (model.cache_bytes, model.multi_latent_cache_bytes, model.full_attention_cache_bytes)]
    model.lm_head = Int8Linear(model.lm_head)
    sizes = [f(100) for f in (model.cache_bytes, model.multi_latent_cache_bytes, model.full_attention_cache_bytes)]
    assert sizes == plain


def test_device_and_dtype_of_a_cache_can_be_given():
    cache = HybridLM(CONFIG).new_cache(3, device="meta", dtype=torch.bfloat16)
    kda, mla = cache.layers[0], cache.layers[3]
    assert kda.conv.dtype == mla.buffer.dtype == torch.bfloat16 and kda.state.dtype == torch.float32
    assert {kda.conv.device.type, kda.state.device.type, mla.buffer.device.type} == {"meta"}


# ---- checkpoints -----------------------------------------------------------------------------------------------------

SHAPES = {
    "A_log": [(HEADS,), (1, 1, HEADS, 1), (HEADS, 1)],
    "dt_bias": [(HEADS * 32,), (HEADS, 32), (1, 1, HEADS, 32)],
    "k_conv1d.weight": [(64, 1, 4), (64, 4)],
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name, shapes in SHAPES.items() for shape in shapes])
def test_checkpoints_of_other_shapes_load(name, shape, assign):
    source, x = kda_layer(1), torch.randn(1, 9, HIDDEN)
    saved = dict(source.state_dict())
    saved[name] = saved[name].reshape(shape)
    layer = kda_layer(2)
    layer.load_state_dict(saved, assign=assign)
    assert torch.equal(layer(x), source(x))
    assert layer.get_parameter(name).shape == source.get_parameter(name).shape
    assert saved[name].shape == shape  # the caller's dictionary stays as it was


def test_the_released_shape_loads_into_a_model():
    source = HybridLM(CONFIG)
    saved = {n: t.reshape(1, 1, -1, 1) if n.endswith("A_log") else t for n, t in source.state_dict().items()}
    model, tokens = HybridLM(CONFIG), torch.arange(7).view(1, 7)
    model.load_state_dict(saved)
    assert torch.equal(model(tokens), source(tokens))


@pytest.mark.parametrize(
    ("name", "shape"), [("dt_bias", (32, HEADS)), ("A_log", (1, HEADS + 1)), ("k_conv1d.weight", (4, 64))]
)
def test_checkpoints_of_wrong_shapes_do_not_load(name, shape):
    layer = kda_layer()
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(layer.state_dict() | {name: torch.zeros(shape)})


# ---- deferred initialisation -----------------------------------------------------------------------------------------


def fill_with_nan(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(float("nan"))
    return module


def test_a_model_built_on_meta_gets_every_parameter():
    with torch.device("meta"):
        model = HybridLM(CONFIG)
    model = fill_with_nan(model.to_empty(device="cpu"))
    torch.manual_seed(0)
    model.reset_weights()
    built = dict(HybridLM(CONFIG).named_parameters())
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        if p.numel() >= 256:
            assert abs(p.std() - built[name].std()) <= 0.2 * built[name].std(), name
        assert p.dtype == built[name].dtype
    model.generate(torch.zeros(1, 3, dtype=torch.long), 2)


@pytest.mark.parametrize("make", [kda_layer, mla_layer, lambda: HybridLM(CONFIG)], ids=["kda", "mla", "model"])
def test_every_module_with_parameters_resets_them(make):
    """All that FSDP2 and others need after ``to_empty``."""
    root = fill_with_nan(make())
    for module in root.modules():
        if module._parameters:
            module.reset_parameters()
    assert all(p.isfinite().all() for p in root.parameters())


def test_reset_parameters_sets_what_the_constructor_sets():
    norm = fill_with_nan(GatedRMSNorm(5))
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.ones(5))
    layer = fill_with_nan(KimiDeltaAttention(8, num_heads=2, head_dim=4))
    torch.manual_seed(3)
    layer.reset_parameters()
    A_log = layer.A_log.clone()
    torch.manual_seed(3)
    layer.reset_gate_parameters()
    assert torch.equal(layer.A_log, A_log) and layer.q_proj.weight.isnan().all()


def test_seeds_make_the_models_they_made_before():
    """A weight of each kind, as the constructor set it when the published figures were measured."""
    torch.manual_seed(0)
    model = HybridLM(HybridConfig(vocab_size=4, hidden_size=8, num_heads=1, head_dim=4, num_layers=4))
    got = [model.lm_head.weight[0, 0], model.model.layers[0].self_attn.q_conv1d.weight[0, 0, 0],
           model.model.layers[2].self_attn.A_log[0]]  # fmt: skip
    torch.testing.assert_close(torch.stack(got).detach(), torch.tensor(SEEDED), rtol=1e-5, atol=1e-6)


SEEDED = [-0.0380434, 0.2744860, 0.0795616]
