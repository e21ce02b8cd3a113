"""The configuration of a model: what the checkpoint says.  SPEC CONF-1 to CONF-4.

Fields have the names of the published config.json.  A field without a default must be there; the others are
those that some published config leaves out.  What this package does not need is kept and written back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from os import PathLike
from typing import Any

from refimpl.config.checks import FIXED, check_combinations, check_ignored, check_quantization
from refimpl.config.jsonfile import read_object
from refimpl.config.rope import YarnScaling, read_rope
from refimpl.config.rules import integer, one_of, optional, real, ruled, settle, show, truth
from refimpl.errors import Invalid, Missing

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2")

# What an absent field means depends on the family, as in transformers' DeepseekV2Config and DeepseekV3Config.
_V2 = {"scoring_func": "softmax", "topk_method": "greedy"}
_V3 = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
FAMILY_DEFAULTS = {name: _V2 if name == "deepseek_v2" else _V3 for name in MODEL_TYPES}

# Fields that say nothing about the function: kept, never read.
IGNORED = frozenset(FIXED) | {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "aux_loss_alpha",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "ep_size",
    "head_dim",
    "initializer_range",
    "num_key_value_heads",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "qk_head_dim",
    "seq_aux",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}

_SIZE = integer()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A validated configuration.  Two are equal when they describe the same model.

    Raises Invalid or Unsupported when a field breaks its rule or fields do not fit together.
    """

    model_type: str = ruled(one_of(*MODEL_TYPES), "family")
    vocab_size: int = ruled(_SIZE, "V, tokens of the vocabulary")
    hidden_size: int = ruled(_SIZE, "D, width of the residual stream")
    num_hidden_layers: int = ruled(integer(high=1024), "decoder layers, MTP modules not counted")
    first_k_dense_replace: int = ruled(integer(low=0), "layers before this index have a dense MLP")
    moe_layer_freq: int = ruled(_SIZE, "every how manieth later layer has experts", default=1)
    intermediate_size: int = ruled(_SIZE, "width of a dense MLP")
    moe_intermediate_size: int = ruled(_SIZE, "I, width of an expert")
    n_routed_experts: int = ruled(integer(high=4096), "N, routed experts of a layer")
    n_shared_experts: int = ruled(integer(low=0, high=4096), "shared experts, fused to one MLP; null is 0")
    num_experts_per_tok: int = ruled(_SIZE, "K, routed experts chosen for a token")
    n_group: int | None = ruled(optional(_SIZE), "G, groups of experts; null without groups", default=None)
    topk_group: int | None = ruled(optional(_SIZE), "groups that are kept; null without groups", default=None)
    scoring_func: str = ruled(one_of("sigmoid", "softmax"), "from router logits to scores")
    topk_method: str = ruled(one_of("noaux_tc", "group_limited_greedy", "greedy"), "how experts are chosen")
    norm_topk_prob: bool = ruled(truth(), "whether chosen scores are normalised to sum 1")
    routed_scaling_factor: float = ruled(real(), "factor of the routing weights")
    num_attention_heads: int = ruled(_SIZE, "H, attention heads")
    q_lora_rank: int | None = ruled(optional(_SIZE), "width of the query latent; null or 0 without one")
    kv_lora_rank: int = ruled(_SIZE, "C, width of the key and value latent")
    qk_nope_head_dim: int = ruled(_SIZE, "width of a head's part without positions")
    qk_rope_head_dim: int = ruled(_SIZE, "R, width of a head's rotated part; even")
    v_head_dim: int = ruled(_SIZE, "width of a head's value")
    rms_norm_eps: float = ruled(real(), "epsilon of RMSNorm")
    rope_theta: float = ruled(real(1.0), "base of the rotary frequencies")
    rope_scaling: YarnScaling | None = field(default=None)
    rope_interleave: bool = ruled(truth(), "whether rotated pairs are neighbours", default=True)
    max_position_embeddings: int = ruled(_SIZE, "longest sequence that the model is meant for")
    num_nextn_predict_layers: int = ruled(integer(low=0, high=64), "MTP modules", default=0)
    tie_word_embeddings: bool = ruled(truth(), "whether the head is the embedding", default=False)
    index_n_heads: int | None = ruled(optional(_SIZE), "V3.2: heads of the indexer", default=None)
    index_head_dim: int | None = ruled(optional(_SIZE), "V3.2: width of an indexer head", default=None)
    index_topk: int | None = ruled(optional(_SIZE), "V3.2: keys that the indexer selects", default=None)
    quantization_config: Mapping[str, Any] | None = field(default=None, hash=False)
    ignored: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    unknown: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.n_shared_experts is None:
            object.__setattr__(self, "n_shared_experts", 0)
        if self.q_lora_rank == 0 and not isinstance(self.q_lora_rank, bool):
            object.__setattr__(self, "q_lora_rank", None)
        settle(self, "config field")
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, YarnScaling):
            raise Invalid(
                f"config field rope_scaling is {show(self.rope_scaling)}, but it must be YarnScaling or None."
            )
        quantization = self.quantization_config
        if quantization is not None:
            check_quantization(quantization)
        check_combinations(self)
        check_ignored(self)

    # What layers ask for.

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the part without positions, then the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def groups(self) -> int:
        """G, groups of experts that selection looks at: 1 when it is not limited to groups."""
        return 1 if self.topk_method == "greedy" or self.n_group is None else self.n_group

    @property
    def kept_groups(self) -> int:
        """Groups that are kept: 1 when selection is not limited to groups."""
        return 1 if self.topk_method == "greedy" or self.topk_group is None else self.topk_group

    @property
    def experts_per_group(self) -> int:
        return self.n_routed_experts // self.groups

    @property
    def has_selection_bias(self) -> bool:
        """Whether the gate has `e_score_correction_bias`, which moves the choice and not the weights."""
        return self.topk_method == "noaux_tc"

    @property
    def has_indexer(self) -> bool:
        """Whether attention is V3.2's sparse attention; its config is read, not yet computed."""
        return self.model_type == "deepseek_v32"

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared experts' one MLP; 0 without."""
        return self.n_shared_experts * self.moe_intermediate_size

    @property
    def fp8_block(self) -> tuple[int, int] | None:
        """Rows and columns of a block of FP8 weights with one scale; None when weights are not FP8."""
        quantization = self.quantization_config or {}
        if quantization.get("quant_method") != "fp8":
            return None
        rows, columns = quantization.get("weight_block_size", (128, 128))
        return rows, columns

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` has experts; MTP modules (from num_hidden_layers on) do."""
        if layer >= self.num_hidden_layers:
            return True
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    # In and out.

    @classmethod
    def from_json(cls, path: str | PathLike[str]) -> ModelConfig:
        """Read a published config.json.  Raises as `from_dict`, and Unreadable."""
        return cls.from_dict(read_object(path))

    @classmethod
    def from_dict(cls, published: Mapping[str, Any]) -> ModelConfig:
        """From the published fields, rope in the hub's form or in that of transformers 5.

        Raises Missing (a required field), Invalid (a rule of every implementation), Unsupported.
        """
        if not isinstance(published, Mapping):
            raise Invalid(
                f"the config is a {type(published).__name__}, but it must be an object of named fields."
            )
        given = copy.deepcopy(dict(published))
        family = given.get("model_type")
        if family is None:
            raise Missing(
                f"config field model_type is missing, but it must be {one_of(*MODEL_TYPES).required}."
            )
        one_of(*MODEL_TYPES).settle("config field model_type", family)
        theta, scaling = read_rope(given)
        values: dict[str, Any] = {**FAMILY_DEFAULTS[family], "rope_scaling": scaling}
        if theta is not None:
            values["rope_theta"] = theta
        if "num_mtp_layers" in given:  # what transformers 5 calls it inside
            given.setdefault("num_nextn_predict_layers", given.pop("num_mtp_layers"))
        names = {item.name for item in fields(cls)} - {"ignored", "unknown"}
        values |= {name: value for name, value in given.items() if name in names and name not in values}
        for name in FAMILY_DEFAULTS[family]:
            if given.get(name) is not None:
                values[name] = given[name]
        for item in fields(cls):
            if item.default is MISSING and item.default_factory is MISSING and item.name not in values:
                raise Missing(
                    f"config field {item.name} is missing, but it must be {item.metadata['rule'].required}."
                )
            if values.get(item.name, item) is None and item.name in _NULL_IS_DEFAULT:
                del values[item.name]
        values["ignored"] = {name: given[name] for name in given if name in IGNORED}
        rest = given.keys() - names - IGNORED - {"rope_parameters"}
        values["unknown"] = {name: given[name] for name in given if name in rest}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The published (hub) form: what `from_dict` reads back as the same; kept fields are written back."""
        always = {
            "hidden_act": "silu",
            "attention_bias": False,
            "num_key_value_heads": self.num_attention_heads,
        }
        written: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            optional_field = item.default is not MISSING and item.name not in _ALWAYS_WRITTEN
            if item.name in ("ignored", "unknown") or (optional_field and value == item.default):
                continue
            written[item.name] = value.to_dict() if isinstance(value, YarnScaling) else copy.deepcopy(value)
        return written | always | copy.deepcopy(dict(self.ignored)) | copy.deepcopy(dict(self.unknown))


_NULL_IS_DEFAULT = ("moe_layer_freq", "rope_interleave", "num_nextn_predict_layers", "tie_word_embeddings")
# Written at their defaults too: sources read their absence differently.
_ALWAYS_WRITTEN = (
    "moe_layer_freq",
    "n_group",
    "topk_group",
    "rope_scaling",
    "num_nextn_predict_layers",
    "tie_word_embeddings",
)
