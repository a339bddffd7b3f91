"""vLLM's door beside a stub of vLLM: every layer class, every kind of batch, and what is left to vLLM."""

from __future__ import annotations

import importlib
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from .engine_truth import (
    CLOSE,
    DIM,
    HEADS,
    WIDTH,
    Layer,
    Tokens,
    assert_only_written,
    draw_layer,
    draw_pool,
    draw_tokens,
    stub_engine,  # noqa: F401
)

CLASSES = {
    "KimiGatedDeltaNetAttention": "vllm.model_executor.layers.mamba.gdn.kimi_gdn_linear_attn",
    "KimiK3DeltaAttention": "vllm.models.kimi_k3.nvidia.kda",
    "Glm5NextLinearAttention": "vllm.models.glm5next.common.kda",
    "BailingMoeV3KimiDeltaAttention": "vllm.model_executor.models.bailing_moe_v3",
}
CHECKPOINTED = ("KimiK3DeltaAttention", "Glm5NextLinearAttention")
SLOTS, DRAFTS = 14, 3


class Norm:
    activation = "sigmoid"

    def __init__(self, layer: Layer):
        self.weight, self.eps = layer.norm, layer.eps

    def __call__(self, o: Tensor, gate: Tensor) -> Tensor:
        return o * torch.rsqrt(o.square().mean(-1, keepdim=True) + self.eps) * self.weight * torch.sigmoid(gate)


