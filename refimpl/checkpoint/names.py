"""Every name of a published checkpoint, with its shape and what it is.  SPEC CKPT-4.

Names are those of the hub: `model.layers.3.self_attn.q_a_proj.weight`.  MTP module k is layer
`num_hidden_layers + k`.  Its copies of the embedding and of the head are aliases: one parameter, whose
gradients add.  A linear's weight is (out, in).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from refimpl.config.model import ModelConfig

EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
NORM: Final = "model.norm.weight"
BIAS: Final = "mlp.gate.e_score_correction_bias"

_IGNORED: Final = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.(inv_freq|cos_cached|sin_cached)")


@dataclass(frozen=True)
class ParameterSpec:
    """What a name is.

    kind    param (learned), buffer (the selection bias: float32, no gradient), scale (of FP8 blocks)
    role    embedding, gain, linear, router, bias, shift, scale: which rule makes its virtual values
    layer   decoder layer, or None for the embedding, the last norm and the head
    """

    shape: tuple[int, ...]
    kind: str
    role: str
    layer: int | None = None
    mtp: bool = False


@lru_cache(maxsize=16)
def parameters(config: ModelConfig) -> Mapping[str, ParameterSpec]:
    """Every name that holds values of its own, in the order of the computation; aliases are left out.

    Scales are there when the config declares FP8 blocks; a checkpoint needs one only where its weight is FP8.
    """
    specs = {EMBEDDING: ParameterSpec((config.vocab_size, config.hidden_size), "param", "embedding")}
    for layer in range(config.num_hidden_layers):
        specs |= _layer(config, layer)
    specs[NORM] = ParameterSpec((config.hidden_size,), "param", "gain")
    if not config.tie_word_embeddings:
        specs[HEAD] = ParameterSpec((config.vocab_size, config.hidden_size), "param", "linear")
    for layer in mtp_layers(config):
        specs |= _layer(config, layer)
    return MappingProxyType(specs)


@lru_cache(maxsize=16)
def aliases(config: ModelConfig) -> Mapping[str, str]:
    """Names in a checkpoint that stand for a parameter with another name."""
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    found = {HEAD: head} if config.tie_word_embeddings else {}
    for layer in mtp_layers(config):
        found[f"model.layers.{layer}.embed_tokens.weight"] = EMBEDDING
        found[f"model.layers.{layer}.shared_head.head.weight"] = head
    return MappingProxyType(found)


def trainable(config: ModelConfig) -> Mapping[str, ParameterSpec]:
    """The learned parameters of the main model: no selection biases, no scales, no MTP modules."""
    found = {name: spec for name, spec in parameters(config).items() if spec.kind == "param" and not spec.mtp}
    return MappingProxyType(found)


def mtp_layers(config: ModelConfig) -> range:
    """The layer numbers of the MTP modules."""
    return range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)


def known_and_ignored(name: str) -> bool:
    """Whether a name is what some published checkpoints have and nobody needs (rotary tables)."""
    return _IGNORED.fullmatch(name) is not None


def _layer(c: ModelConfig, layer: int) -> dict[str, ParameterSpec]:
    mtp = layer >= c.num_hidden_layers
    parts = [*(_mtp(c) if mtp else ()), *_attention(c), *(_moe(c) if c.is_moe_layer(layer) else _dense(c))]
    specs = {}
    for leaf, role, shape in parts:
        name = f"model.layers.{layer}.{leaf}"
        specs[name] = ParameterSpec(shape, "buffer" if role == "bias" else "param", role, layer, mtp)
        if role == "linear" and c.fp8_block is not None and not leaf.startswith("eh_proj"):
            rows, columns = c.fp8_block
            blocks = (-(-shape[0] // rows), -(-shape[1] // columns))
            specs[f"{name}_scale_inv"] = ParameterSpec(blocks, "scale", "scale", layer, mtp)
    return specs


_Part = tuple[str, str, tuple[int, ...]]  # leaf name, role, shape


def _mtp(c: ModelConfig) -> Iterator[_Part]:
    yield "enorm.weight", "gain", (c.hidden_size,)
    yield "hnorm.weight", "gain", (c.hidden_size,)
    yield "eh_proj.weight", "linear", (c.hidden_size, 2 * c.hidden_size)
    yield "shared_head.norm.weight", "gain", (c.hidden_size,)


def _attention(c: ModelConfig) -> Iterator[_Part]:
    heads, hidden, latent = c.num_attention_heads, c.hidden_size, c.kv_lora_rank
    query = heads * c.qk_head_dim
    yield "input_layernorm.weight", "gain", (hidden,)
    if c.q_lora_rank is None:
        yield "self_attn.q_proj.weight", "linear", (query, hidden)
    else:
        yield "self_attn.q_a_proj.weight", "linear", (c.q_lora_rank, hidden)
        yield "self_attn.q_a_layernorm.weight", "gain", (c.q_lora_rank,)
        yield "self_attn.q_b_proj.weight", "linear", (query, c.q_lora_rank)
    yield "self_attn.kv_a_proj_with_mqa.weight", "linear", (latent + c.qk_rope_head_dim, hidden)
    yield "self_attn.kv_a_layernorm.weight", "gain", (latent,)
    yield "self_attn.kv_b_proj.weight", "linear", (heads * (c.qk_nope_head_dim + c.v_head_dim), latent)
    yield "self_attn.o_proj.weight", "linear", (hidden, heads * c.v_head_dim)
    if c.has_indexer:
        yield from _indexer(c)
    yield "post_attention_layernorm.weight", "gain", (hidden,)


def _indexer(c: ModelConfig) -> Iterator[_Part]:
    assert c.index_n_heads is not None  # the config checked it
    assert c.index_head_dim is not None
    heads, width = c.index_n_heads, c.index_head_dim
    latent = c.hidden_size if c.q_lora_rank is None else c.q_lora_rank
    yield "self_attn.indexer.wq_b.weight", "linear", (heads * width, latent)
    yield "self_attn.indexer.wk.weight", "linear", (width, c.hidden_size)
    yield "self_attn.indexer.k_norm.weight", "gain", (width,)
    yield "self_attn.indexer.k_norm.bias", "shift", (width,)
    yield "self_attn.indexer.weights_proj.weight", "router", (heads, c.hidden_size)


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[_Part]:
    yield f"{prefix}.gate_proj.weight", "linear", (width, hidden)
    yield f"{prefix}.up_proj.weight", "linear", (width, hidden)
    yield f"{prefix}.down_proj.weight", "linear", (hidden, width)


def _dense(c: ModelConfig) -> Iterator[_Part]:
    yield from _mlp("mlp", c.hidden_size, c.intermediate_size)


def _moe(c: ModelConfig) -> Iterator[_Part]:
    yield "mlp.gate.weight", "router", (c.n_routed_experts, c.hidden_size)
    if c.has_selection_bias:
        yield BIAS, "bias", (c.n_routed_experts,)
    for expert in range(c.n_routed_experts):
        yield from _mlp(f"mlp.experts.{expert}", c.hidden_size, c.moe_intermediate_size)
    if c.n_shared_experts:
        yield from _mlp("mlp.shared_experts", c.hidden_size, c.shared_intermediate_size)
