"""What DeepSeek's inference code is to an adapter: its source, its arguments, its names.  SPEC CHOICE-2.

`source` imports `inference/model.py` of a checkout beside a stub of its Triton kernels, `arguments` gives its
ModelArgs for a case, and `expressible` says which cases these cannot describe.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from refimpl.config.choices import Choices
from refimpl.config.model import ModelConfig
from refimpl.errors import Missing, Unreadable
from refimpl.layers import rope
from refimpl.validate.given import NotForMe, PortCase
from refimpl.validate.ports.agreement import LATENT, ROTARY, demand, routes
from refimpl.validate.ports.trial import BIAS, Trial

CHECKOUT: Final = "REFIMPL_DEEPSEEK_V3"  # the environment variable that names a checkout
SOURCE: Final = Path("inference", "model.py")
EPSILON: Final = 1e-6  # of every norm, whatever the configuration says
_MODULE: Final = "refimpl_deepseek_v3_inference_model"

OURS: Final[Mapping[str, str]] = {  # as its convert.py has them
    "embed": "model.embed_tokens",
    "layers": "model.layers",
    "head": "lm_head",
    "attn": "self_attn",
    "ffn": "mlp",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "wq": "q_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "bias": BIAS,
}


def source(checkout: str) -> ModuleType:
    """Its model.py, imported beside a stub of its kernels.  Raises Missing, Unreadable."""
    if not checkout:
        raise Missing(
            f"no checkout of deepseek-ai/DeepSeek-V3 is named, but --checkout or {CHECKOUT} must name one."
        )
    path = Path(checkout).resolve() / SOURCE
    known = sys.modules.get(_MODULE)
    if known is not None and known.__file__ == str(path):
        return known
    if not path.is_file():
        raise Unreadable(f"{path} is not there, but a checkout of deepseek-ai/DeepSeek-V3 has it.")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    before = sys.modules.get("kernel")
    sys.modules["kernel"] = _kernels()
    try:
        spec.loader.exec_module(code)
    except ImportError as error:
        raise Missing(
            f"{path} cannot be imported ({error}), but this port runs it; the extra refimpl[crosscheck] has "
            "what it needs."
        ) from None
    finally:
        if before is None:
            del sys.modules["kernel"]
        else:
            sys.modules["kernel"] = before
    sys.modules[_MODULE] = code
    return code


def _kernels() -> ModuleType:
    """What stands in for the Triton kernels, which need a GPU and FP8 weights."""

    def absent(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("a Triton kernel was called, which the CPU does not have")

    stub = ModuleType("kernel")
    for name in ("act_quant", "weight_dequant", "fp8_gemm"):
        setattr(stub, name, absent)
    return stub


def ours(name: str) -> str:
    """Its dotted name of a module or weight in ours."""
    parts = [OURS.get(part, part) for part in name.split(".")]
    return "model.norm" + name.removeprefix("norm") if parts[0] == "norm" else ".".join(parts)


def below(path: str, name: str) -> str:
    """A name below a path, either of which may be empty."""
    return f"{path}.{name}" if path and name else path or name


def expressible(case: PortCase, config: ModelConfig) -> None:
    """Raises NotForMe for forms that its code has no argument for."""
    demand(case, config, _choices(config, Choices.from_dict(case.choices)), "DeepSeek's code")
    scales = rope.cos_sin_factor(config, Choices.from_dict(case.choices)) != 1.0
    if case.component in ROTARY and scales:
        raise NotForMe("DeepSeek's code has one mscale, which never scales cos and sin")
    if case.component in ROTARY - {"rope_tables", "attention"} and not config.rope_interleave:
        raise NotForMe("DeepSeek's code rotates neighbours only")
    if case.component in ("block", "model", "head_loss") and config.rms_norm_eps != EPSILON:
        raise NotForMe(f"DeepSeek's code has the epsilon {EPSILON} in every norm")
    if case.component in LATENT and config.has_indexer:
        raise NotForMe("DeepSeek's code for V3 has no sparse attention")
    if case.component == "model" and config.moe_layer_freq != 1:
        raise NotForMe("DeepSeek's code has no moe_layer_freq")
    if case.component == "model" and (config.tie_word_embeddings or config.num_nextn_predict_layers):
        raise NotForMe("DeepSeek's code has neither a tied head nor MTP modules")
    if routes(case, config):
        _gate_expressible(case, config)


def _gate_expressible(case: PortCase, config: ModelConfig) -> None:
    sigmoid = config.scoring_func == "sigmoid"
    if sigmoid and not config.norm_topk_prob:
        raise NotForMe("DeepSeek's gate always normalises under sigmoid")
    if not sigmoid and config.has_selection_bias and config.norm_topk_prob:
        raise NotForMe("DeepSeek's gate never normalises under softmax")
    if case.backward and not config.has_selection_bias and config.groups > 1:
        raise NotForMe("DeepSeek's gate overwrites the scores that autograd needs, when it has no bias")
    if case.component != "gate" and config.n_shared_experts == 0:
        raise NotForMe("DeepSeek's MoE always has shared experts")


def _choices(config: ModelConfig, wanted: Choices) -> Choices:
    """What its code does.  Whether YaRN applies follows from the longest sequence, which its user gives: it
    is taken as the case has it."""
    own = Choices.named("official").replace(yarn_mscale_zero=wanted.yarn_mscale_zero)
    return own.replace(yarn_applies=wanted.yarn_applies, max_seq_len=wanted.max_seq_len)


def arguments(code: ModuleType, trial: Trial, length: int) -> Any:
    """Its ModelArgs of the configuration, for sequences of that length.  YaRN applies when the longest
    sequence is longer than the original one, both of which are numbers that its user gives."""
    config, active = trial.config, Choices.from_dict(trial.case.choices).yarn_active(trial.config)
    yarn = config.rope_scaling
    original = yarn.original_max_position_embeddings if active and yarn is not None else length
    given: dict[str, Any] = {
        "max_batch_size": trial.extent[0],
        "max_seq_len": max(length, original + 1) if active else length,
        "original_seq_len": original,
        "vocab_size": config.vocab_size,
        "dim": config.hidden_size,
        "inter_dim": config.intermediate_size,
        "moe_inter_dim": config.moe_intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_dense_layers": config.first_k_dense_replace,
        "n_heads": config.num_attention_heads,
        "n_routed_experts": config.n_routed_experts,
        "n_shared_experts": config.n_shared_experts,
        "n_activated_experts": config.num_experts_per_tok,
        "n_expert_groups": config.groups,
        "n_limited_groups": config.kept_groups,
        "score_func": config.scoring_func,
        "route_scale": config.routed_scaling_factor,
        "q_lora_rank": config.q_lora_rank or 0,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "rope_theta": config.rope_theta,
    }
    if yarn is not None:
        given |= {"rope_factor": yarn.factor, "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow}
        given["mscale"] = yarn.mscale_all_dim or 0.0  # what its only use of it is for
    return code.ModelArgs(**given)