class Engine:
    """The stub of vLLM with the door open, one layer of a class, and its caches."""

    def __init__(self, door, name: str, device: str = "cpu", inputs: int = 3):
        self.door, self.name, self.device = door, name, device
        self.served = door.register()
        self.layer = draw_layer(-5.0 if name in CHECKPOINTED else None, device)
        self.pool, self.conv = draw_pool(SLOTS, device), torch.randn(SLOTS, inputs, 3 * WIDTH, device=device)
        self.before, self.past = self.pool.clone(), self.conv.mT.clone()
        self.module = self.own(*self._parts())

    def _parts(self):
        parts = SimpleNamespace(weight=self.layer.conv[:, None], bias=None)
        each = [SimpleNamespace(weight=w[:, None], bias=None) for w in self.layer.conv.split(WIDTH)]
        return parts, each

    def own(self, packed, each):
        checkpoint = importlib.import_module("vllm.model_executor.layers.mamba.checkpoint")
        cls = getattr(importlib.import_module(CLASSES[self.name]), self.name)
        return cls(
            prefix="layers.0",
            kv_cache=(self.conv, self.pool),
            conv1d=packed,
            **dict(zip(("q_conv1d", "k_conv1d", "v_conv1d"), each, strict=True)),
            A_log=self.layer.A_log.view(1, 1, -1, 1) if self.name == "Glm5NextLinearAttention" else self.layer.A_log,
            dt_bias=self.layer.dt_bias,
            gate_lower_bound=self.layer.lower_bound,
            kda_lower_bound=self.layer.lower_bound,
            o_norm=Norm(self.layer),
            use_recoverssm=False,
            _checkpoint_exporter=checkpoint.MambaPrefillCheckpointExporter(),
        )

    @property
    def normed(self) -> bool:
        return self.name.startswith("Kimi")

    def tensor(self, *values, dtype=torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def metadata(self, tokens: int, **fields):
        return importlib.import_module("vllm.v1.attention.backends.gdn_attn").GDNAttentionMetadata(tokens, **fields)

    def forward(self, x: Tokens, m) -> Tensor:
        """The core attention of a step; returns its output ``[T, HEADS, DIM]``."""
        importlib.import_module("vllm.forward_context").context.attn_metadata = {"layers.0": m}
        out = torch.full((1, len(x.g), HEADS, DIM), torch.nan, device=self.device)
        q, k, v = x.mixed.split(WIDTH, dim=-1)
        g, beta = x.g[None], x.beta[None]
        if self.name.startswith("Bailing"):
            g, beta = (y.float() for y in self.layer.transformed(*x.qkv(), x.g, x.beta)[3:])
            self.module._forward(q, k, v, g1=g, beta=beta, core_attn_out=out)
        elif self.name.startswith("Glm"):
            self.module._forward(qkv_proj_states=x.mixed, g1=g, beta=beta, core_attn_out=out)
        else:
            self.module._forward(mixed_qkv=x.mixed, g1=g, g2=x.output_gate, beta=beta, core_attn_out=out)
        return out[0]

    def truth(self, x: Tokens, slot: int, fresh: bool = False, window: int = 0):
        """Of one sequence that starts from a slot, whose window of inputs begins at ``window``."""
        keep = 0 if fresh else 1
        found = self.layer.truth(x, keep * self.before[slot], keep * self.past[slot, :, window : window + 3])
        return found._replace(o=found.normed if self.normed else found.o)


@pytest.fixture(params=CLASSES)
def engine(request, stub_engine, device):  # noqa: F811
    return Engine(stub_engine("vllm"), request.param, device)


@pytest.fixture
def drafting(request, stub_engine, device):  # noqa: F811
    """Convolution states of a model with drafts are wider."""
    return Engine(stub_engine("vllm"), request.param, device, inputs=2 + 1 + DRAFTS)


def run(device, engine: Engine, x: Tokens, m) -> Tensor:
    """:meth:`Engine.forward`, by kernels where there are any."""
    o, kernels = device.run(lambda: engine.forward(x, m))
    assert bool(kernels) == device.runs_kernels
    return o


def close(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found.double(), truth, **CLOSE)


def test_classes_are_replaced_when_they_are_imported(engine):
    assert engine.served == tuple(CLASSES)
    assert type(engine.module).__name__ == f"KdaCuda{engine.name}" and type(engine.module)._forward.breaks
    assert engine.door.register() == engine.served  # a second one changes nothing


def test_prompts(engine, device):
    """One that goes on, one that is new, an empty one, padding with the null slot, and tokens of nobody."""
    x, slots = draw_tokens(80, device), [3, 1, 5, 0]
    bounds, begun = [0, 70, 75, 75, 75], [True, False, True, False]
    m = engine.metadata(
        75,
        num_prefills=2,
        num_prefill_tokens=75,
        has_initial_state=engine.tensor(*begun, dtype=torch.bool),
        non_spec_query_start_loc=engine.tensor(*bounds),
        non_spec_state_indices_tensor=engine.tensor(*slots),
    )
    o = run(device, engine, x, m)
    first, second = engine.truth(x.at(slice(0, 70)), 3), engine.truth(x.at(slice(70, 75)), 1, fresh=True)
    close(o[:75], torch.cat((first.o, second.o)))
    assert_only_written(engine.pool, engine.before, {3: first.states[-1], 1: second.states[-1]})
    close(engine.conv.mT[3], first.inputs[:, -3:])
    assert engine.module.own_calls == 0 and engine.door.report() == {"served": {"prefill": 1}, "declined": {}}


def test_single_tokens(engine, device):
    """The whole layer in one call where its norm belongs to the core attention; a null slot; tokens of nobody."""
    x, slots = draw_tokens(5, device), [4, 0, 2, 9]
    m = engine.metadata(
        4,
        num_decodes=4,
        num_decode_tokens=4,
        non_spec_query_start_loc=engine.tensor(0, 1, 2, 3, 4),
        non_spec_state_indices_tensor=engine.tensor(*slots, 0, 0),
    )
    o = run(device, engine, x, m)
    truths = {slot: engine.truth(x.at([n]), slot) for n, slot in enumerate(slots) if slot}
    for n, slot in enumerate(slots):
        close(o[n], truths[slot].o[0] if slot else torch.zeros_like(o[n], dtype=torch.float64))
    assert_only_written(engine.pool, engine.before, {slot: truth.states[-1] for slot, truth in truths.items()})
    close(engine.conv.mT[4], truths[4].inputs[:, -3:])
    assert engine.door.report()["served"] == {"decode_layer" if engine.normed else "decode": 1}


@pytest.mark.parametrize("drafting", CLASSES, indirect=True)
@pytest.mark.parametrize("where", ["alone", "among prompts", "side by side"])
def test_drafts(drafting, device, where):
    """Columns of slots; the window begins at the last accepted draft; a padded row; a prompt between them."""
    engine, columns = drafting, [[3, 4, 5, 6], [7, 8, 9, 10], [0, 0, 0, 0]]
    accepted, lengths = [1, 3, 1], [4, 2, 0]
    alone = where == "alone"
    x = draw_tokens(6 if alone else 9, device)
    drafts, prompt = [0, 1, 2, 3, 4, 5], []
    if where == "among prompts":
        drafts, prompt = [0, 1, 2, 3, 7, 8], [4, 5, 6]
    elif where == "side by side":
        drafts, prompt = [3, 4, 5, 6, 7, 8], [0, 1, 2]
    m = engine.metadata(
        len(x.g),
        num_spec_decodes=3,
        num_spec_decode_tokens=6,
        spec_query_start_loc=engine.tensor(0, 4, 6, 6, 6),
        spec_state_indices_tensor=engine.tensor(*columns),
        num_accepted_tokens=engine.tensor(*accepted, 1),
    )
    if prompt:
        m.num_prefills, m.num_prefill_tokens = 1, 3
        m.has_initial_state = engine.tensor(False, dtype=torch.bool)
        m.non_spec_query_start_loc, m.non_spec_state_indices_tensor = engine.tensor(0, 3), engine.tensor(12)
    if where == "among prompts":
        m.spec_token_indx, m.non_spec_token_indx = (engine.tensor(*x, dtype=torch.int64) for x in (drafts, prompt))
    elif where == "side by side":  # only in the metadata of Kimi K3
        m.spec_token_start, m.non_spec_token_start = 3, 0
    o = run(device, engine, x, m)
    written, end = {}, 0
    for row, count, length in zip(columns, accepted, lengths, strict=True):
        own, end = drafts[end : end + length], end + length
        if length:
            found = engine.layer.truth(
                x.at(own), engine.before[row[count - 1]], engine.past[row[0], :, count - 1 : count + 2]
            )
            close(o[own], found.normed if engine.normed else found.o)
            written |= dict(zip(row, found.states[1:], strict=False))
            close(engine.conv.mT[row[0], :, : 2 + length], found.inputs[:, 1:])
    if prompt:
        found = engine.truth(x.at(prompt), 12, fresh=True)
        close(o[prompt], found.o)
        written[12] = found.states[-1]
    assert_only_written(engine.pool, engine.before, written)
    assert engine.door.report()["served"] == {"verify": 1} | ({"prefill": 1} if prompt else {})


@pytest.mark.parametrize("drafting", ["KimiGatedDeltaNetAttention"], indirect=True)
def test_single_tokens_of_a_model_with_drafts(drafting, device):
    x = draw_tokens(1, device)
    m = drafting.metadata(1, num_decodes=1, num_decode_tokens=1, non_spec_state_indices_tensor=drafting.tensor(4))
    o, found = run(device, drafting, x, m), drafting.truth(x, 4)
    close(o, found.o)
    assert_only_written(drafting.pool, drafting.before, {4: found.states[-1]})
    assert drafting.door.report()["served"] == {"decode": 1}  # decode_layer has no place for the inputs of drafts


def checkpointed(engine, offsets: list[int], lengths: list[int]):
    metadata = importlib.import_module("vllm.model_executor.layers.mamba.checkpoint").MambaPrefillCheckpointMetadata
    kept = metadata(engine.tensor(*offsets), engine.tensor(8, 0), offsets)
    bounds = engine.tensor(0, lengths[0], sum(lengths))
    return engine.metadata(
        sum(lengths),
        num_prefills=2,
        num_prefill_tokens=sum(lengths),
        checkpoint=kept,
        has_initial_state=engine.tensor(True, True, dtype=torch.bool),
        non_spec_query_start_loc=bounds,
        non_spec_state_indices_tensor=engine.tensor(3, 1),
    )


@pytest.mark.parametrize("engine", CHECKPOINTED, indirect=True)
def test_prefix_checkpoints(engine, device):
    x = draw_tokens(142, device)
    o = run(device, engine, x, checkpointed(engine, [128, 0], [132, 10]))
    first, second = engine.truth(x.at(slice(0, 132)), 3), engine.truth(x.at(slice(132, 142)), 1)
    close(o, torch.cat((first.o, second.o)))
    written = {3: first.states[-1], 8: first.states[128], 1: second.states[-1]}
    assert_only_written(engine.pool, engine.before, written)
    close(engine.conv.mT[8], first.inputs[:, 128:131])


def untouched(engine) -> bool:
    return torch.equal(engine.pool, engine.before) and torch.equal(engine.conv.mT, engine.past)


def decoding(engine):
    return engine.metadata(1, num_decodes=1, num_decode_tokens=1, non_spec_state_indices_tensor=engine.tensor(4))


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("engine", ["KimiK3DeltaAttention"], indirect=True)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e: setattr(e.module, "use_recoverssm", True), "use_recoverssm is on"),
        (lambda e: setattr(e.module.conv1d, "bias", e.layer.norm), "a convolution has a bias, expected none"),
        (lambda e: setattr(e.module, "kv_cache", (e.conv, e.pool[..., :8])), "state has shape [14, 2, 32, 8]"),
        (lambda e: setattr(e.module, "A_log", e.layer.A_log[:1]), "A_log has shape [1]"),
        (lambda e: delattr(e.module, "conv1d") or delattr(type(e.module).__base__, "conv1d"), "no attribute 'conv1d'"),
    ],
)
def test_what_vllm_serves_itself(engine, change, reason, caplog):
    change(engine)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            engine.forward(draw_tokens(1), decoding(engine))
    (said,) = (entry for entry in engine.door.report()["declined"] if reason in entry)
    assert said.startswith("KimiK3DeltaAttention: ") and engine.door.report()["declined"][said] == 2
    assert sum(reason in x.getMessage() for x in caplog.records) == 1  # said once
    assert engine.module.own_calls == 2 and untouched(engine)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("engine", ["Glm5NextLinearAttention"], indirect=True)
