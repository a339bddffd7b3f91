"""What the doors rely on in the serving engines: names of modules, functions, parameters and attributes.

Recorded from the wheels of vLLM 0.33.0 and SGLang 0.5.23. :func:`differences` compares them with an engine's sources,
which it reads and does not import.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["SGLANG", "VLLM", "VLLM_LAYERS", "Attributes", "Called", "Overridden", "differences"]


class Called(NamedTuple):
    """A function that a door calls: it has these parameters, and every other one has a default."""

    parameters: tuple[str, ...]


class Overridden(NamedTuple):
    """A function that a door replaces: it has these parameters and no others."""

    parameters: tuple[str, ...]


class Attributes(NamedTuple):
    """A class whose instances have these attributes."""

    names: tuple[str, ...]


Signatures = dict[str, dict[str, Called | Overridden | Attributes]]  # by module and qualified name

_MAMBA = "vllm.model_executor.layers.mamba"
_CONV = ("x", "weight", "bias", "activation")
VLLM: Signatures = {
    "vllm.model_executor.custom_op": {"PluggableLayer.register_oot": Called(("cls", "_decorated_layer_cls", "name"))},
    "vllm.compilation.breakable_cudagraph": {"eager_break_during_capture": Called(("fn",))},
    "vllm.forward_context": {"get_forward_context": Called(())},
    f"{_MAMBA}.mamba_utils": {"is_conv_state_dim_first": Called(())},
    f"{_MAMBA}.ops.causal_conv1d": {
        "causal_conv1d_fn": Called(
            (*_CONV, "conv_states", "has_initial_state", "cache_indices", "query_start_loc", "metadata")
        ),
        "causal_conv1d_update": Called(
            (
                *_CONV,
                "conv_state",
                "conv_state_indices",
                "num_accepted_tokens",
                "query_start_loc",
                "max_query_len",
                "validate_data",
                "out",
            )
        ),
    },
    f"{_MAMBA}.checkpoint": {
        "MambaPrefillCheckpointMetadata": Attributes(("checkpoint_offsets", "state_indices", "offsets")),
        "MambaPrefillCheckpointExporter.export": Called(("self", "checkpoint", "raw_qkv", "conv_state", "cu_seqlens")),
    },
    "vllm.v1.attention.backends.gdn_attn": {
        "GDNAttentionMetadata": Attributes(
            (
                "num_prefills",
                "num_decodes",
                "num_spec_decodes",
                "num_actual_tokens",
                "checkpoint",
                "has_initial_state",
                "spec_query_start_loc",
                "non_spec_query_start_loc",
                "spec_state_indices_tensor",
                "non_spec_state_indices_tensor",
                "spec_token_indx",
                "non_spec_token_indx",
                "num_accepted_tokens",
            )
        ),
    },
}

_NORMED = Overridden(("self", "mixed_qkv", "g1", "g2", "beta", "core_attn_out"))
_THREE_CONVS = ("q_conv1d", "k_conv1d", "v_conv1d")
VLLM_LAYERS: Signatures = {
    f"{_MAMBA}.gdn.kimi_gdn_linear_attn": {
        "KimiGatedDeltaNetAttention._forward": _NORMED,
        "KimiGatedDeltaNetAttention": Attributes(("conv1d", "A_log", "dt_bias", "gate_lower_bound", "o_norm")),
    },
    "vllm.models.kimi_k3.nvidia.kda": {
        "KimiK3DeltaAttention._forward": _NORMED,
        "KimiK3DeltaAttention": Attributes(
            ("conv1d", "A_log", "dt_bias", "gate_lower_bound", "o_norm", "use_recoverssm", "_checkpoint_exporter")
        ),
    },
    "vllm.models.glm5next.common.kda": {
        "Glm5NextLinearAttention._forward": Overridden(("self", "qkv_proj_states", "g1", "beta", "core_attn_out")),
        "Glm5NextLinearAttention": Attributes(
            (*_THREE_CONVS, "A_log", "dt_bias", "kda_lower_bound", "_checkpoint_exporter")
        ),
    },
    "vllm.model_executor.models.bailing_moe_v3": {
        "BailingMoeV3KimiDeltaAttention._forward": Overridden(
            ("self", "q_proj_states", "k_proj_states", "v_proj_states", "g1", "beta", "core_attn_out")
        ),
        "BailingMoeV3KimiDeltaAttention": Attributes(_THREE_CONVS),
    },
}

_STREAMS = ("q", "k", "v", "a", "b")
_POOL = ("ssm_states", "cache_indices", "query_start_loc")
_LINEAR = "sglang.srt.layers.attention.linear"
_TRITON = "TritonKDAKernel"
SGLANG: Signatures = {
    "sglang.srt.plugins.hook_registry": {
        "HookRegistry.register": Called(("cls", "target", "hook", "hook_type")),
        "HookType": Attributes(("AFTER",)),
    },
    f"{_LINEAR}.kda_backend": {
        "KDAKernelDispatcher.__init__": Called(("self", "decode_backend", "prefill_backend", "verify_backend")),
        "KDAKernelDispatcher": Attributes(("decode_kernel", "extend_kernel", "verify_kernel")),
    },
    f"{_LINEAR}.kernels.kda_triton": {
        _TRITON: Attributes(("supports_packed_decode", "supports_fused_chain_verify", "supports_track_state_snapshot")),
        f"{_TRITON}.decode": Overridden(("self", *_STREAMS, "A_log", "dt_bias", *_POOL, "lower_bound", "kwargs")),
        f"{_TRITON}.packed_decode": Overridden(
            (
                "self",
                "mixed_qkv",
                "a",
                "b",
                "A_log",
                "dt_bias",
                "scale",
                "ssm_states",
                "cache_indices",
                "num_v_heads",
                "head_v_dim",
                "lower_bound",
                "kwargs",
            )
        ),
        f"{_TRITON}.extend": Overridden(
            (
                "self",
                "q",
                "k",
                "v",
                "g",
                "beta",
                *_POOL,
                "A_log",
                "dt_bias",
                "lower_bound",
                "beta_is_raw",
                "return_intermediate_states",
                "kwargs",
            )
        ),
        f"{_TRITON}.target_verify": Overridden(
            (
                "self",
                "A_log",
                "dt_bias",
                *_STREAMS,
                *_POOL,
                "intermediate_states_buffer",
                "intermediate_state_indices",
                "cache_steps",
                "retrieve_parent_token",
                "lower_bound",
                "cache_ring",
                "replayssm_rawv",
                "replayssm_rawk",
                "replayssm_g",
                "replayssm_beta",
                "kwargs",
            )
        ),
    },
}


def differences(signatures: Signatures, folder: Path) -> list[str]:
    """How the sources under ``folder``, which holds the engine's package, differ from what is recorded.

    Each difference is a sentence that names module and function. Empty: none.
    """
    return [said for module, names in signatures.items() for said in _of_module(module, names, folder)]


def _of_module(module: str, names: dict, folder: Path) -> Iterator[str]:
    base = folder.joinpath(*module.split("."))
    path = next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)
    if path is None:
        yield f"{module}: there is no such module"
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name, wanted in names.items():
        node = _definition(tree, name.split("."))
        if node is None:
            yield f"{module}: there is no {name}"
        elif isinstance(wanted, Attributes):
            if missing := [x for x in wanted.names if x not in _attributes(node)]:
                yield f"{module}: {name} has no {', '.join(missing)}"
        else:
            yield from (f"{module}: {name} {said}" for said in _parameters_differ(wanted, node.args))


def _definition(node: ast.AST, names: list[str]) -> ast.AST | None:
    """The class or function of this qualified name, in the order in which Python would leave it: the last one."""
    for name in names:
        kinds = (ast.ClassDef, ast.FunctionDef)
        node = next((x for x in reversed(node.body) if isinstance(x, kinds) and x.name == name), None)
        if node is None:
            return None
    return node


def _attributes(node: ast.AST) -> set[str]:
    """Names that a class or its methods on ``self`` assign or annotate."""
    found = set()
    for x in ast.walk(node):
        if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Store) and getattr(x.value, "id", "") == "self":
            found.add(x.attr)
        elif isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store):
            found.add(x.id)
    return found


def _parameters_differ(wanted: Called | Overridden, found: ast.arguments) -> Iterator[str]:
    plain = [x.arg for x in (*found.posonlyargs, *found.args)]
    keywords = [x.arg for x in found.kwonlyargs]
    names = [*plain, *keywords, *(x.arg for x in (found.vararg, found.kwarg) if x)]
    if missing := [x for x in wanted.parameters if x not in names]:
        yield f"has no parameter {', '.join(missing)}"
    given = {x for x, default in zip(keywords, found.kw_defaults, strict=True) if default is not None}
    given |= set(plain[len(plain) - len(found.defaults) :]) | ({found.kwarg.arg} if found.kwarg else set())
    free = given if isinstance(wanted, Called) else set()
    if added := [x for x in names if x not in wanted.parameters and x not in free]:
        yield f"has also {', '.join(added)}"