def test_a_checkpoint_between_chunks_is_vllms(engine):
    engine.forward(draw_tokens(142), checkpointed(engine, [80, 0], [132, 10]))
    reason = "a prefix checkpoint is after token 80, expected a multiple of 64"
    assert engine.door.report()["declined"] == {f"Glm5NextLinearAttention: {reason}": 1}
    assert engine.module.own_calls == 1 and untouched(engine)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("engine", ["KimiGatedDeltaNetAttention"], indirect=True)
def test_no_metadata_and_a_closed_door(engine):
    engine.forward(draw_tokens(1), None)  # a dummy run of vLLM
    engine.door.unregister()
    engine.forward(draw_tokens(1), decoding(engine))
    assert engine.module.own_calls == 2 and untouched(engine)
    engine.door.register()
    engine.forward(draw_tokens(1), decoding(engine))
    assert engine.module.own_calls == 2 and not untouched(engine)


def test_another_plugin_was_first(stub_engine):  # noqa: F811
    door, name = stub_engine("vllm"), "KimiGatedDeltaNetAttention"
    importlib.import_module("vllm.model_executor.custom_op").op_registry_oot[name] = other = type("Other", (), {})
    door.register()
    importlib.import_module(CLASSES[name])
    assert door.report()["declined"] == {f"{name}: another plugin replaces this class, expected none": 1}
    assert importlib.import_module("vllm.model_executor.custom_op").op_registry_oot == {name: other}
